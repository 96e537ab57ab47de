"""From text to token shards on disk: ready one after another while the rest is still being tokenised.

    corpus = prepare(open_source("my.txt"), tokenizer)  # tokenised once, then read from the cache
    tokens = corpus.tokens()
    ids = tokens.read(0, 1000)

A corpus is a folder in the cache, named by the hash of source and tokenizer:

    corpus.json        what it is made of: source, tokenizer, dtype; written first
    tokens-00000.bin   raw little-endian uint16 or uint32 ids, `shard_tokens(i)` of them; the last shard is shorter
    shards.jsonl       one line per ready shard: its tokens, its largest id, and where in the source the next begins
    manifest.json      the totals; written last: with it the corpus is complete

The file of a shard is synced before its line is written, so whatever is listed is whole. A line is all that is needed
to go on: a tokenising process that was killed reads the source over, without encoding it, up to where the last line
says that the next shard begins, and writes the bytes that it would have written anyway. Nothing depends on how many
processes encode, when they were killed, or who reads meanwhile.
"""

import contextlib
import functools
import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, islice
from multiprocessing import get_all_start_methods, get_context, parent_process
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from nanogpt_hub.sources import Reading, Source, cache_root
from nanogpt_hub.system.files import FULL, remove_leftovers, write_atomic
from nanogpt_hub.tokenizer import EOT, Tokenizer

from .children import end_after

HEADER, LINES, MANIFEST = "corpus.json", "shards.jsonl", "manifest.json"
FORMAT = 2  # of the folder; a change makes a new cache entry
SHARD_TOKENS = 2**22  # of each of the first SMALL_SHARDS shards: small, so that training begins soon
SMALL_SHARDS, GROWTH = 16, 8  # later shards are so many times as large: fewer files
BATCH_CHARS = 2**20  # text encoded at a time
SAMPLE_TOKENS = 2**24  # how many tokens the frequencies of a longer range are counted in
MAX_MAPPED = 64  # shards that a process has mapped at a time, whatever their number

Pieces = list[tuple[str, bool]]  # of documents; True with the last piece of one


def shard_tokens(index: int) -> int:
    """How many tokens a shard holds, unless it is the last one."""
    return SHARD_TOKENS * (1 if index < SMALL_SHARDS else GROWTH)


# ---- where a shard begins --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """A place in the token stream of a source: `skip` tokens into the batch of pieces that is encoded next."""

    batch: int = 0  # batches of pieces since `mark`
    skip: int = 0  # tokens of that batch that are already in shards
    starts: bool = False  # the batch begins with a document other than the first: a separator comes before it
    mark: dict | None = None  # the source's own position, where it has one; None is its beginning
    documents: int = 0  # these three: of all batches before this one
    characters: int = 0
    bytes: int = 0
    bad_rows: int = 0  # rows that could not be read and were left out
    bad_examples: list[str] = field(default_factory=list)  # what was wrong with the first of them
    duplicates: dict[str, int] = field(default_factory=dict)  # exact and near ones, where they are looked for

    def after(self, pieces: Pieces, reading: Reading) -> "Position":
        """The place behind a batch of pieces that starts here."""
        ends = pieces[-1][1]
        mark = reading.mark() if ends else None  # a source can only begin anew where a document does
        return Position(
            batch=0 if mark else self.batch + 1,
            starts=ends,
            mark=mark or self.mark,
            documents=self.documents + sum(last for _, last in pieces),
            characters=self.characters + sum(len(text) for text, _ in pieces),
            bytes=self.bytes + sum(len(text.encode()) for text, _ in pieces),
            bad_rows=reading.bad_rows,
            bad_examples=list(reading.bad_examples),
            duplicates=dict(reading.duplicates),
        )


def _batches(source: Source, position: Position) -> Iterator[tuple[Position, Pieces, Position]]:
    """Batches of pieces from a position on, each with the place where it begins and the one where it ends."""
    reading = Reading(source.max_bad_rows, position.mark)
    batches = _gathered(source.pieces(reading))
    over = sum(1 for _ in islice(batches, position.batch))
    if over < position.batch:
        raise ValueError(f"{source.name} is shorter than it was when its first part was tokenised; it must not change")
    if position.mark:  # what was counted before it
        reading.bad_rows, reading.bad_examples = position.bad_rows, list(position.bad_examples)
    before = replace(position, skip=0)
    for pieces in batches:
        after = before.after(pieces, reading)
        yield before, pieces, after
        before = after


def _gathered(pieces: Iterable[tuple[str, bool]]) -> Iterator[Pieces]:
    """Lists of pieces with some BATCH_CHARS characters together."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- encoding, in this process or in several -------------------------------------------------------------------------


def encode_pieces(tokenizer: Tokenizer, pieces: Pieces, starts: bool) -> np.ndarray:
    """The ids of a batch of pieces, (n,) uint32; end-of-text between documents, where the tokenizer has one."""
    separator = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    flat = array("I")  # reads a list of ints three times as fast as NumPy does
    for (_, ends), ids in zip(pieces, tokenizer.encode_batch([text for text, _ in pieces]), strict=True):
        flat.extend(separator if starts else [])
        flat += array("I", ids)
        starts = ends
    return np.frombuffer(flat, np.uintc)


_worker_tokenizer: Tokenizer | None = None  # of an encoding process


def _start_worker(json_text: str, config: dict | None) -> None:
    global _worker_tokenizer
    parent = parent_process()
    assert parent is not None  # multiprocessing has started this one
    end_after(parent.join)
    _worker_tokenizer = Tokenizer(json_text, config)


def _encode_in_worker(pieces: Pieces, starts: bool) -> np.ndarray:
    assert _worker_tokenizer is not None  # _start_worker has made it
    return encode_pieces(_worker_tokenizer, pieces, starts)


@contextlib.contextmanager
def _encoder(tokenizer: Tokenizer, workers: int) -> Iterator[Callable[[Pieces, bool], Callable[[], np.ndarray]]]:
    """A function that takes a batch of pieces to be encoded, by one of `workers` processes, and gives a way to wait for
    its ids. With one worker this process encodes."""
    if workers == 1:
        yield lambda pieces, starts: lambda: encode_pieces(tokenizer, pieces, starts)
        return
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])  # what takes seconds is imported once
    with ProcessPoolExecutor(workers, context, _start_worker, tokenizer.__reduce__()[1]) as pool:

        def submit(pieces: Pieces, starts: bool) -> Callable[[], np.ndarray]:
            future: Future = pool.submit(_encode_in_worker, pieces, starts)
            return future.result

        try:
            yield submit
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _encoded(
    source: Source, tokenizer: Tokenizer, position: Position, workers: int
) -> Iterator[tuple[Position, np.ndarray, Position]]:
    """The ids of the source from a position on, batch by batch and in order, whoever encodes."""
    waiting: deque = deque()
    with _encoder(tokenizer, workers) as submit:
        for before, pieces, after in _batches(source, position):
            waiting.append((before, submit(pieces, before.starts), after))
            if len(waiting) > 2 * (workers - 1):  # enough that none is idle, few enough that memory stays flat
                first, result, end = waiting.popleft()
                yield first, result(), end
        for first, result, end in waiting:
            yield first, result(), end


# ---- writing ---------------------------------------------------------------------------------------------------------


def corpus_folder(source: Source, tokenizer: Tokenizer, cache_dir: Path | str | None = None) -> Path:
    """Where the tokens of a source are, or will be. cache_dir: default `tokens` in nanogpt_hub's cache."""
    root = Path(cache_dir) if cache_dir else cache_root() / "tokens"
    key, end = f"{FORMAT} {source.fingerprint} {tokenizer.hash}", tokenizer.eot_id
    if end is not None and tokenizer.token_bytes(end) != EOT.encode():
        key += f" {end}"  # tokenizer_config.json chose it, which the hash leaves out
    return root / hashlib.sha256(key.encode()).hexdigest()[:16]


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Of the ids on disk."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


@contextlib.contextmanager
def _disk_named(folder: Path) -> Iterator[None]:
    """Says whose disk is full, and what to do about it: the system's error does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            f"cannot write tokens to {folder}: {error.strerror}. Make room, or choose another --data.cache_dir"
        ) from error


def prepare(
    source: Source, tokenizer: Tokenizer, cache_dir: Path | str | None = None, quiet: bool = False, workers: int = 1
) -> "Corpus":
    """The whole corpus of a source, tokenised as far as it is not in the cache yet. Memory stays flat.

    Several processes may call this at once: one works and the others wait; where it is killed another one goes on.
    quiet: no progress bar. workers: processes that encode. Raises ValueError for text that the source or the tokenizer
    refuses, OSError where the disk does; the shards that were ready by then stay.
    """
    folder = corpus_folder(source, tokenizer, cache_dir)
    with _disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")), _disk_named(folder):
        if not (folder / MANIFEST).is_file():
            _write_corpus(source, tokenizer, folder, quiet, workers)
    return Corpus(folder, tokenizer)


def _write_corpus(source: Source, tokenizer: Tokenizer, folder: Path, quiet: bool, workers: int) -> None:
    """Writes the shards that are missing. The caller holds the folder's lock."""
    header = {
        "format": FORMAT,
        "source": source.describe(),
        "tokenizer": {"kind": tokenizer.kind, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "dtype": dtype_of(tokenizer).name,
    }
    remove_leftovers(folder)
    write_atomic(folder / HEADER, json.dumps(header, indent=1, ensure_ascii=False))
    end = position = (writer := _ShardWriter(folder, dtype_of(tokenizer))).next
    bar = tqdm(total=source.text_bytes, initial=position.bytes, unit="B", unit_scale=True, desc="tokenize",
               disable=quiet, mininterval=0.5)  # fmt: skip
    with bar, contextlib.closing(writer):
        for before, ids, end in _encoded(source, tokenizer, position, workers):
            writer.write(ids, before)
            bar.update(end.bytes - before.bytes)
        writer.finish(end)
    if end.bad_rows >= end.documents and end.bad_rows:
        raise ValueError(f"{end.bad_examples[0]} ({end.bad_rows} of {end.documents + end.bad_rows} rows are like that)")
    tokens = sum(line["tokens"] for line in writer.lines)
    if not tokens:
        raise ValueError(f"the {tokenizer.kind} tokenizer makes no token of {source.name}; use another one")
    names = ("documents", "characters", "bytes", "bad_rows", "bad_examples", "duplicates")
    totals = {name: getattr(end, name) for name in names}
    most = max(line["max_id"] for line in writer.lines)
    manifest = {**header, "tokens": tokens, "shards": len(writer.lines), "max_id": most, **totals}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))


def _sync(file: IO[Any]) -> None:
    """What was written survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


class _ShardWriter:
    """Appends ids to the current shard and lists it when it is full. `next`: where the shard after the last listed one
    begins."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.file: BinaryIO | None = None
        self.lines, ready = read_lines(folder)
        with contextlib.suppress(FileNotFoundError):
            os.truncate(folder / LINES, ready)  # what follows is the half of a line that a killed process wrote
        self.next = Position(**self.lines[-1]["next"]) if self.lines else Position()
        self.resumed = self.next
        self.tokens = self.max_id = 0  # of the current shard

    def write(self, ids: np.ndarray, before: Position) -> None:
        """Appends the ids of the batch that begins at `before`, but for those that are in a shard already."""
        used = self.resumed.skip if before == replace(self.resumed, skip=0) else 0
        while used < len(ids):
            size = shard_tokens(len(self.lines))
            part = ids[used : used + size - self.tokens]
            self._append(part)
            used += len(part)
            if self.tokens == size:
                self.finish(replace(before, skip=used))

    def _append(self, ids: np.ndarray) -> None:
        if self.file is None:
            self.file = open(self._path(), "wb")  # noqa: SIM115 (closed by close)
        self.file.write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)
        self.max_id = max(self.max_id, int(ids.max(initial=0)))

    def _path(self) -> Path:
        return self.folder / shard_name(len(self.lines))

    def finish(self, end: Position) -> None:
        """Lists the current shard, if it holds anything, as ready; the next one begins at `end`."""
        if not self.tokens:
            return
        assert self.file is not None  # it holds the tokens
        _sync(self.file)
        self.close()
        line = {"tokens": self.tokens, "max_id": self.max_id, "next": asdict(end)}
        with open(self.folder / LINES, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            _sync(file)
        self.lines.append(line)
        self.next, self.tokens, self.max_id = end, 0, 0

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def shard_name(index: int) -> str:
    return f"tokens-{index:05d}.bin"


def read_lines(folder: Path, start: int = 0) -> tuple[list[dict], int]:
    """The lines of shards.jsonl from byte `start` on, and the byte behind the last whole one."""
    try:
        with open(folder / LINES, "rb") as file:
            file.seek(start)
            data = file.read()
    except FileNotFoundError:
        return [], start
    whole = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], start + len(whole)


# ---- reading ---------------------------------------------------------------------------------------------------------


class MappedShards:
    """The ready shards of a folder as arrays, at most MAX_MAPPED of them in memory's map at a time."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.ends: list[int] = []  # stream position behind each shard
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()

    def append(self, tokens: int) -> None:
        """One more shard is ready. Raises ValueError when its file does not hold so many tokens."""
        path = self.folder / shard_name(len(self.ends))
        size = path.stat().st_size if path.is_file() else 0
        if size != tokens * self.dtype.itemsize:
            raise ValueError(
                f"{path} has {size} bytes, not the {tokens} tokens that {LINES} lists; "
                f"delete the folder {self.folder} to tokenise anew"
            )
        self.ends.append((self.ends[-1] if self.ends else 0) + tokens)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        if index in self._mapped:
            self._mapped.move_to_end(index)
        else:
            mapped = np.memmap(self.folder / shard_name(index), self.dtype, mode="r")
            self._mapped[index] = np.asarray(mapped)  # plain arrays slice faster
            if len(self._mapped) > MAX_MAPPED:
                self._mapped.popitem(last=False)
        return self._mapped[index]


class Corpus:
    """A token stream on disk, as much of it as is ready. `refresh` looks whether there is more.

    complete: nothing more will come. manifest: facts about source, tokenizer and, when complete, the totals.
    """

    def __init__(self, folder: Path | str, tokenizer: Tokenizer):
        """Opens a folder that `prepare` wrote or is writing. Raises ValueError if another tokenizer wrote it or a file
        is damaged."""
        self.folder, self.tokenizer = Path(folder), tokenizer
        self.shards = MappedShards(self.folder, dtype_of(tokenizer))
        self.manifest: dict = {}
        self.max_id, self.complete, self._read = 0, False, 0
        self.bytes = 0  # of text that the ready shards hold, but for some at their end
        self.vocab_size: int | None = None  # ids at or above it are refused
        self.refresh()

    def __len__(self) -> int:
        return self.shards.ends[-1] if self.shards.ends else 0

    def refresh(self) -> None:
        """Takes in the shards that have become ready."""
        if self.complete:
            return
        complete = (self.folder / MANIFEST).is_file()  # asked first: then the lines below are all there are
        lines, self._read = read_lines(self.folder, self._read)
        for line in lines:
            self.shards.append(line["tokens"])
            self.max_id, self.bytes = max(self.max_id, line["max_id"]), line["next"]["bytes"]
        if self.vocab_size is not None:
            self.check_vocab(self.vocab_size)
        if complete or (lines and not self.manifest):
            self.manifest = json.loads((self.folder / (MANIFEST if complete else HEADER)).read_text(encoding="utf-8"))
            self._check_tokenizer()
        self.complete = complete

    def _check_tokenizer(self) -> None:
        made_by, mine = self.manifest["tokenizer"], self.tokenizer
        if made_by["hash"] != mine.hash:
            raise ValueError(
                f"the tokens in {self.folder} were made by a {made_by['kind']} tokenizer with hash {made_by['hash']}, "
                f"but this is a {mine.kind} tokenizer with hash {mine.hash}; use that one or another cache folder"
            )

    def tokens(self) -> "TokenRange":
        """All that is ready."""
        return TokenRange(self.shards, 0, len(self))

    def split(self, val_fraction: float, block_size: int) -> tuple["TokenRange", "TokenRange"]:
        """(train, val): the last `val_fraction` of the stream is validation. ValueError where one is too short."""
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; it must be between 0 and 1")
        border = int(len(self) * (1 - val_fraction))
        train, val = TokenRange(self.shards, 0, border), TokenRange(self.shards, border, len(self))
        train.check("the training split", block_size, f"lower val_fraction ({val_fraction})")
        val.check("the validation split", block_size, f"raise val_fraction ({val_fraction})")
        return train, val

    def check_vocab(self, vocab_size: int) -> None:
        """Raises ValueError when the stream holds an id that a model of vocab_size ids does not know, now or when more
        of it is ready."""
        self.vocab_size = vocab_size
        if self.max_id >= vocab_size:
            raise ValueError(
                f"the tokens in {self.folder} go up to id {self.max_id}, but the model's vocab_size is "
                f"{vocab_size}; use the model's own tokenizer or a larger vocab_size"
            )


class TokenRange:
    """The tokens [start, stop) of a stream that lies in shards."""

    def __init__(self, shards: MappedShards | list[np.ndarray], start: int, stop: int):
        self.shards, self.start, self.stop = shards, start, stop
        self.ends = shards.ends if isinstance(shards, MappedShards) else list(accumulate(map(len, shards)))

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int | None = None) -> "TokenRange":
        """The tokens [start, stop) of this range, or as many of them as there are, as a range of their own."""
        stop = len(self) if stop is None else min(stop, len(self))
        return TokenRange(self.shards, self.start + min(start, stop), self.start + stop)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of this range, counted from its own beginning; read-only."""
        assert 0 <= start < start + length <= len(self)
        start += self.start
        shard = bisect_right(self.ends, start)
        at = start - (self.ends[shard - 1] if shard else 0)
        part = self.shards[shard][at : at + length]
        if len(part) == length:
            return part
        parts = [part]
        while missing := length - sum(map(len, parts)):
            shard += 1
            parts.append(self.shards[shard][:missing])
        return np.concatenate(parts)

    def check(self, what: str, block_size: int, *ways_out: str) -> None:
        """Raises ValueError when there is not a single window of block_size tokens and its targets."""
        if len(self) <= block_size:
            shorter = [f"set block_size to {len(self) - 1} or less"] if len(self) > 1 else []
            raise ValueError(
                f"{what} has {len(self):,} tokens, but block_size {block_size} needs at least {block_size + 1}: "
                + ", or ".join([*shorter, *ways_out, "give more text"])
            )

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs, (vocab_size,); in a range of more than SAMPLE_TOKENS, in evenly spread samples."""
        stretch = min(len(self), SAMPLE_TOKENS)
        parts = 64 if len(self) > stretch else 1
        starts = np.linspace(0, len(self) - stretch // parts, parts).astype(np.int64)
        counts = (np.bincount(self.read(start, stretch // parts), minlength=vocab_size) for start in starts.tolist())
        return functools.reduce(np.add, counts)
