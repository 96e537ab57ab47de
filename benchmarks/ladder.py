"""The ladder: one small run per file in configs/ladder, each with one thing changed, and a table of what that did.

    python -m benchmarks.ladder                         # on tinyshakespeare, which is downloaded
    python -m benchmarks.ladder --data.source stories   # or python: without a network
    python -m benchmarks.ladder --rungs 8,9             # only these, compared with the one before in the list
    python -m benchmarks.ladder --rungs 8 --max_steps 935    # any option of train.pretrain is passed on

Every rung trains for 500 steps of 12 x 64 characters; the loss is that of the last evaluation. A row is printed as soon
as its run has ended; all of them are kept in out/ladder/ladder.json.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml

from nanogpt_hub.sources import SourceError, open_source
from train.speedrun import timed_run

RUNGS = sorted((Path(__file__).parents[1] / "configs" / "ladder").glob("*.yaml"))
OUT = Path("out/ladder")


def climb(config: Path, options: list[str]) -> dict:
    """Trains one rung and returns what it reached."""
    last = [row for row in timed_run(config, OUT / config.stem, options, quiet=True) if "val_loss" in row][-1]
    return {"rung": config.stem, **{key: last[key] for key in ("step", "val_loss", "seconds")}}


def row_of(row: dict, before: dict | None) -> str:
    """A row of the table, with the change against the rung below."""
    change = f"{row['val_loss'] - before['val_loss']:+.3f}" if before else ""
    return f"| {row['rung'].replace('_', ' ')} | {row['val_loss']:.3f} | {change} | {row['seconds']:.0f} |"


def chosen(numbers: str) -> list[Path]:
    """The rungs of a list such as "8,9"; all of them for an empty one. Raises ValueError for one that there is not."""
    known = {path.stem.partition("_")[0]: path for path in RUNGS}
    wanted = [number.strip() for number in numbers.split(",")] if numbers else [*known]
    if unknown := [number for number in wanted if number not in known]:
        raise ValueError(f"--rungs takes numbers such as 8,9, not {unknown[0]!r}; there are {', '.join(known)}")
    return [known[number] for number in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = yaml.safe_load(RUNGS[0].read_text(encoding="utf-8"))["data"]["source"]
    parser.add_argument("--data.source", dest="source", default=usual, metavar="SOURCE", help=f"default: {usual}")
    parser.add_argument("--rungs", default="", metavar="8,9", help="only these (default: all)")
    args, options = parser.parse_known_args()
    try:
        rungs, rows = chosen(args.rungs), []
        open_source(args.source)
        for config in rungs:
            rows.append(climb(config, [f"--data.source={args.source}", *options]))
            if len(rows) == 1:
                print(f"| rung | loss after {rows[0]['step']} steps | change | seconds |\n|---|---:|---:|---:|")
            print(row_of(rows[-1], rows[-2] if len(rows) > 1 else None), flush=True)
    except SourceError as error:
        sys.exit(f"{error}\n(--data.source stories and --data.source python need no network)")
    except ValueError as error:
        sys.exit(str(error))
    (OUT / "ladder.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
