"""Goes on training a model that exists, on other text.

    python -m train.finetune --from out/quickstart/best --data.source my.txt
    python -m train.finetune configs/finetune_gpt2_shakespeare.yaml --from FOLDER

Weights, tokenizer and shape come from the model folder; optimizer, schedule and counters start anew. (To continue an
interrupted run instead, give its command again.) The loss before the first step is printed first, the change last.
"""

import sys
from dataclasses import replace

from jsonargparse import Namespace

from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.model import GPT
from nanogpt_hub.sources import Source
from train.config import TrainConfig, make_parser
from train.run import Start
from train.run import main as run_main

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


def start(config: TrainConfig, parsed: Namespace, source: Source) -> Start:
    """The base model, with more dropout or a shorter context if asked. Raises ValueError for any other change."""
    fixed = sorted(set(config.model.given()) - CHANGEABLE)
    if fixed:
        raise ValueError(
            f"model.{fixed[0]} cannot be set: a fine-tune takes its shape from --from; only model.dropout and a "
            "shorter model.block_size may change"
        )
    if config.data.tokenizer:
        raise ValueError(f"data.tokenizer {config.data.tokenizer!r} cannot be set: a fine-tune takes it from --from")
    name = parsed["from"]
    gpt, tokenizer = load_model(name)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so its weights cannot be fine-tuned on text")
    return Start(reshaped(gpt, **config.model.given()), tokenizer, {"relation": "finetune"})


def reshaped(gpt: GPT, dropout: float | None = None, block_size: int | None = None) -> GPT:
    """The same weights with another dropout or a shorter context; a table of positions is cut to it."""
    if dropout is None and block_size is None:
        return gpt
    was = gpt.config
    if block_size is not None and block_size > was.block_size:
        raise ValueError(f"model.block_size {block_size} is above the base model's {was.block_size}; shorten it")
    config = replace(was, block_size=block_size or was.block_size, dropout=was.dropout if dropout is None else dropout)
    weights = gpt.state_dict()
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: config.block_size]
    shorter = GPT(config).to(next(gpt.parameters()).dtype)
    shorter.load_state_dict(weights)
    return shorter


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("train.finetune", "Fine-tunes a model from a folder on text.")
    parser.add_argument("--from", required=True, help="the model to start from: a model folder")
    parser.set_defaults(DEFAULTS)
    return run_main(parser, start, argv)


if __name__ == "__main__":
    sys.exit(main())
