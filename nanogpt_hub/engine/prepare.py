"""Compiled code that can be trusted: made and checked by a process of its own, recorded by a stamp.

    python -m nanogpt_hub.engine.prepare         # make it now, and say how it went

A compiler may fail in any way: an error, a wrong number, an endless loop, an abort that takes the process with it. So
it runs in a child process, which compiles the kernels, compares them with the plain way for a tiny model of each kind,
and only then writes a stamp. A process that generates loads nothing but stamped code; without a stamp it goes on in
PyTorch, in the same process and to the end.

The folder of a stamp (`engine-UID/KEY` in $NANOGPT_HUB_CACHE, else in ~/.cache/nanogpt_hub) belongs to one user and one
combination of versions, CPU and source: whatever changes, the code is made anew. Nobody else may read or write there,
because what it holds is run.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from nanogpt_hub.system.files import sha256_of, write_atomic

logger = logging.getLogger("nanogpt_hub.engine")

PACKAGES = ("numba", "llvmlite", "numpy", "torch")
HERE = Path(__file__).parent
SOURCES = (*sorted(HERE.glob("*.py")), HERE.parent / "model.py", HERE.parent / "sampling.py")
SECONDS = 600  # after which a child is given up; NANOGPT_HUB_ENGINE_SECONDS changes it
ATTEMPTS = 2  # that may end without a stamp (a machine may be switched off in the middle)
TRY_AGAIN = 24 * 3600.0  # seconds after which a failure is forgotten
CODE = "code"  # the part of a folder that is Numba's
BUSY = 3  # exit status of a child that finds another at work
PATIENCE = 5.0  # seconds that a child waits for the lock, which a process that looks whether one is at work has briefly


class Stamp(NamedTuple):
    """What is known of the compiled code in a folder."""

    status: str  # "ready"; "failed"; "started": a child is at it, or ended in the middle; "lost"; "none"
    reason: str = ""  # of a failure, a few words
    attempts: int = 0
    when: float = 0.0  # seconds since 1970
    seconds: float = 0.0  # that compiling and checking took
    target: str = ""  # CPU that the code was compiled for
    pid: int = 0  # of the process that compiled
    code: str = ""  # hash of the compiled code: what was changed since is not loaded

    @property
    def may_try(self) -> bool:
        """Whether a child is worth starting."""
        if self.status == "ready":
            return False
        return self.attempts < ATTEMPTS or self.is_old

    @property
    def is_old(self) -> bool:
        return not 0 <= time.time() - self.when < TRY_AGAIN


@cache
def key() -> str:
    """Names the combination of versions, CPU and source files that compiled code belongs to. ImportError: no Numba."""
    from llvmlite import binding

    facts: list[Any] = [platform.python_version(), sys.platform, platform.machine()]
    facts += map(importlib.metadata.version, PACKAGES)
    facts += [binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()]
    facts += [os.environ.get(name) for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT")]
    facts += [sha256_of(path) for path in SOURCES]
    facts += [str(HERE), [path.stat().st_mtime_ns for path in SOURCES if path.parent == HERE]]  # as Numba's cache does
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


@cache
def folder() -> Path:
    """Where this combination's code and stamp are: in the cache or, where that is not possible, among the temporary
    files. OSError where neither gives a folder of this user alone."""
    from nanogpt_hub.sources import cache_root

    mine = f"engine-{os.getuid()}" if os.name == "posix" else "engine"
    try:
        return private_folder(cache_root() / mine / key())
    except (OSError, RuntimeError):  # RuntimeError: no home
        return private_folder(Path(tempfile.gettempdir()) / f"nanogpt-hub-{mine}" / key())


def private_folder(path: Path) -> Path:
    """Makes a folder, and the one that holds it, for this user alone. OSError where that is not possible."""
    path = path.absolute()
    path.parents[1].mkdir(parents=True, exist_ok=True)
    for made in (path.parent, path):
        made.mkdir(mode=0o700, exist_ok=True)
    check_private(path)
    tempfile.TemporaryFile(dir=path).close()
    return path


def check_private(path: Path) -> None:
    """PermissionError where others can put something into a folder, or another folder in its place. Windows, whose
    folders have no modes, is not checked."""
    if os.name != "posix":
        return
    above = path.parents[1].stat()
    others = stat.S_IWOTH if above.st_uid == os.getuid() else stat.S_IWOTH | stat.S_IWGRP  # one's group may be oneself
    if above.st_mode & others and not above.st_mode & stat.S_ISVTX:
        raise PermissionError(f"others can rename what is in {path.parents[1]}")
    for found in (path.parent, path):
        about = found.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise PermissionError(f"{found} must be a folder of this user alone (mode 700)")


def read_stamp(path: Path) -> Stamp:
    """The stamp of a folder; one that cannot be read counts as none."""
    try:
        return Stamp(**json.loads((path / "stamp.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Stamp("none")


def write_stamp(path: Path, stamp: Stamp) -> None:
    """Replaces a folder's stamp in one step."""
    write_atomic(path / "stamp.json", json.dumps(stamp._asdict()))


def forget(path: Path) -> None:
    """Takes a folder's stamp away, so that its code is made anew."""
    (path / "stamp.json").unlink(missing_ok=True)


def code_hash(path: Path) -> str:
    """The hash of the compiled code in a folder."""
    files = sorted((path / CODE).rglob("*.nb[ic]"))
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def lock_of(path: Path) -> FileLock:
    """Held by the child at work. The system frees it when the child ends, however that comes about."""
    return FileLock(path / "lock")


def is_at_work(path: Path) -> bool:
    """Whether a child is compiling in a folder."""
    try:
        with lock_of(path).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


# ---- for the process that generates ----


def start_child(path: Path) -> subprocess.Popen:
    """Starts the child for a folder. It goes on when this process ends, so that the next one finds the stamp."""
    package = HERE.parents[1]
    search = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    windows = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")  # where no session keeps Ctrl-C from the child
    with open(path / "log.txt", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, "--folder", str(path)], cwd=package, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, env={**os.environ, "PYTHONPATH": search}, start_new_session=True,
            creationflags=sum(getattr(subprocess, name, 0) for name in windows),
        )  # fmt: skip


def record_end(path: Path, status: int, since: float) -> Stamp:
    """The stamp after a child that was started at `since` ended: one that died without a word has failed, and this says
    so for the next process."""
    stamp = read_stamp(path)
    told = stamp.status in ("ready", "failed") and stamp.when >= since
    if status in (0, BUSY) or told:
        return stamp
    name = f"signal {-status}" if status < 0 else f"status {status}"
    attempts = stamp.attempts if stamp.when >= since else stamp.attempts + 1
    stamp = Stamp("failed", f"the compiling process ended with {name}{last_words(path)}", attempts, time.time())
    with contextlib.suppress(OSError):  # a full disk
        write_stamp(path, stamp)
    return stamp


def last_words(path: Path) -> str:
    """The last line that a child printed, in brackets."""
    try:
        lines = (path / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" ({line[:200]})" if line else ""


# ---- the child ----


def compile_and_check(path: Path) -> str:
    """Compiles every entry point into a folder, loads it as any process will, and compares it with the plain way.
    Returns the CPU it is for. Raises whatever goes wrong."""
    import torch
    from numba.core.ccallback import CFunc

    from nanogpt_hub.engine import check, numba_decoder, numba_sampler, threads, tuning

    shutil.rmtree(path / CODE, ignore_errors=True)  # what is left there may be damaged

    def compiled(work: Callable) -> None:
        with threads.code_in(path / CODE):
            threads.entry_point.__wrapped__(work, CFunc)
            threads.entry_point(work)

    compiled(numba_sampler.sample_rows)  # the smaller one first: what fails, fails soon
    for count in (1, 2):
        torch.set_num_threads(count)
        check.check_sampler(numba_sampler.choose)
    compiled(numba_decoder.decode_pass)
    numba_decoder.PER_THREAD_BYTES = 1  # tiny models too go through as many threads as there are
    for count in (1, 2):
        torch.set_num_threads(count)
        check.check_decoder(numba_decoder.NumbaDecoder)
    name = tuning.target()[1]
    return f"{name}, vectors of {8 * tuning.vector_bytes()} bits" + (", VNNI" if tuning.dot_of_bytes() else "")


def run_child(path: Path) -> int:
    """The whole child: exit status 0 with a stamp "ready", 1 with "failed", BUSY where another is at work."""
    check_private(path)
    try:
        with lock_of(path).acquire(timeout=PATIENCE):
            return compile_and_stamp(path)
    except Timeout:
        return BUSY


def compile_and_stamp(path: Path) -> int:
    """The child's work while it has the lock; its exit status."""
    before, started = read_stamp(path), time.time()
    attempts = 1 if before.is_old else before.attempts + 1
    stamp = Stamp("started", attempts=attempts, when=started, pid=os.getpid())
    try:
        write_stamp(path, stamp)
        faulthandler.dump_traceback_later(time_limit(), exit=True)  # ends an endless loop, wherever it is
        target = compile_and_check(path)
        seconds = time.time() - started
        stamp = stamp._replace(status="ready", seconds=seconds, target=target, code=code_hash(path))
    except BaseException as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        stamp = stamp._replace(status="failed", reason=reason)
    finally:
        faulthandler.cancel_dump_traceback_later()
    write_stamp(path, stamp)
    return 0 if stamp.status == "ready" else 1


def time_limit() -> float:
    """Seconds after which a child is given up. ValueError where the variable is not a number."""
    text = os.environ.get("NANOGPT_HUB_ENGINE_SECONDS")
    try:
        return float(text or SECONDS)
    except ValueError:
        raise ValueError(f"NANOGPT_HUB_ENGINE_SECONDS is {text!r}; it must be a number of seconds") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compiles the fast way of generating on a CPU, and checks it.")
    parser.add_argument("--folder", type=Path, help="where the code and its stamp go (default: the cache)")
    args = parser.parse_args(argv)
    if hasattr(os, "nice") and args.folder:
        os.nice(10)  # whoever generates meanwhile comes first
    try:
        path = args.folder or folder()
        if not args.folder:
            forget(path)  # asked for by hand: earlier failures do not count
    except (ImportError, OSError) as error:
        sys.stderr.write(f"engine: failed: {error}\n")
        return 1
    status = run_child(path)
    stamp = read_stamp(path)
    words = {0: f"ready after {stamp.seconds:.0f} s, for {stamp.target}", BUSY: "another process is at it"}
    sys.stderr.write(f"engine: {words.get(status, f'failed: {stamp.reason}')}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
