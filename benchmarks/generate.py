"""Tokens per second of generation: ours against nanoGPT, transformers, CTranslate2 and llama.cpp, in turn.

    python -m benchmarks.generate [--nanogpt DIR] [--rounds 5] [--threads N] [--only 124m|small|batch|context]

All write from the same random weights of GPT-2's architecture (nanoGPT from random ones of the same shape), sampling
with top-k 200 as nanoGPT's sample.py does, each in a process of its own. Peers that are not installed are left out
(`make peers` brings them). What the compiled engine brings is seen against "by PyTorch" (--engine torch) and "by
model.py" (--engine plain). Four tables:

124m     one text, 128 tokens after a prompt of 16. The limit is that the bytes of all weights, and of the cache, must
         be read for each token, at the rate of a plain read measured in the same turns.
small    characters, one text and ten: the 500 tokens of sample.py, and a full context.
batch    16 prompts at once against one after the other.
context  milliseconds for a token at the beginning and at the end of a context.
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import alternate, ratio, reader, report, times, workers
from benchmarks.peers import NanoGPT, Ours, Transformers, counterpart, installed, random_folder, ways
from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.engine.select import preparation
from nanogpt_hub.generate import stream_tokens
from nanogpt_hub.model import GPT

SMALL = {"4x128": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65),
         "6x384": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65)}  # fmt: skip


def bytes_per_token(model: GPT, context: int, weight_bytes: int) -> int:
    """What must be read from memory for a token: all matrices, and the keys and values of what came before."""
    cfg = model.config
    cache = 2 * 4 * cfg.n_layer * cfg.kv_heads * cfg.head_dim * context
    return weight_bytes * model.num_params(embeddings=False) + cache


def one_text(nanogpt: Path | None, rounds: int, threads: int, prompt: int = 16, tokens: int = 128) -> list[dict]:
    """The 124M shape, one text."""
    prompts = [list(range(prompt))]
    with tempfile.TemporaryDirectory() as name:
        folder = random_folder(Path(name) / "model", size="124m", vocab_size=50257)
        model, _ = load_model(folder)
        context = prompt + tokens // 2
        limits = {"ours": bytes_per_token(model, context, 4), "ours, int8": bytes_per_token(model, context, 1)}
        del model
        with workers(ways(folder, nanogpt, threads), threads) as programs:
            runs = {name: lambda work=work: work(prompts, tokens) for name, work in programs.items()}
            runs |= {f"limit of {ours}": times(tokens, reader(n_bytes)) for ours, n_bytes in limits.items()}
            taken = alternate(runs, rounds, "124m")
    rows = []
    for name in programs:
        ours = counterpart(name)
        limit = f"limit of {ours}"
        rows.append({"124M, one text": name, "tokens/s": tokens / median(taken[name]),
                     "limit, tokens/s": tokens / median(taken[limit]), "part of the limit": ratio(taken, limit, name),
                     "ours is faster by": ratio(taken, name, ours)})  # fmt: skip
    return rows


def small_models(nanogpt: Path | None, rounds: int, threads: int) -> list[dict]:
    """Character models: the 500 tokens of sample.py against nanoGPT, a full context against transformers."""
    rows = []
    for shape, sizes in SMALL.items():
        with tempfile.TemporaryDirectory() as name:
            folder = random_folder(Path(name) / "model", **sizes)
            if nanogpt:
                rows += small_model(shape, folder, "nanoGPT", (NanoGPT, folder, nanogpt), 500, rounds, threads)
            if installed("transformers"):
                peer, tokens = (Transformers, folder), sizes["block_size"] - 1
                rows += small_model(shape, folder, "transformers", peer, tokens, rounds, threads)
    return rows


def small_model(
    shape: str, folder: Path, peer: str, maker: tuple, tokens: int, rounds: int, threads: int
) -> list[dict]:
    """One text, and ten: at once where a program can (nanoGPT's sample.py writes one after the other)."""
    slower = {"ours by PyTorch": (Ours, folder, False, "torch"), "ours by model.py": (Ours, folder, False, "plain")}
    with workers({"ours": (Ours, folder), **slower, peer: maker}, threads) as programs:
        runs = {(name, 1): lambda work=work: work([[0]], tokens) for name, work in programs.items()}
        runs |= {(name, 10): lambda work=work: work([[0]] * 10, tokens) for name, work in programs.items()}
        if peer == "nanoGPT":
            del runs[peer, 10]
        taken = alternate(runs, rounds, shape)
    if peer == "nanoGPT":
        taken[peer, 10] = [10 * seconds for seconds in taken[peer, 1]]
    return [
        {"model": shape, "tokens each": tokens, "texts": texts, "program": name,
         "ms for a token of one text": 1e3 * median(taken[name, texts]) / tokens / texts,
         "ours is faster by": ratio(taken, (name, texts), ("ours", texts))}
        for texts in (1, 10) for name in ("ours", *slower, peer)
    ]  # fmt: skip


def batch(rounds: int, threads: int, prompts: int = 16, tokens: int = 128) -> list[dict]:
    """The 124M shape, many texts at once."""
    with tempfile.TemporaryDirectory() as name:
        folder = random_folder(Path(name) / "model", size="124m", vocab_size=50257)
        with workers({"float32": (Ours, folder), "int8": (Ours, folder, True)}, threads) as programs:
            texts = [list(range(start, start + 16)) for start in range(prompts)]
            runs = {(name, "together"): lambda work=work: work(texts, tokens) for name, work in programs.items()}
            runs |= {(name, "one"): lambda work=work: [work([text], tokens) for text in texts]
                     for name, work in programs.items()}  # fmt: skip
            taken = alternate(runs, rounds, "batch")
    return [
        {"124M": name, "one by one, tokens/s": prompts * tokens / median(taken[name, "one"]),
         f"{prompts} together, tokens/s": prompts * tokens / median(taken[name, "together"]),
         "ratio": ratio(taken, (name, "one"), (name, "together"))}
        for name in programs
    ]  # fmt: skip


class Late:
    """Seconds for each of the tokens that follow a context."""

    def __init__(self, folder: Path):
        self.model, _ = load_model(folder)
        preparation.wait()

    def __call__(self, context: int, tokens: int) -> float:
        stream = stream_tokens(self.model, None, [[0] * context], max_new_tokens=tokens + 1, seed=0, engine="numba")
        came = [time.perf_counter() for _ in stream]  # the first one has read the context
        return median(after - before for before, after in pairwise(came))


class LateNanoGPT(NanoGPT):
    """The same for nanoGPT, which reads the context for each token."""

    def __call__(self, context: int, tokens: int) -> float:
        started = time.perf_counter()
        super().__call__([[0] * context], tokens)
        return (time.perf_counter() - started) / tokens


def context(nanogpt: Path | None, rounds: int, threads: int, tokens: int = 16) -> list[dict]:
    """From the beginning to the end of a context: that of nanoGPT's small models, and 1,024 tokens."""
    rows = []
    long = {f"{name}, 1024": {**sizes, "block_size": 1024} for name, sizes in SMALL.items()}
    for shape, sizes in (SMALL | long | {"124M": dict(size="124m", vocab_size=50257)}).items():
        last = sizes.get("block_size", 1024) - tokens - 1
        with tempfile.TemporaryDirectory() as name:
            folder = random_folder(Path(name) / "model", **sizes)
            makers = {"ours": (Late, folder)} | ({"nanoGPT": (LateNanoGPT, folder, nanogpt)} if nanogpt else {})
            with workers(makers, threads) as programs:
                for program, work in programs.items():
                    pairs = [(work(8, tokens), work(last, tokens)) for _ in range(rounds + 1)][1:]
                    taken = dict(zip((8, last), zip(*pairs, strict=True), strict=True))
                    rows.append({
                        "model": shape, "program": program, "ms after 8 tokens": 1e3 * median(taken[8]),
                        "ms at the end": 1e3 * median(taken[last]), "ratio": ratio(taken, last, 8),
                    })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("124m", "small", "batch", "context"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = {
        "124m": lambda: one_text(args.nanogpt, args.rounds, args.threads),
        "small": lambda: small_models(args.nanogpt, args.rounds, args.threads),
        "batch": lambda: batch(args.rounds, args.threads),
        "context": lambda: context(args.nanogpt, args.rounds, args.threads),
    }
    for name, rows in tables.items():
        if args.only in (None, name):
            report(f"generate_{name}", rows())


if __name__ == "__main__":
    main()
