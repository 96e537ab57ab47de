"""Makes the figures of the lessons anew: runs the commands of each with three seeds and writes the bands.

    python -m lessons.figures [03 05 ...] [--seeds 1337 1 2] [--out out/lessons]

Of each lesson's README, the lines of its ```sh blocks that train or run a script are taken as they stand, with a seed
and a folder of its own added; those that name a seed themselves are left out. What they reach, from the lowest to the
highest, is written to figures.json beside the README and as a table between its markers. Seconds are those of processor
time, start and evaluation included.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import runpy
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from tqdm import tqdm

from nanogpt_hub.runs import read_run
from train import finetune, pretrain

HERE = Path(__file__).parent
MARKS = re.compile(r"(<!-- figures: begin -->\n).*?(<!-- figures: end -->)", re.DOTALL)
TRAINERS: dict[str, Callable[[list[str]], int]] = {"train.pretrain": pretrain.main, "train.finetune": finetune.main}


def commands(readme: str) -> list[str]:
    """The lines of a lesson's ```sh blocks that train or run a script; not those that name a seed: they repeat one."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if re.match(r"python (-m train|lessons/)", line)]
    return [line for line in lines if "--seed" not in line]


def run(command: str, seed: int, out: Path) -> dict[str, float]:
    """What a command reaches with a seed: its numbers by name."""
    words = [re.sub(r"^out/", f"{out.as_posix()}/{seed}/", word) for word in shlex.split(command)[1:]]
    began = time.process_time()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if words[0] == "-m":
            found = train(words[1], [*words[2:], "--seed", str(seed)], out / str(seed))
        else:
            arguments, sys.argv = sys.argv, [*words, "--seed", str(seed)]
            try:
                runpy.run_path(words[0], run_name="__main__")
            finally:
                sys.argv = arguments
            pairs = re.findall(r"^(.+): ([\d.]+)$", printed.getvalue(), re.MULTILINE)
            found = {name: float(number) for name, number in pairs}
    return {**found, "processor seconds": time.process_time() - began}


def train(module: str, words: list[str], out: Path) -> dict[str, float]:
    """The losses of a training run; its folder is the given one, or that of its config in `out`."""
    if "--out_dir" not in words:
        words += ["--out_dir", str(out / Path(words[0]).stem)]
    folder = Path(words[words.index("--out_dir") + 1])
    if TRAINERS[module]([*words, "--overwrite"]):
        raise SystemExit(f"python -m {module} {shlex.join(words)} did not end well")
    rows = read_run(folder).rows
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    found = {"first validation loss": losses[0], "best validation loss": min(losses)}
    if losses[-1] - min(losses) > 0.01:
        found["rises by"] = losses[-1] - min(losses)
    found["last training loss"] = [row["train_loss"] for row in rows if "train_loss" in row][-1]
    evaluation = json.loads((folder / "run.json").read_text(encoding="utf-8"))["evaluation"]
    if "floor_loss" in evaluation:
        found["above the entropy"] = min(losses) - evaluation["floor_loss"]
    return found


def band(numbers: list[float]) -> str:
    """ "0.345 to 0.351", or one number where all are the same."""
    low, high = (f"{x:.0f}" if x >= 50 or x == int(x) else f"{x:.3f}" for x in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def as_table(figures: dict[str, dict[str, list[float]]]) -> str:
    """Figures by command as Markdown: one row a number."""
    lines = ["| | |", "|---|---:|"]
    for command, found in figures.items():
        lines.append(f"| `{command.removeprefix('python ')}` | |")
        lines += [f"| {name} | {band(numbers)} |" for name, numbers in found.items()]
    return "\n".join(lines) + "\n"


def make(lesson: Path, seeds: list[int], out: Path) -> None:
    """Runs a lesson, the seeds side by side, and writes its figures."""
    readme = (lesson / "README.md").read_text(encoding="utf-8")
    figures = {}
    with ProcessPoolExecutor(len(seeds), multiprocessing.get_context("spawn")) as pool:
        for command in tqdm(commands(readme), desc=lesson.name, leave=False):
            found = [*pool.map(run, repeat(command), seeds, repeat(out))]
            figures[command] = {name: [one[name] for one in found if name in one] for name in found[0] | found[-1]}
            print(f"{lesson.name}: {command}\n  {figures[command]}", file=sys.stderr, flush=True)
    text = json.dumps({"seeds": seeds, "figures": figures}, indent=1) + "\n"
    (lesson / "figures.json").write_text(text, encoding="utf-8")
    readme = (lesson / "README.md").read_text(encoding="utf-8")  # which somebody may have edited in the meantime
    (lesson / "README.md").write_text(MARKS.sub(rf"\g<1>{as_table(figures)}\g<2>", readme), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", nargs="*", metavar="NN", help="numbers of lessons; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/lessons"), help="folder of the runs")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process
    folders = [
        folder for folder in sorted(HERE.glob("[0-9][0-9]_*")) if not args.lessons or folder.name[:2] in args.lessons
    ]
    for folder in folders:
        make(folder, args.seeds, args.out)


if __name__ == "__main__":
    main()
