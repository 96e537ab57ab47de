"""Seconds to nanoGPT's loss: its small Shakespeare run for a CPU, in turn with configs/shakespeare_speedrun_cpu.yaml.

    python -m benchmarks.speedrun --nanogpt DIR [--rounds 1]

DIR is a checkout of https://github.com/karpathy/nanoGPT whose data/shakespeare_char is prepared. Same text, same split,
same depth, width and context. nanoGPT's clock runs from the line before its first evaluation to that of its last one,
whose validation loss (a mean over 240 random windows) is the one to reach; ours counts training and evaluation from the
first step on, to the first evaluation (over the whole validation split) with that loss.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.common import report
from train.report import read_metrics

CONFIG = Path(__file__).parents[1] / "configs" / "shakespeare_speedrun_cpu.yaml"
FLAGS = (  # as its README has them for a CPU
    "--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


def run_nanogpt(checkout: Path, out: Path) -> tuple[float, float]:
    """Seconds and validation loss of its run."""
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *FLAGS.split(), f"--out_dir={out}"]
    began = loss = last = 0.0
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}  # our trainer's
    with subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("using fused AdamW"):
                began = time.perf_counter()
            if line.startswith("step "):
                last, loss = time.perf_counter(), float(line.rpartition("val loss ")[2])
    if process.returncode:
        sys.exit(f"nanoGPT's train.py ended with {process.returncode}; its output is above")
    return last - began, loss


def run_ours(text: Path, out: Path, target: float) -> dict[str, float]:
    """The first evaluation that is as good as the target, or the last one."""
    command = [sys.executable, "-m", "train.pretrain", str(CONFIG), f"--data.source={text}", f"--out_dir={out}"]
    subprocess.run([*command, "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "val_loss" in row]
    return next((row for row in rows if row["val_loss"] <= target), rows[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--rounds", type=int, default=1)
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
            seconds, loss = run_nanogpt(args.nanogpt, Path(folder) / "nanogpt")
            ours = run_ours(text, Path(folder) / "ours", loss)
            ratio = seconds / ours["seconds"] if ours["val_loss"] <= loss else "not reached"
            rows.append({"round": number + 1, "nanoGPT, s": seconds, "its loss": loss, "ours, s": ours["seconds"],
                         "our loss": ours["val_loss"], "steps": ours["step"], "ratio": ratio})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    reached = [row["ratio"] for row in rows if row["ratio"] != "not reached"]
    report("speedrun", rows)
    print(f"\nmedian ratio {median(reached):.1f}" if len(reached) == len(rows) else "\nnot reached in every round")


if __name__ == "__main__":
    main()
