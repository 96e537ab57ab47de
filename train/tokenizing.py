"""Tokenising in a process beside the training, and waiting for what it has ready.

The process is `python -m train.tokenizing`; what to do comes as a line of JSON on its standard input, which stays open
as long as the process that started it lives: at its end this one ends, too. It takes the lock of the corpus, so that of
many runs only one tokenises a text at a time. Where it is killed, it is started again and goes on after the last shard
that was ready (see train/shards.py).
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TypeVar

from nanogpt_hub.corpus.duplicates import without_duplicates
from nanogpt_hub.corpus.mixture import mix
from nanogpt_hub.sources import Source, open_source
from nanogpt_hub.system.readable import reason
from nanogpt_hub.tokenizer import Tokenizer

from .children import end_after
from .shards import LINES, corpus_folder, prepare

IN_PROCESS_BYTES = 2**24  # a smaller source is tokenised by the training process itself, before a new one would start
RESTARTS = 3  # of a process that was killed before it had another shard ready
KILLED, REFUSED = 1, 2  # exit status: start it again; the data cannot be used, and standard output says why

T = TypeVar("T")


@dataclass(frozen=True)
class SourceChoice:
    """What a text is made of: the arguments of `open_source`, what is mixed in, and what becomes of duplicates."""

    source: str
    text_column: str = "text"
    config: str = ""
    split: str = "train"
    revision: str = ""
    encoding: str = "utf-8"
    max_bad_rows: int = 0
    mix: dict[str, float] = field(default_factory=dict)  # further sources and their weights; this one's is 1
    duplicates: str = "ignore"

    def open(self, look: bool = True) -> Source:
        """Raises SourceError where one cannot be read, as far as a `look` at its beginning tells."""
        if not self.mix:
            return without_duplicates(self._open(look), self.duplicates)
        others = [replace(self, source=name, config="", split="train", revision="") for name in self.mix]
        weights = [1.0, *self.mix.values()]
        sources = [without_duplicates(choice._open(look), self.duplicates) for choice in (self, *others)]
        return mix(list(zip(sources, weights, strict=True)))

    def _open(self, look: bool) -> Source:
        about = {name: value for name, value in asdict(self).items() if name not in ("mix", "duplicates")}
        return open_source(**about, look=look)


class Tokenizing:
    """The process that tokenises a source into a corpus. Where the corpus is complete nothing is started, and a small
    source is tokenised by the first `check`.
    """

    def __init__(self, choice: SourceChoice, source: Source, tokenizer: Tokenizer, cache_dir: Path, workers: int = 1):
        self.folder = corpus_folder(source, tokenizer, cache_dir)
        self.process: subprocess.Popen | None = None
        self.restarts, self._shards = 0, self._size()
        self._failed: ValueError | OSError | None = None
        self._at_once: Callable[[], object] | None = None
        if self.complete:
            return
        if source.facts.get("bytes", IN_PROCESS_BYTES) < IN_PROCESS_BYTES:
            self._at_once = lambda: prepare(source, tokenizer, cache_dir, quiet=True)
            return
        json_text, config = tokenizer.__reduce__()[1]
        self.job = json.dumps({
            "choice": asdict(choice), "folder": str(self.folder.resolve()), "tokenizer": json_text, "config": config,
            "cache_dir": str(cache_dir), "workers": workers,
        })  # fmt: skip
        self._start()

    @property
    def complete(self) -> bool:
        return (self.folder / "manifest.json").is_file()

    def _size(self) -> int:
        """Grows with each shard that becomes ready."""
        path = self.folder / LINES
        return path.stat().st_size if path.is_file() else 0

    def _start(self) -> None:
        # A session of its own: an interrupt at the terminal is for the training, which saves first.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.tokenizing"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, encoding="utf-8", start_new_session=True, env=environment,
        )  # fmt: skip
        # In a thread: a long job is not taken until the process has imported what it needs.
        threading.Thread(target=_send, args=(self.job, self.process.stdin), daemon=True, name="send-job").start()

    def check(self) -> None:
        """Starts the process again where it was killed. Raises ValueError where that does not help, and for text that
        the source or the tokenizer refuses."""
        if self._at_once is not None:
            at_once, self._at_once = self._at_once, None
            at_once()
        self.revive()
        if self._failed is not None:
            raise self._failed

    def revive(self) -> None:
        """Starts the process again where it was killed, at once and not when its tokens are needed. What speaks against
        that is for `check` to raise."""
        process = self.process
        if self._failed or process is None or (status := process.poll()) is None or self.complete:
            return
        try:
            self._start_again(process, status)
        except (ValueError, OSError) as error:
            self._failed = error

    def _start_again(self, ended: subprocess.Popen, status: int) -> None:
        assert ended.stdout is not None  # a pipe, see _start
        if status == REFUSED:
            raise ValueError(ended.stdout.read().strip())
        size = self._size()
        self.restarts = self.restarts + 1 if size == self._shards else 1
        self._shards = size
        if self.restarts > RESTARTS:
            raise ValueError(
                f"the process that tokenises the text ended {self.restarts} times (exit status {status}) without "
                "another shard; a smaller --data.workers needs less memory"
            )
        _close_pipes(ended)
        self._start()

    def close(self) -> None:
        """Ends the process; what it has ready stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            _close_pipes(self.process)
            self.process = None


def _send(job: str, stdin: IO[str]) -> None:
    """Writes the job of a process, whose standard input stays open: its end would end the process."""
    with contextlib.suppress(OSError, ValueError):  # it has ended, or was closed
        stdin.write(job + "\n")
        stdin.flush()


def _close_pipes(process: subprocess.Popen) -> None:
    for pipe in filter(None, (process.stdin, process.stdout)):
        with contextlib.suppress(OSError):  # for what the process has not read
            pipe.close()


def wait_for(
    ready: Callable[[], bool],
    tokenizing: list[Tokenizing],
    stop: Callable[[], bool] = lambda: False,
    interval: float = 0.05,
) -> bool:
    """Waits until `ready` holds in every process of the run; returns False as soon as `stop` does in one.

    No process waits in a collective for another one that works: all of them look every `interval` seconds and tell
    each other what they saw. Raises ValueError, in every process, where tokenising has failed or `ready` raises one.
    """
    while True:
        is_ready, failed = False, ""
        try:
            for one in tokenizing:
                one.check()
            is_ready = ready()
        except (ValueError, OSError) as error:
            failed = reason(error)
        all_ready, all_stop, all_failed = zip(*_of_all((is_ready, stop(), failed)), strict=True)
        if any(all_failed):
            raise ValueError(next(filter(None, all_failed)))
        if any(all_stop) or all(all_ready):
            return not any(all_stop)
        time.sleep(interval)


def _of_all(seen: T) -> list[T]:
    """What every process of the run has seen."""
    from accelerate.utils import gather_object  # not in the process that tokenises: this imports PyTorch

    return gather_object([seen])


def main() -> int:
    """The process: reads its job, tokenises, and says in one sentence on standard output why it could not."""
    line = sys.stdin.readline()
    if not line.endswith("\n"):  # nobody waits for it any more
        return KILLED
    job = json.loads(line)
    end_after(lambda: os.read(sys.stdin.fileno(), 1))
    try:
        source = SourceChoice(**job["choice"]).open()
        tokenizer = Tokenizer(job["tokenizer"], job["config"])
        if corpus_folder(source, tokenizer, job["cache_dir"]).resolve() != Path(job["folder"]):
            raise ValueError(f"{source.name} has changed since the run began")
        prepare(source, tokenizer, job["cache_dir"], quiet=True, workers=job["workers"])
    except (ValueError, OSError) as error:
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            print(reason(error), flush=True)
        return REFUSED
    except BrokenProcessPool:  # one of its workers was killed: as if it had been itself
        return KILLED
    return 0


if __name__ == "__main__":
    sys.exit(main())
