"""Models by name: a folder here, or a repo on the Hub at a branch, tag or commit.

    model, tokenizer = from_pretrained("user/name@step-000500")
    place = resolve("user/name")        # place.folder, place.sha

Only the files that a model is made of are fetched: their sizes are checked before, their hashes after. A file that is
damaged in the cache is fetched once more. Nothing in a repo is executed, and its files stay in the Hub's cache. What
goes wrong is one sentence (`HubError`).
"""

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import torch
from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import get_session, validate_repo_id

from nanogpt_hub.checkpoint import CheckpointError, CoreError, load_model, read_config
from nanogpt_hub.hub.private import without_secrets
from nanogpt_hub.hub.readme import one_line
from nanogpt_hub.model import GPT
from nanogpt_hub.system.files import git_hash_of, sha256_of
from nanogpt_hub.tokenizer import Tokenizer

T = TypeVar("T")
logger = logging.getLogger(__name__)

WEIGHT_FILES = re.compile(r"[A-Za-z0-9_][\w.-]*\.safetensors|model\.safetensors\.index\.json")
MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|chat_template\.jinja|README\.md|model\.py\.txt"
    r"|training/([A-Za-z0-9_][\w-]*/)?[A-Za-z0-9_][\w-]*\.(jsonl|json|yaml|txt|png)"
    rf"|{WEIGHT_FILES.pattern}"
)
LOADED_FILES = re.compile(rf"[\w-]+\.json|merges\.txt|chat_template\.jinja|{WEIGHT_FILES.pattern}")  # to compute with
BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of a file in the cache: its hash, for small and for large ones
MAX_BYTES = 20 * 10**9  # of all the files of a model; pass max_bytes for more
MAX_SMALL_FILE = 64 * 2**20  # of each file that holds no weights
TRIES = 2
TIMEOUT = 30.0  # seconds without a sign from the Hub


class HubError(OSError):
    """Something between here and the Hub does not work; the message is one sentence that says what to do."""


class DamagedError(HubError):
    """A file in the cache is not the one that the Hub has, and could not be replaced by it.

    The message is for the user of this machine, `public` for others.
    """

    def __init__(self, name: str, repo_id: str, path: Path, reason: str):
        self.public = f"{name} of {repo_id} is damaged here and could not be fetched again; try again later"
        super().__init__(
            f"{name} of {repo_id} is damaged in the cache ({path}) and could not be fetched again: {reason}; then load "
            "the model again"
        )


@dataclass(frozen=True)
class Resolved(os.PathLike):
    """Where a model is: a folder, and for a Hub repo the name, the revision asked for and the commit it stands for."""

    folder: Path
    repo_id: str = ""
    revision: str = ""
    sha: str = ""

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.sha[:7]}" if self.repo_id else self.folder.as_posix()


def from_pretrained(
    name_or_path: str | Path,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    token: str | None = None,
    any_core: bool = False,
) -> tuple[GPT, Tokenizer | None]:
    """The model, in eval mode, and its tokenizer: of a folder, or of "user/name" or "user/name@revision" on the Hub.

    any_core: as for `load_model`. Raises HubError when it cannot be fetched, CheckpointError when what is there is no
    model of ours, or one of another core.
    """
    place = resolve(name_or_path, revision, token=token)
    try:
        return with_repair(place, lambda: load_model(place, device, dtype, any_core=any_core), token)
    except CheckpointError as error:
        kind = CoreError if isinstance(error, CoreError) else CheckpointError
        raise kind(f"cannot load {place}: {error.__cause__ or error}") from error


def resolve(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    max_bytes: int = MAX_BYTES,
    files: re.Pattern = MODEL_FILES,
    cache_dir: str | Path | None = None,
) -> Resolved:
    """The local folder of a model; an existing path wins over a name on the Hub.

    files: the paths in the repo that are fetched, root folder of the repo first. Where the Hub cannot be reached, what
    an earlier call left in the cache serves. Raises HubError, or CheckpointError for a repo that is no model of ours.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if revision:
            raise HubError(f"{name_or_path} is a folder, which has no revision {revision!r}; leave the revision out")
        return Resolved(folder)
    repo_id, revision = split_name(str(name_or_path), revision)
    repo = Repo(HfApi(token=token), repo_id, revision, cache_dir)
    try:
        return with_retries(lambda: repo.fetch(files, max_bytes))
    except DamagedError:
        raise
    except (HTTPError, OSError, EntryNotFoundError) as error:
        raise HubError(explain(error, repo_id, revision)) from error


def split_name(name: str, revision: str | None = None) -> tuple[str, str]:
    """("user/name", revision) of "user/name@revision"; the default revision is main. HubError for what is no name."""
    name = from_address(name)
    repo_id, _, inline = name.partition("@")
    try:
        if len(Path(repo_id).parts) > 2 or name.startswith((".", "~")):
            raise HFValidationError
        validate_repo_id(repo_id)
    except HFValidationError:
        raise HubError(
            f"{name!r} is neither a folder here nor a name on the Hub: give a path or user/name[@revision]"
        ) from None
    if inline and revision and inline != revision:
        raise HubError(f"{name!r} names revision {inline!r}, and {revision!r} is asked for too: give one of them")
    return repo_id, revision or inline or "main"


def from_address(name: str) -> str:
    """ "user/name" or "user/name@revision" of the address of a model's page; any other name as it is."""
    hosts = "|".join(map(re.escape, {"https://huggingface.co", "https://hf.co", constants.ENDPOINT}))
    found = re.fullmatch(
        rf"(?:{hosts})/(?!datasets/|spaces/)([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(?:tree|blob|commit)/([^/?#]+)[^?#]*)?/?(?:[?#].*)?",
        name.strip(),
    )
    return name if not found else found[1] + (f"@{unquote(found[2])}" if found[2] else "")


# --- fetching ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Repo:
    """A model repo at a revision, and where it is cached."""

    api: HfApi
    repo_id: str
    revision: str
    cache_dir: str | Path | None = None

    def fetch(self, files: re.Pattern, max_bytes: int) -> Resolved:
        """Downloads the files of the commit that the revision stands for now, checked."""
        try:
            info = with_retries(self.info)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if not isinstance(error, OfflineModeIsEnabled) and not is_transient(error):
                raise
            return self.cached(error, files)
        siblings = {s.rfilename: s for s in info.siblings or ()}
        found = {name: siblings[name] for name in choose_files(siblings, files)}
        self.check_sizes(found, max_bytes)
        hashes = {name: hash_on_hub(sibling, self.repo_id) for name, sibling in found.items()}
        sha = commit_named(info.sha, self.repo_id)
        if files is MODEL_FILES:
            self.check_model(found, siblings, sha, hashes)
        place = Resolved(self.download([*found], sha), self.repo_id, self.revision, sha)
        for name, expected in hashes.items():
            if not has_hash(place.folder / name, expected):
                fetch_again(place, name, expected, self.api.token)
        return place

    def info(self) -> ModelInfo:
        return self.api.model_info(self.repo_id, revision=self.revision, files_metadata=True, timeout=TIMEOUT)

    def download(self, names: list[str], revision: str) -> Path:
        place = snapshot_download(
            self.repo_id, revision=revision, allow_patterns=names, cache_dir=self.cache_dir, token=self.api.token
        )
        return Path(place)

    def cached(self, reason: Exception, files: re.Pattern) -> Resolved:
        """What an earlier fetch left. Raises LocalEntryNotFoundError where that is nothing.

        Small files are compared with their hashes, for a flipped bit in one may make another model of it; weights are
        when they cannot be loaded (`with_repair`).
        """
        folder = snapshot_download(
            self.repo_id, revision=self.revision, allow_patterns=[], cache_dir=self.cache_dir, local_files_only=True
        )
        place = Resolved(Path(folder), self.repo_id, self.revision, Path(folder).name)
        if files is MODEL_FILES and "config.json" not in loaded_files(place):
            raise LocalEntryNotFoundError(f"{self} has no config.json in the cache")
        logger.warning("the Hub cannot be reached (%s): taking %s from the cache", type(reason).__name__, self.repo_id)
        small = [name for name in loaded_files(place) if files.fullmatch(name) and not name.endswith(".safetensors")]
        repair(place, self.api.token, small)
        return place

    def check_sizes(self, found: dict[str, RepoSibling], max_bytes: int) -> None:
        """Refuses what is too large before any of it is fetched."""
        total = 0
        for name, sibling in found.items():
            if sibling.size is None:
                raise HubError(f"the Hub does not tell the size of {name} of {self.repo_id}; try again later")
            if sibling.size > MAX_SMALL_FILE and not name.endswith(".safetensors"):
                raise HubError(f"{name} of {self.repo_id} has {sibling.size:,} bytes, which no honest one has")
            total += sibling.size
        if total > max_bytes:
            raise HubError(f"{self.repo_id} has {total:,} bytes, and at most {max_bytes:,} are fetched here")

    def check_model(self, found: Collection[str], names: Collection[str], sha: str, hashes: dict[str, str]) -> None:
        """Refuses a repo without weights or of another architecture before its weights are fetched."""
        if "config.json" not in found:
            raise CheckpointError(f"{self} is no model: it has no config.json")
        if not any(name.endswith(".safetensors") for name in found):
            pickled = any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names)
            what = (
                "only pickled weights, which may run code when opened and are never read" if pickled else "no weights"
            )
            raise CheckpointError(f"{self} has {what}; it needs safetensors")
        # by the revision's own name, so that the cache remembers what it stands for
        path = Path(hf_hub_download(
            self.repo_id, "config.json", revision=self.revision, cache_dir=self.cache_dir, token=self.api.token
        ))  # fmt: skip
        if path.parent.name == sha and not has_hash(path, hashes["config.json"]):
            place = Resolved(path.parent, self.repo_id, self.revision, sha)
            fetch_again(place, path.name, hashes[path.name], self.api.token)
        try:
            read_config(path.parent)
        except CoreError:
            pass  # `load_model` says it too, when the model.py.txt that it speaks of is there
        except ValueError as error:
            raise CheckpointError(f"{self} is no model of ours: {error}") from error

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}"


def choose_files(names: Collection[str], files: re.Pattern) -> list[str]:
    """Which of a repo's files are fetched. Weights beside a model.safetensors are not what is loaded."""
    chosen = [name for name in names if files.fullmatch(name)]
    if "model.safetensors" not in chosen:
        return chosen
    return [name for name in chosen if name == "model.safetensors" or not WEIGHT_FILES.fullmatch(name)]


def commit_named(sha: str | None, repo_id: str) -> str:
    """The commit that an answer of the Hub is about. HubError where it names none."""
    if sha is None:
        raise HubError(f"the Hub does not tell the commit of {repo_id}; try again later")
    return sha


def hash_on_hub(sibling: RepoSibling, repo_id: str) -> str:
    """By which the Hub knows a file: sha256 for large files, git's own hash for small ones."""
    expected = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if expected is None:
        raise HubError(f"the Hub does not tell the hash of {sibling.rfilename} of {repo_id}; try again later")
    return expected


def limit_waiting(seconds: float = 4 * TIMEOUT) -> None:
    """Has the Hub client give up on a server that shows no sign of life for so long; by itself it waits for ever."""
    get_session().timeout = seconds


# --- damage in the cache ----------------------------------------------------------------------------------------------
def with_repair(place: Resolved, work: Callable[[], T], token: str | bool | None = None) -> T:
    """What `work` makes of the files of a model, and once more where it failed and the cache held damaged ones.

    Those are fetched again before. Hashes are computed only after a failure; where every file is as the Hub has it,
    the failure stands. Raises DamagedError for a file that cannot be fetched.
    """
    try:
        return work()
    except CoreError:
        raise
    except (ValueError, OSError):
        if not repair(place, token, loaded_files(place)):
            raise
    return work()


def repair(place: Resolved, token: str | bool | None, names: Collection[str]) -> bool:
    """Fetches those of a model's files again that are damaged in the cache. Whether there were any. DamagedError."""
    damaged = [name for name in names if is_damaged(place.folder / name)]
    for name in damaged:
        fetch_again(place, name, blob_name(place.folder / name), token)
    return bool(damaged)


def loaded_files(place: Resolved) -> list[str]:
    """The files that a model is computed with, those included of which the cache lost the content. None of a folder."""
    names = sorted(os.listdir(place.folder)) if place.repo_id else []
    return [name for name in names if LOADED_FILES.fullmatch(name)]


def is_damaged(path: Path) -> bool:
    """Whether a file of the cache is proven not to be what it was. Needs no network: its own name tells its hash."""
    expected = blob_name(path)
    return bool(expected) and not has_hash(path, expected)


def blob_name(path: Path) -> str:
    """The hash by which the cache stores the content of a file; "" where it does not, as without symbolic links."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if BLOB_NAME.fullmatch(name) else ""


def has_hash(path: Path, expected: str) -> bool:
    """Whether a file is there and has this hash: sha256, or git's own where it is shorter."""
    return path.is_file() and (sha256_of if len(expected) == 64 else git_hash_of)(path) == expected


def fetch_again(place: Resolved, name: str, expected: str, token: str | bool | None) -> None:
    """Replaces a damaged file of the cache by what the Hub has. DamagedError where that cannot be had.

    The old file stays until the new one is complete. One that arrives damaged is not kept.
    """
    path = place.folder / name
    where = path.resolve()
    logger.warning("%s of %s is damaged in the cache: fetching it again", name, place.repo_id)
    if not path.is_symlink():  # a copy, which the client would keep
        path.unlink(missing_ok=True)
    try:
        hf_hub_download(
            place.repo_id, name, revision=place.sha, cache_dir=place.folder.parents[2], token=token,
            force_download=True,
        )  # fmt: skip
    except (HTTPError, OSError, EntryNotFoundError, ValueError) as error:  # the last where the Hub is not reached
        reason = explain(error.__cause__ or error, place.repo_id, place.sha)
        raise DamagedError(name, place.repo_id, where, reason) from error
    if not has_hash(path, expected):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise DamagedError(name, place.repo_id, where, "it arrived damaged again, so check the network")


# --- failures ---------------------------------------------------------------------------------------------------------
def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the network, an overloaded or failing Hub, a commit in between."""
    for e in chain(error):
        if isinstance(e, HfHubHTTPError):
            damaged = e.response.status_code in (400, 422) and is_upload(e)  # bytes that changed on the way
            return damaged or e.response.status_code in (408, 409, 412, 425, 429) or e.response.status_code >= 500
        if isinstance(e, (OfflineModeIsEnabled, HubError)):
            return False
        if isinstance(e, (HTTPError, ConnectionError, TimeoutError)):
            return True
    return False


def is_upload(error: HfHubHTTPError) -> bool:
    """Whether it was the bytes of a large file that the Hub did not take."""
    try:
        return error.response.request.method == "PUT"
    except RuntimeError:  # an answer that knows nothing of its request
        return False


def with_retries(work: Callable[[], T], tries: int = TRIES, pause: float = 0.5) -> T:
    """Does the work, again where it failed for a moment: a reset connection, a damaged file."""
    for attempt in range(1, tries + 1):
        try:
            return work()
        except (HTTPError, OSError) as error:
            if attempt == tries or not is_transient(error):
                raise
            time.sleep(pause * attempt)
    raise AssertionError("the last try returns or raises")


def explain(error: BaseException, repo_id: str, revision: str = "", doing: str = "") -> str:
    """One sentence for what went wrong with a repo, and what to do about it, without the address of an upload."""
    for e in chain(error):
        for kind, sentence in SENTENCES:
            if isinstance(e, kind):
                return without_secrets(sentence.format(repo=repo_id, revision=revision, error=one_line(e)))
        if isinstance(e, HfHubHTTPError):
            return explain_status(e, repo_id, doing)
        if isinstance(e, HTTPError):
            return f"the Hub does not answer ({type(e).__name__}); check the network and try again"
    return without_secrets(one_line(error))


SENTENCES: list[tuple[type[BaseException], str]] = [  # the more special kinds first
    (HubError, "{error}"),
    (GatedRepoError, "{repo} is gated: ask for access on its page on the Hub, then sign in with `hf auth login`"),
    (RepositoryNotFoundError,
     "there is no {repo} here, and none on the Hub that you may read: check the name, or sign in with `hf auth login`"),
    (RevisionNotFoundError, "{repo} has no branch, tag or commit {revision!r}"),
    (DisabledRepoError, "{repo} was disabled by the Hub"),
    (LocalTokenNotFoundError, "you are not signed in to the Hub: run `hf auth login`, or set HF_TOKEN"),
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set: unset it to reach the Hub"),
    (LocalEntryNotFoundError,
     "{repo} at {revision!r} is not in the cache, and the Hub cannot be reached: check the network and HF_HUB_OFFLINE"),
    (EntryNotFoundError, "{repo} lacks a file at {revision!r}: {error}"),
    (HFValidationError, "{repo!r} is no name on the Hub: use user/name, with letters, digits, - _ and . only"),
]  # fmt: skip


def explain_status(error: HfHubHTTPError, repo_id: str, doing: str = "") -> str:
    """One sentence for an HTTP status."""
    status, owner = error.response.status_code, repo_id.split("/")[0]
    doing = doing or f"use {repo_id}"
    return {
        401: "the Hub does not accept your token: sign in again with `hf auth login`",
        402: f"the Hub asks for payment to {doing}: see the plan of {owner}",
        403: f"your token may not {doing}: make one with write access for {owner} at huggingface.co/settings/tokens",
        413: f"the Hub refuses {repo_id}: it is too large",
        429: "the Hub asks to slow down (429): wait some minutes",
    }.get(status, f"the Hub answers {status} when asked to {doing}; try again later")
