"""Models from and for other programs: `nanogpt-hub import` and `gguf`."""

import argparse

from nanogpt_hub.exporters.gguf import export_gguf
from nanogpt_hub.hub.resolve import resolve, with_repair
from nanogpt_hub.importers.nanogpt import import_checkpoint
from nanogpt_hub.system import readable
from nanogpt_hub.system.installed import pip_line

# ---- import ----


def import_nanogpt(args: argparse.Namespace) -> None:
    found = import_checkpoint(args.checkpoint, args.out, args.meta, any_core=args.any_core)
    config, tokenizer = found.model.config, found.tokenizer
    shape = (f"{config.n_layer} layers", f"{config.n_head} heads", f"width {config.n_embd}",
             f"context {config.block_size}", "biases" if config.attn_bias else "no biases")  # fmt: skip
    steps, evaluation = found.facts["training"].get("steps"), found.facts.get("evaluation", {})
    print(f"model      {found.model.num_params():,} parameters: {', '.join(shape)}")
    if steps is not None:
        loss = f", validation loss {evaluation['val_loss']:.4f}" if evaluation else ""
        print(f"training   {steps:,} steps{loss}")
    print(f"tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    print(f"written    {found.folder}")
    print(f"\nNext: nanogpt-hub generate {found.folder}")
    print(f"      nanogpt-hub eval {found.folder} --data FILE")
    print(f"      nanogpt-hub push {found.folder} user/name")


# ---- gguf ----


def gguf(args: argparse.Namespace) -> None:
    try:
        place = resolve(args.path)
        path = with_repair(place, lambda: export_gguf(place, args.out, args.type))
    except ImportError as error:
        raise ValueError(f"the package gguf is missing: run `{pip_line(['gguf'])}`") from error
    print(f"{path} ({readable.size(path.stat().st_size)}, {args.type})")
