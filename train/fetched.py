"""What a run fetched from the Hub may decide, and what is the user's own whoever made the run.

    python -m train.pretrain --resume alice/fox --data.source fox.txt

Somebody else's config.yaml is data, not orders. Of it, the settings of the groups in `TAKEN` count: those without which
the run would be another one. What is read, where anything is written or published, and what this machine does are
never taken from it: the user gives them, and is asked for those that the run cannot do without.

Each field of TrainConfig belongs to exactly one group; tests/train/test_fetched.py fails for one that does not.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from nanogpt_hub.hub.plain_yaml import read_mapping
from nanogpt_hub.hub.publish import STATE_BRANCH
from nanogpt_hub.hub.resolve import resolve
from nanogpt_hub.model import GPTConfig
from nanogpt_hub.runs import METRICS, read_rows
from nanogpt_hub.system.files import write_atomic

GROUPS: dict[str, tuple[str, ...]] = {
    "model": (
        "model.preset", "model.size", *(f"model.{field.name}" for field in fields(GPTConfig)),
        "lora.rank", "lora.alpha", "lora.dropout", "lora.targets",
    ),
    "optimizer": (
        "optim.name", "optim.learning_rate", "optim.embedding_learning_rate", "optim.muon_learning_rate",
        "optim.muon_momentum", "optim.beta1", "optim.beta2", "optim.eps", "optim.weight_decay", "optim.grad_clip",
    ),
    "schedule": (
        "max_steps", "optim.schedule", "optim.warmup_steps", "optim.decay_steps", "optim.final_lr_fraction",
        "eval.interval", "eval.max_windows", "eval.patience",
    ),
    "batch": (
        "seed", "batch_size", "data.format", "data.val_fraction", "data.val_tokens", "data.tokenizer",
        "data.max_bad_rows", "data.duplicates",
    ),
    "source": (
        "data.source", "data.text_column", "data.prompt_column", "data.completion_column", "data.messages_column",
        "data.config", "data.split", "data.revision", "data.encoding", "data.val_source", "data.val_split", "data.mix",
        "data.audit",
    ),
    "destination": (
        "out_dir", "data.cache_dir", "trackers", "save.interval", "save.minutes",
        "hub.repo_id", "hub.private", "hub.minutes", "hub.push_steps", "hub.push_state", "hub.license", "hub.language",
        "hub.patience_minutes", "hub.page", "hub.notebook",
    ),
    "machine": (
        "device", "precision", "compile", "activation_checkpointing", "micro_batch_size", "data.workers", "fast_cpu",
        "minutes", "parallel.shard", "parallel.timeout_minutes",
    ),
    "display": ("log_interval", "eval.prompt", "eval.sample_tokens", "eval.temperature", "eval.top_k"),
}  # fmt: skip
TAKEN = ("model", "optimizer", "schedule", "batch")
MADE_HERE = re.compile(r"|char|byte|gpt2|bpe:\d{1,9}")  # tokenizers that name no file and no repo
ABOUT = re.compile(r"config\.yaml|state/state\.json")
PLAIN_WORD = re.compile(r"[A-Za-z0-9_][\w.-]{0,63}")
MAX_TEXT = 200  # characters of a setting


def read_settings(path: Path) -> dict[str, Any]:
    """A fetched config.yaml as {dotted name: value}. ValueError where it is not one."""
    if not path.is_file():
        raise ValueError("the run has no config.yaml")
    return dict(leaves(read_mapping(path.read_text(encoding="utf-8", errors="replace"), path.name)))


def leaves(settings: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def take(settings: dict[str, Any], tokenizer_folder: Path) -> dict:
    """The part of a fetched run's settings that counts, nested as a config is.

    A tokenizer that is a file or a repo of its own is not looked for there: the run's folder holds it.
    """
    allowed = {name for group in TAKEN for name in GROUPS[group]}
    nested: dict = {}
    for name, value in settings.items():
        if name not in allowed or not is_plain(value):
            continue
        if name == "data.tokenizer" and not (isinstance(value, str) and MADE_HERE.fullmatch(value)):
            value = tokenizer_folder.as_posix()
        section, _, field = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[field] = value
    return nested


def is_plain(value: Any) -> bool:
    """A scalar of a sane size, or a short list of them; what each means is the parser's to check."""
    if isinstance(value, list):
        return len(value) <= 20 and all(isinstance(item, str) and len(item) <= MAX_TEXT for item in value)
    return isinstance(value, bool | int | float | None) or (isinstance(value, str) and len(value) <= MAX_TEXT)


def cleaner(out: Path) -> Callable[[Path], None]:
    """For `fetch_state`: makes a fetched run one to go on from, before it appears as `out`."""

    def clean(folder: Path) -> None:
        taken = take(read_settings(folder / "config.yaml"), out / "last")
        write_atomic(folder / "config.yaml", yaml.safe_dump(taken, sort_keys=False))
        rows = "".join(json.dumps(row) + "\n" for row in read_rows(folder / METRICS))
        write_atomic(folder / METRICS, rows)
        for name in ("best", "last"):  # words of whoever made it; the card is written anew
            (folder / name / "README.md").unlink(missing_ok=True)

    return clean


# ---- what only the user can say --------------------------------------------------------------------------------------


def check_own(name: str, out: Path, parser: ArgumentParser, argv: list[str]) -> None:
    """Raises ValueError, a sentence with the command, while the user has not said what the run shall read.

    name: of the run on the Hub. out: its folder here, where it may lie already. argv: what the user typed.
    """
    given = parser.parse_args(argv, defaults=False)
    here = (out / "config.yaml").is_file()
    place = out if here else resolve(name, None if "@" in name else STATE_BRANCH, files=ABOUT).folder
    settings = read_settings(place / "config.yaml")
    own = settings if here else {}  # what the user said when the run was fetched
    said = {name: value for name, value in {**own, **dict(leaves(given.as_dict()))}.items() if value is not None}
    needed = ("from", "data.source")
    missing = [
        name for name in wanted(settings, parser) if said.get(name, "") == "" and (name in needed or name not in said)
    ]
    if missing:
        line = command(parser, argv, missing, settings)
        raise ValueError(f"what a run from the Hub reads is yours to say ({was(place)}): go on with `{line}`")


def wanted(settings: dict[str, Any], parser: ArgumentParser) -> list[str]:
    """What of the group "source" this run needs: the text always, the rest where the run had set it."""
    defaults = parser.get_defaults()
    needed = ["from"] if "from" in defaults else []
    rest = [name for name in GROUPS["source"][1:] if settings.get(name) not in (None, defaults.get(name))]
    return [*needed, "data.source", *rest]


def command(parser: ArgumentParser, argv: list[str], missing: list[str], settings: dict[str, Any]) -> str:
    """What was typed, and after it what is missing.

    Names inside of a source (a column, a split) are filled in; what is read from this disk or the Hub never is, or a
    stranger could have it copied into a terminal.
    """
    words = [*parser.prog.split(), *argv]
    for name in missing:
        value = str(settings.get(name))
        if name in ("from", "data.source", "data.val_source") or not PLAIN_WORD.fullmatch(value):
            value = {"from": "MODEL", "data.source": "FILE"}.get(
                name, name.rpartition("_")[2].rpartition(".")[2].upper()
            )
        words += [f"--{name}", value]
    return shlex.join(words)


def was(place: Path) -> str:
    """What the run says that it read, in words that may be shown: bare names, one line."""
    try:
        fixed = json.loads((place / "state" / "state.json").read_text(encoding="utf-8"))["fixed"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "it does not say what it read"
    base = fixed.get("base_model") if isinstance(fixed, dict) else None
    parts = [("read", fixed.get("data") if isinstance(fixed, dict) else None)]
    parts += [("began from", base.get("id") if isinstance(base, dict) else None)]
    told = [f"{verb} {shown(name)}" for verb, name in parts if isinstance(name, str) and name]
    return f"this one {' and '.join(told)}" if told else "it does not say what it read"


def shown(name: str) -> str:
    """A stranger's name for something: at most its last two parts, printable, short."""
    line = "".join(letter for letter in name if letter.isprintable())
    return repr("/".join(line.split("/")[-2:])[-80:])
