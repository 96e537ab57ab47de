"""What it costs to save a training state of 124 million parameters, and which part of that are its hashes.

    python -m benchmarks.state [--params 124000000] [--folder DIR]

A save is timed whole, with the hashes left out, and by itself the hashing of its files and their check, in turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from train import state


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.state", description=__doc__.split("\n")[0])
    parser.add_argument("--params", type=int, default=124_000_000)
    parser.add_argument("--folder", help="on the disk to measure (default: where temporary files are)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    layers = 12
    model = {f"h.{i}": torch.randn(args.params // layers) for i in range(layers)}
    moments = {f"{name}/{key}": tensor.clone() for name, tensor in model.items() for key in ("exp_avg", "exp_avg_sq")}
    timed: dict[str, list[float]] = {"a save": [], "without hashes": [], "checking it at a resume": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        for step in range(args.rounds):
            timed["a save"].append(
                seconds(lambda step=step: state.save_state(folder, {"step": 2 * step}, model, moments))
            )
            facts = state.read_facts(folder)
            timed["checking it at a resume"].append(seconds(lambda facts=facts: state.check_files(folder, facts)))
            with mock.patch.object(state, "sha256_of", return_value=""):
                save = seconds(lambda step=step: state.save_state(folder, {"step": 2 * step + 1}, model, moments))
            timed["without hashes"].append(save)
    size = 12 * args.params / 1e9
    print(f"a state of {args.params:,} parameters, {size:.2f} GB, median of {args.rounds}:")
    for name, times in timed.items():
        print(f"  {name:<26} {statistics.median(times):6.2f} s   {size / statistics.median(times):5.2f} GB/s")


if __name__ == "__main__":
    main()
