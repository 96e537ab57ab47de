"""One training step, tokens per second: the trainer's own against nanoGPT's loop, the same architecture in both.

    python -m benchmarks.train_step [--nanogpt DIR] [--launches 3] [--rounds 4] [--threads N] [--only 6x384]

DIR is a checkout of https://github.com/karpathy/nanoGPT; without it only our figures are shown. Each has a process of
its own, because the trainer changes how its process allocates memory, and they take turns; `launches` times anew,
because where its memory happens to lie makes a process up to a quarter slower for as long as it lives. A step is all of
it: reading the batch, forward, backward, clipping, AdamW. The limit is the machine's rate of torch.mm in our precision:
where our trainer takes bfloat16 by itself, as on CPUs that are fast at it, it is also shown in float32, nanoGPT's on a
CPU.

On a CPU our trainer also runs in the plain way, with `--fast_cpu false`: without the attention of train/attention.py
and without keeping freed memory (train/hardware.py).

Where there is a CUDA device the step is that of nanoGPT's bench.py: 124M, batch 12, bfloat16, compiled, on both sides.
"""

import argparse
import random
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from benchmarks.common import Taken, alternate, ratio, report, table, times, workers
from benchmarks.peers import nanogpt_module
from nanogpt_hub.families import empty_model
from nanogpt_hub.model import GPTConfig
from nanogpt_hub.system.devices import choose_device
from train.config import make_parser, parse
from train.hardware import DTYPES, choose_precision, flops_per_token
from train.loading import load_data, open_source_of
from train.pretrain import start
from train.run import make_accelerator
from train.trainer import Trainer

PLAIN = "ours, the plain way"
ALPHABET = string.ascii_letters + string.digits + " .\n"  # 65 characters, as many as tinyshakespeare has


class Shape(NamedTuple):
    """nanoGPT's architecture (no biases, learned positions) at a size, and the batch."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    steps: int  # in each turn: about a second
    vocab_size: int = len(ALPHABET) + 1  # and end-of-text
    dropout: float = 0.0
    asked: str = "auto"  # precision of our trainer; nanoGPT has float32 on a CPU

    @property
    def name(self) -> str:
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.n_layer}x{self.n_embd}, batch {self.batch_size}x{self.block_size}{dropout}"

    @property
    def precision(self) -> str:
        return choose_precision(self.asked, choose_device("auto"), self.n_embd)[0]


SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout")  # fields of every GPT's config
SHAPES = [
    Shape(4, 4, 128, 64, 12, steps=20),
    Shape(4, 4, 128, 64, 12, steps=20, asked="fp32"),
    Shape(6, 6, 384, 256, 8, steps=2),
    Shape(6, 6, 384, 256, 8, steps=2, asked="fp32"),
    Shape(6, 6, 384, 256, 8, steps=2, dropout=0.2),  # nanoGPT's train_shakespeare_char
    Shape(6, 6, 384, 256, 8, steps=2, dropout=0.2, asked="fp32"),
    Shape(12, 12, 768, 1024, 1, steps=1, vocab_size=50304),
]
SHAPES_CUDA = [Shape(12, 12, 768, 1024, 12, steps=20, vocab_size=50304)]


def our_steps(shape: Shape, folder: Path, fast_cpu: bool = True) -> Callable[[], None]:
    """The steps of the trainer as `python -m train.pretrain` builds it, or in the plain way, with `fast_cpu` off."""
    text = folder / "text.txt"
    text.write_text(ALPHABET + "".join(random.Random(0).choices(ALPHABET, k=300_000)), encoding="utf-8", newline="")
    model = {name: getattr(shape, name) for name in SIZES}
    model |= {"preset": "gpt2", "activation": "gelu", "attn_bias": "false", "mlp_bias": "false", "norm_bias": "false"}
    flags = [f"--model.{name}={value}" for name, value in model.items()]
    flags += ["--optim.name=adamw", "--optim.learning_rate=1e-3", "--data.tokenizer=char"]
    flags += [f"--batch_size={shape.batch_size}", f"--data.source={text}", f"--data.cache_dir={folder}"]
    flags += [f"--precision={shape.asked}", f"--fast_cpu={str(fast_cpu).lower()}"]
    config, parsed = parse(make_parser("train_step", ""), [*flags, f"--out_dir={folder / 'out'}"])
    source = open_source_of(config)
    gpt, tokenizer, _ = start(config, parsed, source)
    accelerator, _ = make_accelerator(config, gpt.config)
    data, _ = load_data(config, source, tokenizer, gpt, quiet=True)
    return times(shape.steps, Trainer(config, gpt, tokenizer, data, accelerator, facts={}).train_step)


def nanogpt_steps(shape: Shape, folder: Path, checkout: Path) -> Callable[[], None]:
    """Steps as in the loop of nanoGPT's train.py, its model and its optimizer, reading a memory map."""
    module = nanogpt_module(checkout)
    B, T = shape.batch_size, shape.block_size
    sizes = {name: getattr(shape, name) for name in SIZES}
    model = module.GPT(module.GPTConfig(**sizes, bias=False))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        model = torch.compile(model)
    path = folder / "train.bin"
    np.random.default_rng(0).integers(len(ALPHABET), size=300_000, dtype=np.uint16).tofile(path)

    def batch():
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - T, (B,))
        x, y = ([torch.from_numpy(data[s + n : s + n + T].astype(np.int64)) for s in starts] for n in (0, 1))
        both = torch.stack(x), torch.stack(y)
        return both if device == "cpu" else [t.pin_memory().to(device, non_blocking=True) for t in both]

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            _, loss = model(*batch())
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return times(shape.steps, step)


def measure(shape: Shape, nanogpt: Path | None, launches: int, rounds: int, threads: int) -> dict[str, object]:
    """Tokens per second of both, medians over all rounds, and the median of the ratios within a round."""
    parts = []
    for number in range(launches):
        with tempfile.TemporaryDirectory() as folder:  # a run's text is its own
            parts.append(launch(shape, nanogpt, rounds, threads, Path(folder), f"{shape.name}, launch {number + 1}"))
    taken = {name: [seconds for part in parts for seconds in part[name]] for name in parts[0]}
    tokens = shape.steps * shape.batch_size * shape.block_size
    row = {
        "step": shape.name,
        "our precision": shape.precision,
        **{f"{name} tokens/s": tokens / median(taken[name]) for name in taken if name != "torch.mm"},
    }
    if nanogpt:
        row["ratio"] = ratio(taken, "nanoGPT", "ours")
    if PLAIN in taken:
        row["ratio to the plain way"] = ratio(taken, PLAIN, "ours")
    row["ours, part of the torch.mm rate"] = ratio(taken, "torch.mm", "ours")
    return row


def launch(shape: Shape, nanogpt: Path | None, rounds: int, threads: int, folder: Path, desc: str) -> Taken:
    """Seconds of each in each round, in fresh processes."""
    makers: dict[str, tuple] = {"ours": (our_steps, shape, folder)}
    if not torch.cuda.is_available():
        apart = folder / "plain"
        apart.mkdir()
        makers[PLAIN] = (our_steps, shape, apart, False)
    if nanogpt:
        makers["nanoGPT"] = (nanogpt_steps, shape, folder, nanogpt)
    flops = flops_of(shape) * shape.steps * shape.batch_size * shape.block_size
    cuda = torch.cuda.is_available()
    n = 8192 if cuda else 1024
    a = torch.randn(n, n, dtype=DTYPES[shape.precision], device="cuda" if cuda else "cpu")
    products = max(1, round(flops / (2 * n**3)))  # as much work in matrix products alone
    with workers(makers, threads, trainers=("ours", PLAIN)) as turns:
        turns["torch.mm"] = times(products, lambda: torch.mm(a, a))
        return alternate(turns, rounds, desc)


def flops_of(shape: Shape) -> float:
    """Floating-point operations for a token; the embedding is the head too, the positions are only looked up."""
    sizes = {name: getattr(shape, name) for name in SIZES}
    config = GPTConfig.preset("gpt2", **sizes, attn_bias=False, mlp_bias=False, norm_bias=False)
    return flops_per_token(config, empty_model(config).num_params(embeddings=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="measure the steps whose names begin so, such as 6x384")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = SHAPES_CUDA if torch.cuda.is_available() else SHAPES
    shapes = [shape for shape in distinct(shapes) if shape.name.startswith(args.only)]
    if not shapes:
        parser.error(f"no step's name begins with {args.only!r}: there are {', '.join(s.name for s in SHAPES)}")
    rows = []
    for shape in shapes:
        rows.append(measure(shape, args.nanogpt, args.launches, args.rounds, args.threads))
        print(table(rows[-1:]), flush=True)  # the next one takes minutes
    report("train_step", rows)


def distinct(shapes: list[Shape]) -> list[Shape]:
    """Without those that come to the same here: on many CPUs the trainer takes float32 by itself."""
    return list({(shape.name, shape.precision): shape for shape in shapes}.values())


if __name__ == "__main__":
    main()
