"""A model folder to the Hub, as one commit. (In the background of a training run: pusher.py.)

    push_to_hub("out/mine/best", "user/name")

What is there already is read from the Hub before each try, and each commit names the head that it follows: an answer
that got lost never leads to a second commit. `main` holds the best model; evaluated steps are tags on the branch
`steps`, the training state is on the branch `training-state`.
"""

import json
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling

from nanogpt_hub.checkpoint import load_model, read_json, unwrap
from nanogpt_hub.hub.card import RunFacts, make_card, metadata
from nanogpt_hub.hub.model_notebook import model_notebook
from nanogpt_hub.hub.notebook import NOTEBOOK, is_ours
from nanogpt_hub.hub.private import public_files, public_text
from nanogpt_hub.hub.readme import Readme, merge_edits, validate_readme
from nanogpt_hub.hub.resolve import (
    MODEL_FILES,
    HubError,
    chain,
    choose_files,
    commit_named,
    explain,
    is_transient,
    limit_waiting,
    resolve,
    split_name,
)
from nanogpt_hub.system.files import git_hash_of, replacing, sha256_of
from nanogpt_hub.system.readable import size

logger = logging.getLogger(__name__)
Say = Callable[[str], None]
Files = Mapping[str, Path | bytes]  # path in the repo -> a file here, or its content

STEPS_BRANCH, STATE_BRANCH = "steps", "training-state"
STATE_FILES = re.compile(
    r"((state|best|last|samples)/)?[A-Za-z0-9_][\w.-]*\.(json|jsonl|yaml|txt|safetensors|png|md|jinja)"
)
STATE_OWNED = re.compile(r"(?!\.gitattributes$).*")  # the branch of the state holds nothing else
PUSH_TRIES = 6  # of push_to_hub; a Pusher tries until it is closed


# --- before ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Preflight:
    """What was found out, and made sure of, before a long run."""

    repo_id: str  # as the Hub spells it now: a repo that was renamed answers to its old name
    user: str
    url: str
    private: bool = False

    @property
    def who_reads(self) -> str:
        """Said before anything is sent."""
        return "only you and those you let in can read it" if self.private else "it is public: everybody can read it"


def preflight(
    repo_id: str, *, private: bool = False, token: str | None = None, facts: RunFacts | None = None,
    pull_request: bool = False,
) -> Preflight:  # fmt: skip
    """Makes sure that a push will be let in: name, login, rights, repo (created if need be), the card's metadata.

    A name without an owner gets the user's. For a pull request the repo has to be there and to be readable, whoever
    owns it. Raises HubError, one sentence that says what to do, or CardError.
    """
    validate_readme(str(Readme(metadata(facts or {}, "model"), "", "", "", "")))
    limit_waiting()
    api = HfApi(token=token)
    try:
        repo_id, _ = split_name(repo_id)
        account = api.whoami()
        repo_id = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
        repo_id = current_name(api, repo_id)
        if not pull_request:
            check_account(account, repo_id)
            create_repo(api, repo_id, private=private)
        info = api.repo_info(repo_id)
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(explain(error, repo_id, doing=f"write to {repo_id}")) from error
    return Preflight(repo_id, account["name"], f"{api.endpoint}/{repo_id}", bool(info.private))


def current_name(api: HfApi, repo_id: str, kind: str = "model") -> str:
    """What a repo is called now; the name itself where there is no such repo yet."""
    try:
        return api.repo_info(repo_id, repo_type=kind).id
    except RepositoryNotFoundError:
        return repo_id


def check_account(account: Mapping, repo_id: str) -> None:
    """Refuses an owner that is neither the user nor one of their organisations, and a token that only reads."""
    owner, user = repo_id.split("/")[0], account["name"]
    owners = [user, *(org["name"] for org in account.get("orgs", ()))]
    if owner not in owners:
        raise HubError(f"you are signed in as {user} and cannot write to {owner}: use one of {', '.join(owners)}")
    roles = {org["name"]: org.get("roleInOrg") for org in account.get("orgs", ())}
    if roles.get(owner) == "read":
        raise HubError(f"you may only read in {owner}: ask one of its admins for the role of a contributor")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError("your token only reads: make one with write access at huggingface.co/settings/tokens")


def create_repo(api: HfApi, repo_id: str, *, private: bool, kind: str = "model", **about) -> str:
    """Creates a repo where there is none, checks the right to write to it, and returns its address."""
    url = api.create_repo(repo_id, private=private or None, repo_type=kind, exist_ok=True, **about)
    api.auth_check(repo_id, repo_type=kind, write=True)
    if private and not api.repo_info(repo_id, repo_type=kind).private:
        raise HubError(f"{repo_id} exists and is public: make it private in its settings, or choose another name")
    return str(url)


@torch.no_grad()
def verify(folder: str | Path, model: torch.nn.Module) -> None:
    """Loads a folder and compares its logits with the live model's. Raises HubError where they differ."""
    live = unwrap(model)
    weight, config = live.wte.weight, live.config
    again, _ = load_model(folder, weight.device, weight.dtype)
    tokens = torch.arange(2 * min(config.block_size, 64), device=weight.device) * 7919 % config.vocab_size
    was_training = live.training
    try:
        expected = live.eval()(tokens.view(2, -1))[0].float()
    finally:
        live.train(was_training)
    worst = (again(tokens.view(2, -1))[0].float() - expected).abs().max().item()
    allowed = (1e-4 if weight.dtype == torch.float32 else 2e-2) * max(1.0, expected.abs().max().item())
    if not worst <= allowed:  # NaN is refused too
        raise HubError(f"{folder} loads as another model than the one in training (logits differ by {worst:.2g})")


# --- what is pushed --------------------------------------------------------------------------------------------------
def collect(
    folder: str | Path,
    repo_id: str,
    facts: RunFacts | None = None,
    extra_files: Mapping[str, Path] | None = None,
    about: RunFacts | None = None,
    notebook: bool = True,
) -> dict[str, Path | bytes]:
    """The files of a push by their path in the repo: the model's, the run's under training/, the card, and a notebook
    where one is wanted and could run on Colab.

    facts: of the card; None reads them from run.json. extra_files: None takes those of the run's folder, in which
    best/ and last/ lie. about: facts that the user gives with the push, over those. Raises CardError, or
    CheckpointError for a folder that is no model.
    """
    folder = Path(folder)
    found = files_in(folder)
    files: dict[str, Path | bytes] = {name: found[name] for name in choose_files(found, MODEL_FILES)}
    files |= training_files(folder) if extra_files is None else extra_files
    if facts is not None:
        files["training/run.json"] = (json.dumps(facts, indent=2) + "\n").encode()  # says what the card says
    told = cast(RunFacts, {**read_facts(files), **(about or {})})
    if notebook and (text := model_notebook(folder, told, repo_id)):
        files[NOTEBOOK] = text.encode()
    return {**files, "README.md": make_card(folder, told, repo_id, along=files).encode()}


def training_files(folder: Path) -> dict[str, Path]:
    """What the run around a model folder tells: metrics, loss curve, samples with attention maps, config and facts."""
    run = folder.resolve().parent
    if not (run / "metrics.jsonl").is_file():
        return {}
    names = [run / name for name in ("metrics.jsonl", "loss.png", "config.yaml", "run.json")]
    paths = [*names, *sorted((run / "samples").glob("step-*"))]
    return {f"training/{path.relative_to(run).as_posix()}": path for path in paths if path.is_file()}


def files_in(folder: Path) -> dict[str, Path]:
    """All files below a folder by their path within. What goes meanwhile, as the copies of a push do, is left out."""
    paths = sorted(Path(at, name) for at, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}


def read_facts(files: Files) -> RunFacts:
    """The facts of the run among the files of a push."""
    record = files.get("training/run.json")
    if isinstance(record, bytes):
        return json.loads(record)
    return cast(RunFacts, read_json(record)) if record else {}  # what the trainer wrote there


def commit_message(files: Files) -> str:
    evaluation = read_facts(files).get("evaluation", {})
    if "val_loss" not in evaluation:
        return "Upload model"
    return f"Step {evaluation.get('step', '?')}: validation loss {evaluation['val_loss']:.4f}"


def total_size(files: Files) -> int:
    return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())


# --- one commit ------------------------------------------------------------------------------------------------------
@dataclass
class Push:
    """Files on their way to a branch: each `send` is one try, and tries after the one that worked change nothing.

    Whatever is published comes through here, so this is where it is made public: see private.py.
    """

    repo_id: str
    files: Files
    message: str
    branch: str = "main"
    tags: tuple[str, ...] = ()
    kind: str = "model"
    owned: re.Pattern = MODEL_FILES  # remote files that match are ours: those not among `files` are deleted
    squash: bool = False  # keep no history of the branch: each commit replaces gigabytes
    pull_request: bool = False  # offer the commit to the repo's owner instead of making it
    url: str = field(default="", repr=False)  # of the pull request that was made
    hashes: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.files, self.message = public_files(self.files), public_text(self.message)

    def send(self, api: HfApi, say: Say = logger.info) -> str:
        """Commits what differs from the branch's head, if anything does, and tags it. Returns the commit's sha."""
        head, remote = self.remote(api)
        files = self.with_words_from_hub(api, head, remote, say)
        files = self.without_changed_notebook(api, head, remote, files)
        changed = {path: file for path, file in files.items() if remote.get(path) not in self.hashes_of(path, file)}
        gone = [path for path in remote if path not in files and self.owned.fullmatch(path)]
        if changed or gone:
            head = self.commit(api, head, changed, gone)
            head = self.squashed(api, head) if self.squash else head
        for tag in self.tags:
            set_tag(api, self.repo_id, tag, head)
        return head

    def remote(self, api: HfApi) -> tuple[str, dict[str, str | None]]:
        """The branch's head and the hash of each file there: sha256 of large files, git's own of small ones."""
        look = partial(
            api.repo_info, self.repo_id, repo_type=self.kind, revision=self.branch, files_metadata=True
        )  # fmt: skip
        try:
            info = look()
        except RevisionNotFoundError:
            api.create_branch(self.repo_id, branch=self.branch, repo_type=self.kind, exist_ok=True)
            info = look()
        siblings: list[RepoSibling] = getattr(info, "siblings", None) or []
        hashes = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in siblings}
        return commit_named(info.sha, self.repo_id), hashes

    def commit(self, api: HfApi, head: str, changed: Files, gone: list[str]) -> str:
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, file if isinstance(file, bytes) else str(file)) for path, file in changed.items()
        ]
        operations += [CommitOperationDelete(path) for path in gone]
        made = api.create_commit(
            self.repo_id, operations, commit_message=self.message, revision=self.branch, repo_type=self.kind,
            parent_commit=head,  # a commit that arrives late, or twice, no longer fits and is refused
            create_pr=self.pull_request,
        )  # fmt: skip
        self.url = made.pr_url or ""
        return made.oid

    def squashed(self, api: HfApi, head: str) -> str:
        """The head when the branch has no history; the head as it was where the Hub does not do that now."""
        try:
            api.super_squash_history(self.repo_id, branch=self.branch, repo_type=self.kind, commit_message=self.message)
            squashed = api.repo_info(self.repo_id, repo_type=self.kind, revision=self.branch)
            return commit_named(squashed.sha, self.repo_id)
        except HTTPError as error:
            logger.info("the history of %s is not squashed: %s", self.branch, type(error).__name__)
            return head

    def with_words_from_hub(self, api: HfApi, head: str, remote: Mapping[str, str | None], say: Say) -> Files:
        """The files, with what people wrote into README.md on the Hub taken over."""
        ours = self.files.get("README.md")
        if ours is None or "README.md" not in remote or remote["README.md"] in self.hashes_of("README.md", ours):
            return self.files
        ours = ours if isinstance(ours, bytes) else ours.read_bytes()
        theirs = hf_hub_download(self.repo_id, "README.md", repo_type=self.kind, revision=head, token=api.token)
        merged, conflict = merge_edits(ours.decode(), Path(theirs).read_text(encoding="utf-8"))
        if conflict:
            say(f"README.md was edited here and on the Hub: the words on the Hub stay; copy them from {self.repo_id}")
        return {**self.files, "README.md": merged.encode()}

    def without_changed_notebook(
        self, api: HfApi, head: str, remote: Mapping[str, str | None], files: Files
    ) -> Files:  # fmt: skip
        """The files, without our notebook where somebody has put one of their own on the Hub, or has changed ours."""
        ours = files.get(NOTEBOOK)
        if ours is None or NOTEBOOK not in remote or remote[NOTEBOOK] in self.hashes_of(NOTEBOOK, ours):
            return files
        theirs = hf_hub_download(self.repo_id, NOTEBOOK, repo_type=self.kind, revision=head, token=api.token)
        if is_ours(Path(theirs).read_text(encoding="utf-8", errors="replace")):
            return files
        return {path: file for path, file in files.items() if path != NOTEBOOK}

    def hashes_of(self, path: str, file: Path | bytes) -> tuple[str, str]:
        """(sha256, git's hash) of a file, computed once; the Hub may hold it by either."""
        if isinstance(file, bytes):
            return both_hashes(file)
        if path not in self.hashes:
            self.hashes[path] = both_hashes(file)
        return self.hashes[path]


def both_hashes(file: Path | bytes) -> tuple[str, str]:
    return sha256_of(file), git_hash_of(file)


def set_tag(api: HfApi, repo_id: str, tag: str, sha: str) -> None:
    """Makes a tag point to a commit; one of an earlier run is moved."""
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tags.get(tag) == sha:
        return
    if tag in tags:
        api.delete_tag(repo_id, tag=tag)
    api.create_tag(repo_id, tag=tag, revision=sha)


def wait_seconds(error: BaseException, attempt: int, base: float, most: float) -> float:
    """How long to wait before trying again: twice as long each time, with jitter, and as long as the Hub asks for."""
    asked = 0.0
    for e in chain(error):
        if isinstance(e, HfHubHTTPError) and e.response.headers.get("Retry-After", "").strip().isdigit():
            asked = min(float(e.response.headers["Retry-After"]), 3600.0)
    return max(asked, min(most, base * 2 ** min(attempt, 20)) * random.uniform(0.5, 1.0))


# --- at once ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pushed:
    """Where a push went."""

    repo_id: str
    branch: str
    sha: str
    url: str


def push_to_hub(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    message: str | None = None,
    branch: str = "main",
    tags: tuple[str, ...] = (),
    extra_files: Mapping[str, Path] | None = None,
    facts: RunFacts | None = None,
    about: RunFacts | None = None,
    model: torch.nn.Module | None = None,
    token: str | None = None,
    pull_request: bool = False,
    notebook: bool = True,
    say: Say = logger.info,
    backoff: float = 1.0,
) -> Pushed:
    """Publishes a model folder as one commit and returns where it went; what is there already is not sent again.

    The folder is loaded first, and its logits compared with those of `model`, if given. Its card is brought up to date;
    what people wrote in it, here or on the Hub, stays. For `extra_files`, `facts` and `about` see `collect`. notebook:
    whether one goes along to `main`, which the Hub opens in Colab and Kaggle. `say` is told who will be able to read
    it, and the size, before the upload. Raises HubError, CheckpointError or CardError, one sentence each.
    """
    folder = Path(folder)
    load_model(folder) if model is None else verify(folder, model)
    place = preflight(repo_id, private=private, token=token, facts=about, pull_request=pull_request)
    files = collect(folder, place.repo_id, facts, extra_files, about, notebook and branch == "main")
    push = Push(
        place.repo_id, files, message or commit_message(files), branch, tuple(tags), pull_request=pull_request
    )  # fmt: skip
    say(f"pushing {len(files)} files, {size(total_size(files))}, to {place.repo_id} ({branch}); {place.who_reads}")
    # a pull request whose answer got lost would be made twice
    sha = send_patiently(push, HfApi(token=token), say, backoff, tries=1 if pull_request else PUSH_TRIES)
    return Pushed(place.repo_id, branch, sha, push.url or place.url)


def push_state(
    run: str | Path, repo_id: str, *, private: bool = False, message: str = "", token: str | None = None,
    say: Say = logger.info, backoff: float = 1.0,
) -> Pushed:  # fmt: skip
    """Publishes what continuing a run needs, on the branch training-state. Raises HubError, one sentence."""
    files = state_files(run)
    if "state/state.json" not in files:
        raise HubError(
            f"{Path(run).as_posix()} holds no training state: give the folder of a run, in which state/ lies"
        )
    place = preflight(repo_id, private=private, token=token)
    push = state_of(place.repo_id, files, message)
    say(
        f"pushing {len(files)} files, {size(total_size(files))}, to {place.repo_id} ({STATE_BRANCH}); {place.who_reads}"
    )
    sha = send_patiently(push, HfApi(token=token), say, backoff)
    return Pushed(place.repo_id, STATE_BRANCH, sha, place.url)


def state_of(repo_id: str, files: Files, message: str = "") -> Push:
    """The push of a training state: its branch holds nothing else, and no earlier one."""
    return Push(repo_id, files, message or "Training state", STATE_BRANCH, owned=STATE_OWNED, squash=True)


def send_patiently(push: Push, api: HfApi, say: Say, backoff: float, tries: int = PUSH_TRIES) -> str:
    """Sends until it works or `tries` are used up. Raises HubError."""
    for attempt in range(tries):
        try:
            return push.send(api, say)
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            sentence = explain(error, push.repo_id, push.branch, doing=f"write to {push.repo_id}")
            if attempt == tries - 1 or not is_transient(error):
                raise HubError(sentence) from error
            say(f"{sentence} (trying again)")
            time.sleep(wait_seconds(error, attempt, backoff, 60.0))
    raise AssertionError("the last try returns or raises")


def state_files(run: str | Path) -> dict[str, Path]:
    """All of a run's folder that continuing it needs, by path within the folder; not the state before the last one."""
    found = {name: path for name, path in files_in(Path(run)).items() if STATE_FILES.fullmatch(name)}
    if "state/previous.json" in found:
        records = (read_json(found[f"state/{name}.json"]) for name in ("previous", "state"))
        before, last = (set(record.get("files", {}).values()) for record in records)
        for name in ("previous.json", *(before - last)):
            found.pop(f"state/{name}", None)
    return found


def fetch_state(
    name: str, run: str | Path, *, token: str | None = None, clean: Callable[[Path], None] | None = None
) -> str:
    """Copies the training state of "user/name[@revision]" into a run's folder, to continue there; returns its commit.

    clean: is given the copy before it appears as `run`, to take out of it what must not count here. Raises HubError
    where there is none, or where the folder holds a run already.
    """
    run = Path(run)
    if run.is_dir() and any(run.iterdir()):
        raise HubError(f"{run} holds something already: give another out_dir, or continue what is there")
    revision = None if "@" in name else STATE_BRANCH
    place = resolve(name, revision, token=token, files=STATE_FILES)
    if not (place.folder / "state").is_dir():
        raise HubError(f"{place} has no training state: it was not pushed with --hub.push_state")
    with replacing(run) as aside:
        shutil.copytree(place.folder, aside)  # copies what the cache's links point to
        if clean is not None:
            clean(aside)
        if run.is_dir():
            run.rmdir()
    return place.sha
