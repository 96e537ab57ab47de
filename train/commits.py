"""Which commits of Hub datasets a run reads: looked up once, by one process, and remembered beside the tokens.

A branch moves, and a run may begin while it does, or on a machine without a network. So the names of datasets in a
config become owner/name@commit before any of them is opened: every process, and those that tokenise, read the same.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from nanogpt_hub.sources import COMMIT, OfflineError, find_commit, hub_dataset
from nanogpt_hub.system.files import write_atomic

from .config import DataConfig

Found = dict[tuple[str, str], str]  # (name, revision) of a Hub dataset -> commit


def pinned(d: DataConfig, cache: Path, say: Callable[[str], None]) -> DataConfig:
    """The settings with a commit in the place of each Hub dataset's revision: `at_commits` of `find_commits`."""
    return at_commits(d, find_commits(d, cache, say))


def find_commits(d: DataConfig, cache: Path, say: Callable[[str], None], state: dict | None = None) -> Found:
    """The commits of the Hub datasets in the settings: those with which the run of a training state began or, of a new
    one, for which the names stand now. Where the Hub cannot be reached it is the one found last, which is said.

    cache: the folder of the tokens. Raises SourceError where there is no such dataset. One that was never looked up
    is left out.
    """
    begun, found = commits_of(state or {}), {}
    for name, revision in datasets_of(d):
        if COMMIT.fullmatch(revision):
            continue
        known = begun.get(name) if not revision else None
        if commit := known or look_up(name, revision or "main", cache, say):
            found[name, revision] = commit
    return found


def at_commits(d: DataConfig, found: Found) -> DataConfig:
    """A process's own settings, its paths among them, with the commits that one process has found for all."""

    def at(source: str, revision: str = "") -> str:
        dataset = hub_dataset(source, revision)
        commit = found.get(dataset) if dataset else None
        return f"{dataset[0]}@{commit}" if dataset and commit else source

    source = at(d.source, d.revision)
    apart = source if d.val_source == d.source else at(d.val_source)
    mix = {at(name): weight for name, weight in d.mix.items()}
    return replace(d, source=source, revision=d.revision if source == d.source else "", val_source=apart, mix=mix)


def datasets_of(d: DataConfig) -> Iterator[tuple[str, str]]:
    """(name, revision) of each Hub dataset in the settings."""
    others = [d.val_source, *d.mix] if d.val_source != d.source else d.mix
    for source, revision in ((d.source, d.revision), *((source, "") for source in others)):
        if dataset := hub_dataset(source, revision):
            yield dataset


def commits_of(state: dict) -> dict[str, str]:
    """The commits that the run of a training state reads, by the names of the datasets. The state may be anybody's."""
    fixed = state.get("fixed")
    mixed = fixed.get("sources") if isinstance(fixed, dict) else None
    parts = [part for part in (fixed, *(mixed if isinstance(mixed, list) else ())) if isinstance(part, dict)]
    told = {str(part.get("data")): str(part.get("revision")) for part in parts}
    return {name: commit for name, commit in told.items() if COMMIT.fullmatch(commit)}


def look_up(name: str, revision: str, cache: Path, say: Callable[[str], None]) -> str | None:
    """The commit as the Hub tells it, or told it last; None where it cannot be reached and never was."""
    path = cache / "commits" / f"{hashlib.sha256(f'{name} {revision}'.encode()).hexdigest()[:16]}.json"
    try:
        commit = find_commit(name, revision)["revision"]
    except OfflineError:
        if not path.is_file():
            return None
        commit = json.loads(path.read_text(encoding="utf-8"))["commit"]
        say(f"offline: {name} is read at commit {commit}, its {revision} when the Hub was last asked")
        return commit
    with contextlib.suppress(OSError):  # a cache that cannot be written may still hold the tokens
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"dataset": name, "revision": revision, "commit": commit}))
    return commit
