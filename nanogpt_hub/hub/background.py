"""Pushes in the background of a training run, which waits for none of them and dies of none.

place = preflight("user/name")                               # before training, on the main process
pusher = Pusher(place.repo_id)
pusher.submit("out/mine/best", facts=facts, model=model)     # returns at once and never raises
for left in pusher.close():                                  # what did not arrive, and how to finish it
    print(left.sentence)
"""

import contextlib
import logging
import os
import shlex
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from nanogpt_hub.hub.card import RunFacts
from nanogpt_hub.hub.publish import (
    STATE_BRANCH,
    STEPS_BRANCH,
    Files,
    Push,
    Say,
    collect,
    commit_message,
    files_in,
    state_files,
    state_of,
    total_size,
    verify,
    wait_seconds,
)
from nanogpt_hub.hub.resolve import explain, is_transient, limit_waiting
from nanogpt_hub.system.readable import size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unpushed:
    """A push that did not arrive: what, why, and the command that finishes it ("" where nothing can)."""

    what: str
    why: str
    command: str

    @property
    def sentence(self) -> str:
        return f"{self.what} is not on the Hub: {self.why}" + (f"; finish with: {self.command}" if self.command else "")


@dataclass
class Job:
    """A push in the queue, and the private copy of the files that it sends."""

    key: str  # a newer job of the same key replaces this one
    push: Push
    staged: Path
    command: str
    problem: str = "there was no time left"
    attempts: int = 0


class Pusher:
    """Pushes in a thread of its own, one at a time, while training goes on.

    A newer push to the same place replaces one that waits. Failures of the network and the Hub are tried again, with
    growing pauses, until `close`; what is not allowed is reported by `say` and tried once more at the end. Nothing here
    raises. Use it on the main process only, after `preflight`.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        say: Say = logger.warning,
        request_timeout: float = 120.0,
        backoff: float = 2.0,
        longest_pause: float = 120.0,
        notebook: bool = True,
    ):
        """request_timeout, backoff, longest_pause: seconds without a sign from the Hub; first and longest pause.

        notebook: whether one goes along with the model to main.
        """
        self.repo_id, self.say, self.notebook = repo_id, say, notebook
        self.api = HfApi(token=token)
        self.request_timeout, self.backoff, self.longest_pause = request_timeout, backoff, longest_pause
        self.queue: OrderedDict[str, Job] = OrderedDict()
        self.failed: dict[str, Job] = {}
        self.refused: dict[str, Unpushed] = {}
        self.current: Job | None = None
        self.staging: set[Path] = set()  # folders that hold private copies
        self.closing = self.abandoned = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="pusher", daemon=True)
        disable_progress_bars()  # they would draw over the trainer's

    def submit(
        self,
        folder: str | Path,
        *,
        facts: RunFacts | None = None,
        extra_files: Mapping[str, Path] | None = None,
        message: str = "",
        tag: str = "",
        model: torch.nn.Module | None = None,
    ) -> bool:
        """Queues a model folder: for main, or with a `tag` such as step-000500 for the branch of the steps.

        The files are set aside at once (by hard links where the disk has them), so the folder may change afterwards.
        With the live `model` the folder is verified first. False, and a word to `say`, where it cannot be pushed.
        """
        folder = Path(folder)
        branch, what = (STEPS_BRANCH, tag) if tag else ("main", folder.as_posix())

        def prepare() -> Job:
            if model is not None:
                verify(folder, model)
            files = collect(folder, self.repo_id, facts, extra_files, notebook=self.notebook and not tag)
            staged = self._stage(folder.parent, tag or "best", files)
            push = Push(self.repo_id, files_in(staged), message or commit_message(files), branch, (tag,) if tag else ())
            command = ["push", (staged if tag else folder).as_posix(), self.repo_id]
            command += ["--branch", branch, "--tag", tag] if tag else [] if self.notebook else ["--no-notebook"]
            return Job(tag or branch, push, staged, shlex.join(["nanogpt-hub", *command]))

        return self._enqueue(what, prepare)

    def submit_state(self, run: str | Path, message: str = "") -> bool:
        """Queues what continuing the run needs, for the branch training-state."""
        run = Path(run)

        def prepare() -> Job:
            staged = self._stage(run, "state", state_files(run))
            push = state_of(self.repo_id, files_in(staged), message)
            command = shlex.join(["nanogpt-hub", "push", run.as_posix(), self.repo_id, "--state"])
            return Job(STATE_BRANCH, push, staged, command)

        return self._enqueue("the training state", prepare)

    def close(self, timeout: float = 600.0) -> list[Unpushed]:
        """Waits for what is queued, at most `timeout` seconds, and returns what did not arrive."""
        with self.changed:
            self.queue = OrderedDict({**self.failed, **self.queue})
            self.failed.clear()
            self.closing = True
            self.changed.notify_all()
        if self.thread.ident is not None:
            self.thread.join(timeout)
        with self.changed:
            self.abandoned = True
            jobs = {**self.failed, **({self.current.key: self.current} if self.current else {}), **self.queue}
        if not self.thread.is_alive():
            self._clean([job for job in jobs.values() if not job.push.tags])
        left = [Unpushed(self._name(job), job.problem, job.command) for job in jobs.values()]
        return [*left, *(lost for key, lost in self.refused.items() if key not in jobs)]

    # --- the calling thread's side

    def _clean(self, jobs: list[Job]) -> None:
        """At the end: what is pushed from the run's own folders needs no copy."""
        for job in jobs:
            self._discard(job)
        for folder in self.staging:
            with contextlib.suppress(OSError):  # steps that did not arrive are in it
                folder.rmdir()

    def _enqueue(self, what: str, prepare: Callable[[], Job]) -> bool:
        try:
            job = prepare()
        except Exception as error:  # whatever it is, training goes on
            problem = explain(error, self.repo_id, doing=f"write to {self.repo_id}")
            self.refused[what] = Unpushed(what, problem, "")
            self.say(f"not pushed: {problem}")
            return False
        self.refused.pop(what, None)
        self.say(f"pushing {what} to {self.repo_id}: {len(job.push.files)} files, {size(total_size(job.push.files))}")
        with self.changed:
            self._discard(self.queue.pop(job.key, None))
            self._discard(self.failed.pop(job.key, None))
            self.queue[job.key] = job
            self.changed.notify_all()
            if self.thread.ident is None:
                self.thread.start()
        return True

    def _stage(self, run: Path, name: str, files: Files) -> Path:
        """A folder of its own with these files, on the same disk."""
        if self.thread.ident is None:  # what a killed run left; its steps may still be pushed by hand
            for left in [*run.glob(".push/best-*"), *run.glob(".push/state-*")]:
                shutil.rmtree(left, ignore_errors=True)
        (run / ".push").mkdir(exist_ok=True)
        self.staging.add(run / ".push")
        staged = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=run / ".push"))
        for path, file in files.items():
            target = staged / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, bytes):
                target.write_bytes(file)
            else:
                link_or_copy(file, target)
        return staged

    # --- the thread's side

    def _work(self) -> None:
        while (job := self._next()) is not None:
            problem: Exception | None = None
            try:
                limit_waiting(self.request_timeout)
                sha = job.push.send(self.api, self.say)
                logger.info("pushed %s to %s (%s)", self._name(job), self.repo_id, sha[:7])
            except Exception as error:  # a thread that dies would lose everything queued
                problem = error
            self._settle(job, problem)

    def _next(self) -> Job | None:
        """The next job, or None when closed and done."""
        with self.changed:
            while not self.queue:
                if self.closing:
                    return None
                self.changed.wait()
            if self.abandoned:
                return None
            _, self.current = self.queue.popitem(last=False)
            return self.current

    def _settle(self, job: Job, problem: Exception | None) -> None:
        """Forgets a job that arrived, sets aside one that is not allowed, and has another one wait and come again."""
        with self.changed:
            self.current = None
            if problem is None or job.key in self.queue:  # arrived, or replaced meanwhile
                self._discard(job)
                return
            job.problem = explain(problem, self.repo_id, job.push.branch, doing=f"write to {self.repo_id}")
            if not is_transient(problem):
                self.failed[job.key] = job
                self.say(f"{self._name(job)} is not pushed: {job.problem}")
                return
            self.queue[job.key] = job
            self.queue.move_to_end(job.key, last=False)
            job.attempts += 1
            pause = wait_seconds(problem, job.attempts - 1, self.backoff, self.longest_pause)
            self.say(f"{job.problem} ({self._name(job)} waits {pause:.0f} s)")
            closing = self.closing
            self.changed.wait_for(lambda: self.closing != closing or self.queue.get(job.key) is not job, timeout=pause)

    def _name(self, job: Job) -> str:
        return job.push.tags[0] if job.push.tags else f"{self.repo_id} ({job.push.branch})"

    @staticmethod
    def _discard(job: Job | None) -> None:
        """Removes the files set aside for a job."""
        if job is not None:
            shutil.rmtree(job.staged, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link for weights, which are replaced and never changed in place; a copy of everything else."""
    if source.suffix == ".safetensors":
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another disk, or one without links
            pass
    shutil.copyfile(source, target)
