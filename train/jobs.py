"""Trains on a machine of Hugging Face: a config becomes a job, which pushes the model and its training state.

    nanogpt-hub jobs quickstart --flavor t4-small --timeout 2h --hub.repo_id you/name
    nanogpt-hub jobs quickstart --hub.repo_id you/name --dry-run          # says what would run, and starts nothing

The words are those of `nanogpt-hub train`, and the same command again goes on: a job's disk is gone when it ends, so
the training state is pushed at each save, and a job that finds one on the Hub begins there. The code comes from where
this one came from: a public git repository that has its commit.
"""

import ipaddress
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from jsonargparse import Namespace

from nanogpt_hub.hub.jobs import Job, check_dataset, check_target, has_state, start
from nanogpt_hub.hub.private import secrets_in, without_secrets
from nanogpt_hub.hub.publish import preflight
from nanogpt_hub.hub.resolve import split_name
from nanogpt_hub.sources import parse_stories
from nanogpt_hub.system import installed

from .config import TrainConfig, make_parser, parse
from .cost import vocabulary_size
from .facts import given_facts
from .fetched import MADE_HERE
from .pretrain import check_pretraining
from .typed import Parser

PROG = f"python -m {__package__}.jobs"  # as it is typed; `nanogpt-hub` gives its own
NOT_THERE = ("out_dir", "data.cache_dir")  # settings that mean this machine


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """The command: returns its exit status, with a sentence on standard error where it is not 0."""
    parser = job_parser(prog)
    config, parsed = parse(parser, argv)
    try:
        return run(config, parsed, parser)
    except (ValueError, OSError) as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def job_parser(prog: str) -> Parser:
    """The arguments of a training run, and those of a job."""
    parser = make_parser(prog, "Trains a GPT on a machine of Hugging Face (Jobs), by the words of train.")
    parser.add_argument("--flavor", default="t4-small", help="the machine: cpu-basic, t4-small, a10g-large, h200, ...")
    parser.add_argument("--timeout", default="2h", help="when the job is ended: 90s, 30m, 2h, 1d")
    parser.add_argument("--namespace", default="", help="user or organisation that pays; empty for you")
    parser.add_argument(
        "--secret", default="",
        help="environment variables that the job gets as secrets beside HF_TOKEN, such as WANDB_API_KEY (a,b)",
    )  # fmt: skip
    parser.add_argument(
        "--code", default="",
        help="what pip installs the code from, git+https://...@COMMIT; empty for where this code came from",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would run, start nothing")
    return parser


def run(config: TrainConfig, parsed: Namespace, parser: Parser) -> int:
    """Checks the run, says what the job is, and starts it."""
    check_run(config, parsed)
    for option, source in sources_of(config):
        check_source(option, source, config.data.revision)
    code = parsed.code or installed.public_source()
    if not code:
        raise ValueError(no_code())
    secrets = secrets_of(parsed.secret)
    repo_id = check_target(config.hub.repo_id, parsed.namespace)
    goes_on = not parsed.overwrite and has_state(repo_id)
    words = command(config, parsed, parser, repo_id, code, goes_on)
    job = Job(words, parsed.flavor, parsed.timeout, parsed.namespace)
    for line in (*notes(parsed, repo_id, goes_on), *job.lines(secrets)):
        print(line)
    if parsed.dry_run:
        print("nothing was started (--dry-run)")
        return 0
    place = preflight(repo_id, private=config.hub.private, facts=given_facts(config.hub))
    print(f"hub: signed in as {place.user}; pushing to {place.url}; {place.who_reads}")
    started = start(job, secrets, repo_id)
    print(f"started: {started.url}\nto read along: hf jobs logs {started.id}")
    print("when its time is over, the same command goes on from the last save")
    return 0


# ---- what is checked before ------------------------------------------------------------------------------------------


def check_run(config: TrainConfig, parsed: Namespace) -> None:
    """Raises ValueError for a run that would fail on another machine, or whose result would be lost."""
    check_pretraining(config)
    config.model.gpt_config(vocabulary_size(config))  # an impossible shape is told here, not an hour later
    Job([], parsed.flavor, parsed.timeout)
    if not config.hub.repo_id:
        raise ValueError("a job's disk is gone when it ends: say where the model goes, --hub.repo_id you/name")
    if parsed.resume != "auto":
        raise ValueError("a job goes on by itself where its training state is on the Hub; leave --resume out")
    if not config.save.interval and not config.save.minutes:
        raise ValueError(
            "save.interval and save.minutes are both 0: a job that is ended would have saved nothing; set one of them"
        )
    if secrets_in(parsed.as_dict()):
        raise ValueError(
            "a setting holds a URL with a password or a key, and the command of a job can be read: name a dataset on "
            "the Hub instead, which may be private"
        )
    spec = config.data.tokenizer
    if not MADE_HERE.fullmatch(spec) and Path(spec).expanduser().exists():
        raise ValueError(f"data.tokenizer {spec} is on this machine, and a job cannot read it: push it to the Hub")


def sources_of(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """(setting, source) of all that the run reads."""
    yield "data.source", config.data.source
    if config.data.val_source:
        yield "data.val_source", config.data.val_source
    yield from (("data.mix", source) for source in config.data.mix)


def check_source(option: str, source: str, revision: str = "") -> None:
    """Raises ValueError for a text that a machine elsewhere cannot read."""
    if "://" in source:
        check_address(option, source)
    elif Path(source).expanduser().exists():
        raise ValueError(
            f"{option} {source} is on this machine, and a job cannot read it: put it on the Hub, by `hf upload "
            f"you/name {installed.joined([source])} --repo-type dataset`, and name you/name, or give a URL"
        )
    elif source.partition(":")[0] == "stories":
        parse_stories(source)
    elif source != "python":
        check_dataset(*split_name(source, revision if option == "data.source" else ""))


def check_address(option: str, url: str) -> None:
    """Raises ValueError for a URL that is not of the web."""
    host = urlsplit(url).hostname or ""
    try:
        elsewhere = ipaddress.ip_address(host).is_global
    except ValueError:
        elsewhere = "." in host and not host.endswith((".local", ".localhost", ".internal"))
    if not url.lower().startswith(("http://", "https://")) or not elsewhere:
        raise ValueError(f"{option} {url} cannot be read from elsewhere; give an http(s) URL that everybody can open")


def no_code() -> str:
    hosts = ", ".join(installed.PUBLIC_HOSTS)
    return (
        "a job installs this code from a public git repository, and none has the commit that you run: push it "
        f"(git push) to one on {hosts}, or say --code git+https://ADDRESS@COMMIT"
    )


def secrets_of(names: str) -> dict[str, str]:
    """The Hub's token and the named environment variables. Raises ValueError for one that is not set."""
    found = {"HF_TOKEN": huggingface_hub.get_token() or ""}
    if not found["HF_TOKEN"]:
        raise ValueError("you are not signed in to the Hub: run `hf auth login`, or set HF_TOKEN")
    for name in filter(None, names.split(",")):
        found[name] = os_value(name)
    return found


def os_value(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"there is no environment variable {name} to take the job's secret from: set it first")
    return value


# ---- what runs there -------------------------------------------------------------------------------------------------


def command(
    config: TrainConfig, parsed: Namespace, parser: Parser, repo_id: str, code: str, goes_on: bool
) -> list[str]:
    """The words of the job: uv installs the code and what it needs, and `nanogpt-hub train` gets every setting that is
    not the default as a flag, so that no file has to go along."""
    out = f"out/{Path(config.out_dir).name}"
    needs = [f"nanogpt-hub[train] @ {code}", *config.trackers]
    flags = dict(settings(parsed, parser))
    flags |= {"hub.repo_id": repo_id, "hub.push_state": True, "data.source": config.data.source, "out_dir": out}
    words = [f"--{name}={written(value)}" for name, value in flags.items()]
    words += [f"--resume={repo_id}"] if goes_on else ["--overwrite"] if parsed.overwrite else []
    installs = [word for need in needs for word in ("--with", need)]
    return ["uv", "run", *installs, "nanogpt-hub", "train", *words]


def settings(parsed: Namespace, parser: Parser) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of the run's settings that are not the default."""
    defaults = parser.get_defaults()
    for name in parser.kinds:
        value = parsed.get(name)
        counted = name == "max_steps" and parsed.minutes  # a run by time sets its steps itself
        if name not in NOT_THERE and not counted and value is not None and value != defaults.get(name):
            yield name, value


def written(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def notes(parsed: Namespace, repo_id: str, goes_on: bool) -> list[str]:
    """What a user may not expect."""
    found = [f"going on from the training state of {repo_id}"] if goes_on else []
    if not parsed.code and installed.in_checkout() and installed.git("status", "--porcelain", "--untracked-files=no"):
        found.append("note: changes here that are not committed do not go along")
    return found


if __name__ == "__main__":
    sys.exit(main())
