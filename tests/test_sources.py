"""Sources of text: exact bytes from every kind, and a clear sentence for whatever cannot be read."""

import bz2
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_hub import sources
from nanogpt_hub.corpus import formats
from nanogpt_hub.sources import Source, SourceError, open_source
from nanogpt_hub.tokenizer import build_tokenizer

NASTY = "\n\r\n tab\there \r lone, \u2028 é 日本語 🙂 \x1c  end \n\n"  # what translations and strips would change
ROWS = ['one\r\ntwo, "quoted"\n', NASTY, "last"]


def documents(source, **options) -> list[str]:
    return list(open_source(str(source), **options).documents())


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_rows(path: Path, rows: list[str | None], column: str = "text") -> Path:
    """A table with the columns `column` and n, in the format that the suffix names."""
    import pandas

    table = pandas.DataFrame({column: rows, "n": range(len(rows))})
    if ".parquet" in path.suffixes:
        table.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        path.write_bytes(table.to_csv(index=False, sep="," if path.suffix == ".csv" else "\t").encode())
    elif path.suffix == ".json":
        write(path, json.dumps([{column: row, "n": n} for n, row in enumerate(rows)], indent=1))
    else:
        lines = "".join(json.dumps({column: row, "n": n}) + "\n" for n, row in enumerate(rows))
        write(path, gzip.compress(lines.encode()) if path.suffix == ".gz" else lines)
    return path


# ---- text, exactly ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pack"), [("a.txt", bytes), ("noext", bytes), ("a.md.gz", gzip.compress), ("a.bz2", bz2.compress)]
)
def test_a_file_is_one_document_of_its_exact_text(tmp_path, name, pack):
    path = write(tmp_path / name, pack(NASTY.encode()))
    source = open_source(str(path))
    assert list(source.documents()) == [NASTY] == list(source.documents())
    assert source.text_bytes == (len(NASTY.encode()) if pack is bytes else None)


def test_a_byte_order_mark_is_dropped_at_the_start_alone(tmp_path):
    assert documents(write(tmp_path / "a.txt", "\ufeffa\ufeffb")) == ["a\ufeffb"]
    assert documents(write(tmp_path / "a.jsonl", '\ufeff{"text": "x"}\n')) == ["x"]


@pytest.mark.parametrize("block", [3, 5, 64])
def test_characters_and_offsets_survive_block_borders(tmp_path, monkeypatch, block):
    monkeypatch.setattr(formats, "BLOCK_BYTES", block)
    text = "é日🙂\r\n" * 20
    assert documents(write(tmp_path / "a.txt", text)) == [text]
    for rotten in (b"\xff", b"\xf0\x9f", b"\0"):  # invalid, cut short, not text
        data = text.encode() + rotten
        source = sources._open_file(write(tmp_path / "b.txt", data), sources.Form())
        with pytest.raises(SourceError, match=f"offset {len(text.encode())}\\b"):
            list(source.documents())


def zst(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def test_zstandard_is_unpacked_in_several_frames_and_told_when_it_is_cut(tmp_path):
    data = zst(NASTY.encode()) + zst(b"more")
    assert documents(write(tmp_path / "a.txt.zst", data)) == [NASTY + "more"]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ROWS)
    assert documents(write(tmp_path / "a.jsonl.zst", zst(rows.encode()))) == ROWS
    with pytest.raises(SourceError, match="cannot be read"):
        documents(write(tmp_path / "cut.zst", zst(os.urandom(5000))[:-300]))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "latin-1", "cp1252"])
def test_other_encodings_are_read_when_they_are_named(tmp_path, encoding):
    text = "café, naïve\r\n\ttwo\n"
    path = write(tmp_path / "a.txt", text.encode(encoding))
    assert documents(path, encoding=encoding) == [text]
    assert documents(write(tmp_path / "a.csv", "text\né\n".encode(encoding)), encoding=encoding) == ["é"]
    rows = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in ["é", "two"])
    assert documents(write(tmp_path / "a.jsonl", rows.encode(encoding)), encoding=encoding) == ["é", "two"]
    assert open_source(str(path), encoding=encoding).fingerprint != sources._open_file(path, sources.Form()).fingerprint


def test_an_encoding_that_is_none_and_text_that_is_not_in_it_are_told(tmp_path):
    path = write(tmp_path / "a.txt", b"abc")
    for name in ("utf-9", "hex"):
        with pytest.raises(SourceError, match=f"no text encoding '{name}'; give utf-8, utf-16, latin-1, cp1252"):
            open_source(str(path), encoding=name)
    with pytest.raises(SourceError, match=r"not utf-16 text: UTF-16 stream does not start with BOM"):
        documents(path, encoding="utf-16")


def test_the_files_of_a_folder_in_another_encoding_are_named(tmp_path):
    for name, data in {
        "a/1.txt": "naïve café".encode("latin-1"), "2.txt": "some text".encode("utf-16"), "3.txt": b"plain",
        "4.png": b"\x89PNG\0\1",
    }.items():  # fmt: skip
        write(tmp_path / name, data)
    with pytest.raises(
        SourceError, match=r"2 of the 3 text files .*: 2\.txt \(looks like utf-16\), a/1\.txt \(looks"
    ) as e:
        open_source(str(tmp_path))
    assert "iconv -f utf-16 -t utf-8 FILE > NEW" in str(e.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_rows_are_documents_and_empty_ones_none(tmp_path, name):
    path = write_rows(tmp_path / name, [ROWS[0], None, ROWS[1], "", ROWS[2]], column="story")
    assert documents(path, text_column="story") == ROWS


def test_a_long_field_fits_into_a_csv(tmp_path):
    text = "word " * 100_000
    assert documents(write_rows(tmp_path / "a.csv", [text])) == [text]


def test_a_row_of_too_many_cells_is_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.csv", 'text,n\n"Hello, world",1\nfew\nHello, world,1\n')
    source, reading = open_source(str(path), max_bad_rows=1), formats.Reading(1)
    assert [text for text, ends in source.read(reading) if ends] == ["Hello, world", "few"]
    (example,) = reading.bad_examples
    assert example.startswith(f"{path}, line 4 has 3 cells, and the header names 2; ")


def test_a_folder_of_text_is_read_sorted_and_leaves_out_what_is_no_text(tmp_path):
    for name, data in {
        "b.txt": "B", "a/z.py": "Z", "a/notes": "N", "data.json": '{"a": 1}',
        ".hidden": "h", ".git/config": "g", "picture.png": b"\x89PNG\0\0", "empty.txt": "",
    }.items():  # fmt: skip
        write(tmp_path / "corpus" / name, data)
    source = open_source(str(tmp_path / "corpus"))
    assert list(source.documents()) == ["N", "Z", "B", '{"a": 1}']
    facts = source.describe()
    assert facts == {"kind": "folder", "name": "corpus", "files": 4, "bytes": 11, "skipped_files": 4}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".json"])
def test_a_folder_of_tables_is_read_as_rows_alone(tmp_path, suffix):
    write_rows(tmp_path / f"2{suffix}", ["c"])
    write_rows(tmp_path / f"1{suffix}", ["a", "b"])
    if suffix != ".json":
        write(tmp_path / "README.md", "no data")
        write(tmp_path / "info.json", "{}")
    assert documents(tmp_path) == ["a", "b", "c"]


def test_the_standard_library_is_a_corpus():
    source = open_source("python")
    again = open_source("python")
    size = sum(len(text.encode()) for text in source.texts())
    facts = source.describe()
    version = ".".join(map(str, sys.version_info[:3]))
    assert facts["license"] == "PSF-2.0"
    assert version in facts["name"]
    assert size == facts["bytes"] == source.text_bytes > 5e6
    assert source.fingerprint == again.fingerprint
    first = next(source.documents())
    assert first == Path(__import__("__future__").__file__).read_bytes().decode()
    assert not any("import unittest\n\nclass Test" in text for text in source.documents())


def test_an_existing_path_wins_over_other_readings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "python", "mine")
    write(tmp_path / "owner" / "name", "too")
    assert documents("python") == ["mine"]
    assert documents("owner/name") == ["too"]


def test_only_names_of_local_paths_are_told(tmp_path):
    path = write(tmp_path / "secret" / "a.txt", "x")
    for source in (path, path.parent):
        assert str(tmp_path) not in json.dumps(open_source(str(source)).describe())


def test_the_fingerprint_follows_the_data(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "x", "b": "y"}')
    first = open_source(str(path)).fingerprint
    assert open_source(str(path)).fingerprint == first
    assert open_source(str(path), text_column="b").fingerprint != first
    write(path, '{"text": "xx"}')
    assert open_source(str(path)).fingerprint != first
    folder = open_source(str(tmp_path)).fingerprint
    write(tmp_path / "b.jsonl", '{"text": "x"}')
    assert open_source(str(tmp_path)).fingerprint != folder


# ---- pieces ----------------------------------------------------------------------------------------------------------


def in_pieces(monkeypatch, texts: list[str], size: int) -> list[tuple[str, bool]]:
    def read(reading):
        for text in texts:
            yield text[:7], False
            yield text[7:], True

    monkeypatch.setattr(sources, "PIECE_CHARS", size)
    source = Source("file", "x", "0", read)
    assert list(source.documents()) == texts
    return list(source.pieces())


@given(
    st.lists(st.text(st.sampled_from("ab1 \n\r\t.,'é日🙂s"), min_size=1, max_size=80), min_size=1, max_size=4),
    st.integers(1, 40),
)
def test_pieces_are_the_documents_cut_up(texts, size):
    with pytest.MonkeyPatch.context() as patch:
        pieces = in_pieces(patch, texts, size)
    assert all(0 < len(text) <= size for text, _ in pieces)
    assert "".join(text + "\0" * ends for text, ends in pieces) == "".join(text + "\0" for text in texts)


@cache
def tokenizer(kind: str):
    return build_tokenizer(kind, [NASTY, Path(sources.__file__).read_text(encoding="utf-8")])


def assert_pieces_have_the_ids_of_the_whole(kind: str, texts: list[str], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        pieces = in_pieces(patch, texts, size)
    assert len(pieces) > len(texts)
    encode = tokenizer(kind).encode
    assert [i for text, _ in pieces for i in encode(text)] == [i for text in texts for i in encode(text)]


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("ab1  \n\n\r\t.,'é日🙂s"), max_size=12), min_size=30, max_size=40))
@pytest.mark.parametrize("kind", ["gpt2", "byte", "bpe:300"])
def test_pieces_have_the_token_ids_of_the_whole(gpt2_ranks, kind, words):
    text = "x ".join(words)  # a safe place within the reach of each piece
    assert_pieces_have_the_ids_of_the_whole(kind, [text], 32)


@pytest.mark.parametrize("kind", ["gpt2", "bpe:300", "char"])
def test_code_in_pieces_has_the_token_ids_of_the_whole(gpt2_ranks, kind):
    code = Path(sources.__file__).read_text(encoding="utf-8")
    assert_pieces_have_the_ids_of_the_whole(kind, [code, code[::-1], code.replace(" ", "")], 200)


# ---- what cannot be read ---------------------------------------------------------------------------------------------

BAD_FILES = {
    "empty.txt": (b"", r"is empty"),
    "mark.txt": ("\ufeff".encode(), r"holds no text"),
    "picture.txt": (b"text \0 ...", r"not text: there is a NUL byte at offset 5; a binary file\?"),
    "latin.txt": (
        "café".encode("latin-1"),
        r"not UTF-8 text: invalid byte at offset 3; it looks like latin-1: give",
    ),
    "windows.txt": (
        "“café”".encode("cp1252"),
        r"invalid byte at offset 0; it looks like cp1252: give",
    ),
    "wide.csv": ("text\na".encode("utf-16"), r"it looks like utf-16: give --data.encoding utf-16"),
    "wide.txt": ("some text".encode("utf-16-be"), r"NUL byte at offset 0; it looks like utf-16-be: give"),
    "packed.zst": (b"plain", r"cannot be read: Not a zstandard file"),
    "packed.txt.gz": (b"plain", r"cannot be read: Not a gzipped file"),
    "cut.gz": (gzip.compress(os.urandom(1000))[:-200], r"cannot be read"),
    "column.jsonl": (b'{"txt": "a", "n": 1}', r"column.jsonl, line 1 has no column 'text'; it has txt, n$"),
    "column.csv": (b"txt,n\na,1\n", r"has no column 'text'; it has txt, n$"),
    "cells.csv": (b"text\nHello, world\n", r'line 2 has 2 cells, and the header names 1; put .* a comma in "quotes"$'),
    "cells.tsv": (b"n\ttext\n1\tto\tbe\n", r'line 2 has 3 cells, and the header names 2; put .* a tab in "quotes"$'),
    "nothing.csv": (b"text,n\n", r"holds no text"),
    "number.jsonl": (b'{"text": 1}', r"line 1: column 'text' holds int, not text"),
    "array.jsonl": (b'"text"\n', r"line 1: an object with columns was expected, not str"),
    "nested.jsonl": (b'{"text":' * 100_000, r"line 1: (JSON nested too deep|not valid JSON)"),
    "broken.jsonl": (b'\n{"text": "a"\n', r"line 2: not valid JSON \(Expecting ',' delimiter"),
    "half.jsonl": (b'{"text": "a\\ud800"}', r"line 1: column 'text' holds half a character"),
    "null.jsonl": (b'{"text": null}\n{"text": ""}', r"holds no text"),
    "rotten.parquet": (b"PAR1 no", r"not a readable parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_told_when_opened(tmp_path, name):
    data, message = BAD_FILES[name]
    with pytest.raises(SourceError, match=message) as error:
        open_source(str(write(tmp_path / name, data)))
    assert "\n" not in str(error.value)


def test_a_bad_line_far_down_is_told_by_its_number(tmp_path):
    source = open_source(str(write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 9 + "{")))
    with pytest.raises(SourceError, match=r"a\.jsonl, line 10: not valid JSON"):
        list(source.documents())


def test_a_misspelt_parquet_column_is_told_with_those_there_are(tmp_path):
    path = write_rows(tmp_path / "a.parquet", ["x"])
    with pytest.raises(SourceError, match=r"no column 'txt'; it has text, n$"):
        open_source(str(path), text_column="txt")
    with pytest.raises(SourceError, match=r"column 'n' holds int, not text"):
        open_source(str(path), text_column="n")


@pytest.mark.parametrize(
    "source", ["", " ", "gone.txt", "./gone", "no/such/path", "a\\b", "~nobody/x", "data/train.jsonl"]
)
def test_a_path_that_does_not_exist_is_told(source):
    with pytest.raises(SourceError, match="there is no file or folder"):
        open_source(source)


def test_an_empty_folder_is_told(tmp_path):
    write(tmp_path / "a.bin", b"\0")
    with pytest.raises(SourceError, match=r"holds no text file \(1 hidden, binary or empty"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("option", [{"config": "en"}, {"split": "test"}, {"revision": "v1"}])
def test_options_of_the_hub_are_refused_elsewhere(tmp_path, option):
    with pytest.raises(SourceError, match="belong to Hub datasets"):
        open_source(str(write(tmp_path / "a.txt", "x")), **option)


# ---- over HTTP -------------------------------------------------------------------------------------------------------


class Server:
    """An HTTP server on loopback: answers[path] is (status, headers, body); `asked` is what was asked for."""

    def __init__(self):
        self.answers, self.asked = {}, []

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.split("?")[0]
                outer.asked.append(self.path)
                missing = (404, {"X-Error-Code": "EntryNotFound"}, b"{}")
                status, headers, body = outer.answers.get(path, missing)
                wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if wanted:
                    first, last = map(int, wanted.groups())
                    headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(body)}"}
                    status, body = 206, body[first : last + 1]
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    with Server() as running:
        yield running


def test_a_url_is_downloaded_once_and_read_by_its_suffix(server, tmp_path):
    rows = write_rows(tmp_path / "rows.parquet", ROWS).read_bytes()
    server.answers = {"/a.txt": (200, {}, NASTY.encode()), "/rows.parquet": (200, {}, rows)}
    for _ in range(2):
        assert documents(f"{server.url}/a.txt") == [NASTY]
    assert documents(f"{server.url}/rows.parquet?download=true") == ROWS
    assert server.asked == ["/a.txt", "/rows.parquet?download=true"]


def test_processes_that_need_a_url_at_once_download_it_once(server, monkeypatch):
    server.answers = {"/a.txt": (200, {}, b"text")}
    download, together = sources._download, threading.Barrier(3)

    def when_all_do(*args) -> None:
        with suppress(threading.BrokenBarrierError):
            together.wait(1)
        download(*args)

    monkeypatch.setattr(sources, "_download", when_all_do)
    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(documents, [f"{server.url}/a.txt"] * 3)] == [["text"]] * 3
    assert server.asked == ["/a.txt"]


def test_a_url_tells_no_secret(server):
    server.answers = {"/a.txt": (200, {}, b"text")}
    source = open_source(f"{server.url.replace('//', '//user:pass@')}/a.txt?token=hf_secret")
    assert source.describe() == {"kind": "url", "name": f"{server.url}/a.txt", "bytes": 4}
    with pytest.raises(SourceError, match=r"could not download .*/gone.txt: HTTP 404 Not Found$") as error:
        open_source(f"{server.url}/gone.txt?token=hf_secret")
    assert "hf_secret" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"Content-Type": "text/html"}, b"<html>"), "is a web page"),
        ((200, {"Content-Length": "99"}, b"cut short"), "could not download"),
        ((500, {}, b""), "HTTP 500"),
        ((200, {}, b""), "is empty"),
        ((200, {}, b"\0"), "not text"),
    ],
)
def test_a_download_that_fails_is_told_and_leaves_no_part(server, tmp_path, answer, message):
    server.answers = {"/a.txt": answer}
    with pytest.raises(SourceError, match=message):
        open_source(f"{server.url}/a.txt")
    assert not list(tmp_path.rglob("*.part"))


def test_nobody_listening_is_told():
    with pytest.raises(SourceError, match="could not download"):
        open_source("http://127.0.0.1:9/a.txt")


SHA = "a" * 40
HUB_FILES = {
    "README.md": b"---\nlicense: cc0-1.0\n---\n",
    "data/train.jsonl": json.dumps({"text": NASTY, "n": 1}).encode() + b'\n{"text": "two", "n": 2}\n',
    "data/test.jsonl": b'{"text": "three", "n": 3}\n',
}
ASK_THE_HUB = """
import json, sys
from nanogpt_hub.sources import SourceError, open_source
for options in json.load(sys.stdin):
    try:
        source = open_source(**options)
        answer = [source.describe(), list(source.documents()), source.fingerprint]
    except SourceError as error:
        answer = str(error)
    print(json.dumps(answer))
"""


def serve_dataset(server: Server) -> None:
    """The part of the Hub's API that the datasets library asks for, for the dataset me/tiny."""
    entries = []
    for path, data in HUB_FILES.items():
        entries.append({"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()})
        headers = {"ETag": f'"{entries[-1]["oid"]}"', "X-Repo-Commit": SHA}
        server.answers[f"/datasets/me/tiny/resolve/{SHA}/{path}"] = (200, headers, data)
    info = {"id": "me/tiny", "sha": SHA, "siblings": [{"rfilename": path} for path in HUB_FILES]}
    info["cardData"] = {"license": "cc0-1.0"}
    api = "/api/datasets/me/tiny"
    top = [{"type": "directory", "path": "data", "oid": SHA, "size": 0}, entries[0]]
    for path, answer in {
        api: info, f"{api}/revision/v1": info, f"{api}/revision/{SHA}": info,
        f"{api}/tree/{SHA}": top, f"{api}/tree/{SHA}/data": entries[1:],
    }.items():  # fmt: skip
        server.answers[path] = (200, {}, json.dumps(answer).encode())
    server.answers[f"{api}/revision/v9"] = (404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
    server.answers["/api/datasets/me/none"] = (404, {"X-Error-Code": "RepoNotFound"}, b"{}")


def ask_the_hub(server: Server, home: Path, asked: list[dict]) -> list:
    """What open_source gives for each of the options, in a process that takes `server` for the Hub."""
    env = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
    }
    command = [sys.executable, "-c", ASK_THE_HUB]
    run = subprocess.run(
        command,
        env=env,
        input=json.dumps([{"source": "me/tiny", **options} for options in asked]),
        text=True,
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_hub_dataset(server, tmp_path):
    serve_dataset(server)
    good = [{}, {"revision": "v1"}, {"split": "test"}, {"split": "train[1:]+test"}]
    bad = {
        r"no branch, tag or commit 'v9'": {"revision": "v9"},
        r"Bad split: val. Available splits: \['train', 'test'\]": {"split": "val"},
        r"BuilderConfig 'en' not found. Available: \['default'\]": {"config": "en"},
        r"no column 'txt'; it has text, n$": {"text_column": "txt"},
        r"column 'n' holds int, not text": {"text_column": "n"},
        r"'me/none' is neither a file or folder here nor a dataset on the Hub that": {"source": "me/none"},
    }
    train, tagged, test, sliced, *errors = ask_the_hub(server, tmp_path, [*good, *bad.values()])
    facts = {"kind": "hub", "name": "me/tiny", "split": "train", "revision": SHA, "license": "cc0-1.0"}
    assert train[:2] == [facts, [NASTY, "two"]]
    assert tagged == train  # the commit counts, not the name it was asked by
    assert test[:2] == [{**facts, "split": "test"}, ["three"]]
    assert test[2] != train[2]
    assert sliced[1] == ["two", "three"]
    for error, message in zip(errors, bad, strict=True):
        assert re.search(message, error)


def test_a_stream_is_gone_on_with_from_its_mark(tmp_path):
    import datasets

    for part in range(2):
        write_rows(tmp_path / f"{part}.jsonl", [f"{part} {i}" if i % 5 else None for i in range(40)])
    files = [str(tmp_path / f"{part}.jsonl") for part in range(2)]
    rows = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path))
    load, reading = cache(lambda: (rows, rows.state_dict())), formats.Reading()
    texts, marks = [], []
    for text, _ in sources._read_hub(load, "me/tiny", "text", reading):
        texts.append(text)
        marks.append(json.loads(json.dumps(reading.mark())))
    assert len(texts) == 64
    for at in (0, 5, 31, 32, 63):
        again = formats.Reading(start=marks[at])
        assert [text for text, _ in sources._read_hub(load, "me/tiny", "text", again)] == texts[at + 1 :]
    assert [text for text, _ in sources._read_hub(load, "me/tiny", "text", formats.Reading())] == texts


def test_no_network_and_no_such_file():
    with pytest.raises(SourceError, match="no file or folder 'me/none' here, and the Hub cannot be reached"):
        sources.load_hub("me/none", "", "train", "", online=False)
