"""Files of text and files of rows: unpacked, decoded, one row after the other. The only readers of either kind.

    for text, ends in read_text(Path("a.txt.gz")): ...          # one document, a block at a time
    for where, row in read_rows(Path("a.jsonl"), Reading()): ...  # {"text": ...} and words that say where it stands

Text is byte-exact: no newline is translated, nothing is stripped; only a byte order mark at the very start of a file is
dropped. A row that cannot be read is put to the `Reading`, which either raises or counts and goes on; what is wrong
with a file as a whole always raises. Every error is a `SourceError`, one sentence for the user.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

BLOCK_BYTES = 2**20  # how much of a file is read at a time
MAX_LINE_BYTES = 2**28  # of one line, which is held in memory
MAX_UNPACKED = 250  # times its packed size that a file may have: text packs to a tenth, a bomb to a thousandth
SMALL = 2**26  # bytes that any file may unpack to
ROWS_AT_A_TIME = 256  # of a parquet file
EXAMPLES = 3  # rows that could not be read are described up to this number
UTF_8 = "utf-8"

Chunks = Iterator[tuple[str, bool]]  # pieces of text; True with the last one of a document
Rows = Iterator[tuple[str, dict]]  # where a row stands, for error messages, and the row


class SourceError(ValueError):
    """The data cannot be used as asked: missing, empty, binary, not in the form its name promises."""


class Reading:
    """One pass over a source: where it begins, where it is, and which rows could not be read.

    max_bad_rows: with one more than so many, `skip` raises. start: what an earlier pass gave as its `mark`.
    """

    def __init__(self, max_bad_rows: int = 0, start: dict | None = None):
        self.max_bad_rows, self.start = max_bad_rows, start
        self.bad_rows = 0
        self.bad_examples: list[str] = []
        self.duplicates = {"exact": 0, "near": 0}  # where they are looked for
        self.mark: Callable[[], dict | None] = lambda: None  # where the next document begins, if the source can tell

    def skip(self, error: SourceError) -> None:
        """Leaves out a row that cannot be read. Raises SourceError where that is one too many."""
        self.bad_rows += 1
        if self.bad_rows > self.max_bad_rows:
            over = f" ({self.bad_rows} rows cannot be read, and {self.max_bad_rows} may be left out)"
            raise SourceError(f"{error}{over if self.max_bad_rows else ''}") from error
        if len(self.bad_examples) < EXAMPLES:
            self.bad_examples.append(str(error))

    def repeat(self, kind: str) -> None:
        """Counts a document that was there before: "exact" or "near"."""
        self.duplicates[kind] += 1

    def check_share(self, good: int) -> None:
        """Raises SourceError where no more rows were good than bad: then it is not single rows that are wrong."""
        if self.bad_rows and self.bad_rows >= good:
            raise SourceError(f"{self.bad_examples[0]} ({self.bad_rows} of {good + self.bad_rows} rows cannot be read)")


class InnerReading(Reading):
    """A reading from the beginning, whose bad rows count for another one."""

    def __init__(self, outer: Reading):
        super().__init__()
        self.outer = outer

    def skip(self, error: SourceError) -> None:
        self.outer.skip(error)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _open_zst(path: Path, mode: str) -> BinaryIO:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        if file.read(4) != b"\x28\xb5\x2f\xfd":
            raise OSError("Not a zstandard file")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), BLOCK_BYTES)  # reads lines, too


UNPACKERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. What goes wrong while it is read becomes a SourceError."""
    unpack = UNPACKERS.get(path.suffix.lower())
    try:
        with (unpack or open)(path, "rb") as file:
            yield io.BufferedReader(_Unpacked(path, file), BLOCK_BYTES) if unpack else file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error


class _Unpacked(io.RawIOBase):
    """A packed file's bytes, as many as an honest one holds."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.left = max(SMALL, MAX_UNPACKED * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.left -= len(data)
        if self.left < 0:
            raise SourceError(
                f"{self.path} unpacks to more than {MAX_UNPACKED} times its size, as no text does; "
                "unpack it yourself if you trust it, and give that file"
            )
        return len(data)


def _parquet_batch(path: Path, metadata: Any) -> int:
    """How many rows of a parquet file are unfolded together. Raises SourceError for one that is mostly air.

    A value is at most as long as its part of the file unpacked, but a short file may repeat a long one in every row.
    """
    groups = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    packed, unpacked = path.stat().st_size, sum(groups)
    if unpacked > max(SMALL, MAX_UNPACKED * packed):
        raise SourceError(
            f"{path} unpacks to {unpacked:,} bytes, more than {MAX_UNPACKED} times its size, as no text does; "
            "write it anew without compression if you trust it"
        )
    if unpacked < 20 * packed:
        return ROWS_AT_A_TIME
    return max(1, min(ROWS_AT_A_TIME, MAX_LINE_BYTES // max(1, *groups)))


def suffix(path: Path) -> str:
    """The suffix that tells the format: what is left under .gz and the like."""
    inner = Path(path.stem) if path.suffix.lower() in UNPACKERS else path
    return inner.suffix.lower()


# ---- characters ------------------------------------------------------------------------------------------------------


def check_encoding(name: str) -> str:
    """The standard name of a text encoding. Raises SourceError for one that Python does not know."""
    try:
        "".encode(name)  # a codec may also be one of bytes, such as hex
        return codecs.lookup(name).name
    except LookupError as error:
        raise SourceError(
            f"there is no text encoding {name!r}; give utf-8, utf-16, latin-1, cp1252 or another one that Python knows"
        ) from error


def guess_encoding(data: bytes) -> str:
    """The encoding that bytes which are not UTF-8 look like, as one gives it to `encoding`; empty for a binary file."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = data[::2].count(0), data[1::2].count(0)
    if 0 in data:  # Western text in UTF-16 has a NUL in nearly every second place, and none in the others
        few = max(1, len(data) // 4)
        little, big = odd > few and not even, even > few and not odd
        return "utf-16-le" if little else "utf-16-be" if big else ""
    if any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in data):
        return ""
    return "cp1252" if re.search(rb"[\x80-\x9f]", data) else "latin-1"  # Windows has signs where Latin-1 has none


def not_utf8(path: Path, offset: int, data: bytes) -> SourceError:
    """The error for a file with bytes that are not UTF-8. data: what surrounds them."""
    nul = 0 in data
    what = "is not text: there is a NUL byte" if nul else "is not UTF-8 text: invalid byte"
    guess = guess_encoding(data)
    known = f"it looks like {guess}: give --data.encoding {guess}, or convert it to UTF-8" if guess else ""
    return SourceError(f"{path} {what} at offset {offset}; {known or 'a binary file? Give text in UTF-8'}")


def read_text(path: Path, encoding: str = UTF_8) -> Chunks:
    """One document: the whole file, a block at a time; nothing for an empty file."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, found = 0, False
    with opened(path) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            text = _decoded(path, decoder, block, offset, encoding)
            if not block:
                break
            text = text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(block)
            if text:
                found = True
                yield text, False
    if found:
        yield "", True


def _decoded(path: Path, decoder: codecs.IncrementalDecoder, block: bytes, offset: int, encoding: str) -> str:
    if encoding == UTF_8 and (at := block.find(0)) >= 0:
        raise not_utf8(path, offset + at, block[:4096] if offset == 0 else block[max(0, at - 100) : at + 100])
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:  # error.object begins with what an earlier block left undecided
        at = offset + len(block) - len(error.object) + error.start
        if encoding == UTF_8:
            raise not_utf8(path, at, error.object[max(0, error.start - 100) : error.start + 100]) from error
        raise SourceError(f"{path} is not {encoding} text: invalid bytes at offset {at}") from error
    except UnicodeError as error:  # UTF-16 without a mark of its byte order
        raise SourceError(f"{path} is not {encoding} text: {error}") from error


def looks_wrong(path: Path, n_bytes: int = 2**16) -> str | None:
    """What the beginning of a file is in instead of UTF-8: an encoding, "" for a binary file; None if it is UTF-8."""
    with opened(path) as file:
        data = file.read(n_bytes)
    try:
        text = codecs.getincrementaldecoder(UTF_8)().decode(data, final=len(data) < n_bytes)
        return None if "\0" not in text else guess_encoding(data[:4096])
    except UnicodeDecodeError:
        return guess_encoding(data[:4096])


def _lines(path: Path, encoding: str) -> Iterator[bytes | str]:
    """The file's lines, their ends untouched: bytes if they are to be UTF-8, so that each can be wrong by itself."""
    with opened(path) as file:
        if encoding == UTF_8:
            yield from _short_lines(path, file)
            return
        try:
            yield from io.TextIOWrapper(file, encoding, newline="")
        except UnicodeError as error:
            raise SourceError(f"{path} is not {encoding} text: {error}") from error


def _short_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > MAX_LINE_BYTES:
            raise SourceError(f"{path}, line {number}, has more than {MAX_LINE_BYTES:,} bytes: cut it")
        yield line


def _line_text(path: Path, line: bytes | str, offset: int) -> str:
    if isinstance(line, bytes):
        if (at := line.find(0)) >= 0:
            raise not_utf8(path, offset + at, line)
        try:
            text = line.decode(UTF_8)
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset + error.start, line) from error
    else:
        text = line
    return text.removeprefix("\ufeff") if offset == 0 else text


# ---- rows ------------------------------------------------------------------------------------------------------------


def read_rows(path: Path, reading: Reading, columns: list[str] | None = None, encoding: str = UTF_8) -> Rows:
    """The rows of a table in one of ROW_FORMATS, packed or not. columns: all that is needed of them, if not all."""
    read = ROW_FORMATS[suffix(path)]
    if read is _parquet_rows:
        yield from read(path, columns)
        return
    for where, row in read(path, reading, encoding):
        if isinstance(row, dict):
            yield where, row
        else:
            reading.skip(SourceError(f"{where}: an object with columns was expected, not {type(row).__name__}"))


def read_texts(path: Path, column: str, reading: Reading, encoding: str = UTF_8) -> Chunks:
    """The texts in a column of a table, each a document; nothing where it is empty or null."""
    return texts_of(read_rows(path, reading, [column], encoding), column, reading)


def texts_of(rows: Rows, column: str, reading: Reading) -> Chunks:
    """The texts in a column of rows, each a document; nothing where it is empty or null."""
    for where, row in rows:
        try:
            text = row_text(row, column, where)
        except SourceError as error:
            reading.skip(error)
            continue
        if text:
            yield text, True


def cell(row: dict, column: str, where: str) -> object:
    """What a row has in a column. Raises SourceError where there is no such column."""
    if column not in row:
        raise SourceError(f"{where} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
    return row[column]


def row_text(row: dict, column: str, where: str) -> str:
    """The text that a row has in a column, empty for null. Raises SourceError where it is something else."""
    text = cell(row, column, where)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise SourceError(f"{where}: column {column!r} holds {type(text).__name__}, not text; name a column of text")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise SourceError(f"{where}: column {column!r} holds half a character (a lone surrogate, \\ud800-\\udfff)")
    return text


def _json_rows(path: Path, reading: Reading, encoding: str) -> Iterator[tuple[str, object]]:
    """JSON lines, or a single JSON array, which is then held in memory."""
    offset, lines = 0, _lines(path, encoding)
    for number, raw in enumerate(lines, 1):
        where, row = f"{path}, line {number}", None
        try:
            line = _line_text(path, raw, offset)
            if number == 1 and line.lstrip().startswith("["):
                break
            row = _parse_json(line, where) if line.strip() else None
        except SourceError as error:
            reading.skip(error)
            line = ""
        if line.strip():
            yield where, row
        offset += len(raw)
    else:
        return
    yield from _json_array(path, line, lines)


def _json_array(path: Path, first: str, lines: Iterator[bytes | str]) -> Iterator[tuple[str, object]]:
    rest = [_line_text(path, line, 1) for line in lines]
    rows = _parse_json(first + "".join(rest), str(path))
    if not isinstance(rows, list):
        raise SourceError(f"{path} must hold a list of rows, or one row a line")
    yield from ((f"{path}, row {index}", row) for index, row in enumerate(rows, 1))


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise SourceError(f"{where}: JSON nested too deep") from error


def _csv_rows(path: Path, reading: Reading, encoding: str) -> Rows:
    """Comma- or tab-separated values. A row may have fewer cells than the header has names, but not more."""
    tabs = suffix(path) == ".tsv"
    csv.field_size_limit(2**31 - 1)  # the module's own limit, 128 KiB, is less than a document
    rows = csv.reader(_csv_lines(path, encoding), delimiter="\t" if tabs else ",")
    header = next(rows, [])
    while True:
        try:
            values = next(rows, None)
        except csv.Error as error:
            reading.skip(SourceError(f"{path}, line {rows.line_num}: {error}"))
            continue
        if values is None:
            return
        where = f"{path}, line {rows.line_num}"
        if len(values) > len(header):
            reading.skip(SourceError(
                f"{where} has {len(values)} cells, and the header names {len(header)}; put a cell that holds a "
                f'{"tab" if tabs else "comma"} in "quotes"'
            ))  # fmt: skip
        elif values:  # not a blank line
            yield where, dict(zip(header, values, strict=False))


def _csv_lines(path: Path, encoding: str) -> Iterator[str]:
    offset = 0
    for line in _lines(path, encoding):
        yield _line_text(path, line, offset)  # a field may go over several lines: none can be left out
        offset += len(line)


def _parquet_rows(path: Path, columns: list[str] | None) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            size = _parquet_batch(path, file.metadata)
            there = file.schema_arrow.names
            for column in columns or ():
                cell(dict.fromkeys(there), column, str(path))  # says which columns there are
            for batch in file.iter_batches(batch_size=size, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not a readable parquet file: {error}") from error


ROW_FORMATS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_rows, ".ndjson": _json_rows, ".json": _json_rows,
    ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows,
}  # fmt: skip
