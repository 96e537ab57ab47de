"""What a training run left to look at: its curves, the samples of its kept steps, and whether it is still going on.

    run = read_run("out/quickstart")          # or the folder training/ of a model from the Hub
    run.samples[500], run.at(500)["val_loss"]

Logs may come from anywhere, so what is in them is taken only where it is what it should be.
"""

import base64
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from nanogpt_hub.checkpoint import read_json

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "metrics.jsonl"
CURVES = {"train_loss": "training", "val_loss": "validation"}
MAX_BYTES = 16 * 2**20  # of a log that is read
MAX_MAPS = 2**20  # bytes of a step's attention maps that are read
MAX_POINTS = 400  # of a curve that is drawn; more than a screen shows
STILL_SECONDS = 120  # a log that has not grown for so long belongs to a run that ended or was stopped


@dataclass(frozen=True)
class Run:
    """A run as its files tell it."""

    name: str
    folder: Path
    rows: tuple[dict[str, float], ...]  # by step: step, and what was measured there
    samples: dict[int, Path] = field(default_factory=dict)  # step -> text file
    max_steps: int | None = None
    floor: float | None = None  # the entropy of its text in nats per token, where the source knows it: the lowest loss
    changed: float = 0.0  # when its log grew last, seconds since the epoch; 0 for one that is not written here

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def best_step(self) -> int | None:
        """Where the validation loss was lowest; None where it was never measured."""
        measured = [row for row in self.rows if "val_loss" in row]
        return int(min(measured, key=lambda row: row["val_loss"])["step"]) if measured else None

    def going_on(self, now: float | None = None) -> bool:
        """Whether it seems to be training at this moment."""
        fresh = (time.time() if now is None else now) - self.changed < STILL_SECONDS
        return fresh and self.max_steps is not None and self.last_step < self.max_steps

    def at(self, step: int) -> dict[str, float]:
        """What was measured last, up to a step."""
        known: dict[str, float] = {}
        for row in self.rows:
            if row["step"] <= step:
                known |= row
        return known

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of one measure, thinned evenly to what a screen can show; both ends stay."""
        points = [(int(row["step"]), row[key]) for row in self.rows if key in row]
        every = max(1, math.ceil(len(points) / MAX_POINTS))
        return points[::every] + (points[-1:] if points and (len(points) - 1) % every else [])

    def sample(self, step: int, most: int = 4000) -> str:
        """The text that was written at a kept step, cut to `most` characters."""
        if step not in self.samples:
            return ""
        with open(self.samples[step], encoding="utf-8", errors="replace", newline="") as file:
            return file.read(most)

    def attention(self, step: int) -> dict[str, Any] | None:
        """Where the heads looked at a kept step, as `attention_json` wrote it; None where it was not kept."""
        path = self.folder / "samples" / attention_file(step)
        if not path.is_file() or path.stat().st_size > MAX_MAPS:
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except (ValueError, RecursionError):
            return None
        return found if is_attention(found) else None


def read_run(folder: str | Path, name: str = "") -> Run:
    """The run in a folder; without rows where it has no log."""
    folder = Path(folder)
    log = folder / METRICS
    samples: dict[int, Path] = {}
    for path in folder.glob("samples/step-*.txt"):
        step = re.fullmatch(r"step-(\d{1,12})\.txt", path.name)
        samples |= {int(step[1]): path} if step else {}
    came_along = folder.name == "training" and (folder.parent / "config.json").is_file()  # with a model from the Hub
    changed = log.stat().st_mtime if log.is_file() and not came_along else 0.0  # of a download, the time tells nothing
    return Run(
        name or folder.name, folder, tuple(read_rows(log)), dict(sorted(samples.items())),
        max_steps(folder), known_floor(folder), changed,
    )  # fmt: skip


def read_rows(log: Path, max_bytes: float = MAX_BYTES) -> list[dict[str, float]]:
    """The rows of a log, by step: numbers only. Whatever else a line holds is passed over, and a log of more bytes."""
    if not log.is_file() or log.stat().st_size > max_bytes:
        return []
    rows: list[dict[str, float]] = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a run that writes at this moment
        numbers = {k: v for k, v in row.items() if is_number(v)} if isinstance(row, dict) else {}
        if isinstance(numbers.get("step"), int):
            rows.append(numbers)
    return sorted(rows, key=lambda row: row["step"])


def attention_file(step: int) -> str:
    return f"step-{step:06d}-attention.json"


def attention_json(tokens: Sequence[str], maps: "Tensor") -> dict[str, Any]:
    """Attention maps (L, H, T, T) over T tokens: a byte for each weight, row by row, as base64."""
    rows = [
        [base64.b64encode(head.numpy().tobytes()).decode() for head in layer] for layer in (maps * 255).round().byte()
    ]
    return {"tokens": list(tokens), "layers": len(maps), "heads": len(maps[0]), "maps": rows}


def is_attention(found: object) -> bool:
    """Whether a file holds what `attention_json` makes."""
    if not isinstance(found, dict):
        return False
    tokens, maps = found.get("tokens"), found.get("maps")
    if not isinstance(tokens, list) or not isinstance(maps, list) or not all(isinstance(t, str) for t in tokens):
        return False
    length = 4 * math.ceil(len(tokens) ** 2 / 3)  # of base64
    heads = [head for layer in maps for head in (layer if isinstance(layer, list) else [None])]
    shape = (len(maps), len(heads) / max(1, len(maps)))
    right = all(isinstance(head, str) and re.fullmatch(rf"[A-Za-z0-9+/=]{{{length}}}", head) for head in heads)
    return right and 0 < len(tokens) <= 256 and bool(heads) and shape == (found.get("layers"), found.get("heads"))


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15  # NaN is not


def max_steps(folder: Path) -> int | None:
    """How many steps the run was asked for; None where its config does not tell."""
    path = folder / "config.yaml"
    if not is_small(path):
        return None
    found = re.search(r"^max_steps: (\d{1,12})$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return int(found[1]) if found else None


def known_floor(folder: Path) -> float | None:
    """The entropy of a run's text in nats per token, as run.json tells it; None where it holds no such number."""
    path = folder / "run.json"
    if not is_small(path):
        return None
    try:
        evaluation = read_json(path).get("evaluation")
    except (ValueError, OSError):
        return None
    floor = evaluation.get("floor_loss") if isinstance(evaluation, dict) else None
    return float(floor) if is_number(floor) and floor > 0 else None


def is_small(path: Path) -> bool:
    """Whether there is such a file, of a size that a run's own have."""
    return path.is_file() and path.stat().st_size <= MAX_BYTES


def find_runs(root: str | Path | None) -> list[Path]:
    """The runs in a folder of runs, the one that changed last first. The folder may also be a run itself."""
    if root is None:
        return []
    logs = [log for pattern in (METRICS, f"*/{METRICS}", f"*/*/{METRICS}") for log in Path(root).glob(pattern)]
    return [log.parent for log in sorted(logs, key=lambda log: log.stat().st_mtime, reverse=True)]


def run_of(model_folder: Path) -> Path | None:
    """Where the log of a model's training is: beside it in its run folder, or under training/ if it is from the Hub."""
    for folder in (model_folder / "training", model_folder.parent):
        if (folder / METRICS).is_file():
            return folder
    return None


def run_record(model_folder: Path) -> dict[str, Any]:
    """The run.json that came with a model, or lies in the run around it; empty where there is none.

    Raises CheckpointError for a file that is not JSON.
    """
    record = model_folder / "training" / "run.json"
    around = model_folder.resolve().parent
    if not record.is_file() and (around / METRICS).is_file():
        record = around / "run.json"
    return read_json(record) if record.is_file() else {}
