"""Which commits of Hub datasets a run reads: looked up once, by one process, and remembered beside the tokens.

A branch moves, and a run may begin while it does, or on a machine without a network. So the names of datasets in a
config become owner/name@commit before any of them is opened: every process, and those that tokenise, read the same.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nanogpt_hub.sources import COMMIT, OfflineError, find_commit, hub_dataset
from nanogpt_hub.system.files import write_atomic

from .config import DataConfig


def pinned(d: DataConfig, cache: Path, say: Callable[[str], None], state: dict | None = None) -> DataConfig:
    """The settings with a commit for each Hub dataset: that with which the run of a training state began or, of a new
    one, that for which the name stands now. Where the Hub cannot be reached it is the one found last, which is said.

    cache: the folder of the tokens. Raises SourceError where there is no such dataset. One that was never looked up
    keeps its name.
    """
    commits = Commits(cache, say, commits_of(state or {}))
    source = commits.pin(d.source, d.revision)
    apart = source if d.val_source == d.source else commits.pin(d.val_source)
    mix = {commits.pin(name): weight for name, weight in d.mix.items()}
    return replace(d, source=source, revision=d.revision if source == d.source else "", val_source=apart, mix=mix)


def commits_of(state: dict) -> dict[str, str]:
    """The commits that the run of a training state reads, by the names of the datasets."""
    fixed = state.get("fixed", {})
    told = {part.get("data", ""): part.get("revision", "") for part in (fixed, *fixed.get("sources", ()))}
    return {name: commit for name, commit in told.items() if COMMIT.fullmatch(commit)}


@dataclass(frozen=True)
class Commits:
    """What names of Hub datasets stand for."""

    cache: Path
    say: Callable[[str], None]
    begun: dict[str, str]  # the commits with which the run began

    def pin(self, source: str, revision: str = "") -> str:
        """A Hub dataset as owner/name@commit; any other source as it is."""
        dataset = hub_dataset(source, revision)
        if dataset is None or COMMIT.fullmatch(dataset[1]):
            return source
        name, revision = dataset
        commit = self.begun.get(name) if not revision else None
        commit = commit or self.look_up(name, revision or "main")
        return f"{name}@{commit}" if commit else source

    def look_up(self, name: str, revision: str) -> str | None:
        """The commit as the Hub tells it, or told it last; None where it cannot be reached and never was."""
        path = self.cache / "commits" / f"{hashlib.sha256(f'{name} {revision}'.encode()).hexdigest()[:16]}.json"
        try:
            commit = find_commit(name, revision)["revision"]
        except OfflineError:
            if not path.is_file():
                return None
            commit = json.loads(path.read_text(encoding="utf-8"))["commit"]
            self.say(f"offline: {name} is read at commit {commit}, its {revision} when the Hub was last asked")
            return commit
        with contextlib.suppress(OSError):  # a cache that cannot be written may still hold the tokens
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"dataset": name, "revision": revision, "commit": commit}))
        return commit
