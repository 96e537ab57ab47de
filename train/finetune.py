"""Goes on training a model that exists, on other text or on prompts with their answers.

    python -m train.finetune --from out/quickstart/best --data.source my.txt
    python -m train.finetune --from openai-community/gpt2 --data.source pairs.jsonl --data.format completion
    python -m train.finetune --from user/name@v1 --data.source chats.jsonl --data.format messages --lora.rank 8
    python -m train.finetune configs/finetune_lora.yaml --from openai-community/gpt2

(`nanogpt-hub finetune` is the same, outside of a checkout too.)

--from takes a model folder or the name of a repo on the Hub, ours or anybody's of the families that this project reads
(GPT-2, GPT-NeoX and Pythia, Llama, nanochat). Weights, tokenizer and shape come from there; optimizer, schedule and
counters start anew. (To continue an interrupted run instead, give its command again.) The loss before the first step
is printed first, the change last.

data.format tells what the data is. `text` is learned as a whole. Rows with a `prompt` and a `completion`, and rows of
`messages`, are learned only where the model is to answer; how they become tokens is told in train/rows.py and
nanogpt_hub/chat.py. --lora.rank trains small adapters beside the frozen weights; the saved models have them merged.
"""

import sys
from dataclasses import replace
from pathlib import Path

from jsonargparse import Namespace

from nanogpt_hub.chat import PLAIN
from nanogpt_hub.checkpoint import CoreError, load_model, read_config
from nanogpt_hub.families import empty_model
from nanogpt_hub.hub.card import BaseFacts
from nanogpt_hub.hub.resolve import resolve, with_repair
from nanogpt_hub.model import GPT
from nanogpt_hub.sources import Source
from nanogpt_hub.tokenizer import Tokenizer

from .config import TrainConfig, make_parser
from .lora import add_adapters, check_peft
from .parallel import gets_weights_later
from .plan import check_fits
from .rows import RowSource
from .run import Start
from .run import main as run_main

PROG = f"python -m {__package__}.finetune"  # as it is typed; `nanogpt-hub` gives its own
# Gentler than from scratch: the weights are already where most of the work has brought them.
DEFAULTS = {
    "data.tokenizer": "",
    "optim.name": "adamw",
    "optim.learning_rate": 1e-4,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 10,
    "max_steps": 200,
    "eval.interval": 50,
}
CHANGEABLE = {"dropout", "block_size"}


def start(config: TrainConfig, parsed: Namespace, source: Source | RowSource) -> Start:
    """The base model, with adapters, more dropout or a shorter context if asked.

    Raises ValueError for what cannot be asked, HubError or CheckpointError when the base cannot be had.
    """
    check_settings(config)
    if not parsed["from"]:
        raise ValueError("say what to start from: --from FOLDER, or --from user/name[@revision]")
    place = resolve(parsed["from"])
    try:
        check_fits(config, read_config(place.folder, any_core=parsed["any_core"]))
    except CoreError as error:
        raise CoreError(f"cannot load {parsed['from']}: {error}") from error
    gpt, tokenizer = with_repair(place, lambda: read_base(config, place.folder, parsed["any_core"]))
    if tokenizer is None:
        raise ValueError(f"{place} has no tokenizer, so its weights cannot be fine-tuned on text")
    gpt = reshaped(gpt, **config.model.given())
    if config.lora.rank:
        add_adapters(gpt, config.lora, config.seed)
    if config.data.format == "messages":
        tokenizer.config["chat_template"] = tokenizer.config.get("chat_template") or PLAIN
    base: BaseFacts = {"relation": "finetune"}
    if place.repo_id:
        base |= {"id": place.repo_id, "revision": place.sha}
    return Start(gpt, tokenizer, base)


def read_base(config: TrainConfig, folder: Path, any_core: bool) -> tuple[GPT, Tokenizer | None]:
    """The model in a folder and its tokenizer, as `load_model`; without memory where the weights come later."""
    if not gets_weights_later(config):
        return load_model(folder, any_core=any_core)
    there = (folder / "tokenizer.json").is_file()
    return empty_model(read_config(folder, any_core=any_core)), Tokenizer.load(folder) if there else None


def check_settings(config: TrainConfig) -> None:
    """Raises ValueError for a setting that a fine-tune cannot have."""
    fixed = sorted(set(config.model.given()) - CHANGEABLE)
    if fixed:
        raise ValueError(
            f"model.{fixed[0]} cannot be set: a fine-tune takes its shape from --from; only model.dropout and a "
            "shorter model.block_size may change"
        )
    if config.data.tokenizer:
        raise ValueError(f"data.tokenizer {config.data.tokenizer!r} cannot be set: a fine-tune takes it from --from")
    if config.lora.rank:
        check_peft()
        if config.optim.name == "muon":
            raise ValueError("optim.name muon is for whole matrices: adapters (lora.rank) are trained with adamw")


def reshaped(gpt: GPT, dropout: float | None = None, block_size: int | None = None) -> GPT:
    """The same weights with another dropout or a shorter context; a table of positions is cut to it."""
    if dropout is None and block_size is None:
        return gpt
    was = gpt.config
    if block_size is not None and block_size > was.block_size:
        raise ValueError(f"model.block_size {block_size} is above the base model's {was.block_size}; shorten it")
    config = replace(was, block_size=block_size or was.block_size, dropout=was.dropout if dropout is None else dropout)
    if gpt.wte.weight.is_meta:
        return empty_model(config)
    weights = gpt.state_dict()
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: config.block_size]
    shorter = GPT(config).to(next(gpt.parameters()).dtype)
    shorter.load_state_dict(weights)
    return shorter


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    parser = make_parser(prog, "Fine-tunes a model on text, or on prompts with their answers.")
    parser.add_argument("--from", default="", help="the model to start from: a folder, or user/name[@revision]")
    parser.add_argument(
        "--any_core", "--any-core", action="store_true", help="start from weights of another model.py than this one"
    )
    parser.set_defaults(DEFAULTS)
    return run_main(parser, start, argv)


if __name__ == "__main__":
    sys.exit(main())
