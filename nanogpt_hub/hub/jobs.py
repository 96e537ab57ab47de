"""A command on Hugging Face's machines: a job, which the Hub runs in a container and ends after a time.

    job = Job(["uv", "run", "--with", "nanogpt-hub[train] @ git+https://...", "nanogpt-hub", "train", ...], "t4-small")
    started = start(job, {"HF_TOKEN": token}, "alice/fox")
    started.url

Whoever may read the job reads its command. What opens something goes as a secret, which the Hub keeps encrypted.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from nanogpt_hub.hub.publish import STATE_BRANCH, check_account
from nanogpt_hub.hub.resolve import HubError, explain, limit_waiting, split_name
from nanogpt_hub.system.installed import joined

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"  # has uv and git; what the client's own uv jobs run in
TIME = re.compile(r"\d+(\.\d+)?[smhd]?")


@dataclass(frozen=True)
class Job:
    """What runs, and on what. Raises ValueError for a time limit that is none."""

    words: list[str]  # the command
    flavor: str  # of the machine, as the Hub names it: t4-small, a10g-large, h200, ...
    timeout: str = "2h"  # 90s, 30m, 2h, 1d
    namespace: str = ""  # user or organisation that pays; empty for the user

    def __post_init__(self):
        if not TIME.fullmatch(self.timeout) or not float(self.timeout.rstrip("smhd")):
            raise ValueError(f"timeout is {self.timeout!r}; give a number and its unit: 90s, 30m, 2h or 1d")

    def lines(self, secrets: Mapping[str, str]) -> Iterator[str]:
        """What is said before it is started: no value of a secret is in it."""
        yield f"job: {self.flavor}, at most {self.timeout}, paid by {self.namespace or 'you'}; image {IMAGE}"
        yield f"command: {joined(self.words)}"
        yield f"secrets: {', '.join(secrets) or 'none'} (their values go to the Hub encrypted, not with the command)"


@dataclass(frozen=True)
class Started:
    """A job that the Hub has taken."""

    id: str
    url: str


def start(job: Job, secrets: Mapping[str, str], repo_id: str) -> Started:
    """Has the Hub run a job, by the login here. Raises HubError, one sentence. repo_id: where it will push to."""
    limit_waiting()
    try:
        made = HfApi().run_job(
            image=IMAGE, command=job.words, secrets=dict(secrets), flavor=job.flavor, timeout=job.timeout,
            namespace=job.namespace or None,
        )  # fmt: skip
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(explain(error, job.namespace or repo_id, doing=f"run a job on {job.flavor}")) from error
    return Started(made.id, made.url)


def check_target(repo_id: str, namespace: str = "") -> str:
    """Makes sure that the login may write to a repo, and run jobs for `namespace`, without making anything.

    Returns the repo's full name. Raises HubError, one sentence.
    """
    limit_waiting()
    try:
        account = HfApi().whoami()
        repo_id, _ = split_name(repo_id)
        repo_id = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
        for owned in (repo_id, *([f"{namespace}/jobs"] if namespace else [])):
            check_account(account, owned)
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(explain(error, repo_id, doing=f"write to {repo_id}")) from error
    return repo_id


def has_state(repo_id: str) -> bool:
    """Whether a training state lies on the Hub under this name, to go on from. Raises HubError, one sentence."""
    limit_waiting()
    try:
        refs = HfApi().list_repo_refs(repo_id)
    except RepositoryNotFoundError:
        return False
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(explain(error, repo_id)) from error
    return any(branch.name == STATE_BRANCH for branch in refs.branches)


def check_dataset(name: str, revision: str = "") -> None:
    """Raises HubError, one sentence, unless a dataset of this name is on the Hub, for the login here."""
    limit_waiting()
    try:
        HfApi().repo_info(name, repo_type="dataset", revision=revision or None)
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(explain(error, f"dataset {name}", revision)) from error
