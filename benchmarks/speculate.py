"""Guessing ahead against plain generation: the same tokens, per second, where a text repeats itself and where not.

    python -m benchmarks.speculate [--size 124m] [--tokens 64] [--rounds 5] [--threads N] [--int8]
    python -m benchmarks.speculate --model out/large/best [--draft out/small/best] [--prompt TEXT]

Without a model the weights are random and the shape is GPT-2's: taking the likeliest token soon goes in circles, which
is the repetitive text; sampling gives one in which nothing can be guessed. With a model, so do a temperature of 0 and
of 0.8. A draft is a smaller model with the same tokenizer. The last column tells how many tokens a pass gave.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import alternate, ratio, report
from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.engine.select import preparation
from nanogpt_hub.generate import stream_tokens
from nanogpt_hub.model import GPT, SIZES, GPTConfig
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.speculate import Speculator

CASES = {"repetitive (temperature 0)": 0.0, "new (temperature 0.8)": 0.8}


def generating(model: GPT, prompt: list[int], config: SamplingConfig, draft: Speculator | None) -> Callable[[], object]:
    return lambda: list(stream_tokens(model, None, [prompt], config, draft=draft))


def measure(model: GPT, drafts: dict[str, GPT | None], prompt: list[int], tokens: int, rounds: int) -> list[dict]:
    rows = []
    for case, temperature in CASES.items():
        config = SamplingConfig(max_new_tokens=tokens, temperature=temperature, seed=0, stop_tokens=())
        speculators = {name: Speculator(draft) for name, draft in drafts.items()}
        ways = {"plain": None, **speculators}
        runs = {name: generating(model, prompt, config, draft) for name, draft in ways.items()}
        taken = alternate(runs, rounds, case)
        for name, speculator in speculators.items():
            rows.append({
                "text": case, "guesses by": name, "plain, tokens/s": tokens / median(taken["plain"]),
                "ours, tokens/s": tokens / median(taken[name]), "ratio": ratio(taken, "plain", name),
                "tokens a pass": 1 + speculator.true / speculator.passes,
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="124m")
    parser.add_argument("--model", type=Path, help="a model folder, in place of random weights")
    parser.add_argument("--draft", type=Path, help="the folder of a smaller model with the tokenizer of --model")
    parser.add_argument("--prompt", default="\n", help="for --model")
    parser.add_argument("--int8", action="store_true", help="weights of 8 bits in both models")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.draft and not args.model:
        parser.error("--draft needs a --model")
    preparation.wait()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.model:
        model, tokenizer = load_model(args.model)
        prompt = tokenizer.encode(args.prompt)
    else:
        model, prompt = GPT(GPTConfig.preset("gpt2", args.size, vocab_size=50257)).eval(), list(range(16))
    drafts = {"the text": None} | ({"a model": load_model(args.draft)[0]} if args.draft else {})
    if args.int8:
        model, drafts = quantize_int8(model), {name: gpt and quantize_int8(gpt) for name, gpt in drafts.items()}
    report("speculate", measure(model, drafts, prompt, args.tokens, args.rounds))


if __name__ == "__main__":
    main()
