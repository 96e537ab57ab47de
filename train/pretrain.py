"""Trains a GPT from scratch.

    python -m train.pretrain configs/quickstart.yaml
    python -m train.pretrain --data.source my.txt --model.n_layer 6 --max_steps 1000
    torchrun --nproc_per_node 2 -m train.pretrain configs/shakespeare_char.yaml     (or: accelerate launch -m ...)

(`nanogpt-hub train` is the same, outside of a checkout too.) The same command again continues a run that was
interrupted. `--help` lists every setting.
"""

import sys

import torch
from jsonargparse import Namespace

from nanogpt_hub.families import empty_model
from nanogpt_hub.model import GPT
from nanogpt_hub.sources import Source

from .config import TrainConfig, make_parser
from .loading import cached_tokenizer
from .parallel import gets_weights_later
from .plan import check_fits
from .rows import RowSource
from .run import Start
from .run import main as run_main

PROG = f"python -m {__package__}.pretrain"  # as it is typed; `nanogpt-hub` gives its own


def start(config: TrainConfig, parsed: Namespace, source: Source | RowSource) -> Start:
    """A freshly initialised model for the text's tokenizer. Raises ValueError for what only a fine-tune can do."""
    check_pretraining(config)
    assert isinstance(source, Source), "the format is text"
    tokenizer = cached_tokenizer(config, source)
    gpt_config = config.model.gpt_config(tokenizer.vocab_size)
    check_fits(config, gpt_config)
    if gets_weights_later(config):
        return Start(empty_model(gpt_config), tokenizer)
    torch.manual_seed(config.seed)
    return Start(GPT(gpt_config), tokenizer)


def check_pretraining(config: TrainConfig) -> None:
    """Raises ValueError for what only a fine-tune can do."""
    if config.lora.rank:
        raise ValueError(
            "lora.rank is for fine-tuning (nanogpt-hub finetune): adapters need weights that have learned something"
        )
    if config.data.format != "text":
        raise ValueError(
            f"data.format {config.data.format} is for fine-tuning (nanogpt-hub finetune); pre-training learns from text"
        )


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    parser = make_parser(prog, "Trains a GPT from scratch on text.")
    return run_main(parser, start, argv)


if __name__ == "__main__":
    sys.exit(main())
