"""The ladder: one small run per file in configs/ladder, each with one thing changed, and a table of what that did.

    python -m benchmarks.ladder [--data.source input.txt] [any other option of train.pretrain]
    python -m benchmarks.ladder --rungs 8,9 [...]              # only these, compared with the one before in the list

Every rung trains for 500 steps of 12 x 64 characters; the loss is that of the last evaluation.
"""

import json
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from train.report import read_metrics

RUNGS = sorted((Path(__file__).parents[1] / "configs" / "ladder").glob("*.yaml"))
OUT = Path("out/ladder")


def climb(config: Path, options: list[str]) -> dict:
    """Trains one rung and returns what it reached."""
    out = OUT / config.stem
    command = [sys.executable, "-m", "train.pretrain", str(config), "--out_dir", str(out), "--overwrite", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    last = [row for row in read_metrics(out / "metrics.jsonl") if "val_loss" in row][-1]
    return {"rung": config.stem, **{key: last[key] for key in ("step", "val_loss", "seconds")}}


def chosen(options: list[str]) -> tuple[list[Path], list[str]]:
    """The rungs that `--rungs 8,9` names, all without it, and the options that are the trainer's."""
    if "--rungs" not in options:
        return RUNGS, options
    at = options.index("--rungs")
    numbers = options[at + 1].split(",") if len(options) > at + 1 else []
    known = {path.stem.partition("_")[0]: path for path in RUNGS}
    if not numbers or not known.keys() >= set(numbers):
        raise SystemExit(f"--rungs takes numbers such as 8,9; there are {', '.join(known)}")
    return [known[number] for number in numbers], [*options[:at], *options[at + 2 :]]


def main(options: list[str]) -> None:
    rungs, options = chosen(options)
    rows = [climb(config, options) for config in tqdm(rungs, desc="ladder", unit="run")]
    print("| rung | loss after 500 steps | change | seconds |\n|---|---:|---:|---:|")
    for before, row in zip([None, *rows], rows, strict=False):
        change = f"{row['val_loss'] - before['val_loss']:+.3f}" if before else ""
        print(f"| {row['rung'].replace('_', ' ')} | {row['val_loss']:.3f} | {change} | {row['seconds']:.0f} |")
    (OUT / "ladder.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
