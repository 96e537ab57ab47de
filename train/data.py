"""From token shards to batches: windows of a token stream become the rows of a batch.

    corpus = prepare(open_source("my.txt"), tokenizer)  # train/shards.py: tokenised once, then read from the cache
    train, val = corpus.split(0.1, block_size)
    batches = Batches(train, block_size, seed=1337)
    idx, targets = batches.batch(step, batch_size)  # a pure function of (seed, step): nothing to save, nothing to skip

The order of a text of at most SMALL_TOKENS tokens is drawn over the whole text. A longer one is trained on while it is
still being tokenised, so its order must not depend on how long it is or how much of it is ready: see `StreamBatches`.

What a training loop asks of batches is `TrainingBatches`. A data set of another kind (rows.py has one) has the same
methods, gets its order from `Order`, and reads the rows that it names.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanogpt_hub.model import IGNORE_INDEX
from nanogpt_hub.tokenizer import Tokenizer

from .shards import Corpus, TokenRange
from .tokenizing import Tokenizing

SMALL_TOKENS = 2**24  # a longer text is a stream: it is tokenised in seconds up to here
FIRST_GROUP, MAX_DOUBLINGS = 2**23, 5  # tokens that the first group of a stream holds; how often that doubles
TOKENS = "tokens_sha256"  # in the identity of data: the hash of what is ready when training begins
LISTED = 2**20  # a permutation of more numbers is computed instead of being stored

ALL = slice(None)  # rows of a batch


class Counted(Protocol):
    """Tokens that can be counted: a range of a text, or rows."""

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each id is a target, (vocab_size,)."""
        ...


def unigram_loss(train: Counted, val: Counted, vocab_size: int) -> float:
    """Loss on val, in nats per token, of knowing how frequent each token is in train and nothing else.

    The baseline that a model which has learned anything about order beats. Each id counts once more than it was seen.
    """
    seen = train.counts(vocab_size) + 1
    share = val.counts(vocab_size)
    return float(-(share / share.sum()) @ np.log(seen / seen.sum()))


def content(source: dict, duplicates: str, tokens: str) -> dict[str, object]:
    """What tells data from other data: name, the rows that were chosen and their commit, and `tokens`, their hash.

    Nothing of it depends on where the data lies. source: as `Source.describe` gives it.
    """
    dropped = {"duplicates": duplicates} if duplicates.startswith("drop") else {}
    return {**_chosen(source), **dropped, TOKENS: tokens}


def _chosen(source: dict) -> dict[str, object]:
    chosen = {key: source[key] for key in ("config", "split", "revision") if key in source}
    mixed = {"sources": [_chosen(part) for part in source["sources"]]} if "sources" in source else {}
    return {"data": source["name"], **chosen, **mixed}


def text_bytes(source: dict) -> int:
    """The size of what a source reads, as its description tells it; 0 where it does not."""
    return source.get("bytes", 0) + sum(map(text_bytes, source.get("sources", ())))


def tokens_sha256(*ranges: TokenRange) -> str:
    """A hash of the tokens of ranges; the same whoever made them."""
    digest = hashlib.sha256()
    for tokens in ranges:
        digest.update(f"{len(tokens)} tokens".encode())
        for start in range(0, len(tokens), 2**20):
            digest.update(tokens.read(start, min(2**20, len(tokens) - start)).tobytes())
    return digest.hexdigest()[:16]


# ---- tokens to batches -----------------------------------------------------------------------------------------------


class TrainingBatches(Protocol):
    """Batches as a function of the step, whatever they are made of: windows of a text or rows."""

    def __len__(self) -> int:
        """Sequences in one epoch."""
        ...

    def epochs(self, step: int, batch_size: int) -> float | None:
        """Epochs seen after `step` batches; None as long as the length of the text is not known."""
        ...

    def needs_more(self, step: int, batch_size: int) -> bool:
        """Whether the batch of a step may need what is not prepared yet."""
        ...

    def ready(self, step: int, batch_size: int) -> bool:
        """Whether the batch of a step can be read now."""
        ...

    def batch(self, step: int, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """(idx, targets), each (B, T) int64: the batch of a step, or only the `rows` of it that are asked for."""
        ...


class Permutation:
    """A seeded permutation of 0..count-1 that needs no memory: a Feistel network over the next even number of bits.

    Each round replaces (a, b) by (b, a xor hash(b)), which can be undone, so that no two indices meet. A result of
    count or more is put in again until it is below: less than four rounds on average, because that many bits count less
    than 4 * count.
    """

    ROUNDS = 6

    def __init__(self, count: int, *key: int):
        self.count = count
        self.half = max(1, ((count - 1).bit_length() + 1) // 2)  # bits of a and of b
        digests = (hashlib.sha256(f"{key} {number}".encode()).digest() for number in range(self.ROUNDS))
        self.keys = [int.from_bytes(digest[:8], "little") for digest in digests]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        mask, half = (1 << self.half) - 1, self.half
        while True:
            a, b = index >> half, index & mask
            for key in self.keys:
                a, b = b, a ^ (_mixed(b ^ key) & mask)
            index = a << half | b
            if index < self.count:
                return index


Shuffled = Permutation | np.ndarray | tuple[()]  # the numbers from 0 on, each once, by their places


def _mixed(number: int) -> int:
    """A hash of 64 bits: the multiplications and shifts of SplitMix64, without its last."""
    number = number * 0x9E3779B97F4A7C15 & 2**64 - 1
    number = (number ^ number >> 29) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    return number ^ number >> 32


class Order:
    """The order in which `count` examples are seen, epoch after epoch: each epoch its own seeded permutation."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed % 2**64
        self._drawn: tuple[int, float, Shuffled] = (-1, 0.0, ())  # epoch, phase, permutation: the last asked for

    def draw(self, epoch: int) -> tuple[float, Shuffled]:
        """An epoch's phase in [0, 1), and its examples 0..count-1 in their order."""
        if epoch != self._drawn[0]:
            generator = np.random.default_rng((self.seed, epoch))
            phase = generator.random()
            listed = self.count <= LISTED
            order = generator.permutation(self.count) if listed else Permutation(self.count, self.seed, epoch)
            self._drawn = (epoch, phase, order)
        return self._drawn[1:]

    def examples(self, step: int, batch_size: int, rows: slice = ALL) -> Iterator[tuple[float, int]]:
        """Phase and example of each row of a batch that is asked for."""
        for place in range(step * batch_size, (step + 1) * batch_size)[rows]:
            yield self.example(place)

    def example(self, place: int) -> tuple[float, int]:
        """Phase and example of a place in the sequence of all epochs."""
        epoch, place_in_epoch = divmod(place, self.count)
        phase, permutation = self.draw(epoch)
        return phase, int(permutation[place_in_epoch])


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

    def needs_more(self, step: int, batch_size: int) -> bool:
        """Whether the batch of a step may need tokens that no batch before it needed."""
        return False

    def ready(self, step: int, batch_size: int) -> bool:
        """Whether the batch of a step can be read now."""
        return True

    def batch(self, step: int, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """(idx, targets), each (B, T) int64: the batch of a step, or only the `rows` of it that are asked for.

        The same for the same seed and step, whoever asks: parts put together again are the whole.
        """
        starts = [self.start(*example) for example in self.order.examples(step, batch_size, rows)]
        return read_windows(self.tokens, starts, self.block_size)

    def start(self, phase: float, window: int) -> int:
        """The token that a window of an epoch begins with."""
        T, last = self.block_size, len(self.tokens) - self.block_size - 1
        return min(max(0, window * T - int(phase * T)), last)


class StreamBatches:
    """Training batches of a text that may still be tokenised, in an order that does not depend on how far that is.

    The first epoch goes through the text in groups of windows, one after the other: FIRST_GROUP tokens, then twice as
    many, and so on up to 2**MAX_DOUBLINGS times as many; the last group has what is left. Within a group the windows
    come in a random order. So a batch needs its group alone, and the shuffle gets wider as the text gets ready. The
    windows lie side by side: each token but the first is a target exactly once, but for the few in front of the end
    that the last window, which is pushed inside, has again. From the second epoch on the length is known, and the order
    is that of `Batches`, over the whole text.
    """

    def __init__(self, corpus: Corpus, first: int, block_size: int, seed: int):
        """The stream from token `first` on."""
        self.corpus, self.block_size, self.seed = corpus, block_size, seed
        self.tokens = TokenRange(corpus.shards, first, max(first, len(corpus)))
        self._group: tuple[int, Shuffled] = (-1, ())  # the last group asked for, and the order of its windows
        self._later: Batches | None = None  # from the second epoch on

    def __len__(self) -> int:
        """Sequences in the first epoch, as far as they are ready."""
        return max(0, math.ceil((len(self.tokens) - 1) / self.block_size))

    def epochs(self, step: int, batch_size: int) -> float | None:
        """Epochs seen after `step` batches; None as long as the length of the text is not known."""
        self._refresh()
        places, first = step * batch_size, len(self)
        if not self.corpus.complete:
            return None
        return places / first if places <= first else 1 + (places - first) / len(self._later_epochs())

    def needs_more(self, step: int, batch_size: int) -> bool:
        """Whether the batch of a step may need tokens that no batch before it needed: a function of the step alone."""
        last = (step + 1) * batch_size - 1
        return self._group_of(last) != self._group_of(max(0, last - batch_size))

    def ready(self, step: int, batch_size: int) -> bool:
        """Whether the batch of a step can be read now."""
        last = (step + 1) * batch_size - 1
        return self._is_ready(last) or (self._refresh() and self._is_ready(last))

    def batch(self, step: int, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """(idx, targets), each (B, T) int64: the batch of a step, or only the `rows` of it that are asked for.

        The same for the same seed and step, whoever asks and whenever. It must be `ready`.
        """
        if not self.ready(step, batch_size):
            raise RuntimeError(f"the tokens of step {step} are not ready; only {len(self.tokens):,} are")
        places = range(step * batch_size, (step + 1) * batch_size)[rows]
        return read_windows(self.tokens, [self._start(place) for place in places], self.block_size)

    def _refresh(self) -> bool:
        """Takes in what has become ready. Always True."""
        self.corpus.refresh()
        self.tokens.stop = max(self.tokens.start, len(self.corpus))
        return True

    def _is_ready(self, place: int) -> bool:
        if self.corpus.complete:
            return True
        _, first, count = self._group_of(place)
        return len(self.tokens) > (first + count) * self.block_size

    def _group_of(self, place: int) -> tuple[int, int, int]:
        """The group of a place in the first epoch: its number, its first window, and how many it has when full."""
        first = group = 0
        count = max(1, FIRST_GROUP // self.block_size)
        while place >= first + count and group < MAX_DOUBLINGS:
            first, count, group = first + count, 2 * count, group + 1
        further = (place - first) // count
        return group + further, first + further * count, count

    def _start(self, place: int) -> int:
        """The token that the window at a place of the sequence begins with."""
        if self.corpus.complete and place >= len(self):
            batches = self._later_epochs()
            return batches.start(*batches.order.example(len(batches) + place - len(self)))
        group, first, count = self._group_of(place)
        if group != self._group[0]:
            count = min(count, len(self) - first) if self.corpus.complete else count
            self._group = (group, _group_order(count, self.seed % 2**64, group))
        window = first + int(self._group[1][place - first])
        return min(window * self.block_size, len(self.tokens) - self.block_size - 1)

    def _later_epochs(self) -> Batches:
        if self._later is None:
            self._later = Batches(self.tokens, self.block_size, self.seed)
        return self._later


def _group_order(count: int, seed: int, group: int) -> Shuffled:
    """The random order of a group's windows; its key has three numbers, so it is none that an epoch has."""
    if count > LISTED:
        return Permutation(count, seed, 1, group)
    return np.random.default_rng((seed, 1, group + 1)).permutation(count)


def read_windows(tokens: TokenRange, starts: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    """Windows from each of `starts` on as (idx, targets), each (B, T) int64; targets are idx moved on by one."""
    both = np.empty((2, len(starts), block_size), dtype=np.int64)
    for row, start in enumerate(starts):
        window = tokens.read(start, block_size + 1)
        both[0, row], both[1, row] = window[:-1], window[1:]
    idx, targets = torch.from_numpy(both).unbind()
    return idx, targets


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

    batches: TrainingBatches
    val: tuple[Tensor, Tensor]  # idx and targets, each (N, T); IGNORE_INDEX where a target does not count
    bytes_per_token: float  # of the validation text
    baselines: dict[str, float]  # losses to compare with, by name
    facts: dict  # about the text, for the model card
    identity: dict  # what must be the same when a run goes on
    tokenizing: list[Tokenizing] = field(default_factory=list)  # processes that prepare more of it
    question: list[dict] = field(default_factory=list)  # of conversations: messages before an answer, to sample one

    def close(self) -> None:
        """Ends what works beside the training; what is tokenised stays."""
        for one in self.tokenizing:
            one.close()

    def progress(self, step: int, batch_size: int) -> dict:
        """What is known about the data after so many steps: `epochs` seen, `train_tokens` once they are counted."""
        epochs = self.batches.epochs(step, batch_size)
        if epochs is None:
            return {}
        whole = {"train_tokens": len(self.batches.tokens)} if isinstance(self.batches, StreamBatches) else {}
        return {"epochs": epochs, **whole}


# ---- what a person wants to see first --------------------------------------------------------------------------------


def summary(corpus: Corpus, train: TokenRange, val: TokenRange) -> list[str]:
    """Lines about the data of a run: its size, its tokens, its split, and the first tokens as text again."""
    facts, source, tokenizer = corpus.manifest, corpus.manifest["source"], corpus.tokenizer
    about = [f"{key} {source[key]}" for key in ("config", "split", "revision", "license") if key in source]
    skipped = f", {source['skipped_files']:,} files left out" if "skipped_files" in source else ""
    first = tokenizer.decode(train.read(0, min(len(train), 64)).tolist())
    return [
        f"data: {source['name']} ({', '.join([source['kind'], *about])})" + skipped,
        *(whole_lines(facts, tokenizer) if corpus.complete else growing_lines(corpus)),
        f"split: {len(train):,} to train{'' if corpus.complete else ' so far'}, {len(val):,} to validate"
        + (f" ({len(val) / (len(train) + len(val)):.1%})" if corpus.complete else ""),
        f"first tokens: {first!r}",
    ]


def whole_lines(facts: dict, tokenizer: Tokenizer) -> list[str]:
    """What a complete corpus holds, and what was left out of it."""
    lines = [
        f"text: {facts['characters']:,} characters, {facts['bytes']:,} bytes, documents: {facts['documents']:,}",
        f"tokens: {facts['tokens']:,} ({tokenizer.kind}, {tokenizer.vocab_size:,} ids, "
        f"{facts['bytes'] / facts['tokens']:.2f} bytes per token)",
    ]
    if facts["bad_rows"]:
        lines.append(f"left out: {facts['bad_rows']:,} rows that cannot be read, such as {facts['bad_examples'][0]}")
    if repeated := facts["duplicates"].get("exact", 0) + facts["duplicates"].get("near", 0):
        lines.append(f"duplicates: {repeated:,} documents, {facts['duplicates']['near']:,} of them not word for word")
    return lines


def growing_lines(corpus: Corpus) -> list[str]:
    """What is ready of a corpus that is still being tokenised."""
    tokenizer = corpus.tokenizer
    return [
        f"tokens: {len(corpus):,} ready ({tokenizer.kind}, {tokenizer.vocab_size:,} ids), the rest is tokenised "
        "beside the training"
    ]
