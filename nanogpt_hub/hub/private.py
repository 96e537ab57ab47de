"""What leaves this machine, made fit to be read by everybody: the one place that everything published passes.

    files = public_files(files)                  # of a push: cards, run.json, config.yaml, logs, samples, the state
    print(without_secrets(str(error)))           # a line of a log, which may name folders but open nothing

Taken out are passwords and queries in URLs, tokens by their form, the values of secrets in this process's environment,
and the folders of this machine, of which a path's last part stays. Weights and vocabularies hold none of these and are
left as they are. The run's own folder keeps what it has: only what is sent is cleaned.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import huggingface_hub
import yaml

from nanogpt_hub.hub.notebook import as_text, is_ours, with_mark
from nanogpt_hub.hub.plain_yaml import PlainYamlError, read_mapping
from nanogpt_hub.hub.readme import CardError, Readme

REMOVED = "(removed)"
URL = re.compile(r"""\b[a-zA-Z][a-zA-Z0-9+.-]{1,15}://[^\s"'<>`)\]}|\\]*[^\s"'<>`)\]}|\\.,;:!?]""")
TOKENS = (
    re.compile(  # by their form: of the Hub, GitHub, GitLab, Slack, OpenAI and its kin, AWS, Google; JSON web tokens
        r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
        r"|\bxox[a-z]-[\w-]{10,}|\bsk-[\w-]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}"
        r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}|(?<=[Bb]earer )[\w.~+/-]{12,}"
    )
)
SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|APIKEY|KEY|CREDENTIAL)S?(_|$)", re.IGNORECASE)
SECRET_PARAMETER = re.compile(
    r"se|sp|sv|sr|.*(sig|token|secret|key|pass|auth|cred|expires|session|policy|hmac).*", re.IGNORECASE
)
SHORTEST_SECRET = 8  # characters; replacing shorter ones would tear words apart
IN_A_PATH = r"[^\s\"'`<>|,;:)\]}]*"
SOME_HOME = re.compile(rf"(?<![\w/.])(?:/home/|/Users/|/root/|[A-Za-z]:[\\/]+Users[\\/]+){IN_A_PATH}")
# Keys of what a model wrote or reads: a path in it is no place here.
FREE_TEXT = ("text", "prompt", "content", "chat_template")
MADE_HERE = re.compile(r"|char|byte|gpt2|bpe:\d+|python")  # tokenizers and sources that name no file and no repo
NOT_OTHERS = ("hub", "save", "trackers", "out_dir", "resume", "overwrite", "config")  # settings that start no same run
TEXTS = re.compile(r".*\.(json|jsonl|yaml|txt|md|jinja|ipynb)")
MODELS_OWN = re.compile(r"(.*/)?((config|generation_config|tokenizer|vocab|added_tokens)\.json|merges\.txt)")


# ---- a text ----------------------------------------------------------------------------------------------------------
class Scrub:
    """Cleans texts: what opens something goes, and of each folder of this machine all but a path's last part."""

    def __init__(self, secrets: Iterable[str] = ()):
        """secrets: more than this process's own to take out, literally."""
        self.secrets = sorted({*secrets, *known_secrets()}, key=len, reverse=True)
        home, passing = private_roots()
        self.home, self.anywhere = path_pattern(home), path_pattern([*home, *passing])

    def secrets_of(self, text: str) -> str:
        """The text without what opens something."""
        for secret in self.secrets:
            text = text.replace(secret, REMOVED)
        return TOKENS.sub(REMOVED, URL.sub(lambda found: public_url(found[0]), text))

    def __call__(self, text: str, free: bool = False) -> str:
        """The text without secrets and places. free: what people or models wrote, in which only this user's own
        folders are places."""
        text = (self.home if free else self.anywhere).sub(
            lambda found: last_part(found[0]) or ".", self.secrets_of(text)
        )
        return text if free else SOME_HOME.sub(lambda found: last_part(found[0]), text)

    def value(self, value: Any, key: str = "") -> Any:
        """JSON with each of its strings cleaned; the keys are ours."""
        if isinstance(value, str):
            return self(value, free=key in FREE_TEXT)
        if isinstance(value, Mapping):
            return {k: self.value(v, str(k)) for k, v in value.items()}
        return [self.value(item, key) for item in value] if isinstance(value, list | tuple) else value


def without_secrets(text: str) -> str:
    """A text without what opens something: for what this machine's own user reads."""
    return Scrub().secrets_of(text)


def public_text(text: str) -> str:
    """A text without secrets and without the folders of this machine."""
    return Scrub()(text)


def public_url(url: str) -> str:
    """A URL without user and password, and without its query where that may open something."""
    try:
        parts = urlsplit(url)
        host = f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    except ValueError:
        return REMOVED
    harmless = "@" not in parts.netloc and not any(is_secret(*pair) for pair in parse_qsl(parts.query))
    return url if harmless else f"{parts.scheme}://{host}{parts.path}"


def is_secret(name: str, value: str) -> bool:
    """Whether a parameter of a URL may open something: by its name, or by a value that nobody would type."""
    return bool(SECRET_PARAMETER.fullmatch(name) or re.fullmatch(r"[\w%+/=-]{20,}", value))


def public_name(name: str) -> str:
    """A source, model or file as others may read it: a local path by its last part, a URL up to its query."""
    if "://" in name:
        return public_text(public_url(re.split(r"[?#]", name, maxsplit=1)[0]))
    local = name.startswith(("/", "~", ".", "\\")) or "\\" in name or re.match(r"[A-Za-z]:", name)
    return public_text(last_part(name) if name and (local or Path(name).exists()) else name)


def last_part(path: str) -> str:
    """The last part of a path of either kind of system."""
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name


def known_secrets() -> set[str]:
    """The Hub token in use, and values of environment variables that are named as secrets are."""
    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    return {value for value in {*found, huggingface_hub.get_token() or ""} if len(value) >= SHORTEST_SECRET}


def secrets_in(value: Any) -> set[str]:
    """What opens something in the URLs of settings: user or password, and values of queries."""
    found: set[str] = set()
    for url in (url for text in strings_in(value) for url in URL.findall(text)):
        try:
            parts = urlsplit(url)
            found |= {parts.password or parts.username or ""}
            found |= {value for name, value in parse_qsl(parts.query) if is_secret(name, value)}
        except ValueError:
            continue
    return {form for secret in found for form in (secret, unquote(secret)) if len(form) >= SHORTEST_SECRET}


def strings_in(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from strings_in(item)


def private_roots() -> tuple[list[str], list[str]]:
    """The folders of this machine that say something of its user, and those in which things lie for a while."""
    caches = (os.environ.get(name, "") for name in ("HF_HOME", "NANOGPT_HUB_CACHE"))
    own: list[str | Path] = [Path.home(), Path.cwd(), *caches]
    return _spellings(own), _spellings([tempfile.gettempdir()])


def _spellings(places: Iterable[str | Path]) -> list[str]:
    """Each folder as it is named and as it is without links."""
    return [str(form) for place in places if str(place) for form in (Path(place), Path(place).resolve())]


def path_pattern(roots: list[str]) -> re.Pattern:
    """Paths at or below one of the roots; of one that is everything (/), none."""
    named = sorted((root for root in roots if len(Path(root).parts) > 1), key=len, reverse=True)
    either = "|".join(map(re.escape, named)) or "(?!)"
    return re.compile(rf"(?<![\w.~-])(?:{either})(?![\w.-]){IN_A_PATH}")


# ---- settings --------------------------------------------------------------------------------------------------------
def public_config(settings: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A run's settings as others need them to start the same: not where it was kept, cached, tracked and pushed.

    facts: of its run.json, which tell whether "owner/name" was read from the Hub and is no folder of this machine.
    """
    on_hub = hub_names(facts or {})
    kept = {name: value for name, value in settings.items() if name not in NOT_OTHERS}
    if isinstance(kept.get("data"), Mapping):
        data = {name: value for name, value in kept["data"].items() if name != "cache_dir"}
        named = {name: data[name] for name in ("source", "val_source", "tokenizer") if isinstance(data.get(name), str)}
        if isinstance(data.get("mix"), Mapping):
            data["mix"] = {public_source(str(name), on_hub): weight for name, weight in data["mix"].items()}
        kept["data"] = data | {name: public_source(value, on_hub) for name, value in named.items()}
    if isinstance(kept.get("from"), str):
        kept["from"] = public_source(kept["from"], on_hub)
    return Scrub(secrets_in(settings)).value(kept)


def hub_names(facts: Mapping[str, Any]) -> set[str]:
    """The names on the Hub that a run's facts mention."""
    data = facts["data"] if isinstance(facts.get("data"), Mapping) else {}
    source = data["source"] if isinstance(data.get("source"), Mapping) else {}
    base = facts["base_model"] if isinstance(facts.get("base_model"), Mapping) else {}
    found = (source.get("name") if source.get("kind") == "hub" else None, base.get("id"), data.get("tokenizer"))
    return {name for name in found if isinstance(name, str)}


def public_source(name: str, on_hub: set[str]) -> str:
    """As `public_name`, and a relative path by its last part too, wherever it was relative to."""
    if MADE_HERE.fullmatch(name) or name.partition("@")[0] in on_hub:
        return name
    cleaned = public_name(name)
    return cleaned if "://" in cleaned else last_part(cleaned)


# ---- files -----------------------------------------------------------------------------------------------------------
def public_files(files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """The files of a push as they may be read by everybody; those that need no change are passed on as they are.

    A config or a record that cannot be read is left out: what is in it cannot be known.
    """
    config = next((path for path in ("training/config.yaml", "config.yaml") if path in files), "")
    settings = _mapping(files[config]) if config else {}
    record = next((path for path in ("training/run.json", "run.json") if path in files), "")
    facts = _record(files[record]) if record else {}
    scrub = Scrub(secrets_in(settings))
    public: dict[str, Path | bytes] = {}
    for path, file in files.items():
        if path == config:
            text = yaml.safe_dump(public_config(settings, facts), sort_keys=False, allow_unicode=True)
            public[path] = text.encode()
        elif not TEXTS.fullmatch(path) or MODELS_OWN.fullmatch(path):
            public[path] = file
        elif (new := public_file(path, data := _read(file), scrub)) is not None:
            public[path] = file if new == data else new
    return public


def public_file(path: str, data: bytes, scrub: Scrub) -> bytes | None:
    """One file of text; None for JSON that is none."""
    text = data.decode("utf-8", "replace")
    new: str | None
    if path.endswith(".md"):
        new = public_readme(text, scrub)
    elif path.endswith(".ipynb"):
        new = public_notebook(text, scrub)
    elif path.endswith((".json", ".jsonl")):
        new = public_json(text, scrub, lines=path.endswith("l"))
    else:
        new = scrub(text, free=True)
    return None if new is None else data if new == text else new.encode()


def public_json(text: str, scrub: Scrub, lines: bool) -> str | None:
    """JSON, or JSON lines; None for what is neither."""
    try:
        values = [json.loads(part) for part in (text.splitlines() if lines else [text]) if part.strip()]
    except (ValueError, RecursionError):
        return None
    public = [scrub.value(value) for value in values]
    if public == values:
        return text
    return "".join(json.dumps(value, indent=None if lines else 2, ensure_ascii=False) + "\n" for value in public)


def public_notebook(text: str, scrub: Scrub) -> str | None:
    """A notebook; the mark that tells whether somebody has changed it goes along. None for what is none."""
    new = public_json(text, scrub, lines=False)
    if new is None or new == text or not is_ours(text):
        return new
    return as_text(with_mark(json.loads(new)))


def public_readme(text: str, scrub: Scrub) -> str:
    """A card, the words of people in it cleaned too; the mark that tells whether they wrote goes along."""
    try:
        parts = Readme.parse(text)
    except CardError:
        return scrub(text, free=True)
    before, block, after = (scrub(part, free=True) for part in (parts.before, parts.block, parts.after))
    new = replace(parts, data=scrub.value(parts.data), before=before, block=block, after=after)
    if new == parts:
        return text
    return str(replace(new, mark=new.words) if parts.mark == parts.words else new)


def _read(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _record(file: Path | bytes) -> dict[str, Any]:
    """A run.json; nothing where it is none."""
    try:
        content = json.loads(_read(file))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _mapping(file: Path | bytes) -> dict[str, Any]:
    """A config.yaml; nothing where it is none, so that nothing of it is published."""
    try:
        return read_mapping(_read(file).decode("utf-8", "replace"), "config.yaml")
    except PlainYamlError:
        return {}
