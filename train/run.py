"""From a checked config to a finished run: what pre-training and fine-tuning have in common around the loop."""

import contextlib
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator, PartialState
from jsonargparse import ArgumentParser, Namespace

from nanogpt_hub.checkpoint import saved_as, write_atomic
from nanogpt_hub.core import CORE_FILE, faults, running_core
from nanogpt_hub.hub.publish import fetch_state
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.sources import Source
from nanogpt_hub.tokenizer import Tokenizer
from train.config import TrainConfig, parse
from train.data import Data
from train.facts import command_line, lasting_facts
from train.hardware import check_precision, choose_device, choose_precision, device_name, memory_bytes
from train.loading import load_data, open_source_of
from train.report import baseline_lines, describe_loss, size, size_warning
from train.sharing import Sharing
from train.state import read_facts
from train.tokenizing import wait_for
from train.trainer import Trainer, TrainingError


class Start(NamedTuple):
    """What a run starts from."""

    gpt: GPT
    tokenizer: Tokenizer
    base: dict | None = None  # of a fine-tune: the model it starts from, for the card


MakeStart = Callable[[TrainConfig, Namespace, Source], Start]


def main(parser: ArgumentParser, make_start: MakeStart, argv: list[str] | None = None) -> int:
    """The whole command: returns its exit status, with a sentence on standard error where it is not 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        config, parsed = parse(parser, argv)
        if parsed.resume not in ("auto", "must"):
            config, parsed = fetch_run(config, parsed, parser, argv)
        return run(config, parsed, parser, make_start, argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def fetch_run(
    config: TrainConfig, parsed: Namespace, parser: ArgumentParser, argv: list[str]
) -> tuple[TrainConfig, Namespace]:
    """Brings a run from the Hub into out_dir; without a CONFIG its own counts, below the given flags."""
    named = parsed.out_dir or parsed.config
    out = Path(config.out_dir if named else "out/" + parsed.resume.partition("@")[0].rpartition("/")[2])
    if read_facts(out / "state") is None:
        print(f"fetching the training state of {parsed.resume} into {out}")
        fetch_state(parsed.resume, out)
    if parsed.config:
        return config, parsed
    return parse(parser, ["--config", str(out / "config.yaml"), *argv, "--out_dir", str(out)])


def run(config: TrainConfig, parsed: Namespace, parser: ArgumentParser, make_start: MakeStart, argv: list[str]) -> int:
    """Prepares everything, trains, and says what came of it."""
    out = Path(config.out_dir)
    state = find_state(out, parsed)
    processes = join_processes(config)
    say = processes.print
    sharing = Sharing(config.hub, out, say) if config.hub.repo_id and processes.is_main_process else None
    source = open_source_of(config)
    gpt, tokenizer, base = make_start(config, parsed, source)
    data, lines = load_data(config, source, tokenizer, gpt, quiet=not processes.is_main_process)
    with contextlib.closing(data):
        accelerator, device_line = make_accelerator(config, gpt.config)
        facts = lasting_facts(config, command_line(parser.prog, argv), data, tokenizer, base)
        trainer = Trainer(config, gpt, tokenizer, data, accelerator, facts, sharing)
        if state is not None:
            trainer.resume(state)
        for line in (device_line, *lines, *model_lines(config, gpt, data), *plan_lines(config, trainer)):
            say(line)
        return train(trainer, parsed, parser, fresh=state is None, say=say)


def train(trainer: Trainer, parsed: Namespace, parser: ArgumentParser, fresh: bool, say: Callable[[str], None]) -> int:
    """Trains, unless the run is finished, and says what came of it."""
    config, accelerator, progress = trainer.config, trainer.accelerator, trainer.progress
    if progress.step >= config.max_steps:
        say(
            f"{trainer.out} holds this run, finished: {progress.step} steps, best validation loss "
            f"{progress.best_loss:.4f}. Raise --max_steps to go on, or start anew with --overwrite"
        )
        return 0
    if accelerator.is_main_process:
        prepare_folder(trainer.out, parsed, parser, fresh=fresh)
    wait_for(lambda: trainer.data.batches.ready(progress.step, config.batch_size), trainer.data.tokenizing)
    accelerator.init_trackers("nanogpt_hub", config=flat(asdict(config)))
    trainer.fit()
    accelerator.end_training()
    left = trainer.sharing.finish() if trainer.sharing else []
    for line in (*closing_lines(trainer), *left):
        say(line)
    return 0


def find_state(out: Path, parsed: Namespace) -> dict | None:
    """The state to go on from, or None for a fresh run. Raises ValueError where the wish and the folder disagree."""
    if parsed.overwrite:
        return None
    facts = read_facts(out / "state")
    if facts is None and parsed.resume != "auto":
        raise ValueError(f"there is no training state in {out} to resume; run without --resume to start")
    if facts is None and (out / "last").exists():
        raise ValueError(f"{out} holds a model but no training state; choose another --out_dir, or give --overwrite")
    return facts


def join_processes(config: TrainConfig) -> PartialState:
    """This process among those of the run. Raises ValueError for a device, a precision or a tracker that is not there:
    before any work."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError("this trainer keeps the whole model on each device; launch without FSDP")
    missing = [name for name in config.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"tracker {missing[0]} is not installed; run `pip install {missing[0]}` or leave it out")
    device = choose_device(config.device)
    check_precision(config.precision, device)
    return PartialState(cpu=device == "cpu")


def make_accelerator(config: TrainConfig, shape: GPTConfig) -> tuple[Accelerator, str]:
    """Accelerate on the device and in the precision that suit the model, and a line that says which and why."""
    device = choose_device(config.device)
    precision, reason = choose_precision(config.precision, device, shape.n_embd)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=config.trackers or None,
        project_dir=config.out_dir,
    )
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return accelerator, f"device: {device_name(device)}{processes}; precision {precision}: {reason}"


def model_lines(config: TrainConfig, gpt: GPT, data: Data) -> list[str]:
    """The model in numbers, who will be able to load it, and a word where it is too big for its text."""
    cfg = gpt.config
    family, why = saved_as(gpt)
    lines = [
        f"model: {gpt.num_params():,} parameters; {cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, "
        f"context {cfg.block_size}; saved as {family}"
    ]
    if running_core(gpt).changed:
        loads = "loads only where that is nanogpt_hub/model.py, and not in Transformers"
        lines.append(f"note: {why}: the folder holds it as {CORE_FILE} and {loads}")
        lines += [f"warning: {fault}" for fault in faults(cfg)]
    elif family == "nanogpt_hub":
        lines.append(f"note: Transformers has no such model ({why}); the folder loads with nanogpt_hub only")
    trained = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    if config.lora.rank:
        share = trained / gpt.num_params()
        lines.append(f"LoRA: adapters of rank {config.lora.rank}; {trained:,} parameters are trained ({share:.2%})")
    tokens = data.facts.get("train_tokens")  # unknown while a long text is tokenised
    warning = size_warning(trained, tokens) if tokens is not None else None
    return [*lines, warning] if warning else lines


def plan_lines(config: TrainConfig, trainer: Trainer) -> list[str]:
    """What the run will do, how much memory that takes, and what a loss has to be compared with."""
    gpt, data = trainer.gpt, trainer.data
    tokens = config.max_steps * config.batch_size * gpt.config.block_size
    at_most = "at most " if config.data.format != "text" else ""  # rows are padded as far as their batch needs
    have = memory_bytes(trainer.device.type)
    share = f" of {size(have)}" if have else ""
    accumulation = config.batch_size // (trainer.micro * trainer.world)
    known = data.batches.epochs(config.max_steps, config.batch_size)
    epochs = "epochs not known yet" if known is None else f"{known:.2f} epochs"
    lines = [
        f"plan: {config.max_steps:,} steps of {config.batch_size} x {at_most}{gpt.config.block_size} tokens "
        f"({accumulation} x {trainer.micro} a process), {at_most}{tokens:,} in all, "
        f"{epochs}; {config.optim.name}",
        f"memory: about {size(trainer.bytes_needed)}{share}",
        *baseline_lines(data.baselines, data.bytes_per_token),
    ]
    if trainer.progress.step:
        lines.append(f"resuming at step {trainer.progress.step}")
    return lines


def prepare_folder(out: Path, parsed: Namespace, parser: ArgumentParser, fresh: bool) -> None:
    """Makes the run's folder, empties it of an earlier run's files, and stores the resolved config."""
    if fresh:
        for old in ("best", "last", "state", "samples"):
            shutil.rmtree(out / old, ignore_errors=True)
    settings = parsed.clone()
    for key in ("config", "resume", "overwrite", "out_dir"):
        settings.pop(key, None)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "config.yaml", parser.dump(settings, skip_validation=True))


def flat(nested: dict, prefix: str = "") -> dict:
    """{"optim": {"name": "adamw"}} as {"optim.name": "adamw"}, with only what trackers accept."""
    out = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        elif value is not None:
            out[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out


def closing_lines(trainer: Trainer) -> list[str]:
    """Where the result is and what to do with it."""
    best = trainer.out / "best"
    p = trainer.progress
    quality = describe_loss(p.best_loss, trainer.data.bytes_per_token)
    prompt = f" --prompt {shlex.quote(trainer.prompt)}" if trainer.prompt.strip() else ""
    return [
        f"validation loss: {p.first_loss:.4f} before the first step, {p.best_loss:.4f} at its best "
        f"({p.best_loss - p.first_loss:+.4f})",
        f"best model: {best} (validation {quality}); loss curve: {trainer.out / 'loss.png'}",
        f"sample from it: {python_command()} -m nanogpt_hub generate {best}{prompt}",
    ]


def python_command() -> str:
    """This interpreter as one would type it here."""
    python, here = Path(sys.executable), Path.cwd()
    return python.relative_to(here).as_posix() if python.is_relative_to(here) else "python"
