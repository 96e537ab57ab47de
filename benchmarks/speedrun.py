"""Seconds to nanoGPT's loss: its small Shakespeare run for a CPU, in turn with configs/shakespeare_speedrun_cpu.yaml.

    python -m benchmarks.speedrun --nanogpt DIR [--rounds 1] [--gpu]

DIR is a checkout of https://github.com/karpathy/nanoGPT whose data/shakespeare_char is prepared. Same text, same split,
same depth, width and context. nanoGPT's clock runs from the line before its first evaluation to that of its last one,
whose validation loss (a mean over 240 random windows) is the one to reach; ours counts training and evaluation from the
first step on, to the first evaluation (over the whole validation split) with that loss.

--gpu takes nanoGPT's config/train_shakespeare_char.py as it is, the best of its losses and when it came, against
configs/shakespeare_speedrun.yaml, which does not compile; that nanoGPT does counts.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.common import report, without
from train.speedrun import timed_run

CONFIGS = Path(__file__).parents[1] / "configs"
FLAGS = (  # as its README has them for a CPU
    "--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


def run_nanogpt(checkout: Path, out: Path, gpu: bool) -> tuple[float, float]:
    """Seconds and validation loss of its run: at its end, or on a GPU, where it comes to overfit, at its best."""
    flags = [] if gpu else FLAGS.split()
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *flags, f"--out_dir={out}"]
    began, seconds, best = 0.0, 0.0, math.inf
    with without(os.environ, "GOMP_SPINCOUNT"):  # our trainer's
        process = subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True)
    with process:
        for line in process.stdout:
            if line.startswith("using fused AdamW"):
                began = time.perf_counter()
            loss = float(line.rpartition("val loss ")[2]) if line.startswith("step ") else math.inf
            if loss < best or (loss < math.inf and not gpu):
                seconds, best = time.perf_counter() - began, loss
    if process.returncode:
        sys.exit(f"nanoGPT's train.py ended with {process.returncode}; its output is above")
    return seconds, best


def run_ours(text: Path, out: Path, target: float, gpu: bool) -> dict[str, float]:
    """The first evaluation that is as good as the target, or the last one."""
    config = CONFIGS / ("shakespeare_speedrun.yaml" if gpu else "shakespeare_speedrun_cpu.yaml")
    rows = [row for row in timed_run(config, out, [f"--data.source={text}"], quiet=True) if "val_loss" in row]
    return next((row for row in rows if row["val_loss"] <= target), rows[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="the runs for a GPU")
    args = parser.parse_args()
    if not args.nanogpt:
        print("left out: it needs --nanogpt DIR, a checkout of nanoGPT")
        return
    text = args.nanogpt / "data" / "shakespeare_char" / "input.txt"
    if not text.with_name("train.bin").is_file():
        sys.exit(f"{text.parent} is not prepared; run `python data/shakespeare_char/prepare.py` in {args.nanogpt}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            seconds, loss = run_nanogpt(args.nanogpt, Path(folder) / "nanogpt", args.gpu)
            ours = run_ours(text, Path(folder) / "ours", loss, args.gpu)
            ratio = seconds / ours["seconds"] if ours["val_loss"] <= loss else "not reached"
            rows.append({"round": number + 1, "nanoGPT, s": seconds, "its loss": loss, "ours, s": ours["seconds"],
                         "our loss": ours["val_loss"], "steps": ours["step"], "ratio": ratio})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    reached = [row["ratio"] for row in rows if row["ratio"] != "not reached"]
    report("speedrun", rows)
    print(f"\nmedian ratio {median(reached):.1f}" if len(reached) == len(rows) else "\nnot reached in every round")


if __name__ == "__main__":
    main()
