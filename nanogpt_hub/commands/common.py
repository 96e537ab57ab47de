"""What several commands do."""

import argparse
import sys

import torch

from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.engine.select import core_is_known, engine_setting, preparation
from nanogpt_hub.hub.resolve import Resolved, with_repair
from nanogpt_hub.model import GPT
from nanogpt_hub.system.devices import choose_device
from nanogpt_hub.tokenizer import Tokenizer


def open_model(place: Resolved, args: argparse.Namespace) -> tuple[GPT, Tokenizer | None]:
    """The model that `add_path` and `add_device` ask for, and its tokenizer. `args.device` is then the one it is on."""
    if getattr(args, "quantize", None) and args.device == "auto":
        args.device = "cpu"
    dtype = getattr(torch, args.dtype) if args.dtype else None
    args.device = choose_device(args.device)
    return with_repair(place, lambda: load_model(place, device=args.device, dtype=dtype, any_core=args.any_core))


def say(text: str) -> None:
    """What is not the result itself."""
    print(text, file=sys.stderr)


def prepare_engine(args: argparse.Namespace) -> None:
    """Has the compiled engine made where it was asked for by name, for a model that `open_model` has opened. Says that
    it takes a while, once per machine, or why there is none."""
    if engine_setting(args.engine) != "numba":
        return
    if not core_is_known():
        say("model.py is edited, and the compiled engine computes the unedited one: model.py itself generates")
    elif torch.device(args.device).type != "cpu":
        say(f"the compiled engine is for CPUs: on {args.device} PyTorch generates")
    elif preparation.poll() is None and not preparation.over:
        say("preparing the compiled engine, once for this machine: about a minute ...")
        preparation.wait()
