"""Where text comes from: a file, a folder, a URL, a Hub dataset, the Python standard library, or a grammar of stories.

    source = open_source("my.txt")
    for text in source.documents():  # exact text, one document after the other; each call starts anew
        ...

Text is UTF-8 and byte-exact: no newline is translated, nothing is stripped; only a byte order mark at the very start of
a file is dropped. What a first look can tell (a missing file, a misspelt column, a binary file) is an error at
`open_source`, before any heavy work. Every error is a `SourceError`, one sentence for the user.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from nanogpt_hub.corpus import stories
from nanogpt_hub.corpus.formats import (
    BLOCK_BYTES,
    ROW_FORMATS,
    UNPACKERS,
    UTF_8,
    Chunks,
    Reading,
    SourceError,
    check_encoding,
    looks_wrong,
    read_text,
    read_texts,
    suffix,
    texts_of,
)
from nanogpt_hub.system.files import one_at_a_time, replacing

__all__ = ["OfflineError", "Reading", "Source", "SourceError", "cache_root", "open_source"]

NAMES = {"python", "stories"}  # of sources that are made here: no Hub dataset is meant
PIECE_CHARS = 2**20  # a longer document is handed out in pieces of at most so many characters
LISTED_FILES = 10  # of a folder's files that are in another encoding, so many are named
ReadChunks = Callable[[Reading], Chunks]  # one pass over the documents


@dataclass(frozen=True)
class Source:
    """Documents of text and what is known about them. Made by `open_source`."""

    kind: str  # file | folder | url | python | stories | hub | mix
    name: str  # for people: no private path, no credentials
    fingerprint: str  # sha256 hex; another one when the data has changed
    read: ReadChunks = field(repr=False)  # documents in chunks of any size
    facts: dict = field(default_factory=dict)  # what `describe` adds
    text_bytes: int | None = None  # exact size of the text where the file system tells it
    max_bad_rows: int = 0  # rows that cannot be read are left out, up to so many in a pass

    def documents(self) -> Iterator[str]:
        """Whole documents, each held in memory. Each call starts anew."""
        parts = []
        for text, ends in self.read(Reading(self.max_bad_rows)):
            parts.append(text)
            if ends:
                yield "".join(parts)
                parts.clear()

    def pieces(self, reading: Reading | None = None) -> Chunks:
        """(text, ends) in flat memory: pieces of at most PIECE_CHARS; `ends` with the last one of each document.

        Documents are cut where byte-pair pre-tokenizers of the GPT-2 kind cut too (see `safe_cut`), so that the pieces'
        token ids, joined, are those of the whole document. reading: takes down which rows could not be read.
        """
        rest = ""
        for text, ends in self.read(reading or Reading(self.max_bad_rows)):
            text, start = rest + text, 0
            while len(text) - start > PIECE_CHARS:
                end = safe_cut(text, start, start + PIECE_CHARS)
                yield text[start:end], False
                start = end
            rest = text[start:]
            if ends:
                yield rest, True
                rest = ""

    def texts(self) -> Iterator[str]:
        """The pieces without their ends: what a tokenizer is trained on."""
        return (text for text, _ in self.pieces())

    def describe(self) -> dict:
        """Facts for cards and manifests, JSON-ready: kind, name, and where known revision, license, bytes, ..."""
        return {"kind": self.kind, "name": self.name, **self.facts}


SAFE_CUTS = [  # best first: each matches up to its last place in the text, which may not be the very end
    re.compile(r".*[^\W_](?=\r?\n)", re.DOTALL),  # before the line end behind a letter or digit
    re.compile(r".*[^\W_](?=[ \t])", re.DOTALL),  # before the space behind a letter or digit
    re.compile(r".*[^\W\d_](?=[^\w\s])", re.DOTALL),  # between a letter and a sign
]


def safe_cut(text: str, start: int, end: int) -> int:
    """The last place in (start, end] at which no token of a GPT-2-like pre-tokenizer can lie across.

    GPT-2's pattern never joins a letter or digit with white space that follows it, nor a letter with a sign; those of
    GPT-4, Llama 3 and Qwen neither. A stretch of `end - start` characters without such a place (no white space, no
    punctuation) is cut at `end` all the same: a token or two there may differ from those of the whole.
    """
    for pattern in SAFE_CUTS:
        if match := pattern.match(text, start, end):
            return match.end()
    return end


def open_source(
    source: str,
    *,
    text_column: str = "text",
    config: str = "",
    split: str = "train",
    revision: str = "",
    encoding: str = UTF_8,
    max_bad_rows: int = 0,
    look: bool = True,
) -> Source:
    """Opens a source of text and takes a first look at it. Raises SourceError, one sentence, where that fails.

    source: a path to a file (.jsonl, .json, .parquet, .csv and .tsv hold rows with a `text_column`; anything else is
    one document of text; .gz, .bz2, .xz and .zst around them are opened), a folder of such files, an http(s) URL of a
    file, "python" for the standard library of the running interpreter, "stories" for very short stories from a grammar
    (see `parse_stories` for what may follow), or the name of a Hub dataset, as owner/name or owner/name@revision, for
    which `config`, `split` and `revision` count. An existing path wins over the other readings.
    encoding: of files that are not UTF-8, by Python's name for it. max_bad_rows: rows that cannot be read are left out
    and counted, up to so many; but the first one has to be good. look: without it, what cannot be read is an error when
    it is read. So it is, with it, of a Hub dataset at a commit while the Hub cannot be reached: its tokens may be here.
    """
    source, form = str(source), Form(text_column, check_encoding(encoding))
    if re.fullmatch(r"https?://.+", source, re.IGNORECASE):
        found = _open_url(source, form)
    elif source.strip() and Path(source).expanduser().is_dir():
        found = _open_folder(Path(source).expanduser(), form)
    elif source.strip() and Path(source).expanduser().exists():
        found = _open_file(Path(source).expanduser(), form)
    elif source == "python":
        found = _open_python()
    elif source.partition(":")[0] == "stories":
        found = _open_stories(source)
    elif dataset := hub_dataset(source, revision):
        found = _open_hub(*dataset, text_column, config, split, look)
    else:
        raise SourceError(
            f"there is no file or folder {source!r}; give an existing path, an http(s) URL, a Hub dataset "
            '(owner/name), "python" or "stories"'
        )
    if found.kind != "hub" and (config or revision or split != "train"):
        raise SourceError(
            f"config, split and revision belong to Hub datasets, but {source!r} is a source of kind {found.kind}; "
            "leave them out"
        )
    if look and _is_empty(found):
        raise SourceError(f"{source} holds no text: there is nothing to train on")
    return replace(found, max_bad_rows=max_bad_rows)


def _is_empty(source: Source) -> bool:
    """Looks through the first document, or the first PIECE_CHARS of it, where it can be reached."""
    try:
        return next(source.pieces(), None) is None
    except OfflineError:
        return False


@dataclass(frozen=True)
class Form:
    """How a file is to be read."""

    column: str = "text"  # of a table
    encoding: str = UTF_8  # of whatever holds characters

    def key(self) -> list[str]:
        """What a fingerprint takes in: the same as ever for UTF-8."""
        return [self.column] if self.encoding == UTF_8 else [self.column, self.encoding]


def cache_root() -> Path:
    """Where downloads and token shards are kept: the folder NANOGPT_HUB_CACHE, or ~/.cache/nanogpt_hub."""
    return Path(os.environ.get("NANOGPT_HUB_CACHE") or Path.home() / ".cache" / "nanogpt_hub")


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


# ---- files, folders, URLs --------------------------------------------------------------------------------------------


def _reader(path: Path, form: Form) -> ReadChunks:
    if suffix(path) in ROW_FORMATS:
        return lambda reading: read_texts(path, form.column, reading, form.encoding)
    return lambda reading: read_text(path, form.encoding)


def _text_bytes(paths: list[Path], form: Form) -> int | None:
    """The size of the text itself, unless it lies packed or in rows or is in another encoding."""
    if form.encoding != UTF_8:
        return None
    if any(path.suffix.lower() in UNPACKERS or suffix(path) in ROW_FORMATS for path in paths):
        return None
    return sum(path.stat().st_size for path in paths)


def _stat_facts(path: Path) -> tuple:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _open_file(path: Path, form: Form) -> Source:
    if path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"{path} is empty; give a file with text in it")
    facts = {"bytes": path.stat().st_size}
    fingerprint = _digest("file", _stat_facts(path), *form.key())
    return Source("file", path.name, fingerprint, _reader(path, form), facts, _text_bytes([path], form))


def _folder_files(folder: Path, form: Form) -> tuple[list[Path], int]:
    """The files of a folder that hold the data, sorted, and how many others were left out.

    Where there are tables (parquet, jsonl, csv, tsv; json only where there is nothing else), they alone are the data,
    and what lies beside them, such as a README, is not. Otherwise each text file is. Hidden, binary and empty files
    never are. Raises SourceError for text files in another encoding, which it names.
    """
    found = [path for path in folder.rglob("*") if path.is_file()]
    parts = {path: path.relative_to(folder).parts for path in found}
    seen = [path for path in found if path.stat().st_size and not any(part.startswith(".") for part in parts[path])]
    rows = [path for path in seen if suffix(path) in ROW_FORMATS]
    tables = rows if len(rows) == len(seen) else [path for path in rows if suffix(path) != ".json"]
    files = sorted(tables or seen, key=parts.__getitem__)
    if not tables and form.encoding == UTF_8:
        files = _text_files(folder, files)
    return files, len(found) - len(files)


def _text_files(folder: Path, files: list[Path]) -> list[Path]:
    """Those of the files that are text in UTF-8, where the others are binary."""
    wrong = {path: guess for path in files if (guess := looks_wrong(path)) is not None}
    other = {path: guess for path, guess in wrong.items() if guess}
    if other:
        names = [f"{path.relative_to(folder).as_posix()} (looks like {guess})" for path, guess in other.items()]
        more = f" and {len(names) - LISTED_FILES} more" if len(names) > LISTED_FILES else ""
        guess, text_files = next(iter(other.values())), len(files) - len(wrong) + len(other)
        raise SourceError(
            f"{len(other)} of the {text_files} text files in {folder} are not UTF-8: "
            f"{', '.join(names[:LISTED_FILES])}{more}; give --data.encoding {guess} if all files are in it, or convert "
            f"these, each by: iconv -f {guess} -t utf-8 FILE > NEW"
        )
    return [path for path in files if path not in wrong]


def _chain(readers: Sequence[ReadChunks], reading: Reading) -> Chunks:
    for read in readers:
        yield from read(reading)


def _open_folder(folder: Path, form: Form) -> Source:
    files, skipped = _folder_files(folder, form)
    if not files:
        raise SourceError(f"the folder {folder} holds no text file ({skipped} hidden, binary or empty files in it)")
    tables = all(suffix(path) in ROW_FORMATS for path in files)
    readers = [_reader(path, form) if tables else partial(_read_text, path, form) for path in files]
    facts = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    if skipped:
        facts["skipped_files"] = skipped
    fingerprint = _digest("folder", [_stat_facts(path) for path in files], *form.key())
    read = partial(_chain, readers)
    return Source("folder", folder.resolve().name, fingerprint, read, facts, _text_bytes(files, form))


def _read_text(path: Path, form: Form, reading: Reading) -> Chunks:
    return read_text(path, form.encoding)


def _open_url(url: str, form: Form) -> Source:
    parts = urlsplit(url)
    public = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    file_name = re.sub(r"[^\w.-]", "_", unquote(parts.path.rsplit("/", 1)[-1])) or "index"
    path = cache_root() / "downloads" / _digest(url)[:16] / file_name
    if not path.exists():
        with one_at_a_time(path):
            if not path.exists():
                _download(url, public, path)
    size = path.stat().st_size
    if size == 0:
        raise SourceError(f"{public} is empty; give the URL of a file with text in it")
    fingerprint = _digest("url", url, size, *form.key())
    return Source("url", public, fingerprint, _reader(path, form), {"bytes": size}, _text_bytes([path], form))


def _download(url: str, public: str, path: Path) -> None:
    """Fetches url into path: written aside, renamed when whole. Errors name `public`, which holds no credentials."""
    import requests

    try:
        with replacing(path) as aside, open(aside, "wb") as file:
            _fetch(url, public, file)
    except requests.RequestException as error:
        answer = error.response
        reason = type(error).__name__ if answer is None else f"HTTP {answer.status_code} {answer.reason}"
        raise SourceError(f"could not download {public}: {reason}") from None  # the error's own text shows the query


def _fetch(url: str, public: str, file: BinaryIO) -> None:
    import requests

    # identity: a server that packs on the way would hide the true length
    with requests.get(url, stream=True, timeout=60, headers={"Accept-Encoding": "identity"}) as response:
        response.raise_for_status()
        page = "text/html" in response.headers.get("Content-Type", "")
        if page and not urlsplit(url).path.lower().endswith((".html", ".htm")):
            raise SourceError(f"{public} is a web page, not a file of text; give the address of the raw file")
        total = int(response.headers.get("Content-Length", 0)) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc="download") as bar:
            for block in response.iter_content(BLOCK_BYTES):
                file.write(block)
                bar.update(len(block))


# ---- the standard library --------------------------------------------------------------------------------------------

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TABLES = {"encodings", "pydoc_data", "lib2to3"}  # made by programs, or Python 2's: not how people write Python


def _open_python() -> Source:
    """The running interpreter's standard library, without its tests and tables: a corpus that is always there."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    names = sorted(
        name
        for name, path in modules.items()
        if not (NOT_LIBRARY | TABLES).intersection(name.split("/"))
        and not path.name.startswith(("test_", "_sysconfigdata"))
        and path.stat().st_size
    )
    if not names:
        raise SourceError("this Python comes without the source of its standard library; give a file or folder instead")
    files = [modules[name] for name in names]
    version, size = platform.python_version(), sum(path.stat().st_size for path in files)
    facts = {"revision": version, "license": "PSF-2.0", "files": len(files), "bytes": size}
    fingerprint = _digest("python", version, [(name, modules[name].stat().st_size) for name in names])
    readers = [partial(_read_text, path, Form()) for path in files]
    name = f"Python {version} standard library"
    return Source("python", name, fingerprint, partial(_chain, readers), facts, size)


# ---- stories from a grammar ------------------------------------------------------------------------------------------

STORIES = {"level": 4, "seed": 1, "size": 8_000_000}  # defaults; the size is in characters


def parse_stories(source: str) -> dict[str, int]:
    """ "stories:level=2,seed=7" as {"level": 2, "seed": 7, "size": 8_000_000}. Raises SourceError for anything else.

    level: 1 to 4 (see corpus/stories.py); seed: which stream of stories; size: how many characters of it, ending with a
    whole story.
    """
    settings = dict(STORIES)
    for setting in filter(None, source.partition(":")[2].split(",")):
        key, _, value = setting.partition("=")
        if key.strip() not in STORIES or not re.fullmatch(r"[\d_]+", value.strip(), re.ASCII):
            raise SourceError(
                f"{source!r}: {setting!r} is not a setting of stories; write stories, or settings behind it as in "
                f"stories:{','.join(f'{k}={v}' for k, v in STORIES.items())}"
            )
        settings[key.strip()] = int(value)
    if settings["level"] not in stories.LEVELS or not settings["size"]:
        raise SourceError(
            f"{source!r}: level must be one of {', '.join(map(str, stories.LEVELS))}, and size at least 1"
        )
    return settings


def _open_stories(source: str) -> Source:
    """So many characters of the endless stream of a level and seed; its entropy is a fact."""
    settings = parse_stories(source)
    level, seed, size = (settings[key] for key in STORIES)
    name = f"stories of level {level}" + (f", seed {seed}" if seed != STORIES["seed"] else "")
    known = stories.entropy(level)
    facts = {"level": level, "seed": seed, "characters": size, "license": "mit", "bits_per_document": known.bits}
    fingerprint = _digest("stories", settings, next(stories.stories(level, seed)), known.bits, known.characters)
    return Source("stories", name, fingerprint, partial(_read_stories, level, seed, size), facts)


def _read_stories(level: int, seed: int, size: int, reading: Reading) -> Chunks:
    for story in stories.stories(level, seed):
        yield story, True
        size -= len(story)
        if size <= 0:
            return


# ---- the Hub ---------------------------------------------------------------------------------------------------------

FILE_SUFFIXES = {".txt", ".md", ".text", ".log", ".py", ".html", ".zip", ".bin", *UNPACKERS, *ROW_FORMATS}
COMMIT = re.compile(r"[0-9a-f]{40}")  # what is read at a commit never changes
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([\w./-]+))?", re.ASCII)


class OfflineError(SourceError):
    """The Hub cannot be reached, and what was asked for is in no cache here."""


def hub_dataset(source: str, revision: str = "") -> tuple[str, str] | None:
    """(name, revision) of the Hub dataset that a source names, as owner/name or owner/name@revision; None for another
    kind of source, and for what is plainly meant as a file. Raises SourceError for two revisions."""
    found = HUB_NAME.fullmatch(source)
    if not found or source in NAMES or Path(source).expanduser().exists():
        return None
    if {Path(source).suffix.lower(), Path(found[1]).suffix.lower()} & FILE_SUFFIXES:
        return None
    if found[2] and revision not in ("", found[2]):
        raise SourceError(f"{source!r} names a revision, and {revision!r} is asked for too: give one of them")
    return found[1], found[2] or revision


def find_commit(name: str, revision: str = "") -> dict[str, str]:
    """The commit that a branch, tag or commit of a Hub dataset stands for now, as `revision`, and its `license`.

    Raises OfflineError where the Hub cannot be reached, SourceError where there is no such thing or the Hub fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    from nanogpt_hub.hub.resolve import TIMEOUT, explain, with_retries

    try:
        info = with_retries(lambda: HfApi().dataset_info(name, revision=revision or None, timeout=TIMEOUT))
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{name!r} is neither a file or folder here nor a dataset on the Hub that you may read; check the "
            "spelling, or log in with `hf auth login` if it is private or gated"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"the Hub dataset {name} has no branch, tag or commit {revision!r}") from error
    except HfHubHTTPError as error:
        raise SourceError(explain(error, name, revision, doing=f"look up the dataset {name}")) from error
    except (HTTPError, OSError) as error:
        raise OfflineError(f"the Hub cannot be reached to look up the dataset {name}") from error
    facts = {"revision": info.sha, "license": getattr(info.card_data, "license", None)}
    return {key: value for key, value in facts.items() if value}


def _open_hub(name: str, revision: str, column: str, config: str, split: str, look: bool) -> Source:
    """Asks the Hub nothing where the commit is given and no look is wanted: the rows are opened when they are read."""
    found: dict[str, str] = {}
    online = True
    try:
        if look or not COMMIT.fullmatch(revision):
            found = find_commit(name, revision)
    except OfflineError:  # what an earlier run left in the cache may still serve
        online = False
    facts = {"config": config, "split": split, "revision": revision, **found}
    facts = {key: value for key, value in facts.items() if value}
    commit = facts.get("revision", "")

    @functools.cache
    def load() -> tuple[Any, dict | None]:
        rows = load_hub(name, config, split, commit, online)
        return rows, rows.state_dict() if hasattr(rows, "state_dict") else None

    if not COMMIT.fullmatch(commit):
        load()  # raises where nothing is here that could be meant
    fingerprint = _digest("hub", name, config, split, commit, column)
    return Source("hub", name, fingerprint, partial(_read_hub, load, name, column), facts)


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What goes wrong in the datasets library becomes a SourceError of one line."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except SourceError:
        raise
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise SourceError(f"the Hub dataset {name} cannot be read: {reason}") from error


def load_hub(name: str, config: str, split: str, revision: str, online: bool = True, stream: bool = True) -> Any:
    """The rows of a Hub dataset: a stream, but for slices such as train[:1%]; a table from the local cache where it is
    not `online`. Raises SourceError where they cannot be read, OfflineError where the cache does not hold them."""
    import datasets

    streaming = online and stream and re.fullmatch(r"[\w.-]+", split) is not None
    options = dict(split=split, revision=revision or None, streaming=streaming)
    try:
        with _hub_errors(f"{name} (config {config or 'default'}, split {split})"), _network(online):
            rows = datasets.load_dataset(name, config or None, **options)
    except SourceError as error:
        if online:
            raise
        raise _not_here(name, revision) from error
    if online or not COMMIT.fullmatch(revision):
        return rows
    if not any(revision in Path(file["filename"]).parts for file in rows.cache_files):
        raise _not_here(name, revision)  # the library takes any commit that is in the cache
    return rows


@contextlib.contextmanager
def _network(online: bool) -> Iterator[None]:
    """Where the Hub could not be reached, the datasets library does not try: it would fetch a whole dataset."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not online
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _not_here(name: str, revision: str) -> OfflineError:
    if COMMIT.fullmatch(revision):
        return OfflineError(
            f"the Hub cannot be reached, and the dataset {name} at commit {revision} is not complete in a cache here: "
            "run `nanogpt-hub prepare` with the same settings where there is a network"
        )
    return OfflineError(
        f"there is no file or folder {name!r} here, and the Hub cannot be reached to look for a dataset of that name"
    )


def _read_hub(load: Callable[[], tuple[Any, dict | None]], name: str, column: str, reading: Reading) -> Chunks:
    """The texts, from `reading.start` on: the position that the datasets library itself keeps of a stream, and how many
    rows are before it. load: gives the rows and the position before the first one; a table in the local cache has none,
    and begins behind so many rows."""
    rows, begin = load()
    first = reading.start["rows"] if reading.start else 0
    number = first

    def located() -> Iterator[tuple[str, dict]]:
        nonlocal number
        for number, row in enumerate(rows, first + 1):
            yield f"the Hub dataset {name}, row {number}", row

    if begin is None:
        rows = rows.skip(first)
    else:  # a position that is loaded stays with the object, so the beginning has to be loaded as well
        rows.load_state_dict(reading.start["state"] if reading.start else begin)
        reading.mark = lambda: {"rows": number, "state": rows.state_dict()}
    with _hub_errors(name):
        yield from texts_of(located(), column, reading)
