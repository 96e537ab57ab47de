"""One training step, tokens per second: the trainer's own against nanoGPT's loop, the same architecture in both.

    python -m benchmarks.train_step [--nanogpt DIR] [--rounds 7] [--threads N]

DIR is a checkout of https://github.com/karpathy/nanoGPT; without it only our figures are shown. Each has a process of
its own, because the trainer changes how its process allocates memory, and they take turns. A step is all of it: reading
the batch, forward, backward, clipping, AdamW. The limit is the machine's rate of torch.mm, of which each uses a part.
"""

import argparse
import importlib.util
import multiprocessing
import random
import string
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.common import alternate, ratio, report
from nanogpt_hub.model import GPT, GPTConfig
from train.config import make_parser, parse
from train.hardware import flops_per_token
from train.pretrain import start
from train.run import load_data, make_accelerator, open_source_of
from train.trainer import Trainer

ALPHABET = string.ascii_letters + string.digits + " .\n"  # 65 characters, as many as tinyshakespeare has


class Shape(NamedTuple):
    """nanoGPT's architecture (no biases, learned positions) at a size, and the batch."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    steps: int  # in each turn: about a second

    @property
    def name(self) -> str:
        return f"{self.n_layer}x{self.n_embd}, batch {self.batch_size}x{self.block_size}"


SHAPES = [Shape(4, 4, 128, 64, 12, steps=20), Shape(6, 6, 384, 256, 8, steps=2)]


def our_step(shape: Shape, folder: Path) -> Callable[[], object]:
    """The step of the trainer as `python -m train.pretrain` builds it."""
    text = folder / "text.txt"
    text.write_text(ALPHABET + "".join(random.Random(0).choices(ALPHABET, k=300_000)), encoding="utf-8", newline="")
    model = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    model |= {"preset": "gpt2", "activation": "gelu", "attn_bias": "false", "mlp_bias": "false", "norm_bias": "false"}
    flags = [f"--model.{name}={value}" for name, value in model.items()]
    flags += ["--optim.name=adamw", "--optim.learning_rate=1e-3", "--data.tokenizer=char", "--device=cpu"]
    flags += [f"--batch_size={shape.batch_size}", f"--data.source={text}", f"--data.cache_dir={folder}"]
    config, parsed = parse(make_parser("train_step", ""), [*flags, f"--out_dir={folder / 'out'}"])
    accelerator, _ = make_accelerator(config)
    source = open_source_of(config)
    gpt, tokenizer, _ = start(config, parsed, source)
    data, _ = load_data(config, source, tokenizer, gpt, quiet=True)
    return Trainer(config, gpt, tokenizer, data, accelerator, facts={}).train_step


def nanogpt_model(checkout: Path):
    """nanoGPT's model.py, from the user's own checkout."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    if spec is None or not (checkout / "model.py").is_file():
        sys.exit(f"--nanogpt {checkout}: there is no model.py; give the folder of a nanoGPT checkout")
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_step(shape: Shape, folder: Path, checkout: Path) -> Callable[[], object]:
    """A step as in the loop of nanoGPT's train.py on a CPU, its model and its optimizer, reading a memory map."""
    module = nanogpt_model(checkout)
    B, T = shape.batch_size, shape.block_size
    sizes = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    model = module.GPT(module.GPTConfig(**sizes, vocab_size=len(ALPHABET), dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    path = folder / "train.bin"
    np.random.default_rng(0).integers(len(ALPHABET), size=300_000, dtype=np.uint16).tofile(path)

    def batch():
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - T, (B,))
        x, y = ([torch.from_numpy(data[s + n : s + n + T].astype(np.int64)) for s in starts] for n in (0, 1))
        return torch.stack(x), torch.stack(y)

    def step():
        _, loss = model(*batch())
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def serve(pipe: Connection, threads: int, shape: Shape, make: Callable, *args) -> None:
    """A process that takes a turn whenever it is told to."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        step = make(shape, Path(folder), *args)
        while pipe.recv():
            for _ in range(shape.steps):
                step()
            pipe.send(True)


def measure(shape: Shape, nanogpt: Path | None, rounds: int, threads: int) -> dict[str, object]:
    """Tokens per second of both, medians over the rounds, and the median of the ratios within a round."""
    makers = {"ours": (our_step,), **({"nanoGPT": (nanogpt_step, nanogpt)} if nanogpt else {})}
    pipes, context = {}, multiprocessing.get_context("spawn")
    for name, maker in makers.items():
        pipes[name], far = context.Pipe()
        context.Process(target=serve, args=(far, threads, shape, *maker), daemon=True).start()
        far.close()  # so that its end is noticed here

    def turn(pipe: Connection) -> None:
        pipe.send(True)
        pipe.recv()

    flops = flops_of(shape) * shape.steps * shape.batch_size * shape.block_size
    turns = {name: lambda pipe=pipe: turn(pipe) for name, pipe in pipes.items()}
    a, products = torch.randn(1024, 1024), round(flops / (2 * 1024**3))  # as much work in matrix products alone
    turns["torch.mm"] = lambda: [torch.mm(a, a) for _ in range(products)]
    taken = alternate(turns, rounds, shape.name)
    for pipe in pipes.values():
        pipe.send(False)
    tokens = shape.steps * shape.batch_size * shape.block_size
    row = {"step": shape.name, **{f"{name} tokens/s": tokens / median(taken[name]) for name in pipes}}
    if nanogpt:
        row["ratio"] = ratio(taken, "nanoGPT", "ours")
    row["ours, part of the torch.mm rate"] = ratio(taken, "torch.mm", "ours")
    return row


def flops_of(shape: Shape) -> float:
    """Floating-point operations for a token; the embedding is the head too, the positions are only looked up."""
    config = GPTConfig.preset(
        "gpt2", n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, block_size=shape.block_size,
        vocab_size=len(ALPHABET), attn_bias=False, mlp_bias=False, norm_bias=False,
    )  # fmt: skip
    with torch.device("meta"):
        return flops_per_token(config, GPT(config).num_params(embeddings=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report("train_step", [measure(shape, args.nanogpt, args.rounds, args.threads) for shape in SHAPES])


if __name__ == "__main__":
    main()
