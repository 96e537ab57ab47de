"""Compiled code that can be trusted: made and checked by a process of its own, recorded by a stamp.

    python -m nanogpt_hub.engine.prepare         # make it now, and say how it went

A compiler may fail in any way: an error, a wrong number, an endless loop, an abort that takes the process with it. So
it runs in a child process, which compiles the kernels, compares them with the plain way for a tiny model of each kind,
and only then writes a stamp. A process that generates loads nothing but stamped code; without a stamp it goes on in
PyTorch, in the same process and to the end.

The folder of a stamp (`$NANOGPT_HUB_CACHE/engine/KEY`, else below ~/.cache/nanogpt_hub) belongs to one combination of
versions, CPU and source: whatever changes, the code is made anew.
"""

import argparse
import atexit
import faulthandler
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
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


class Stamp(NamedTuple):
    """What is known of the compiled code in a folder."""

    status: str  # "ready"; "failed"; "started": a child is at it, or ended in the middle; "none"
    reason: str = ""  # of a failure, a few words
    attempts: int = 0
    when: float = 0.0  # seconds since 1970
    seconds: float = 0.0  # that compiling and checking took
    target: str = ""  # CPU that the code was compiled for
    pid: int = 0  # of the process that compiled

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
    """Where this combination's code and stamp are. Where nothing can be written, a folder for this process alone."""
    from nanogpt_hub.sources import cache_root

    try:
        path = cache_root() / "engine" / key()
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        if os.name == "posix" and path.stat().st_uid != os.getuid():  # code is loaded from here
            raise PermissionError(f"{path} belongs to somebody else")
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="nanogpt-hub-engine-"))
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


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
    with open(path / "log.txt", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, "--folder", str(path)], cwd=package, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, env={**os.environ, "PYTHONPATH": search}, start_new_session=True,
        )  # fmt: skip


def record_end(path: Path, status: int) -> Stamp:
    """The stamp after a child ended: one that died without a word has failed, and this says so for the next process."""
    stamp = read_stamp(path)
    if stamp.status == "started" and status != BUSY:
        name = f"signal {-status}" if status < 0 else f"status {status}"
        stamp = stamp._replace(status="failed", reason=f"the compiling process ended with {name}{last_words(path)}")
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
    seconds = float(os.environ.get("NANOGPT_HUB_ENGINE_SECONDS") or SECONDS)
    try:
        with lock_of(path).acquire(timeout=0):
            started, before = time.time(), read_stamp(path)
            attempts = 1 if before.is_old else before.attempts + 1
            stamp = Stamp("started", attempts=attempts, when=started, pid=os.getpid())
            write_stamp(path, stamp)
            faulthandler.dump_traceback_later(seconds, exit=True)  # ends an endless loop, wherever it is
            try:
                target = compile_and_check(path)
            except BaseException as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
                write_stamp(path, stamp._replace(status="failed", reason=reason))
                return 1
            write_stamp(path, stamp._replace(status="ready", seconds=time.time() - started, target=target))
            return 0
    except Timeout:
        return BUSY


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compiles the fast way of generating on a CPU, and checks it.")
    parser.add_argument("--folder", type=Path, help="where the code and its stamp go (default: the cache)")
    args = parser.parse_args(argv)
    if hasattr(os, "nice") and args.folder:
        os.nice(10)  # whoever generates meanwhile comes first
    path = args.folder or folder()
    if not args.folder:
        forget(path)  # asked for by hand: earlier failures do not count
    status = run_child(path)
    stamp = read_stamp(path)
    words = {0: f"ready after {stamp.seconds:.0f} s, for {stamp.target}", BUSY: "another process is at it"}
    sys.stderr.write(f"engine: {words.get(status, f'failed: {stamp.reason}')}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
