"""YAML that somebody else wrote: mappings, lists and scalars, in bounded time and memory.

    settings = read_yaml(path.read_text(), "config.yaml")

Aliases are refused, because a few lines of them unfold to gigabytes; so are deep nesting and texts that are larger
than any honest file of their kind. No tag makes an object.
"""

from typing import Any

import yaml

MAX_CHARACTERS = 2**18  # the config of a run has 2,000
MAX_DEPTH = 32
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same language, ten times as fast


class PlainYamlError(ValueError):
    """A text that is not YAML, or more of it than is read."""


def read_yaml(text: str, name: str) -> Any:
    """What a YAML text holds; None for an empty one. Raises PlainYamlError, one line that begins with `name`."""
    if len(text) > MAX_CHARACTERS:
        raise PlainYamlError(f"{name} has {len(text):,} characters of YAML; at most {MAX_CHARACTERS:,} are read")
    try:
        check_events(text, name)
        return yaml.load(text, Loader=LOADER)  # noqa: S506 (LOADER is the safe one)
    except PlainYamlError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PlainYamlError(f"{name} is not valid YAML: {reason}") from None


def read_mapping(text: str, name: str) -> dict[str, Any]:
    """A YAML text of `key: value` lines; {} for an empty one. Raises PlainYamlError where it holds something else."""
    content = read_yaml(text, name)
    if content is not None and not isinstance(content, dict):
        raise PlainYamlError(f"{name} must be `key: value` lines, not a {type(content).__name__}")
    return {str(key): value for key, value in (content or {}).items()}


def check_events(text: str, name: str) -> None:
    """Refuses aliases and deep nesting: the parser's events are looked through before anything is built of them."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise PlainYamlError(f"{name} has an alias (*{event.anchor}), which is not read: write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise PlainYamlError(f"{name} is nested more than {MAX_DEPTH} levels deep")
