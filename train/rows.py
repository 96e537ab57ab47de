"""Prompts and answers to them: rows of a table become padded batches in which only the answers are learned.

    source = open_rows("pairs.jsonl", ["prompt", "completion"])
    rows, counts = encode_rows(source, completions("prompt", "completion", tokenizer), block_size)
    batches = RowBatches(rows, block_size, seed=1337)
    idx, targets = batches.batch(step, batch_size)  # as train.data.Batches; prompts and padding are IGNORE_INDEX

Two kinds of rows, chosen by data.format:

completion   {"prompt": "2 + 2 =", "completion": " 4"}: the ids of the prompt as it has them alone, those of the
             completion, end-of-text. Nothing is put in between, so the white space that belongs there must be in one of
             the two: best at the head of the completion, because the usual vocabularies join a space to what follows.
messages     {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}: written by
             the tokenizer's chat template, or a plain one (nanogpt_hub/chat.py); what the assistant says is learned.
             {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."} is read as well.

A row longer than the context loses the beginning of its prompt; an answer that is longer by itself loses its end.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanogpt_hub.chat import ASSISTANT, SYSTEM, USER, ChatTemplate, Encoded, Messages, message
from nanogpt_hub.corpus.formats import (
    ROW_FORMATS,
    UTF_8,
    Reading,
    Rows,
    SourceError,
    cell,
    check_encoding,
    read_rows,
    row_text,
    suffix,
)
from nanogpt_hub.evaluate import token_lengths
from nanogpt_hub.generate import encode_prompt
from nanogpt_hub.model import IGNORE_INDEX
from nanogpt_hub.sources import OfflineError, find_commit, hub_dataset, load_hub
from nanogpt_hub.tokenizer import Tokenizer

from .config import DataConfig, TrainConfig
from .data import ALL, Data, Order, content, unigram_loss
from .report import EVEN, UNIGRAM

ROWS_AT_A_TIME = 1000  # tokenised together
PARQUET_ROWS = 64  # unfolded together
SHOWN = 200  # characters of the first row
SPEAKERS = {  # the `from` of a message, and the role that it means
    "system": SYSTEM, "human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "chatgpt": ASSISTANT,
    "model": ASSISTANT, "bot": ASSISTANT, "function_call": ASSISTANT, "observation": "tool", "tool": "tool",
}  # fmt: skip

Encode = Callable[[list[tuple[str, dict]]], Iterable[Encoded]]  # rows, each with the words that say where it stands


# ---- where rows come from --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowSource:
    """Rows of a table and what is known about them. Made by `open_rows`."""

    kind: str  # file | hub
    name: str  # for people: no private path
    read: Callable[[Reading], Rows] = field(repr=False)  # each call starts anew
    facts: dict = field(default_factory=dict)  # what `describe` adds

    def describe(self) -> dict:
        """Facts for cards, as `nanogpt_hub.sources.Source` gives them."""
        return {"kind": self.kind, "name": self.name, **self.facts}


def open_rows(
    source: str,
    columns: list[str],
    *,
    config: str = "",
    split: str = "train",
    revision: str = "",
    encoding: str = UTF_8,
) -> RowSource:
    """Opens a .jsonl, .json, .csv, .tsv or .parquet file, packed or not, or a Hub dataset, for which config, split and
    revision count. encoding: of a file that is not UTF-8.

    Raises SourceError, one sentence, when it cannot be read or the first row lacks one of the `columns`.
    """
    path = Path(source).expanduser()
    if path.exists() or suffix(path) in ROW_FORMATS:
        opened = _open_file(path, check_encoding(encoding))
        if config or revision or split != "train":
            raise SourceError(f"config, split and revision belong to Hub datasets, but {source} is a file")
    else:
        dataset = hub_dataset(source, revision)
        if dataset is None:
            raise SourceError(f"there is no file {source}; give an existing one, or a Hub dataset (owner/name)")
        opened = _open_hub(*dataset, config, split)
    where, first = next(iter(opened.read(Reading())), ("", None))
    if first is None:
        raise SourceError(f"{source} holds no rows: there is nothing to train on")
    for column in columns:
        cell(first, column, where)
    return opened


def _open_file(path: Path, encoding: str) -> RowSource:
    if not path.is_file():
        raise SourceError(f"there is no file {path}; give an existing one, or the name of a Hub dataset (owner/name)")
    if suffix(path) not in ROW_FORMATS:
        known = ", ".join(ROW_FORMATS)
        raise SourceError(f"{path} is no table: rows are read from {known} files and from Hub datasets")
    facts = {"bytes": path.stat().st_size}
    return RowSource("file", path.name, lambda reading: read_rows(path, reading, encoding=encoding), facts)


def _open_hub(name: str, revision: str, config: str, split: str) -> RowSource:
    online, found = True, {"revision": revision}
    try:
        found = find_commit(name, revision)
    except OfflineError:  # what an earlier run left in the cache may still serve
        online = False
    facts: dict[str, Any] = {"config": config, "split": split, **found}
    facts = {key: value for key, value in facts.items() if value}
    rows = load_hub(name, config, split, facts.get("revision", ""), online, stream=False)
    return RowSource("hub", name, lambda reading: ((f"row {n}", row) for n, row in enumerate(rows, 1)), facts)


# ---- from rows to ids ------------------------------------------------------------------------------------------------


def completions(prompt: str, completion: str, tokenizer: Tokenizer) -> Encode:
    """Encodes rows with a column of prompts and one of completions. An empty completion gives no ids."""
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]

    def encode(rows: list[tuple[str, dict]]) -> Iterator[Encoded]:
        pairs = [(row_text(row, prompt, where), row_text(row, completion, where)) for where, row in rows]
        alone = tokenizer.encode_batch(asked for asked, _ in pairs)
        whole = tokenizer.encode_batch(asked + answer for asked, answer in pairs)
        for (_, answer), start, ids in zip(pairs, alone, whole, strict=True):
            if not answer:
                yield [], []
                continue
            # Where the border lies inside a token of the whole text, the two are encoded each by itself.
            learned = ids[len(start) :] if ids[: len(start)] == start else tokenizer.encode(answer)
            start = start or encode_prompt(tokenizer, "")
            yield start + learned + end, [False] * len(start) + [True] * len(learned + end)

    return encode


class Conversations:
    """Encodes rows with a column of messages, by the tokenizer's chat template."""

    def __init__(self, column: str, tokenizer: Tokenizer):
        self.column, self.template = column, ChatTemplate(tokenizer)
        self.question: Messages = []  # of the last conversation that was read: all before its first answer

    def __call__(self, rows: list[tuple[str, dict]]) -> Iterable[Encoded]:
        read = [messages_of(row, self.column, where) for where, row in rows]
        for messages in read:
            before = list(takewhile(lambda each: each["role"] != ASSISTANT, messages))
            self.question = before if 0 < len(before) < len(messages) else self.question
        return self.template.encode(read)


def messages_of(row: dict, column: str, where: str) -> Messages:
    """The conversation of a row. SourceError where it is none."""
    value = cell(row, column, where) or []
    found = [as_message(each, where) for each in value] if isinstance(value, list) else [None]
    messages = [each for each in found if each is not None]
    if len(messages) < len(found):
        raise SourceError(
            f"{where}: column {column!r} must hold a list of {{role, content}}, or of {{from, value}}, all of them text"
        )
    return messages


def as_message(value: object, where: str) -> dict | None:
    """A message as templates know it; None for what is none. SourceError for a speaker that is not known."""
    if not isinstance(value, dict):
        return None
    if all(isinstance(value.get(key), str) for key in ("role", "content")):
        return value
    if not all(isinstance(value.get(key), str) for key in ("from", "value")):
        return None
    if value["from"].lower() not in SPEAKERS:
        raise SourceError(f"{where}: a message is from {value['from']!r}; known are {', '.join(SPEAKERS)}")
    return message(SPEAKERS[value["from"].lower()], value["value"])


class TokenRows:
    """Rows of token ids, end to end in one array, and which of the ids are targets."""

    def __init__(self, ids: np.ndarray, learned: np.ndarray, borders: np.ndarray):
        """ids (n,), learned (n,) booleans, borders (rows + 1,): row i is ids[borders[i] : borders[i + 1]]."""
        self.ids, self.learned, self.borders = ids, learned, borders

    @classmethod
    def of(cls, rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> "TokenRows":
        """From each row's ids and its learned."""
        ids, learned = [], []
        for row_ids, row_learned in rows:
            ids.append(row_ids)
            learned.append(row_learned)
        borders = np.cumsum([0, *map(len, ids)])
        empty = np.empty(0, np.uint32)
        return cls(np.concatenate([empty, *ids]), np.concatenate([empty, *learned]).astype(bool), borders)

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def n_targets(self) -> int:
        return int(self.learned.sum())

    def part(self, start: int, stop: int) -> "TokenRows":
        """Rows [start, stop) as rows of their own, without a copy."""
        first, last = self.borders[start], self.borders[stop]
        return TokenRows(self.ids[first:last], self.learned[first:last], self.borders[start : stop + 1] - first)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a row and which are learned, each (n,)."""
        place = slice(self.borders[index], self.borders[index + 1])
        return self.ids[place], self.learned[place]

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each id is a target, (vocab_size,)."""
        return np.bincount(self.ids[self.learned], minlength=vocab_size)

    def padded(self, indices: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
        """Rows as (idx, targets), each (B, T) int64; targets are IGNORE_INDEX in prompts and padding."""
        longest = int(np.max(self.borders[indices + 1] - self.borders[indices])) - 1
        T = min(padded_length(longest), block_size)
        idx = np.zeros((len(indices), T), dtype=np.int64)
        targets = np.full_like(idx, IGNORE_INDEX)
        for i, index in enumerate(indices.tolist()):
            ids, learned = self.row(index)
            idx[i, : len(ids) - 1] = ids[:-1]
            targets[i, np.flatnonzero(learned) - 1] = ids[learned]  # the first id is never learned
        return torch.from_numpy(idx), torch.from_numpy(targets)


def padded_length(n: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ...: few shapes, as a model is compiled anew for each, and little waste."""
    power = max(8, 1 << (n - 1).bit_length())
    return power * 3 // 4 if 8 < n <= power * 3 // 4 else power


def encode_rows(
    source: RowSource, encode: Encode, block_size: int, quiet: bool = True, max_bad_rows: int = 0
) -> tuple[TokenRows, Counter]:
    """All rows that have something to learn, and how many were `read`, `skipped`, `shortened` (the prompt), `cut`, and
    `bad`: not in the form they should have.

    Raises SourceError for more than max_bad_rows bad rows, for more bad than good ones, or when nothing is left.
    """
    counts: Counter[str] = Counter()
    reading = Reading(max_bad_rows)
    fitted = (fit(*encoded, block_size + 1, counts) for encoded in _encoded(source, encode, reading, quiet))
    rows = TokenRows.of(row for row in fitted if row is not None)
    counts["bad"] = reading.bad_rows
    reading.check_share(counts["read"])
    if not len(rows):
        raise SourceError(f"none of the {counts['read']:,} rows of {source.name} has an answer to learn from")
    return rows, counts


def _encoded(source: RowSource, encode: Encode, reading: Reading, quiet: bool) -> Iterator[Encoded]:
    rows = iter(source.read(reading))
    with tqdm(unit="row", desc="tokenize", disable=quiet, delay=1) as bar:
        while some := list(islice(rows, ROWS_AT_A_TIME)):
            yield from _encode_some(some, encode, reading)
            bar.update(len(some))


def _encode_some(rows: list[tuple[str, dict]], encode: Encode, reading: Reading) -> list[Encoded]:
    """The rows that can be encoded; those that cannot are told to the reading."""
    try:
        return list(encode(rows))
    except ValueError:
        encoded: list[Encoded] = []
    for where, row in rows:  # one by one, to find out which it is
        try:
            encoded += encode([(where, row)])
        except SourceError as error:
            reading.skip(error)
        except ValueError as error:  # the row is fine, but not for this tokenizer or its template
            raise SourceError(f"{where}: {error}") from error
    return encoded


def fit(ids: list[int], learned: list[bool], longest: int, counts: Counter) -> tuple[np.ndarray, np.ndarray] | None:
    """A row of at most `longest` ids, or None where nothing is learned; keeps count.

    What is too much goes from the left, up to one id before the first that is learned, then from the right.
    """
    counts["read"] += 1
    if not any(learned[1:]):  # the first id follows nothing and cannot be learned
        counts["skipped"] += 1
        return None
    excess = max(0, len(ids) - longest)
    left = min(excess, learned.index(True, 1) - 1)
    counts["shortened"] += left > 0
    counts["cut"] += excess > left
    kept = slice(left, left + longest)
    marks = np.array(learned[kept], dtype=bool)
    marks[0] = False
    return np.array(ids[kept], dtype=np.uint32), marks


# ---- from ids to batches ---------------------------------------------------------------------------------------------


class RowBatches:
    """Training batches of whole rows, padded to the longest: each epoch has every row once, in a random order."""

    def __init__(self, rows: TokenRows, block_size: int, seed: int):
        self.rows, self.block_size, self.order = rows, block_size, Order(len(rows), seed)

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return self.order.count

    def epochs(self, step: int, batch_size: int) -> float:
        """Epochs seen after `step` batches."""
        return step * batch_size / len(self)

    def needs_more(self, step: int, batch_size: int) -> bool:
        """Whether the batch of a step may need rows that are not encoded yet: all of them are."""
        return False

    def ready(self, step: int, batch_size: int) -> bool:
        """Whether the batch of a step can be read now."""
        return True

    def batch(self, step: int, batch_size: int, rows: slice = ALL) -> tuple[Tensor, Tensor]:
        """(idx, targets), each (B, T) int64: the batch of a step, or only the `rows` of it that are asked for.

        The same for the same seed and step, whoever asks; T is what the longest of the rows asked for needs.
        """
        indices = np.array([index for _, index in self.order.examples(step, batch_size, rows)])
        return self.rows.padded(indices, self.block_size)


def load_rows(
    config: TrainConfig, source: RowSource, tokenizer: Tokenizer, block_size: int, quiet: bool
) -> tuple[Data, list[str]]:
    """What a training loop reads, and lines that describe it. Raises SourceError where there are too few rows."""
    encode = encoder(config.data, tokenizer)
    rows, counts = encode_rows(source, encode, block_size, quiet, config.data.max_bad_rows)
    apart = open_validation_rows(config.data)
    if apart is None:
        border = len(rows) - max(1, round(len(rows) * config.data.val_fraction))
        if border < 1:
            raise SourceError(f"{source.name} has 1 row to learn from; at least 2 are needed, 1 of them to validate")
        train, val = rows.part(0, border), rows.part(border, len(rows))
    else:
        train, (val, _) = rows, encode_rows(apart, encode, block_size, quiet, config.data.max_bad_rows)
    seen = np.linspace(0, len(val) - 1, min(len(val), config.eval.max_windows)).round().astype(np.int64)
    idx, targets = val.padded(seen, block_size)
    learned = targets[targets != IGNORE_INDEX].numpy()
    data = Data(
        batches=RowBatches(train, block_size, config.seed),
        val=(idx, targets),
        bytes_per_token=max(1, int(token_lengths(tokenizer)[learned].sum())) / len(learned),
        baselines={EVEN: math.log(tokenizer.vocab_size), UNIGRAM: unigram_loss(train, val, tokenizer.vocab_size)},
        facts={
            "source": source.describe(), "rows": dict(counts), "train_tokens": train.n_targets,
            "val_tokens": val.n_targets,
        },
        identity={
            "train_tokens": train.n_targets, **content(source.describe(), "", rows_sha256(train, val)),
        },
        question=encode.question if isinstance(encode, Conversations) else [],
    )  # fmt: skip
    return data, summary(source, config.data.format, train, val, counts, tokenizer, block_size)


def rows_sha256(*parts: TokenRows) -> str:
    """A hash of rows: their ids, which of them are learned, and where each row ends."""
    digest = hashlib.sha256()
    for rows in parts:
        for array in (rows.ids.astype("<u4"), rows.learned, rows.borders.astype("<i8")):
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def encoder(config: DataConfig, tokenizer: Tokenizer) -> Encode:
    """Encodes rows of the config's format."""
    if config.format == "completion":
        return completions(config.prompt_column, config.completion_column, tokenizer)
    return Conversations(config.messages_column, tokenizer)


def open_rows_of(config: DataConfig) -> RowSource:
    """The rows to train on."""
    columns = {"completion": [config.prompt_column, config.completion_column], "messages": [config.messages_column]}
    where = {"config": config.config, "split": config.split, "revision": config.revision}
    return open_rows(config.source, columns[config.format], **where, encoding=config.encoding)


def open_validation_rows(config: DataConfig) -> RowSource | None:
    """The rows to validate on, where they are not the last of the rows to train on."""
    apart = config.validation()
    return open_rows_of(apart) if apart else None


def summary(
    source: RowSource,
    form: str,
    train: TokenRows,
    val: TokenRows,
    counts: Counter,
    tokenizer: Tokenizer,
    block_size: int,
) -> list[str]:
    """Lines about the data of a run: what was read and left out, the split, and the first row as text again."""
    bad = f", {counts['bad']:,} that cannot be read left out" if counts["bad"] else ""
    about = [f"{key} {source.facts[key]}" for key in ("config", "split", "revision", "license") if key in source.facts]
    ids, learned = train.row(0)
    total, targets = len(train.ids) + len(val.ids), train.n_targets + val.n_targets
    return [
        f"data: {source.name} ({', '.join([source.kind, *about])})",
        f"rows: {counts['read']:,} ({form}); {counts['skipped']:,} without an answer skipped; to fit {block_size} "
        f"tokens, {counts['shortened']:,} prompts shortened and {counts['cut']:,} answers cut{bad}",
        f"tokens: {total:,}, of which {targets:,} are learned ({tokenizer.kind}, {tokenizer.vocab_size:,} ids)",
        f"split: {len(train):,} rows to train, {len(val):,} to validate",
        f"first row: {tokenizer.decode(ids)[:SHOWN]!r}",
        f"learned of it: {tokenizer.decode(ids[learned])[:SHOWN]!r}",
    ]
