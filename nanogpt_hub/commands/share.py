"""Models for others: `nanogpt-hub push`, `space` and `web`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, cast

import huggingface_hub

from nanogpt_hub.chat import has_template
from nanogpt_hub.commands.common import say
from nanogpt_hub.hub.card import RunFacts, write_card
from nanogpt_hub.hub.publish import push_state, push_to_hub
from nanogpt_hub.hub.readme import Readme
from nanogpt_hub.hub.resolve import resolve, split_name
from nanogpt_hub.hub.serve import PageServer
from nanogpt_hub.hub.space import create_space
from nanogpt_hub.hub.static import create_static_space
from nanogpt_hub.runs import run_record
from nanogpt_hub.tokenizer import Tokenizer

# ---- push ----


def push(args: argparse.Namespace) -> None:
    if "@" in args.repo_id:
        raise ValueError(f"{args.repo_id!r} names a revision: give the branch to push to by --branch")
    token = Path(args.token_file).expanduser().read_text(encoding="utf-8").strip() if args.token_file else None
    common: dict[str, Any] = dict(private=args.private, message=args.message, token=token, say=say)
    if args.state:
        done = push_state(args.path, args.repo_id, **common)
        print(f"{done.url} ({done.branch}, commit {done.sha})")
        say(f"to go on elsewhere: nanogpt-hub train --resume {done.repo_id} --data.source FILE")
        return
    place = resolve(args.path)
    about = {name: value for name in ("license", "description") if (value := getattr(args, name))}
    if args.description and not place.repo_id:  # kept in the folder too, or the next push would take it away
        facts = cast(RunFacts, run_record(place.folder) | {"description": args.description})
        write_card(place.folder, facts)
    if "license" not in about:
        about = ask_license(place.folder) | about
    done = push_to_hub(
        place,
        args.repo_id,
        branch=args.branch,
        tags=tuple(args.tag),
        about=cast(RunFacts, about),
        pull_request=args.create_pr,
        notebook=not args.no_notebook,
        **common,
    )
    print(f"{done.url} ({done.branch}, commit {done.sha})")
    if not about.get("license"):
        say("no license is given, so others may not use the model: push again with --license mit (or another)")
    if not args.create_pr:
        talks = (place.folder / "tokenizer.json").is_file() and has_template(Tokenizer.load(place))
        at = "" if done.branch == "main" else f"@{done.branch}"
        say(f"to try it: nanogpt-hub {'chat' if talks else 'generate'} {done.repo_id}{at}")


def ask_license(folder: Path) -> dict[str, str]:
    """The license that the folder's card or run tells, else what is typed where somebody sits at a terminal."""
    card = folder / "README.md"
    known = Readme.parse(card.read_text(encoding="utf-8")).data.get("license") if card.is_file() else None
    known = known or run_record(folder).get("license")
    if not known and sys.stdin.isatty():
        known = input("license of the weights, such as mit or apache-2.0 (nothing for none): ").strip()
    return {"license": known} if isinstance(known, str) and known else {}


# ---- space ----


def space(args: argparse.Namespace) -> None:
    if args.static:
        no_server = {"--hardware": args.hardware, "--secret": args.secret, "--app-folder": args.app_folder}
        if given := [flag for flag, value in no_server.items() if value]:
            raise ValueError(f"{given[0]} is for a Space with a server; leave it out with --static")
        done = create_static_space(args.space_id, args.model, private=args.private, say=say)
        print(f"{done.url} (commit {done.sha})")
        return
    done = create_space(
        args.space_id, args.model, private=args.private, hardware=args.hardware, app_folder=args.app_folder,
        secrets={name: secret_of(name) for name in args.secret}, say=say,
    )  # fmt: skip
    print(f"{done.url} (commit {done.sha})")
    say(done.how_to_duplicate)


def secret_of(name: str) -> str:
    """A secret from the environment: on a command line the other users of a machine could read it."""
    value = os.environ.get(name) or (huggingface_hub.get_token() if name == "HF_TOKEN" else None)
    if not value:
        raise ValueError(f"there is no environment variable {name} to take the Space's secret from: set it first")
    return value


# ---- web ----


def web(args: argparse.Namespace) -> None:
    if args.path and not Path(args.path).is_dir():
        split_name(args.path)  # a sentence now is better than an empty page
    server = PageServer(args.path, args.host, args.port)
    print(f"the page is at {server.url}; Ctrl-C stops it", flush=True)
    server.run()
