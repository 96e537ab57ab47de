"""The run's folder: one run at a time writes to it, nothing half written stays in it, and what goes wrong with the disk
is a sentence that says what is needed and what is safe."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from nanogpt_hub.checkpoint import read_header, read_json, weight_files
from nanogpt_hub.system.files import FULL, remove_leftovers
from nanogpt_hub.system.readable import reason, size
from nanogpt_hub.tokenizer import Tokenizer

from .state import PREVIOUS, STATE, find_whole

LOCK = ".lock"
OUTPUTS = ("best", "last", "state", "samples")  # of a run, beside its single files
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


class TrainingError(RuntimeError):
    """The run cannot go on; what it has saved is whole."""


# ---- one run at a time -----------------------------------------------------------------------------------------------


class RunLock:
    """Held by the one run that writes to a folder. The system frees it when the process ends, however it ends."""

    def __init__(self, out: Path, wanted: bool = True):
        """`wanted`: on the main process, the only one that writes."""
        self.out, self.lock = out, FileLock(out / LOCK) if wanted else None
        self.late = not out.is_dir()  # a folder that is not there yet is made when the run begins, and locked then

    def __enter__(self) -> "RunLock":
        if not self.late:
            self.claim()
        return self

    def __exit__(self, *_) -> None:
        if self.lock is not None:
            self.lock.release(force=True)

    def claim(self) -> None:
        """Takes the lock, and removes what killed runs left half written. ValueError where another run has it."""
        if self.lock is None or self.lock.is_locked:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run is writing to {self.out}: wait until it ends, stop it, or choose another --out_dir"
            ) from None
        except NotImplementedError:  # a network disk without locks: as good as it gets
            self.lock = None
        except OSError as error:
            raise ValueError(disk_trouble(error, self.out)) from error
        if self.late and any((self.out / name).exists() for name in OUTPUTS):
            raise ValueError(f"another run has begun to write to {self.out}: choose another --out_dir")
        for folder in (self.out, *(self.out / name for name in OUTPUTS)):
            remove_leftovers(folder)


def empty(out: Path) -> None:
    """Removes an earlier run's models, state and samples, what tells that they are a run first."""
    (out / "config.yaml").unlink(missing_ok=True)
    for name in OUTPUTS:
        shutil.rmtree(out / name, ignore_errors=True)


def may_begin_again(out: Path, settings: str) -> bool:
    """Whether the run in a folder, which has no training state, was stopped before its first save, and beginning it
    again loses nothing: these are its settings (the text of config.yaml), so it does the same steps; or it had made
    none that made it better."""
    path, record = out / "config.yaml", out / "run.json"
    if (out / "last").exists() or not path.is_file():
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(record.read_text(encoding="utf-8"))["training"]["steps"] == 0:
            return True
    return without_comments(path.read_text(encoding="utf-8", errors="replace")) == without_comments(settings)


def without_comments(text: str) -> str:
    return re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)


def check_best(folder: Path) -> None:
    """Looks whether the files of best/ are whole, as far as they tell. Raises ValueError that names one that is not.

    A run that goes on replaces best/ when it finds a better model, and not before.
    """
    try:
        read_json(folder / "config.json")
        for path in weight_files(folder):
            read_header(path)
        Tokenizer.load(folder)
        if (folder / "README.md").is_file():
            (folder / "README.md").read_text(encoding="utf-8")
        json.loads((folder.parent / "run.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{folder} is damaged ({reason(error)}): bring it back, or delete it: then the next evaluation writes one"
        ) from error


# ---- trouble with the disk -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_errors(out: Path, needed: int = 0) -> Iterator[None]:
    """Turns what goes wrong in writing to the run's folder into a TrainingError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{disk_trouble(error, out, needed)}. {what_is_safe(out)}") from error


def disk_trouble(error: BaseException, out: Path, needed: int = 0) -> str:
    """What is wrong with the disk, and what is needed."""
    number = error_number(error)
    if not out.is_dir():
        return f"the folder {out} has vanished while the run was writing to it: bring back it or its disk"
    if number in FULL:
        room = f"; a save needs {size(needed)}, {size(free_bytes(out))} are free" if needed else ""
        limit = "a file may not be that large here" if number == errno.EFBIG else "the disk is full"
        return f"cannot write to {out}: {limit}{room}. Make room"
    if number in FORBIDDEN:
        return f"cannot write to {out}: {os.strerror(number)}. Make it writable, or choose another --out_dir"
    return f"cannot write to {out}: {reason(error)}"


def what_is_safe(out: Path) -> str:
    """What of the run is on the disk, whole."""
    state = out / "state"
    facts = find_whole(state, STATE) or find_whole(state, PREVIOUS)
    if facts is not None:
        return f"Safe is the training state of step {facts['step']}: the same command goes on from there"
    if (out / "best" / "config.json").is_file():
        return f"No training state was saved yet: the same command begins again; {out / 'best'} is whole"
    return "Nothing of this run was saved yet"


def error_number(error: BaseException) -> int | None:
    """The system's number of an error; safetensors has it in its text only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else None)


def free_bytes(out: Path) -> int:
    """What the disk has left for a folder that may not be there yet."""
    there = next(place for place in (out.absolute(), *out.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free
