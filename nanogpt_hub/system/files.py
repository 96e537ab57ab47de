"""Files that survive a kill, a full disk and a power cut, and the hashes by which damage shows.

    with replacing("out/mine/loss.png") as aside:
        figure.savefig(aside)                         # out/mine/loss.png is the old file or the new one, never half
    sha256_of("out/mine/best/model.safetensors")

Everything is written beside its place, synced to the disk and renamed. Standard library, and filelock's locks.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

BLOCK = 2**22  # bytes read at a time
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # numbers of the errors for want of room on a disk
# What a killed process leaves: ours (files and folders written aside), and that of safetensors' own save_file.
LEFTOVER = re.compile(r"\..+\.(tmp|saving)|\.tmp\w{6}")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives the path of a file or folder to write, beside `path`, and puts it there when the block has ended.

    A reader, or a kill, sees what was there before or all of the new. When the block raises, what it wrote is removed.
    An existing file is replaced; OSError where a folder that is not empty would be.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        for written in [*aside.rglob("*"), aside]:
            sync(written)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        remove(aside)


@contextlib.contextmanager
def one_at_a_time(path: str | Path) -> Iterator[None]:
    """Around what one process does for a file or folder and others find done: of this machine or of another one that
    shares its disk, for the lock lies beside it. On a network disk without locks nobody waits."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with contextlib.suppress(NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_atomic(path: str | Path, data: str | bytes) -> Path:
    """Writes a whole file or none of it: a reader or a kill sees the old content or the new one. Text is UTF-8."""
    with replacing(path) as aside:
        aside.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return Path(path)


def sync(path: str | Path) -> None:
    """Puts a file, or a folder's list of names, on the disk. Windows cannot do that for folders."""
    if os.name == "nt" and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it; nothing happens where there is neither."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path) -> None:
    """Removes what killed processes left half written in a folder. Only for who is sure to be its one writer."""
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if LEFTOVER.fullmatch(path.name):
            remove(path)


def sha256_of(file: str | Path | bytes, progress: Callable[[int], object] | None = None) -> str:
    """The SHA-256 of a file, or of bytes, in hex. `progress` is told the size of each block that was read."""
    return _hash(hashlib.sha256(), file, progress)


def git_hash_of(file: str | Path | bytes) -> str:
    """The hash by which git, and so the Hub, knows a small file: SHA-1 of its size and its content, in hex."""
    size = len(file) if isinstance(file, bytes) else os.stat(file).st_size
    return _hash(hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), file)


def _hash(digest, file: str | Path | bytes, progress: Callable[[int], object] | None = None) -> str:
    if isinstance(file, bytes):
        digest.update(file)
        return digest.hexdigest()
    with open(file, "rb", buffering=0) as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()
