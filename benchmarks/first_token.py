"""Seconds to the first token: of a long prompt, and from a folder on the disk.

    python -m benchmarks.first_token [--rounds 5] [--threads N]

prompt  GPT-2's 124M shape, prompts of 64 and of 900 tokens, in the programs that are installed (`make peers`), in turn.
load    the same folder, from the start of Python to the first token of a short prompt, and of that what comes after
        the imports. Fresh processes, in turn; the files are in the system's cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import alternate, ratio, report, workers
from benchmarks.peers import counterpart, installed, random_folder, ways

OURS = """
import time
from nanogpt_hub import load_model
from nanogpt_hub.generate import stream_tokens
imported = time.perf_counter()
model, _ = load_model({folder!r})
next(stream_tokens(model, None, [[1, 2, 3]], max_new_tokens=1))
print(time.perf_counter() - imported)
"""
TRANSFORMERS = """
import time
import torch
from transformers import AutoModelForCausalLM
imported = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained({folder!r})
idx = torch.tensor([[1, 2, 3]])
model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=1, do_sample=True, pad_token_id=0)
print(time.perf_counter() - imported)
"""


def prompt(folder: Path, rounds: int, threads: int, lengths: tuple[int, ...] = (64, 900)) -> list[dict]:
    prompts = {tokens: [[7 * i % 50257 for i in range(tokens)]] for tokens in lengths}
    with workers(ways(folder, None, threads), threads) as programs:
        runs = {(name, tokens): lambda work=work, prompt=prompt: work(prompt, 1)
                for tokens, prompt in prompts.items() for name, work in programs.items()}  # fmt: skip
        taken = alternate(runs, rounds, "prompt")
    return [
        {"124M, prompt of": tokens, "program": name, "first token, s": median(seconds),
         "prompt tokens/s": tokens / median(seconds),
         "ours is faster by": ratio(taken, (name, tokens), (counterpart(name), tokens))}
        for (name, tokens), seconds in taken.items()
    ]  # fmt: skip


def load(folder: Path, rounds: int) -> list[dict]:
    scripts = {"ours": OURS, **({"transformers": TRANSFORMERS} if installed("transformers") else {})}
    imported: dict[str, list[float]] = {name: [] for name in scripts}

    def start(name: str) -> None:
        command = [sys.executable, "-c", scripts[name].format(folder=str(folder))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        imported[name].append(json.loads(done.stdout))

    taken = alternate({name: lambda name=name: start(name) for name in scripts}, rounds, "load")
    return [
        {"124M from a folder": name, "from the start of Python, s": median(taken[name]),
         "ours is faster by": ratio(taken, name, "ours"), "after the imports, s": median(imported[name][1:]),
         "ours is faster by then": ratio(imported, name, "ours")}
        for name in scripts
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = random_folder(Path(name) / "model", size="124m", vocab_size=50257)
        report("first_token_load", load(folder, args.rounds))
        report("first_token_prompt", prompt(folder, args.rounds, args.threads))


if __name__ == "__main__":
    main()
