"""A race that anybody can run again: fixed text, fixed goal, fixed hardware; what counts is the seconds of training.

    nanogpt-hub speedrun                                  # the tracks and their records
    nanogpt-hub speedrun shakespeare                      # runs the record anew
    nanogpt-hub speedrun shakespeare mine.yaml            # runs a config of yours: is it faster?

A submission is a config. It is trained with each of the seeds, on the track's training text; then its *weights* are
loaded from `last/` and measured on the whole validation text, which must be coded in no more bits per byte than the
goal. The seconds are those of the run's own log, from the first step to the last one, evaluations included,
compiling not; the median over the seeds is the time. A record is a config under configs/ and its log under
configs/records/.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from nanogpt_hub.checkpoint import load_model, read_json
from nanogpt_hub.compare import markdown
from nanogpt_hub.evaluate import evaluate
from nanogpt_hub.runs import METRICS
from nanogpt_hub.sources import open_source
from nanogpt_hub.system.files import write_atomic
from nanogpt_hub.system.installed import PACKAGE, part, shown
from nanogpt_hub.system.readable import flatten

from .report import read_metrics

PROG = f"python -m {__package__}.speedrun"  # as it is typed; `nanogpt-hub` gives its own
SEEDS = (1, 2, 3)
CPU, T4, GPU = "two CPU cores", "one T4", "one GPU"  # the classes of hardware
TOKENIZERS = re.compile(r"char|byte|gpt2|bpe:\d+")  # whose vocabulary holds nothing of the validation text
NOT_YOURS = ("data", "out_dir", "seed", "minutes", "device", "hub", "trackers", "lora")  # settings that the track makes


@dataclass(frozen=True)
class Track:
    """What is raced on."""

    about: str
    goal: float  # bits per byte of the validation text, read in windows of the model's context
    hardware: str
    config: str  # of the record, by its name under configs/
    source: str  # the training text
    val_source: str = ""  # empty: of the source's characters the last tenth
    sha256: str = ""  # of the text that is measured, or that it is cut from


SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SMALL = "nanoGPT's small Shakespeare run for a CPU: the loss of its own log, 1.886 nats per character"
LARGE = "nanoGPT's Shakespeare run for a GPU: its best loss, 1.4697 nats per character"
TRACKS = {
    "shakespeare": Track(SMALL, 2.72, CPU, "shakespeare_speedrun_cpu", SHAKESPEARE, sha256=SHAKESPEARE_SHA256),
    "stories": Track(
        "stories with a plot, whose entropy is 0.099 bits per byte; nothing is downloaded", 0.15, CPU,
        "stories_speedrun_cpu", "stories", "stories:level=4,seed=1000,size=200000",
        "6391d385522f6ff7fd54a61db44e271e8558f3c7f9ce3253b4de56a6aa905620",
    ),
    "shakespeare-t4": Track(LARGE, 2.1204, T4, "shakespeare_speedrun", SHAKESPEARE, sha256=SHAKESPEARE_SHA256),
    "shakespeare-gpu": Track(LARGE, 2.1204, GPU, "shakespeare_speedrun", SHAKESPEARE, sha256=SHAKESPEARE_SHA256),
}  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """What a config reached with a seed."""

    seed: int
    steps: int
    seconds: float
    bits_per_byte: float  # measured from the weights
    log: list[tuple[int, float, float]]  # step, seconds and validation loss of each evaluation of the run


# ---- before ----------------------------------------------------------------------------------------------------------


def check_config(path: Path, track: Track) -> dict[str, Any]:
    """The settings of a submission. Raises ValueError where one of them is not its own to make."""
    if not path.is_file():
        raise ValueError(f"there is no config {path}; give a YAML file, or none for the record's own")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: write it as those in configs/")
    data = settings.get("data") or {}
    told = {key for key in settings if key in NOT_YOURS[1:]} | {f"data.{key}" for key in data if key != "tokenizer"}
    if data.get("source") == track.source:
        told.discard("data.source")
    if told:
        raise ValueError(f"{path} sets {', '.join(sorted(told))}, which the track sets for everybody; leave that out")
    if not TOKENIZERS.fullmatch(str(data.get("tokenizer", "bpe:1024"))):
        raise ValueError(f"data.tokenizer is {data['tokenizer']!r}; a track takes char, byte, gpt2 or bpe:N")
    return settings


def check_hardware(track: Track) -> None:
    """Raises ValueError where this machine is not of the track's class."""
    if track.hardware == CPU:
        if len(cores()) < 2:
            raise ValueError(f"the track is for {CPU}, and this process has one")
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    if name == "no GPU" or (track.hardware == T4 and "T4" not in name):
        raise ValueError(f"the track is for {track.hardware}, and this machine has {name}")


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def texts(track: Track, out: Path, given: str = "") -> tuple[str, str]:
    """The sources of the training and the validation text. given: where the text is, instead of its address.

    Raises ValueError for a text that is not the track's.
    """
    measured = track.val_source or given or track.source
    text = "".join(open_source(measured).texts())
    if (found := hashlib.sha256(text.encode()).hexdigest()) != track.sha256:
        raise ValueError(f"{measured} is another text than the track's (sha256 {found[:12]}...)")
    if track.val_source:
        return track.source, track.val_source
    cut = int(0.9 * len(text))
    out.mkdir(parents=True, exist_ok=True)
    for name, piece in (("train.txt", text[:cut]), ("validation.txt", text[cut:])):
        write_atomic(out / name, piece)
    return str(out / "train.txt"), str(out / "validation.txt")


# ---- a run -----------------------------------------------------------------------------------------------------------


def timed_run(config: str | Path, out: Path, flags: Sequence[str], quiet: bool = False) -> list[dict[str, Any]]:
    """Trains a config in a process of its own; the rows of its log. Raises ValueError where it did not end well."""
    command = [sys.executable, "-m", "nanogpt_hub", "train", str(config), f"--out_dir={out}", "--overwrite", *flags]
    paths = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL if quiet else None, check=False
    )
    if done.returncode:
        raise ValueError(f"training ended with status {done.returncode}; its own words are above")
    return read_metrics(out / METRICS)


@contextlib.contextmanager
def on_hardware(track: Track) -> Iterator[list[str]]:
    """Processes that are started inside have the track's hardware; gives the flags that go with it."""
    if track.hardware != CPU:
        yield ["--device=cuda"]
        return
    mine, threads = cores(), os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "2"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine[:2])
    try:
        yield ["--device=cpu"]
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, mine)
        os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)


def attempt(track: Track, config: Path, seed: int, sources: tuple[str, str], out: Path) -> Attempt:
    """Trains a config with a seed, and measures the weights that it left."""
    with on_hardware(track) as flags:
        flags += [f"--data.source={sources[0]}", f"--data.val_source={sources[1]}", f"--seed={seed}"]
        rows = timed_run(config, out, flags)
    log = [(row["step"], row["seconds"], row["val_loss"]) for row in rows if "val_loss" in row]
    model, tokenizer = load_model(out / "last", device="cpu" if track.hardware == CPU else "cuda")
    assert tokenizer is not None  # each run saves one
    found = evaluate(model, tokenizer, open_source(sources[1]))
    return Attempt(seed, rows[-1]["step"], rows[-1]["seconds"], found.bits_per_byte, log)


# ---- records ---------------------------------------------------------------------------------------------------------


def record_of(name: str) -> dict[str, Any] | None:
    """The standing record of a track."""
    path = part("configs") / "records" / f"{name}.json"
    return read_json(path) if path.is_file() else None


def as_record(name: str, settings: dict[str, Any], attempts: Sequence[Attempt], out: Path) -> dict[str, Any]:
    """What is kept of a race."""
    training = read_json(out / f"seed-{attempts[-1].seed}" / "run.json").get("training", {})
    about = {key: training[key] for key in ("hardware", "precision", "versions", "commit") if key in training}
    return {
        "track": name, "goal": TRACKS[name].goal, "seconds": median(run.seconds for run in attempts),
        "settings": settings, **about, "runs": [asdict(run) for run in attempts],
    }  # fmt: skip


def verdict(track: Track, record: dict[str, Any], standing: dict[str, Any] | None) -> str:
    """What came of it, in a sentence."""
    missed = [run["seed"] for run in record["runs"] if not run["bits_per_byte"] <= track.goal]
    if missed:
        return f"The goal, {track.goal} bits per byte, was not reached with seed {', '.join(map(str, missed))}."
    if len(record["runs"]) < len(SEEDS):
        return f"The goal was reached; a record needs the seeds {', '.join(map(str, SEEDS))}."
    if standing is None:
        return "The goal was reached with each seed: the first record of this track."
    ratio = record["seconds"] / standing["seconds"]
    same = flatten(record["settings"]) == flatten(standing["settings"])
    compared = (
        f"{record['seconds']:.1f} s here, {standing['seconds']:.1f} s on the record's machine ({ratio:.2f} times)"
    )
    return f"The goal was reached with each seed: {compared}." + (
        " This is the record's own config: compare others with its time here." if same else
        " Whether it is faster, only turns on one machine can tell: run the record here, too."
    )  # fmt: skip


def race(name: str, config: Path, seeds: Sequence[int], given: str, out: Path) -> dict[str, Any]:
    """Runs a config on a track, writes record.json into `out` and returns what it holds."""
    track = TRACKS[name]
    settings = check_config(config, track)
    check_hardware(track)
    sources, attempts = texts(track, out, given), []
    for seed in seeds:
        attempts.append(attempt(track, config, seed, sources, out / f"seed-{seed}"))
        last = attempts[-1]
        print(f"seed {seed}: {last.seconds:.1f} s, {last.bits_per_byte:.4f} bits per byte by the weights", flush=True)
    record = as_record(name, settings, attempts, out)
    write_atomic(out / "record.json", json.dumps(record, indent=1) + "\n")
    return record


def board() -> str:
    """All tracks and their records, as a table."""
    rows = []
    for name, track in TRACKS.items():
        found = record_of(name)
        rows.append([
            name, track.hardware, f"{track.goal}", f"{found['seconds']:.1f} s" if found else "none yet",
            f"{max(run['bits_per_byte'] for run in found['runs']):.4f}" if found else "",
            str(found["hardware"]) if found else "",
        ])  # fmt: skip
    return markdown(["track", "hardware", "goal, bits per byte", "record", "its worst seed", "machine"], rows)


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """The command: returns its exit status, with a sentence on standard error where it is not 0."""
    parser = argparse.ArgumentParser(
        prog=prog, description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("track", nargs="?", choices=TRACKS, help="what to race on; without one the records are shown")
    parser.add_argument("config", nargs="?", type=Path, help="a YAML file (default: the record's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="INT", help="default: 1 2 3")
    parser.add_argument(
        "--text", default="", metavar="FILE", help="where the track's text lies, instead of downloading it"
    )
    parser.add_argument("--out", type=Path, help="folder of the runs (default: out/speedrun/TRACK)")
    args = parser.parse_args(argv)
    if not args.track:
        print(board())
        return 0
    track, out = TRACKS[args.track], args.out or Path("out/speedrun") / args.track
    config = args.config or part("configs") / f"{track.config}.yaml"
    try:
        record = race(args.track, config, args.seeds, args.text, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{track.about}\n{verdict(track, record, record_of(args.track))}\nkept in {shown(out / 'record.json')}")
    return int(any(not run["bits_per_byte"] <= track.goal for run in record["runs"]))


if __name__ == "__main__":
    sys.exit(main())
