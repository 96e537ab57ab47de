"""The models that a process of many visitors holds: found by name within rules, fetched once, kept while there is room.

    models = ModelStore("user/name")
    place = models.find("user/name", "step-000500")     # resolved to a commit; a LimitError where that is not allowed
    loaded = models.load(place)                         # loaded.model, loaded.tokenizer, shared by all

`Limits` say what one request may ask for. They hold in the functions here and in session.py, whoever calls.
"""

import contextlib
import fnmatch
import hashlib
import math
import os
import re
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError
from torch import nn

from nanogpt_hub.checkpoint import CheckpointError, load_model, weight_files
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.hub.resolve import (
    MODEL_FILES,
    DamagedError,
    HubError,
    Resolved,
    chain,
    resolve,
    split_name,
    with_repair,
)
from nanogpt_hub.model import GPT
from nanogpt_hub.playground.tiny import make_tiny
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.tokenizer import Tokenizer

TINY = {"tiny": "last", "tiny-early": "early"}  # names of the built-in model, and the folder of its run that they mean
TOKENIZER_FILES = re.compile(r"(tokenizer|tokenizer_config|special_tokens_map)\.json")
REMEMBER_SECONDS = 60  # for how long a branch is taken to be the commit that it was


class LimitError(ValueError):
    """More was asked for than is allowed here; the message says how much is."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. Each can be set by a variable: NANOGPT_MAX_ and the field's name in capitals."""

    prompt_chars: int = 2000
    new_tokens: int = 500
    kept_tokens: int = 4000  # of a text that grows by Continue or by branches
    seconds: float = 30.0  # of generation, for one request
    text_chars: int = 8000  # of text to be scored or cut
    text_tokens: int = 1024
    look_tokens: int = 64  # of text to be looked into: a map for each head
    model_bytes: int = 20 * 10**9  # of one model to fetch
    cache_bytes: int = 2 * 10**9  # of all models kept in memory; the one in use is always kept
    queue: int = 32  # requests that wait, of all visitors together

    @classmethod
    def from_env(cls, on_space: bool = False) -> "Limits":
        """The defaults (on a Space, models of at most 1 GB), and what the variables say. ValueError names a bad one."""
        values: dict[str, Any] = {"model_bytes": 10**9} if on_space else {}
        for item in fields(cls):
            name = f"NANOGPT_MAX_{item.name.upper()}"
            text, default = os.environ.get(name, ""), cast(Any, item.default)
            try:
                values |= {item.name: type(default)(text)} if text else {}
            except ValueError:
                raise ValueError(f"{name} is {text!r}; it must be a number, such as {default}") from None
        return cls(**values)

    def check(self, what: str, got: float, most: float, unit: str = "") -> None:
        """LimitError where `got` is more than `most`."""
        if got > most:
            raise LimitError(f"{what} has {got:,}{unit}; at most {most:,} are allowed here")


# ---- models in memory ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Loaded:
    """A model in memory. Nothing changes its weights, so that all visitors share it."""

    place: Resolved
    model: GPT
    tokenizer: Tokenizer
    defaults: SamplingConfig
    n_bytes: int
    notes: dict = field(default_factory=dict)  # results that are asked for again and again, by what was asked
    int8: GPT | None = None  # its copy for `ModelStore.load_int8`, made under the lock
    lock: threading.Lock = field(default_factory=threading.Lock)


class ModelCache:
    """The models used last, as many as fit into `max_bytes`; all who wait for the same one wait for one load."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        """Forgets everything, the locks included: also right after a fork, which may copy a lock that is held."""
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple, Loaded] = OrderedDict()
        self._gates: dict[tuple, threading.Lock] = {}

    @property
    def n_bytes(self) -> int:
        return sum(loaded.n_bytes for loaded in self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def get(self, key: tuple, n_bytes: int, load: Callable[[], Loaded]) -> Loaded:
        """The model under `key`, loaded if need be; before, the ones used longest ago make room for `n_bytes`."""
        with self._lock:
            gate = self._gates.setdefault(key, threading.Lock())
        with gate:
            with self._lock:
                if key in self._models:
                    self._models.move_to_end(key)
                    return self._models[key]
                self._make_room(n_bytes)
            loaded = load()
            with self._lock:
                self._make_room(loaded.n_bytes)
                self._models[key] = loaded
                self._gates = {k: g for k, g in self._gates.items() if k in self._models or g.locked()}
        return loaded

    def grow(self, loaded: Loaded, n_bytes: int) -> None:
        """Counts `n_bytes` more for a model in use; the others that were used longest ago make room for them."""
        with self._lock:
            loaded.n_bytes += n_bytes
            self._make_room(0, keep=loaded)

    def _make_room(self, n_bytes: int, keep: Loaded | None = None) -> None:
        for key in [key for key, loaded in self._models.items() if loaded is not keep]:
            if self.n_bytes + n_bytes > self.max_bytes:
                del self._models[key]


# ---- by name ---------------------------------------------------------------------------------------------------------


class ModelStore:
    """Finds and holds models for all visitors of a process."""

    def __init__(
        self,
        default: str = "",
        runs: str | Path | None = None,
        *,
        limits: Limits | None = None,
        allowed: Sequence[str] = ("*",),
        any_folder: bool = False,
        on_space: bool = False,
        device: str = "cpu",
    ):
        """default: what a first visit sees, "user/name[@revision]" or a folder; empty for a tiny model made here.

        runs: a folder of training runs. allowed: patterns of names on the Hub. any_folder: visitors may name any folder
        of this machine, so only where they are its users. on_space: nobody is signed in unless they signed in on the
        page; the owner's own token opens the default model and no other.
        """
        self.runs = Path(runs) if runs else None
        self.limits = limits or Limits.from_env(on_space)
        self.allowed, self.any_folder, self.on_space, self.device = tuple(allowed), any_folder, on_space, device
        self.default = default or self._newest_run() or "tiny"
        self.cache = ModelCache(self.limits.cache_bytes)
        self._found: OrderedDict[tuple, tuple[float, Any]] = OrderedDict()
        self._lock, self._tiny_lock = threading.Lock(), threading.Lock()
        self._home: tempfile.TemporaryDirectory | None = None

    # -- which model

    def find(self, name: str = "", revision: str = "", token: str | None = None) -> Resolved:
        """Where a model is, fetched if need be. Its weights are not loaded yet.

        token: of a visitor who signed in; what only they may see is kept apart from what all may. Raises LimitError for
        what is not allowed here, HubError and CheckpointError as `resolve` does.
        """
        name, revision = from_address((name or "").strip(), (revision or "").strip())
        name, revision = name or self.default, "" if not name else revision
        self.limits.check("the name", len(name) + len(revision), 500, " characters")
        if folder := self._own_folder(name, revision):
            return folder
        return self._remembered(*self._allowed(name, revision), token)

    def _own_folder(self, name: str, revision: str) -> Resolved | None:
        """The folder of this machine that a name means, if visitors may open it."""
        if name in TINY:
            return Resolved(self._tiny() / TINY[name])
        if name == self.default and Path(name).is_dir():
            return Resolved(Path(name))
        return resolve(name, revision or None) if self._is_folder(name) else None

    def _allowed(self, name: str, revision: str) -> tuple[str, str]:
        """Repo and revision on the Hub. LimitError for a name that visitors may not ask for."""
        repo_id, revision = split_name(name, revision or None)
        if Path(repo_id).is_dir():  # `resolve` would take it for the folder
            raise LimitError(f"{repo_id} is a folder here, and folders of this machine are not open to visitors")
        if not any(fnmatch.fnmatchcase(repo_id, pattern) for pattern in self.allowed) and name != self.default:
            raise LimitError(f"{repo_id} is not among the models allowed here: {', '.join(self.allowed)}")
        return repo_id, revision

    def tokenizer_hash(self, name: str, revision: str = "", token: str | None = None) -> str:
        """What tells a model's tokenizer from others, as `Tokenizer.hash` does. No weights are fetched for it.

        Empty where it has none. Raises as `find` does, and ValueError for a damaged one.
        """
        place = self._own_folder(name, revision)
        if place is None:
            repo_id, revision = self._allowed(name, revision)
            key, now = ("tokenizer", repo_id, revision, token), time.monotonic()
            then, known = self._found.get(key, (-math.inf, ""))
            if now - then < REMEMBER_SECONDS:
                return known
            place = self._fetch(repo_id, revision, token, TOKENIZER_FILES)
        found = Tokenizer.load(place.folder).hash if (place.folder / "tokenizer.json").is_file() else ""
        if place.repo_id:
            self._remember(key, found)
        return found

    def _is_folder(self, name: str) -> bool:
        """Whether a name means a folder that visitors may open."""
        path = Path(name).expanduser()
        if self.runs and path.resolve().is_relative_to(self.runs.resolve()):
            return True
        return self.any_folder and path.is_dir()

    def _remembered(self, repo_id: str, revision: str, token: str | None) -> Resolved:
        """`_fetch`, not asking the Hub again within a minute."""
        key, now = (repo_id, revision, token), time.monotonic()
        then, place = self._found.get(key, (-math.inf, None))
        if place is not None and now - then < REMEMBER_SECONDS and place.folder.is_dir():
            return place
        place = self._fetch(repo_id, revision, token)
        self._remember(key, place)
        return place

    def _fetch(self, repo_id: str, revision: str, token: str | None, files: re.Pattern = MODEL_FILES) -> Resolved:
        """What all may see goes into the common cache, what only this visitor may into one of their own."""
        most: dict[str, Any] = dict(max_bytes=self.limits.model_bytes, files=files)
        with no_paths():
            try:
                return resolve(repo_id, revision, token=self._own_token(repo_id), **most)
            except HubError as error:
                if not token or not is_hidden(error):
                    raise
            owner = hashlib.sha256(token.encode()).hexdigest()[:32]
            return resolve(repo_id, revision, token=token, cache_dir=self._folder() / "private" / owner, **most)

    def _own_token(self, repo_id: str) -> bool | None:
        """None (this machine's login) or False (none): on a Space the owner's token opens the model that it shows."""
        return False if self.on_space and repo_id != self.default.partition("@")[0] else None

    def revisions(self, place: Resolved, token: str | None = None) -> list[str]:
        """Names to choose from: main, other branches, then the kept steps, latest first. Empty for a folder."""
        if not place.repo_id:
            return []
        key, now = ("revisions", place.repo_id, token), time.monotonic()
        then, names = self._found.get(key, (-math.inf, []))
        if now - then >= REMEMBER_SECONDS:
            names = self._ask_revisions(place, token)
            self._remember(key, names)
        return names if place.revision in names else [*names, place.revision]

    def _ask_revisions(self, place: Resolved, token: str | None) -> list[str]:
        try:
            refs = HfApi(token=token or self._own_token(place.repo_id)).list_repo_refs(place.repo_id)
        except (HTTPError, OSError):
            return []
        branches = sorted((ref.name for ref in refs.branches), key=lambda name: (name != "main", name))
        return branches + sorted((ref.name for ref in refs.tags), reverse=True)

    def _remember(self, key: tuple, value: Any) -> None:
        with self._lock:
            self._found[key] = (time.monotonic(), value)
            while len(self._found) > 256:
                self._found.popitem(last=False)

    def _forget(self, place: Resolved) -> None:
        """Has the next `find` of a model ask the Hub."""
        with self._lock:
            for key in [key for key, (_, value) in self._found.items() if value == place]:
                del self._found[key]

    def names(self) -> list[str]:
        """What the model field offers: the default, the runs' models, and the tiny one."""
        return list(dict.fromkeys([self.default, *self.run_models(), *TINY]))

    def run_models(self) -> list[str]:
        """The model folders of the runs, newest first."""
        if self.runs is None:
            return []
        found = [
            p.parent for pattern in ("config.json", "*/config.json", "*/*/config.json") for p in self.runs.glob(pattern)
        ]
        found = [p for p in found if p.name not in ("state",) and not p.name.startswith(".")]
        newest = sorted(found, key=lambda p: (p / "config.json").stat().st_mtime, reverse=True)
        return [p.as_posix() for p in newest[:100]]

    def _newest_run(self) -> str:
        best = [name for name in self.run_models() if Path(name).name == "best"] or self.run_models()
        return best[0] if best else ""

    def _tiny(self) -> Path:
        """The run folder of the built-in model, made when it is first asked for."""
        folder = self._folder() / "tiny"
        with self._tiny_lock:
            if not (folder / "last" / "README.md").is_file():
                make_tiny(folder)
        return folder

    def _folder(self) -> Path:
        """A folder that goes when the process goes."""
        with self._lock:
            self._home = self._home or tempfile.TemporaryDirectory(prefix="nanogpt-hub-", ignore_cleanup_errors=True)
        return Path(self._home.name)

    def load(self, place: Resolved, device: str | None = None) -> Loaded:
        """The model in memory. CheckpointError where it cannot be loaded; what was in memory stays in use.

        HubError where a file of it is damaged in the cache and cannot be fetched again.
        """
        try:
            with no_paths():
                return with_repair(place, lambda: self._get(place, device), self._own_token(place.repo_id))
        except HubError:  # the visitor's own token may open what this machine's does not
            self._forget(place)
            raise

    def _get(self, place: Resolved, device: str | None) -> Loaded:
        files = weight_files(place.folder)
        n_bytes = sum(path.stat().st_size for path in files)
        self.limits.check("the model", n_bytes, self.limits.model_bytes, " bytes")
        newest = max(path.stat().st_mtime_ns for path in files)  # a run writes its folder again and again
        device = device or self.device
        return self.cache.get((place.folder, place.sha, newest, device), n_bytes, lambda: self._load(place, device))

    def _load(self, place: Resolved, device: str) -> Loaded:
        try:
            model, tokenizer = load_model(place.folder, device)
        except CheckpointError as error:  # by the model's name: where it is cached is nobody's business
            raise CheckpointError(f"cannot load {self.name_of(place)}: {error.__cause__ or error}") from error
        if tokenizer is None:
            raise LimitError(f"{place} has no tokenizer.json, so no text can be given to it here")
        n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        return Loaded(place, model, tokenizer, SamplingConfig.from_folder(place.folder), n_bytes)

    def load_int8(self, place: Resolved) -> GPT:
        """The model on the CPU with weights of 8 bits: made once for all visitors, kept as long as the model itself."""
        loaded = self.load(place, "cpu")
        with loaded.lock:
            if loaded.int8 is None:
                loaded.int8 = quantize_int8(loaded.model)
                linear = [module for module in loaded.model.modules() if isinstance(module, nn.Linear)]
                self.cache.grow(loaded, 2 * sum(module.weight.numel() for module in linear))  # the rest is shared
        return loaded.int8

    def name_of(self, place: Resolved) -> str:
        """The name by which `find` finds the same again."""
        if place.repo_id:
            return place.repo_id
        tiny = {Path(self._home.name) / "tiny" / folder: name for name, folder in TINY.items()} if self._home else {}
        return tiny.get(place.folder, place.folder.as_posix())


def from_address(name: str, revision: str) -> tuple[str, str]:
    """(name, revision) of a model whose page on the Hub was pasted in place of its name."""
    parts = urlsplit(name if "://" in name else f"https://{name}")
    if parts.hostname not in ("huggingface.co", "www.huggingface.co", "hf.co"):
        return name, revision
    path = [unquote(part) for part in parts.path.split("/") if part]
    if len(path) > 3 and path[2] in ("tree", "blob", "resolve", "commit"):
        revision = revision or path[3]
    return "/".join(path[:2]), revision


@contextlib.contextmanager
def no_paths() -> Iterator[None]:
    """Turns a DamagedError into one that does not tell visitors where models are cached."""
    try:
        yield
    except DamagedError as error:
        raise HubError(error.public) from None


def is_hidden(error: BaseException) -> bool:
    """Whether the Hub says no to this visitor: a repo that is private, gated, or not there."""
    return any(isinstance(e, GatedRepoError | RepositoryNotFoundError) for e in chain(error))
