"""What is typed after `nanogpt-hub train`: names of configs, lists, and a sentence where a word is off.

    parser = Parser(prog="nanogpt-hub train")
    parser.kinds = kinds(TrainConfig)

What jsonargparse says of a wrong word names Python's types; here it becomes what was got, what is allowed and, where
one is near, what was probably meant.
"""

import difflib
import json
import re
import sys
from collections.abc import Collection
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args, get_origin, get_type_hints

import jsonargparse

from nanogpt_hub.system.installed import config_names, joined, part

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
# What other trainers call a setting, where no name of ours is near.
ELSEWHERE = {"lr": "optim.learning_rate", "max_iters": "max_steps", "epochs": "max_steps", "dataset": "data.source",
             "init_from": "from", "dtype": "precision", "wandb_log": "trackers"}  # fmt: skip
WRONG_VALUE = re.compile(r'Parser key "([\w.]+)":.*(?:Got value|Given value): (.*)', re.DOTALL)
UNKNOWN_KEY = re.compile(r"(?:Group '([\w.]+)' does not accept option|Option) '([^']+)'")
LEFT_OVER = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)


def kinds(cls: type, prefix: str = "") -> dict[str, Any]:
    """{dotted name: type} of all settings of a dataclass and of those in it."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        found |= kinds(cast(type, kind), f"{prefix}{name}.") if is_dataclass(kind) else {f"{prefix}{name}": kind}
    return found


def config_path(word: str) -> str:
    """The file that a word stands for: its path, or the name of a config that comes along.

    Raises ValueError, with what to type, for a text and for what is neither.
    """
    path = Path(word)
    if path.is_file() and path.suffix.lower() in CONFIG_SUFFIXES:
        return word
    name = word.replace("\\", "/").removeprefix("configs/").removesuffix(".yaml")
    known = config_names()
    if name in known:
        return str(part("configs") / f"{name}.yaml")
    if path.exists():
        what = "a folder" if path.is_dir() else "a text"
        raise ValueError(f"{word} is {what}, not a config (.yaml): to train on it, type --data.source {joined([word])}")
    raise ValueError(
        f"there is no file {word} here, and no config of that name{meant(name, known)}. Configs that come along: "
        f"{', '.join(known)}. A text to train on is given by --data.source"
    )


def meant(word: str, known: Collection[str], mark: str = "") -> str:
    """ "; did you mean ...?", where something known is near."""
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(mark + each for each in near)}?" if near else ""


def setting_meant(name: str, known: Collection[str]) -> str:
    """The same for the dotted name of a setting, which people may know without its group or by another word."""
    last = name.rpartition(".")[2]
    same = [each for each in known if each.rpartition(".")[2] == last]
    if not same and ELSEWHERE.get(last) in known:
        same = [ELSEWHERE[last]]
    return f"; did you mean {' or '.join('--' + each for each in same[:2])}?" if same else meant(name, known, "--")


def allowed(kind: Any) -> str:
    """What a setting of a type takes, in words."""
    choices = [each for each in get_args(kind) if each is not type(None)]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, choices))}"
    if get_origin(kind) is list:
        of = f" of {', '.join(map(str, get_args(choices[0])))}" if get_origin(choices[0]) is Literal else ""
        return f"a list{of}, such as a,b (in YAML [a, b])"
    if get_origin(kind) is dict:
        return 'names with their weights, such as {"other.txt": 0.5}'
    if choices:  # int | None
        return allowed(choices[0])
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return words.get(kind, f"of type {kind}")


def names_in(kind: Any) -> list[str]:
    """The words that a type allows, if it is a choice of words."""
    if get_origin(kind) is Literal:
        return [str(each) for each in get_args(kind)]
    return [word for each in get_args(kind) for word in names_in(each)]


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's, which reads words as they are typed and speaks to people."""

    kinds: dict[str, Any] = {}  # noqa: RUF012 (jsonargparse copies parsers without arguments of ours)

    def parse_args(  # type: ignore[override]  # argparse overloads it, jsonargparse too: ours goes before both
        self, args=None, *rest, **options
    ) -> jsonargparse.Namespace:
        words = [*(sys.argv[1:] if args is None else args)]
        try:
            words = self.plain(words)
        except ValueError as error:
            self.error(str(error))
        return super().parse_args(words, *rest, **options)

    def plain(self, words: list[str]) -> list[str]:
        """The words as jsonargparse takes them. Raises ValueError for a config or a setting that there is not."""
        if words and not words[0].startswith("-"):
            words = ["--config", config_path(words[0]), *words[1:]]
        made: list[str] = []
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            before = words[i - 1] if i else ""
            if word.startswith("--") and word != "--":
                self.check_known(name)
                made.append(f"{name}={self.as_list(name, value)}" if equals else word)
            else:
                made.append(self.as_list(before, word))
        return made

    def check_known(self, option: str) -> None:
        """Raises ValueError for a setting that there is not, with what was probably meant."""
        name = option.removeprefix("--").removesuffix("+")
        group = name.rpartition(".")[0]
        if f"--{name}" in self._option_string_actions or get_origin(self.kinds.get(group)) is dict:
            return
        known = [each.removeprefix("--") for each in self._option_string_actions if each.startswith("--")]
        raise ValueError(f"there is no setting {option}{setting_meant(name, known)}")

    def as_list(self, option: str, value: str) -> str:
        """`tensorboard` or `a,b` where a list is wanted, as JSON."""
        wants_list = get_origin(self.kinds.get(option.removeprefix("--"))) is list
        return json.dumps(value.split(",")) if wants_list and not value.startswith("[") else value

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a parser inside of this one
            super().error(message, ex)
        sys.stderr.write(f"error: {self.sentence(message)}\nall settings: {self.prog} --help\n")
        self.exit(2)

    def sentence(self, message: str) -> str:
        """What jsonargparse says, in our words where we know the case."""
        if wrong := WRONG_VALUE.match(message):
            kind, value = self.kinds.get(wrong[1]), wrong[2].strip()
            return f"{wrong[1]} is {value!r}; it must be {allowed(kind)}{meant(value, names_in(kind))}"
        if unknown := UNKNOWN_KEY.match(message):
            name = ".".join(filter(None, unknown.groups()))
            return f"the config has {name!r}, and there is no such setting{setting_meant(name, self.kinds)}"
        if left := LEFT_OVER.match(message):
            return f"{left[1]!r} stands where no value belongs; a setting is given as --name value"
        if message.startswith("Unexpected config"):
            return "the config holds no settings; it is a YAML file of lines such as `max_steps: 1000`"
        return message
