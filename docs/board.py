"""The tables of docs/speedrun.md, made anew from the records in configs/records: `python docs/board.py [--check]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanogpt_hub.compare import markdown
from nanogpt_hub.system.readable import flatten
from train.speedrun import TRACKS, board, record_of

PAGE = Path(__file__).with_name("speedrun.md")
MARK = "<!-- made by docs/board.py -->\n"


def page() -> str:
    """The page with its tables as the records are."""
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    parts = [board()]
    for name, track in TRACKS.items():
        record = record_of(name)
        parts.append(f"## {name}\n\nOn {track.hardware}, to {track.goal} bits per byte: {track.about}.")
        if record is None:
            parts[-1] += f" No record yet: `nanogpt-hub speedrun {name}` on {track.hardware} makes the first one."
            continue
        runs = [
            [str(run["seed"]), str(run["steps"]), f"{run['seconds']:.1f}", f"{run['bits_per_byte']:.4f}"]
            for run in record["runs"]
        ]
        settings = ", ".join(f"{key} {value}" for key, value in flatten(record["settings"]).items())
        versions = ", ".join(f"{key} {value}" for key, value in record.get("versions", {}).items())
        parts += [
            f"[configs/{track.config}.yaml](../configs/{track.config}.yaml); "
            f"its log: [configs/records/{name}.json](../configs/records/{name}.json)",
            markdown(["seed", "steps", "seconds", "bits per byte"], runs),
            f"{record['hardware']}, {record['precision']}; {versions}. Settings: {settings}.",
        ]
    return head + MARK + "\n".join(f"{part}\n" for part in parts)


def main() -> int:
    made = page()
    if PAGE.read_text(encoding="utf-8") == made:
        return 0
    if "--check" in sys.argv:
        print(f"out of date: {PAGE}; run python docs/board.py")
        return 1
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
