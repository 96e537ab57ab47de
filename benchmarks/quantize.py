"""Weights of 8 bits against float32: tokens per second of one text, and the loss on a text where a model is given.

    python -m benchmarks.quantize [--size 124m] [--tokens 64] [--rounds 5] [--threads N]
    python -m benchmarks.quantize --model out/shakespeare_char/best --data input.txt

Without a model the weights are random and the shape is GPT-2's, prompt 16, top-k 200. The limit is what the memory
allows: the read bandwidth over the bytes of all weights that a token reads.
"""

import argparse
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.common import alternate, ratio, read_bandwidth, report
from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.evaluate import evaluate
from nanogpt_hub.generate import stream_tokens
from nanogpt_hub.model import GPT, SIZES, GPTConfig
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.sources import open_source

BYTES = {"float32": 4, "int8": 1}  # of a weight


def speeds(models: dict[str, GPT], tokens: int, rounds: int) -> list[dict]:
    config = SamplingConfig(max_new_tokens=tokens, top_k=200, seed=0, stop_tokens=())
    model = models["float32"]
    prompt = torch.arange(min(16, model.config.block_size)).remainder(model.config.vocab_size).tolist()
    runs = {name: lambda m=m: list(stream_tokens(m, None, [prompt], config)) for name, m in models.items()}
    taken = alternate(runs, rounds, "generate")
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    bandwidth = read_bandwidth()
    return [
        {"weights": name, "tokens/s": tokens / median(taken[name]), "times float32": ratio(taken, "float32", name),
         "limit, tokens/s": bandwidth / (weights * BYTES[name])}
        for name in models
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="124m")
    parser.add_argument("--model", type=Path, help="a model folder, in place of random weights")
    parser.add_argument("--data", help="text on which to compare the loss of --model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.data and not args.model:
        parser.error("--data needs a --model: random weights have no loss worth comparing")
    torch.set_num_threads(args.threads)
    if args.model:
        model, tokenizer = load_model(args.model)
    else:
        model, tokenizer = GPT(GPTConfig.preset("gpt2", args.size, vocab_size=50257)).eval(), None
    models = {"float32": model, "int8": quantize_int8(model)}
    rows = speeds(models, args.tokens, args.rounds)
    if args.data:
        for row, gpt in zip(rows, models.values(), strict=True):
            row["loss"] = round(evaluate(gpt, tokenizer, open_source(args.data), 500).loss, 5)
    report("quantize", rows)


if __name__ == "__main__":
    main()
