"""What is installed here: where the parts are, what is missing, what to type, and how somebody else gets the same code.

    part("web")              # a folder or file that a checkout has beside the package, and a wheel inside it
    load("train.pretrain")   # a module of the trainer, or the app
    missing("train")         # what an extra needs and this Python lacks: ["accelerate>=1.10"]
    public_source()          # "git+https://github.com/you/nanogpt_hub@COMMIT", or "" where there is no public one

It imports Python's own library alone, and Pythons that are too old for the rest can read it: it has to say so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

OLDEST_PYTHON = (3, 10)
DISTRIBUTION = "nanogpt-hub"
PACKAGE = Path(__file__).parents[1]
PARTS = ("train", "configs", "web", "app.py", "requirements.txt")  # what setup.py copies into a wheel
# What is imported, by the extra that brings it; "" is what comes in any case. requirements.txt has the versions.
EXTRAS = {
    "": ("torch", "numpy", "safetensors", "tokenizers", "tiktoken", "huggingface_hub", "requests", "tqdm", "jinja2"),
    "train": ("accelerate", "jsonargparse", "matplotlib", "datasets", "pyarrow", "detect_secrets"),
    "app": ("gradio",),
    "fast": ("numba",),
}
PUBLIC_HOSTS = ("github.com", "gitlab.com", "codeberg.org", "bitbucket.org", "huggingface.co")
REMOTE = re.compile(r"(?:https?://(?:[^/@]*@)?|ssh://(?:[^/@]*@)?|git@)([\w.-]+)(?::\d+/|[:/])(.+?)(?:\.git)?/?")
GIT_SECONDS = 10.0


# ---- parts ----


def part(name: str) -> Path:
    """Where one of `PARTS` is: in the package as a wheel has it, else beside it as in a checkout.

    Raises FileNotFoundError for an installation that lacks it. Inside comes first: beside an installed package lie the
    packages of others, which may have the same names.
    """
    for folder in (PACKAGE, PACKAGE.parent):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{name} is not in this installation ({PACKAGE}): install nanogpt_hub again")


def is_wheel() -> bool:
    """Whether the parts are inside the package."""
    return (PACKAGE / "train").is_dir()


def load(name: str) -> ModuleType:
    """The module `train.pretrain`, `app`, ...: from the checkout, or as `nanogpt_hub.train.pretrain` from a wheel."""
    top = name.partition(".")[0]
    place = part(top if top == "train" else f"{top}.py")
    if place.parent == PACKAGE:
        return importlib.import_module(f"{PACKAGE.name}.{name}")
    if sys.path[0] != str(place.parent):  # first, so that no other train or app is found
        sys.path.insert(0, str(place.parent))
    return importlib.import_module(name)


def config_names() -> list[str]:
    """The configs that come along, as one types them: quickstart, shakespeare_char, ladder/1_rotary, ... Those of
    Accelerate's launcher are none of ours."""
    folder = part("configs")
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("accelerate/"))


# ---- what is missing ----


class MissingPackagesError(ValueError):
    """Says what to install."""


def missing(extra: str) -> list[str]:
    """The requirements of an extra ("" for those of all) that this Python has not got, as pip takes them."""
    return [requirement(name) for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def requirement(module: str) -> str:
    """What pip installs for a module: its line in requirements.txt, with the versions, else its name."""
    name = module.partition(".")[0].replace("_", "-")
    lines = part("requirements.txt").read_text(encoding="utf-8").splitlines()
    found = (line.strip() for line in lines if re.match(rf"{re.escape(name)}\b", line, re.IGNORECASE))
    return next(found, name)


def pip_line(requirements: list[str]) -> str:
    """The command that installs into this Python, for a shell, PowerShell and cmd alike."""
    words = [f'"{word}"' if re.search(r"[<>=\[~!;, ]", word) else word for word in requirements]
    return f"{python_command()} -m pip install {' '.join(words)}"


def what_is_missing(who: str, *extras: str) -> str | None:
    """A sentence that says what this Python lacks for a command and how to get it; None where nothing is missing."""
    if sys.version_info < OLDEST_PYTHON:
        return f"{who} needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}"
    absent = [each for extra in ("", *extras) for each in missing(extra)]
    return how_to_get(who, absent) if absent else None


def how_to_get(who: str, absent: list[str]) -> str:
    """A sentence for requirements that are not there: another environment that has them, or what to install."""
    names = [re.split(r"[<>=\[~!; ]", each)[0] for each in absent]
    more = f" and {len(names) - 3} more packages" if len(names) > 4 else ""
    lacks = f"{who} needs {', '.join(names[:3] if more else names)}{more}, which {shown(sys.executable)} has not"
    scripts = PACKAGE.parent / ".venv" / ("Scripts" if os.name == "nt" else "bin")  # as `make install` leaves it
    if (scripts / "activate").is_file() and not same_file(scripts, Path(sys.executable).parent):
        line = f"{'' if os.name == 'nt' else 'source '}{shown(scripts / 'activate')}"
        return f"{lacks}: activate the environment first, by `{line}`"
    return f"{lacks}: run `{pip_line(absent)}`"


def need(who: str, *extras: str) -> None:
    """Ends the program with `what_is_missing`, where something is."""
    if sentence := what_is_missing(who, *extras):
        raise SystemExit(f"error: {sentence}")


# ---- what to type ----


def python_command() -> str:
    """How this Python is called at a prompt here: `python` where that is it, else its path."""
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found and same_file(Path(found).parent, Path(sys.executable).parent):
            return name
    return shown(sys.executable)


def command() -> str:
    """How `nanogpt-hub` is called at a prompt here."""
    found = shutil.which("nanogpt-hub")
    if found and same_file(Path(found).parent, Path(sys.executable).parent):
        return "nanogpt-hub"
    return f"{python_command()} -m nanogpt_hub"


def joined(words: list[str]) -> str:
    """Words as one types them: quoted for a POSIX shell, or for PowerShell and cmd."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def shown(path: str | Path) -> str:
    """A path as one types it here."""
    path, here = Path(path), Path.cwd()
    return joined([str(path.relative_to(here) if path.is_relative_to(here) else path)])


def same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


# ---- where the code is from ----


def commit() -> str:
    """The commit of this code: of the checkout, or the one that pip installed from. Empty where it is not known."""
    return installed_from()[1] if is_wheel() else git("rev-parse", "HEAD") if in_checkout() else ""


def public_source() -> str:
    """What pip installs the same code from, anywhere: git+ADDRESS@COMMIT. Empty where nothing public has the commit.

    Asks the address once, without any account: whoever reads a model's card has none either.
    """
    return _public_source()


@functools.lru_cache(maxsize=1)
def _public_source() -> str:
    remote, sha = installed_from() if is_wheel() else checked_out_from()
    address = public_address(remote)
    return f"git+{address}@{sha}" if address and sha and answers(address) else ""


def installed_from() -> tuple[str, str]:
    """Address and commit of the repository that pip installed this package from, as pip recorded it (PEP 610)."""
    import importlib.metadata  # half of the time that help takes

    try:
        found = importlib.metadata.distribution(DISTRIBUTION)
        record = json.loads(found.read_text("direct_url.json") or "{}")
        if not same_file(Path(str(found.locate_file(PACKAGE.name))), PACKAGE):
            return "", ""
        return str(record["url"]), str(record["vcs_info"]["commit_id"])
    except (importlib.metadata.PackageNotFoundError, KeyError, TypeError, ValueError):
        return "", ""


def checked_out_from() -> tuple[str, str]:
    """Address and commit of this checkout, where its remote has the commit too."""
    if not in_checkout():
        return "", ""
    sha = git("rev-parse", "HEAD")
    there = git("for-each-ref", "refs/remotes/origin", "--contains", sha, "--count", "1", "--format", "%(refname)")
    return (git("config", "--get", "remote.origin.url"), sha) if there else ("", "")


def in_checkout() -> bool:
    """Whether the package lies in a repository of its own, and not somewhere inside of another one."""
    top = git("rev-parse", "--show-toplevel")
    return bool(top) and same_file(Path(top), PACKAGE.parent)


def git(*arguments: str) -> str:
    """What git says here; empty where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=GIT_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def public_address(remote: str) -> str:
    """The https address of a remote on one of `PUBLIC_HOSTS`, without a name or token in it; empty for others."""
    found = REMOTE.fullmatch(remote)
    if not found or found[1].lower() not in PUBLIC_HOSTS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", found[2]):
        return ""
    return f"https://{found[1].lower()}/{found[2]}"


def answers(address: str) -> bool:
    """Whether git can read a repository without an account: no saved password, no question, no setting of the user."""
    with tempfile.TemporaryDirectory() as empty:
        alone = {"HOME": empty, "USERPROFILE": empty, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1",
                 "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "SSH_ASKPASS": ""}  # fmt: skip
        try:
            subprocess.run(
                ["git", "-c", "credential.helper=", "ls-remote", "--exit-code", address, "HEAD"], cwd=empty,
                stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=GIT_SECONDS,
                env={**os.environ, **alone},
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return False
    return True
