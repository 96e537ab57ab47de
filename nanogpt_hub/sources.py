"""Where text comes from: a file, a folder, a URL, a Hub dataset, or the Python standard library itself.

    source = open_source("my.txt")
    for text in source.documents():  # exact text, one document after the other; each call starts anew
        ...

Text is UTF-8 and byte-exact: no newline is translated, nothing is stripped; only a byte order mark at the very start of
a file is dropped. What a first look can tell (a missing file, a misspelt column, a binary file) is an error at
`open_source`, before any heavy work. Every error is a `SourceError`, one sentence for the user.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import hashlib
import json
import lzma
import os
import platform
import re
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

PIECE_CHARS = 2**20  # a longer document is handed out in pieces of at most so many characters
BLOCK_BYTES = 2**20  # how much of a file is read at a time
MAX_ROW_BYTES = 2**28  # of one line or one value of a table: a row is held in memory
MAX_UNPACKED = 250  # times its packed size that a file may have: text packs to a tenth, a bomb to a thousandth
SMALL = 2**26  # bytes that any file may unpack to
Chunks = Iterator[tuple[str, bool]]  # pieces of text; True with the last one of a document


class SourceError(ValueError):
    """The data cannot be used as asked: missing, empty, binary, not in the form its name promises."""


@dataclass(frozen=True)
class Source:
    """Documents of text and what is known about them. Made by `open_source`."""

    kind: str  # file | folder | url | python | hub
    name: str  # for people: no private path, no credentials
    fingerprint: str  # sha256 hex; another one when the data has changed
    read: Callable[[], Chunks] = field(repr=False)  # documents in chunks of any size
    facts: dict = field(default_factory=dict)  # what `describe` adds
    text_bytes: int | None = None  # exact size of the text where the file system tells it

    def documents(self) -> Iterator[str]:
        """Whole documents, each held in memory. Each call starts anew."""
        parts = []
        for text, ends in self.read():
            parts.append(text)
            if ends:
                yield "".join(parts)
                parts.clear()

    def pieces(self) -> Chunks:
        """(text, ends) in flat memory: pieces of at most PIECE_CHARS; `ends` with the last one of each document.

        Documents are cut where byte-pair pre-tokenizers of the GPT-2 kind cut too (see `safe_cut`), so that the pieces'
        token ids, joined, are those of the whole document.
        """
        rest = ""
        for text, ends in self.read():
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
    source: str, *, text_column: str = "text", config: str = "", split: str = "train", revision: str = ""
) -> Source:
    """Opens a source of text and takes a first look at it. Raises SourceError, one sentence, where that fails.

    source: a path to a file (.jsonl, .json, .parquet, .csv and .tsv hold rows with a `text_column`; anything else is
    one document of text; .gz, .bz2 and .xz around them are opened), a folder of such files, an http(s) URL of a file,
    "python" for the standard library of the running interpreter, or the name of a Hub dataset, for which `config`,
    `split` and `revision` count. An existing path wins over the other readings.
    """
    source = str(source)
    if re.fullmatch(r"https?://.+", source, re.IGNORECASE):
        opened = _open_url(source, text_column)
    elif source.strip() and Path(source).expanduser().is_dir():
        opened = _open_folder(Path(source).expanduser(), text_column)
    elif source.strip() and Path(source).expanduser().exists():
        opened = _open_file(Path(source).expanduser(), text_column)
    elif source == "python":
        opened = _open_python()
    elif _may_be_hub_id(source):
        opened = _open_hub(source, text_column, config, split, revision)
    else:
        raise SourceError(
            f"there is no file or folder {source!r}; give an existing path, an http(s) URL, a Hub dataset (owner/name) "
            'or "python"'
        )
    if opened.kind != "hub" and (config or revision or split != "train"):
        raise SourceError(
            f"config, split and revision belong to Hub datasets, but {source!r} is a source of kind {opened.kind}; "
            "leave them out"
        )
    if next(opened.pieces(), None) is None:  # looks through the first document, or the first PIECE_CHARS of it
        raise SourceError(f"{source} holds no text: there is nothing to train on")
    return opened


def cache_root() -> Path:
    """Where downloads and token shards are kept: the folder NANOGPT_HUB_CACHE, or ~/.cache/nanogpt_hub."""
    return Path(os.environ.get("NANOGPT_HUB_CACHE") or Path.home() / ".cache" / "nanogpt_hub")


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


# ---- bytes and lines of a file ---------------------------------------------------------------------------------------

UNPACKERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. What goes wrong while it is read becomes a SourceError."""
    unpack = UNPACKERS.get(path.suffix.lower())
    try:
        with (unpack or open)(path, "rb") as file:
            yield _Bounded(path, file) if unpack else file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


class _Bounded:
    """A packed file's bytes: as many as an honest one holds."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.left = max(SMALL, MAX_UNPACKED * path.stat().st_size)

    def read(self, size: int) -> bytes:
        return self._counted(self.file.read(size))

    def readline(self, size: int) -> bytes:
        return self._counted(self.file.readline(size))

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise SourceError(
                f"{self.path} unpacks to more than {MAX_UNPACKED} times its size, as no text does; "
                "unpack it yourself if you trust it, and give that file"
            )
        return data


def check_parquet(file, path: Path) -> None:
    """Refuses a parquet file of which a few bytes unfold to gigabytes. Raises SourceError."""
    unpacked = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
    if unpacked > max(SMALL, MAX_UNPACKED * path.stat().st_size):
        raise SourceError(
            f"{path} unpacks to {unpacked:,} bytes, more than {MAX_UNPACKED} times its size, as no text does; "
            "write it anew without compression if you trust it"
        )


def _no_nul(path: Path, block: bytes, offset: int) -> None:
    if (at := block.find(0)) >= 0:
        raise SourceError(
            f"{path} is not text: there is a NUL byte at offset {offset + at} (a binary file, or UTF-16?); "
            "give text in UTF-8"
        )


def _not_utf8(path: Path, offset: int) -> SourceError:
    return SourceError(f"{path} is not UTF-8 text: invalid byte at offset {offset}; convert it to UTF-8 first")


def _read_text(path: Path) -> Chunks:
    """One document: the whole file, a block at a time; nothing for an empty file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, found = 0, False
    with _opened(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            _no_nul(path, block, offset)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # error.object begins with what an earlier block left undecided
                raise _not_utf8(path, offset + len(block) - len(error.object) + error.start) from error
            if not block:
                break
            text = text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(block)
            if text:
                found = True
                yield text, False
    if found:
        yield "", True


def _lines(path: Path) -> Iterator[str]:
    """The file's lines, their ends untouched."""
    offset = 0
    with _opened(path) as file:
        for line in iter(partial(file.readline, MAX_ROW_BYTES + 1), b""):
            if len(line) > MAX_ROW_BYTES:
                raise SourceError(f"{path} has a line of more than {MAX_ROW_BYTES:,} bytes at offset {offset}; cut it")
            _no_nul(path, line, offset)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start) from error
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(line)


# ---- rows with a text column -----------------------------------------------------------------------------------------


def _row_text(row: dict, column: str, where: str) -> Chunks:
    """A row's text as a document; nothing where it is empty or null."""
    if column not in row:
        raise SourceError(f"{where} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise SourceError(f"{where}: column {column!r} holds {type(text).__name__}, not text; name a column of text")
    if text:
        yield text, True


def _parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise SourceError(f"{where}: JSON nested too deep") from error


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) of JSON lines; of a single JSON array, too, which is then held in memory."""
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        if number == 1 and line.lstrip().startswith("["):
            rows = _parse_json(line + "".join(lines), str(path))
            yield from ((f"{path}, row {index}", row) for index, row in enumerate(rows, 1))
        elif line.strip():
            yield f"{path}, line {number}", _parse_json(line, f"{path}, line {number}")


def _read_json(path: Path, column: str) -> Chunks:
    for where, row in _json_rows(path):
        if not isinstance(row, dict):
            raise SourceError(f"{where}: an object with a column {column!r} was expected, not {type(row).__name__}")
        for text, ends in _row_text(row, column, where):
            if re.search("[\ud800-\udfff]", text):
                raise SourceError(f"{where}: an escape \\ud800-\\udfff without its other half is no character")
            yield text, ends


def _read_csv(path: Path, column: str) -> Chunks:
    tabs = ".tsv" in [suffix.lower() for suffix in path.suffixes]
    csv.field_size_limit(2**31 - 1)  # the module's own limit, 128 KiB, is less than a document
    rows = csv.reader(_lines(path), delimiter="\t" if tabs else ",")
    try:
        header = next(rows, [])
        for values in rows:
            if values:  # not a blank line
                row = dict(zip(header, values, strict=False))
                yield from _row_text(row, column, f"{path}, line {rows.line_num}")
    except csv.Error as error:
        raise SourceError(f"{path}, line {rows.line_num}: {error}") from error


def _read_parquet(path: Path, column: str) -> Chunks:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, read_dictionary=[column]) as file:
            check_parquet(file, path)
            columns = file.schema_arrow.names
            if column not in columns:
                yield from _row_text(dict.fromkeys(columns), column, str(path))  # says which columns there are
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):  # one at a time: a repeated text is there once, as a dictionary's entry
                    yield from _row_text({column: value.as_py()}, column, str(path))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not a readable parquet file: {error}") from error


ROW_READERS = {
    ".jsonl": _read_json, ".ndjson": _read_json, ".json": _read_json,
    ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet,
}  # fmt: skip


# ---- files, folders, URLs --------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    """The suffix that tells the format: what is left under .gz and the like."""
    inner = Path(path.stem) if path.suffix.lower() in UNPACKERS else path
    return inner.suffix.lower()


def _reader(path: Path, column: str) -> Callable[[], Chunks]:
    rows = ROW_READERS.get(_suffix(path))
    return partial(rows, path, column) if rows else partial(_read_text, path)


def _text_bytes(paths: list[Path]) -> int | None:
    """The size of the text itself, unless it lies packed or in rows."""
    if any(path.suffix.lower() in UNPACKERS or _suffix(path) in ROW_READERS for path in paths):
        return None
    return sum(path.stat().st_size for path in paths)


def _stat_facts(path: Path) -> tuple:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _open_file(path: Path, column: str) -> Source:
    if path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"{path} is empty; give a file with text in it")
    facts = {"bytes": path.stat().st_size}
    fingerprint = _digest("file", _stat_facts(path), column)
    return Source("file", path.name, fingerprint, _reader(path, column), facts, _text_bytes([path]))


def _is_binary(path: Path) -> bool:
    with _opened(path) as file:
        return 0 in file.read(4096)


def _folder_files(folder: Path) -> tuple[list[Path], int]:
    """The files of a folder that hold the data, sorted, and how many others were left out.

    Where there are tables (parquet, jsonl, csv, tsv; json only where there is nothing else), they alone are the data,
    and what lies beside them, such as a README, is not. Otherwise each text file is. Hidden, binary and empty files
    never are.
    """
    found = [path for path in folder.rglob("*") if path.is_file()]
    parts = {path: path.relative_to(folder).parts for path in found}
    seen = [path for path in found if path.stat().st_size and not any(part.startswith(".") for part in parts[path])]
    rows = [path for path in seen if _suffix(path) in ROW_READERS]
    tables = rows if len(rows) == len(seen) else [path for path in rows if _suffix(path) != ".json"]
    files = tables or [path for path in seen if not _is_binary(path)]
    return sorted(files, key=parts.get), len(found) - len(files)


def _chain(readers: list[Callable[[], Chunks]]) -> Chunks:
    for read in readers:
        yield from read()


def _open_folder(folder: Path, column: str) -> Source:
    files, skipped = _folder_files(folder)
    if not files:
        raise SourceError(f"the folder {folder} holds no text file ({skipped} hidden, binary or empty files in it)")
    tables = all(_suffix(path) in ROW_READERS for path in files)
    readers = [_reader(path, column) if tables else partial(_read_text, path) for path in files]
    facts = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    if skipped:
        facts["skipped_files"] = skipped
    fingerprint = _digest("folder", [_stat_facts(path) for path in files], column)
    return Source("folder", folder.resolve().name, fingerprint, partial(_chain, readers), facts, _text_bytes(files))


def _open_url(url: str, column: str) -> Source:
    parts = urlsplit(url)
    public = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    file_name = re.sub(r"[^\w.-]", "_", unquote(parts.path.rsplit("/", 1)[-1])) or "index"
    path = cache_root() / "downloads" / _digest(url)[:16] / file_name
    if not path.exists():
        _download(url, public, path)
    size = path.stat().st_size
    if size == 0:
        raise SourceError(f"{public} is empty; give the URL of a file with text in it")
    fingerprint = _digest("url", url, size, column)
    return Source("url", public, fingerprint, _reader(path, column), {"bytes": size}, _text_bytes([path]))


def _download(url: str, public: str, path: Path) -> None:
    """Fetches url into path: written aside, renamed when whole. Errors name `public`, which holds no credentials."""
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            _fetch(url, public, file)
        os.replace(aside, path)
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", None)
        reason = f"HTTP {status} {error.response.reason}" if status else type(error).__name__
        raise SourceError(f"could not download {public}: {reason}") from None  # the error's own text shows the query
    finally:
        Path(aside).unlink(missing_ok=True)


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
    readers = [partial(_read_text, path) for path in files]
    name = f"Python {version} standard library"
    return Source("python", name, fingerprint, partial(_chain, readers), facts, size)


# ---- the Hub ---------------------------------------------------------------------------------------------------------

FILE_SUFFIXES = {".txt", ".md", ".text", ".log", ".py", ".html", ".zip", ".bin", *UNPACKERS, *ROW_READERS}


def _may_be_hub_id(source: str) -> bool:
    """`name` or `owner/name`, and not what is plainly meant as a file."""
    well_formed = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source, re.ASCII)
    return bool(well_formed) and Path(source).suffix.lower() not in FILE_SUFFIXES


def _open_hub(name: str, column: str, config: str, split: str, revision: str) -> Source:
    found = _hub_facts(name, revision)
    revision = found.get("revision", revision)
    rows = _load_hub(name, config, split, revision, online=bool(found))
    facts = {"config": config, "split": split, "revision": revision, **found}
    facts = {key: value for key, value in facts.items() if value}
    fingerprint = _digest("hub", name, config, split, revision, column)
    return Source("hub", name, fingerprint, partial(_read_hub, rows, name, column), facts)


def _hub_facts(name: str, revision: str) -> dict:
    """The commit that `revision` stands for, and the licence; nothing where the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(name, revision=revision or None)
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{name!r} is neither a file or folder here nor a dataset on the Hub that you may read; check the "
            "spelling, or log in with `hf auth login` if it is private or gated"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"the Hub dataset {name} has no branch, tag or commit {revision!r}") from error
    except (HTTPError, OSError):  # offline: what an earlier run left in the cache may still serve
        return {}
    return {"revision": info.sha, "license": getattr(info.card_data, "license", None)}


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


def _load_hub(name: str, config: str, split: str, revision: str, online: bool):
    """The rows: a stream, except for slices such as train[:1%] and for what is only in the local cache."""
    import datasets

    streaming = online and re.fullmatch(r"[\w.-]+", split) is not None
    options = dict(split=split, revision=revision or None, streaming=streaming)
    try:
        with _hub_errors(f"{name} (config {config or 'default'}, split {split})"):
            return datasets.load_dataset(name, config or None, **options)
    except SourceError as error:
        if online:
            raise
        raise SourceError(
            f"there is no file or folder {name!r} here, and the Hub cannot be reached to look for a dataset of that "
            "name"
        ) from error


def _read_hub(rows, name: str, column: str) -> Chunks:
    with _hub_errors(name):
        for row in rows:
            yield from _row_text(row, column, f"the Hub dataset {name}")
