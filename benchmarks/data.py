"""Preparing text and reading batches: is either ever what a run waits for?

    python -m benchmarks.data [--tokenizer bpe:1024] [--megabytes 64] [--rounds 3] [--large 2000]

prepare  a text file becomes token shards on disk, against tiktoken alone on the same text in memory, on one core; both
         with the same vocabulary. The text is Python's own standard library, again and again.
memory   the most that a process has in memory when it prepares that file, and when one of --large megabytes.
batches  how many tokens a second are read from the shards, and how many the smallest model here trains on.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.common import alternate, in_fresh_process, process_peak, ratio, report
from benchmarks.train_step import SHAPES, our_steps
from nanogpt_hub.sources import open_source
from nanogpt_hub.tokenizer import build_tokenizer
from train.data import Batches
from train.shards import prepare

MB = 10**6


def write_text(path: Path, n_bytes: int) -> None:
    """The standard library's source, repeated."""
    text = "\n".join(open_source("python").documents()).encode()
    with open(path, "wb") as file:
        for _ in range(-(-n_bytes // len(text))):
            file.write(text[: n_bytes - file.tell()].decode(errors="ignore").encode())


def preparing(path: Path, tokenizer, rounds: int) -> list[dict]:
    source, encoding = open_source(str(path)), tokenizer._tiktoken
    if encoding is None:
        sys.exit(f"a {tokenizer.kind} tokenizer is not tiktoken's; give bpe:N or gpt2")
    pieces = list(source.texts())

    def ours() -> None:
        with tempfile.TemporaryDirectory() as cache:
            prepare(source, tokenizer, cache, quiet=True)

    runs = {"tiktoken": lambda: [encoding.encode_ordinary(piece) for piece in pieces], "ours": ours}
    taken = alternate(runs, rounds, "prepare")
    size = path.stat().st_size
    rates = {name: size / MB / median(taken[name]) for name in runs}
    return [
        {"preparing": name, "MB/s": rate, "part of tiktoken's rate": ratio(taken, "tiktoken", name)}
        for name, rate in rates.items()
    ]


def prepare_one(path: str, tokenizer: str) -> int:
    with tempfile.TemporaryDirectory() as cache:
        prepare(open_source(path), build_tokenizer(tokenizer, []), cache, quiet=True)
    return process_peak()


def reading(path: Path, tokenizer, folder: Path, rounds: int) -> list[dict]:
    shape = SHAPES[0]
    batches = Batches(prepare(open_source(str(path)), tokenizer, folder, quiet=True).tokens(), shape.block_size, seed=0)
    train, n = our_steps(shape, folder), 2000
    runs = {"read": lambda: [batches.batch(step, shape.batch_size) for step in range(n)], "train": train}
    taken = alternate(runs, rounds, "batches")
    tokens = shape.batch_size * shape.block_size
    read, used = (steps * tokens / median(taken[name]) for name, steps in (("read", n), ("train", shape.steps)))
    return [{"batches": shape.name, "read, tokens/s": read, "trained on, tokens/s": used, "ratio": read / used}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="bpe:1024", help="bpe:N or gpt2")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--large", type=int, default=0, help="megabytes of a second file for the memory; 0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the fresh process
    args = parser.parse_args()
    if args.one:
        print(prepare_one(args.one, args.tokenizer))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = build_tokenizer(args.tokenizer, open_source("python").texts())
        tokenizer.save(folder / "tokenizer")
        text = folder / "text.txt"
        write_text(text, args.megabytes * MB)
        report("data_prepare", preparing(text, tokenizer, args.rounds))
        report("data_batches", reading(text, tokenizer, folder, args.rounds))
        rows = []
        for megabytes in filter(None, (args.megabytes, args.large)):
            write_text(text, megabytes * MB)
            peak = in_fresh_process("benchmarks.data", "--one", str(text), "--tokenizer", str(folder / "tokenizer"))
            rows.append({"prepared, MB": megabytes, "process at its peak, MB": peak / MB})
        report("data_memory", rows)


if __name__ == "__main__":
    main()
