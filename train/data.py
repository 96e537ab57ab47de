"""From text to batches: documents become token shards on disk, windows of them become the rows of a batch.

    corpus = prepare(open_source("my.txt"), tokenizer)  # tokenised once, then read from the cache
    train, val = corpus.split(0.1, block_size)
    batches = Batches(train, block_size, seed=1337)
    idx, targets = batches.batch(step, batch_size)  # a pure function of (seed, step): nothing to save, nothing to skip

On disk a corpus is a folder of raw little-endian uint16 or uint32 ids (tokens-00000.bin, ...) and a manifest.json. The
split into training and validation is made when reading: the last part of the token stream is validation.

A batch object has `batch(step, batch_size, rows)`, `epochs(step, batch_size)` and `len` (sequences per epoch), and gets
its order from `Order`; a data set of another kind needs the same three and a way to read the rows that `Order` names.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from nanogpt_hub.model import IGNORE_INDEX
from nanogpt_hub.sources import Source, cache_root
from nanogpt_hub.tokenizer import Tokenizer

MANIFEST = "manifest.json"
FORMAT = 1  # of the folder; a change makes a new cache entry
SHARD_TOKENS = 100_000_000
BATCH_CHARS = 2**20  # text encoded at a time
SAMPLE_TOKENS = 2**24  # how many tokens the frequencies of a longer range are counted in

ALL = slice(None)  # rows of a batch
Pieces = list[tuple[str, bool]]  # of documents; True with the last piece of one


# ---- text to shards --------------------------------------------------------------------------------------------------


def prepare(source: Source, tokenizer: Tokenizer, cache_dir: Path | str | None = None, quiet: bool = False) -> "Corpus":
    """The tokens of a source, from the cache where they are. Memory stays flat, whatever the size of the source.

    cache_dir: default `tokens` in the folder NANOGPT_HUB_CACHE or ~/.cache/nanogpt_hub. Shards are written aside and
    renamed when whole, under a lock: several processes may call this at once, one works and the others wait.
    quiet: no progress bar. Raises ValueError for text that the source or the tokenizer refuses.
    """
    root = Path(cache_dir) if cache_dir else cache_root() / "tokens"
    root.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{FORMAT} {source.fingerprint} {tokenizer.hash}".encode()).hexdigest()[:16]
    folder, aside = root / key, root / f"{key}.part"
    with FileLock(root / f"{key}.lock"):
        if not (folder / MANIFEST).is_file():
            for leftover in (folder, aside):  # of a run that was killed; whoever holds the lock owns both
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                _write_corpus(source, tokenizer, aside, quiet)
                os.replace(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return Corpus.load(folder, tokenizer)


def _write_corpus(source: Source, tokenizer: Tokenizer, folder: Path, quiet: bool) -> None:
    folder.mkdir()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    counts = {"tokens": 0, "documents": 0, "characters": 0, "bytes": 0, "max_id": 0}
    bar = tqdm(total=source.text_bytes, unit="B", unit_scale=True, desc="tokenize", disable=quiet)
    with bar, contextlib.closing(_ShardWriter(folder, dtype)) as writer:
        for ids in _encoded(source, tokenizer, counts, bar):
            writer.write(ids.astype(dtype))
    if not counts["tokens"]:
        raise ValueError(f"the {tokenizer.kind} tokenizer makes no token of {source.name}; use another one")
    manifest = {
        "format": FORMAT,
        "source": source.describe(),
        "tokenizer": {"kind": tokenizer.kind, "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size},
        "dtype": dtype.name,
        **counts,
        "shards": writer.shards,
    }
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, ensure_ascii=False)
        _sync(file)


def _encoded(source: Source, tokenizer: Tokenizer, counts: dict, bar: tqdm) -> Iterator[np.ndarray]:
    """The ids of the whole source, a batch of pieces at a time; end-of-text between documents, where there is one."""
    separator = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    starts = False  # the next piece begins a document other than the first
    for pieces in _gathered(source.pieces()):
        encoded = tokenizer.encode_batch([text for text, _ in pieces])
        flat = array("I")  # reads a list of ints three times as fast as NumPy does
        for (text, ends), ids in zip(pieces, encoded, strict=True):
            flat.extend(separator if starts else [])
            flat += array("I", ids)
            starts = ends
            size = len(text.encode())
            counts["documents"] += ends
            counts["characters"] += len(text)
            counts["bytes"] += size
            bar.update(size)
        tokens = np.frombuffer(flat, np.uintc)
        counts["tokens"] += len(tokens)
        counts["max_id"] = max(counts["max_id"], int(tokens.max(initial=0)))
        yield tokens


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


def _sync(file) -> None:
    """What was written survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


class _ShardWriter:
    """Appends ids to tokens-00000.bin and on to the next file after SHARD_TOKENS."""

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype, self.shards, self.file = folder, dtype, [], None

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            if self.file is None or self.shards[-1]["tokens"] == SHARD_TOKENS:
                self._next()
            part = ids[: SHARD_TOKENS - self.shards[-1]["tokens"]]
            self.file.write(part.tobytes())
            self.shards[-1]["tokens"] += len(part)
            ids = ids[len(part) :]

    def _next(self) -> None:
        self.close()
        self.shards.append({"name": f"tokens-{len(self.shards):05d}.bin", "tokens": 0})
        self.file = open(self.folder / self.shards[-1]["name"], "wb")  # noqa: SIM115 (closed by close)

    def close(self) -> None:
        if self.file is not None:
            _sync(self.file)
            self.file.close()
            self.file = None


# ---- shards to tokens ------------------------------------------------------------------------------------------------


class Corpus:
    """A token stream on disk, memory-mapped, and its `manifest`."""

    def __init__(self, folder: Path, manifest: dict):
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.folder, self.manifest, self.shards = folder, manifest, []
        for shard in manifest["shards"]:
            path = folder / shard["name"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["tokens"] * dtype.itemsize:
                raise ValueError(f"{path} has {size} bytes, not the {shard['tokens']} tokens of its manifest; "
                                 f"delete the folder {folder} to tokenise anew")  # fmt: skip
            self.shards.append(np.asarray(np.memmap(path, dtype, mode="r")))  # plain arrays slice faster

    @classmethod
    def load(cls, folder: Path | str, tokenizer: Tokenizer) -> "Corpus":
        """Opens a folder that `prepare` wrote. Raises ValueError if another tokenizer wrote it or a file is damaged."""
        folder = Path(folder)
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_by = manifest["tokenizer"]
        if made_by["hash"] != tokenizer.hash:
            raise ValueError(
                f"the tokens in {folder} were made by a {made_by['kind']} tokenizer with hash {made_by['hash']}, but "
                f"this is a {tokenizer.kind} tokenizer with hash {tokenizer.hash}; use that one or another cache folder"
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest["tokens"]

    def tokens(self) -> "TokenRange":
        """The whole stream."""
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
        """Raises ValueError when the stream holds an id that a model of vocab_size ids does not know."""
        if self.manifest["max_id"] >= vocab_size:
            raise ValueError(
                f"the tokens in {self.folder} go up to id {self.manifest['max_id']}, but the model's vocab_size is "
                f"{vocab_size}; use the model's own tokenizer or a larger vocab_size"
            )


class TokenRange:
    """The tokens [start, stop) of a stream that lies in shards."""

    def __init__(self, shards: list[np.ndarray], start: int, stop: int):
        self.shards, self.start, self.stop = shards, start, stop
        self.ends = list(accumulate(map(len, shards)))  # stream position behind each shard

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of this range, counted from its own beginning; read-only."""
        assert 0 <= start < start + length <= len(self)
        start += self.start
        shard = bisect_right(self.ends, start)
        at = start - (self.ends[shard] - len(self.shards[shard]))
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
        return sum(np.bincount(self.read(start, stretch // parts), minlength=vocab_size) for start in starts.tolist())


def unigram_loss(train: TokenRange, val: TokenRange, vocab_size: int) -> float:
    """Loss on val, in nats per token, of knowing how frequent each token is in train and nothing else.

    The baseline that a model which has learned anything about order beats. Each id counts once more than it was seen.
    """
    seen = train.counts(vocab_size) + 1
    share = val.counts(vocab_size)
    return float(-(share / share.sum()) @ np.log(seen / seen.sum()))


# ---- tokens to batches -----------------------------------------------------------------------------------------------


class Order:
    """The order in which `count` examples are seen, epoch after epoch: each epoch its own seeded permutation."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed % 2**64
        self._drawn = (-1, 0.0, np.empty(0, dtype=np.int64))  # epoch, phase, permutation: the last ones asked for

    def draw(self, epoch: int) -> tuple[float, np.ndarray]:
        """An epoch's phase in [0, 1), and its examples 0..count-1 in their order, (count,)."""
        if epoch != self._drawn[0]:
            generator = np.random.default_rng((self.seed, epoch))
            self._drawn = (epoch, generator.random(), generator.permutation(self.count))
        return self._drawn[1:]

    def examples(self, step: int, batch_size: int, rows: slice = ALL) -> Iterator[tuple[float, int]]:
        """Phase and example of each row of a batch that is asked for."""
        for place in range(step * batch_size, (step + 1) * batch_size)[rows]:
            epoch, place_in_epoch = divmod(place, self.count)
            phase, permutation = self.draw(epoch)
            yield phase, int(permutation[place_in_epoch])


class Batches:
    """Training batches of windows: each epoch reads every token of the range, in windows in a random order.

    The windows of an epoch lie side by side, from a random offset on, so that their borders move from epoch to epoch;
    the first and the last are pushed inside the range instead of being cut short or dropped.
    """

    def __init__(self, tokens: TokenRange, block_size: int, seed: int):
        tokens.check("the training text", block_size)
        self.tokens, self.block_size = tokens, block_size
        # One window more than would cover the targets, so that any offset leaves none uncovered.
        self.order = Order(math.ceil((len(tokens) - 1) / block_size) + 1, seed)

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return self.order.count

    def epochs(self, step: int, batch_size: int) -> float:
        """Epochs seen after `step` batches."""
        return step * batch_size / len(self)

    def batch(self, step: int, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """(idx, targets), each (B, T) int64: the batch of a step, or only the `rows` of it that are asked for.

        The same for the same seed and step, whoever asks: parts put together again are the whole.
        """
        T, last = self.block_size, len(self.tokens) - self.block_size - 1
        examples = self.order.examples(step, batch_size, rows)
        starts = [min(max(0, window * T - int(phase * T)), last) for phase, window in examples]
        return read_windows(self.tokens, starts, T)


def read_windows(tokens: TokenRange, starts: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    """Windows from each of `starts` on as (idx, targets), each (B, T) int64; targets are idx moved on by one."""
    both = np.empty((2, len(starts), block_size), dtype=np.int64)
    for row, start in enumerate(starts):
        window = tokens.read(start, block_size + 1)
        both[0, row], both[1, row] = window[:-1], window[1:]
    return torch.from_numpy(both).unbind()


class EvalWindows:
    """A fixed set of windows side by side, evenly spread where not all are wanted: what each evaluation reads.

    max_windows: 0 for all, in which case each token but the first is a target exactly once. The last window of a range
    is pushed inside; targets that the one before it has already are set to IGNORE_INDEX.
    """

    def __init__(self, tokens: TokenRange, block_size: int, max_windows: int = 0):
        tokens.check("the validation text", block_size)
        self.tokens, self.block_size = tokens, block_size
        total = math.ceil((len(tokens) - 1) / block_size)
        count = min(total, max_windows) if max_windows else total
        self.windows = np.linspace(0, total - 1, count).round().astype(np.int64)  # (count,)

    def __len__(self) -> int:
        return len(self.windows)

    def read(self, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """(idx, targets), each (B, T) int64, of all windows or the `rows` of them that are asked for."""
        starts = self.windows[rows] * self.block_size
        pushed = np.minimum(starts, len(self.tokens) - self.block_size - 1)
        idx, targets = read_windows(self.tokens, pushed.tolist(), self.block_size)
        for row, repeated in enumerate((starts - pushed).tolist()):
            targets[row, :repeated] = IGNORE_INDEX
        return idx, targets

    def bytes_per_token(self, lengths: np.ndarray) -> float:
        """Bytes of text per target, by the `token_lengths`: bits per byte = loss / ln 2 / bytes_per_token."""
        size = count = 0
        for start in range(0, len(self), 64):
            targets = self.read(slice(start, start + 64))[1].numpy()
            ids = targets[targets != IGNORE_INDEX]
            size, count = size + int(lengths[ids].sum()), count + len(ids)
        return size / count


@dataclass
class Data:
    """What a training loop reads: batches as a function of the step, and the fixed windows of every evaluation."""

    batches: Batches
    val: tuple[Tensor, Tensor]  # idx and targets, each (N, T); IGNORE_INDEX where a target does not count
    bytes_per_token: float  # of the validation text
    baselines: dict[str, float]  # losses to compare with, by name
    facts: dict  # about the text, for the model card


# ---- what a person wants to see first --------------------------------------------------------------------------------


def summary(corpus: Corpus, train: TokenRange, val: TokenRange, tokenizer: Tokenizer) -> list[str]:
    """Lines about the data of a run: its size, its tokens, its split, and the first tokens as text again."""
    facts, source = corpus.manifest, corpus.manifest["source"]
    about = [f"{key} {source[key]}" for key in ("config", "split", "revision", "license") if key in source]
    skipped = f", {source['skipped_files']:,} files left out" if "skipped_files" in source else ""
    total = len(train) + len(val)
    return [
        f"data: {source['name']} ({', '.join([source['kind'], *about])})" + skipped,
        f"text: {facts['characters']:,} characters, {facts['bytes']:,} bytes, documents: {facts['documents']:,}",
        f"tokens: {facts['tokens']:,} ({tokenizer.kind}, {tokenizer.vocab_size:,} ids, "
        f"{facts['bytes'] / facts['tokens']:.2f} bytes per token)",
        f"split: {len(train):,} to train, {len(val):,} to validate ({len(val) / total:.1%})",
        f"first tokens: {tokenizer.decode(train.read(0, min(len(train), 64)).tolist())!r}",
    ]
