"""What a run knows of itself, for the model card and run.json: nothing private, nothing that was not measured."""

import importlib.metadata
import platform
import shlex
from collections.abc import Mapping
from typing import Any, cast

from nanogpt_hub.evaluate import bits_per_byte
from nanogpt_hub.hub.card import BaseFacts, EvaluationFacts, RunFacts, TrainingFacts
from nanogpt_hub.hub.private import NOT_OTHERS, public_name
from nanogpt_hub.system import installed
from nanogpt_hub.system.readable import flatten
from nanogpt_hub.tokenizer import Tokenizer

from .config import HubConfig, TrainConfig, as_settings
from .data import Data, text_bytes
from .hardware import device_name
from .optim import OPTIMIZERS
from .report import FLOOR, UNIGRAM

LIBRARIES = ("torch", "accelerate", "tokenizers", "safetensors")


class MeasuredFacts(EvaluationFacts, total=False):
    """What run.json holds beyond what a card shows."""

    unigram_bits_per_byte: float


def lasting_facts(
    config: TrainConfig, command: str, data: Data, tokenizer: Tokenizer, base: BaseFacts | None
) -> RunFacts:
    """What is known before the first step and stays so."""
    facts: RunFacts = {
        "data": {**data.facts, "tokenizer": public_name(config.data.tokenizer) or tokenizer.kind},
        "training": {
            "hyperparameters": hyperparameters(config),
            "optimizer": OPTIMIZERS[config.optim.name],
            "seed": config.seed,
            "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in LIBRARIES},
            "command": command,
        },
    }
    facts |= given_facts(config.hub)
    if commit := installed.commit():
        facts["training"]["commit"] = commit
    if base is not None:
        facts["base_model"] = base
    return facts


def given_facts(config: HubConfig) -> RunFacts:
    """What only a person can tell, where they did."""
    facts: RunFacts = {}
    if config.license:
        facts["license"] = config.license
    if config.language:
        facts["language"] = config.language
    return facts


def hyperparameters(config: TrainConfig) -> dict:
    """The settings that the weights depend on, beside the model's shape and the data."""
    settings = as_settings(config)
    mine = {k: v for k, v in settings["optim"].items() if config.optim.name == "muon" or not k.startswith("muon")}
    dropout = {"dropout": config.model.dropout} if config.model.dropout else {}
    lora = {"lora": settings["lora"]} if config.lora.rank else {}
    return {"max_steps": config.max_steps, "batch_size": config.batch_size, **dropout, "optim": mine, **lora}


def settings_now(trainer) -> dict[str, Any]:
    """What may differ when a run goes on, by dotted name: the hyper-parameters and what changes their meaning."""
    config = trainer.config
    settings = {**hyperparameters(config), "precision": trainer.precision, "eval.max_windows": config.eval.max_windows}
    settings["data.bytes"] = text_bytes(trainer.data.facts["source"])
    settings.setdefault("dropout", 0.0 if config.model.dropout is None else config.model.dropout)
    if trainer.gpt.config.n_expert:
        settings["router_aux_loss_coef"] = trainer.gpt.config.router_aux_loss_coef
    return flat(settings)


def changes_between(state: dict, now: dict[str, Any]) -> list[dict]:
    """What is another setting from the state's step on: [{"step": 400, "name": .., "from": .., "to": ..}, ...]."""
    was = state.get("settings")
    if not isinstance(was, dict):  # a state of an earlier version does not tell
        return []
    names = [name for name in was if name in now and was[name] != now[name]]  # a later version may tell more
    return [{"step": state["step"], "name": n, "from": was[n], "to": now[n]} for n in names]


def change_line(change: dict) -> str:
    return f"from step {change['step']} on: {change['name']} {change['to']} (before: {change['from']})"


def flat(nested: dict) -> dict:
    """{"optim": {"name": "adamw"}} as {"optim.name": "adamw"}, with only what trackers and JSON hold."""
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in flatten(nested).items()}


def progress_facts(trainer) -> RunFacts:
    """What has come of it so far: the training as it stands, the last evaluation, a sample."""
    p, data = trainer.progress, trainer.data
    training: TrainingFacts = {
        "steps": p.step,
        "tokens": p.tokens,
        "precision": trainer.precision,
        "hardware": device_name(trainer.device.type) + (f" x {trainer.world}" if trainer.world > 1 else ""),
        "seconds": round(p.seconds, 1),
        "tokens_per_second": p.tokens / p.seconds if p.seconds else 0.0,
    }
    if trainer.changes:
        training["changes"] = trainer.changes
    evaluation: MeasuredFacts = {
        "step": p.evaluated_step,
        "val_loss": p.last_loss,
        "bits_per_byte": bits_per_byte(p.last_loss, data.bytes_per_token),
        "unigram_loss": data.baselines[UNIGRAM],
        "unigram_bits_per_byte": bits_per_byte(data.baselines[UNIGRAM], data.bytes_per_token),
    }
    if FLOOR in data.baselines:
        evaluation["floor_loss"] = data.baselines[FLOOR]
    if "base_model" in trainer.facts:
        evaluation["base_loss"] = p.first_loss
    facts: RunFacts = {
        "training": training,
        "data": data.progress(p.step, trainer.config.batch_size),
        "evaluation": evaluation,
    }
    if trainer.sample:
        used = trainer.sampler.settings
        settings = {"temperature": used.temperature, "top_k": used.top_k, "seed": used.seed}
        facts["sample"] = {"prompt": trainer.sampler.prompt, "text": trainer.sample, "settings": settings}
        if trainer.known is not None:
            copied = trainer.known.overlap([trainer.sample])
            facts["sample"]["verbatim"] = {"share": round(copied.share, 3), "longest": copied.longest}
        if trainer.sampler.question:
            facts["sample"]["question"] = trainer.sampler.question
    return facts


def merged_facts(first: RunFacts, second: RunFacts) -> RunFacts:
    """Both as one; the second wins."""
    return cast(RunFacts, merged(first, second))


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dicts as one; the second wins."""
    both = dict(first)
    for key, value in second.items():
        both[key] = merged(both[key], value) if isinstance(both.get(key), dict) and isinstance(value, dict) else value
    return both


def command_line(prog: str, argv: list[str]) -> str:
    """The command that starts the same run: without private paths, and without what is the user's own."""
    words, skip, named = [], False, installed.config_names()
    for word in argv:
        option, equals, value = word.partition("=")
        if word.startswith("--"):
            skip = option.removeprefix("--").partition(".")[0] in NOT_OTHERS or option == "--data.cache_dir"
        if skip:
            continue
        if word.startswith("--") and equals:
            words.append(f"{option}={public_name(value)}")
        else:
            words.append(word if word.startswith("configs/") or word in named else public_name(word))
    return shlex.join([*prog.split(), *words])
