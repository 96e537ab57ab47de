"""What several commands do."""

import argparse
import sys

import torch

from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.engine.select import engine_setting, preparation
from nanogpt_hub.hub.resolve import Resolved, with_repair
from nanogpt_hub.model import GPT
from nanogpt_hub.system.devices import choose_device
from nanogpt_hub.tokenizer import Tokenizer


def open_model(place: Resolved, args: argparse.Namespace) -> tuple[GPT, Tokenizer | None]:
    """The model that `add_path` and `add_device` ask for, and its tokenizer."""
    if getattr(args, "quantize", None) and args.device == "auto":
        args.device = "cpu"
    dtype = getattr(torch, args.dtype) if args.dtype else None
    device = choose_device(args.device)
    return with_repair(place, lambda: load_model(place, device=device, dtype=dtype, any_core=args.any_core))


def say(text: str) -> None:
    """What is not the result itself."""
    print(text, file=sys.stderr)


def prepare_engine(args: argparse.Namespace) -> None:
    """Has the compiled engine made where it was asked for by name, and says so: it takes a while, once per machine."""
    if (args.engine or engine_setting()) == "numba" and preparation.poll() is None and not preparation.over:
        say("preparing the compiled engine, once for this machine: about a minute ...")
        preparation.wait()
