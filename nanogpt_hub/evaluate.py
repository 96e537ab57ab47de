"""How well a model predicts a text: loss, perplexity, bits per byte, measured on any source of text.

    result = evaluate(model, tokenizer, open_source("plays.txt"))
    print(result.loss, result.perplexity, result.bits_per_byte)

The text is read as a stream, so that its size does not matter: documents with end-of-text between them, cut into
windows of block_size side by side, in which each token but the very first is predicted exactly once.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanogpt_hub.engine.select import PLAIN, Engine
from nanogpt_hub.generate import inference
from nanogpt_hub.model import GPT, IGNORE_INDEX, KVCache
from nanogpt_hub.sources import Source
from nanogpt_hub.tokenizer import Tokenizer

DECODED_ROWS = 16  # windows that a decoder reads side by side
BATCH_TOKENS, BATCH_LOGITS = 2**13, 2**26  # at a time at most; so many logits are 256 MB in float32
Window = tuple[list[int], int]  # ids in a row, and how many of the last ones are targets


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    loss: float  # mean over the targets, nats per token
    tokens: int  # targets
    bytes: int  # of text behind the targets; end-of-text has none
    engine: str = PLAIN.name  # what computed it: a slower one than was asked for where that does not know the model

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.loss, self.bytes / self.tokens) if self.bytes else math.nan


def perplexity(loss: float) -> float:
    """exp(loss): between how many equally likely tokens the model hesitates."""
    return math.exp(min(loss, 700))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss (nats per token) as bits to write down a byte of the text: compares models with different tokenizers."""
    return loss / math.log(2) / bytes_per_token


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    source: Source,
    max_windows: int = 0,
    quiet: bool = False,
    engine: Engine = PLAIN,
) -> Evaluation:
    """Measures `model` on the text of `source`, or on its first `max_windows` windows; 0 is all of them.

    engine: model.py itself, which reads a window in one pass, or a faster one, which reads it token by token as it
    would write it: slow, but its loss is then seen to be the model's. quiet: no progress bar, as where stderr is no
    terminal. Raises ValueError for text that the source or the tokenizer refuses, or that has fewer than two tokens.
    """
    lengths = torch.from_numpy(token_lengths(tokenizer))
    rows = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.config.vocab_size) // model.config.block_size)
    rows = rows if engine is PLAIN else DECODED_ROWS
    found = islice(windows(token_stream(source, tokenizer), model.config.block_size), max_windows or None)
    total, tokens, n_bytes, used = 0.0, 0, 0, PLAIN.name
    size = None if max_windows else source.text_bytes
    with tqdm(total=size, unit="B", unit_scale=True, desc="evaluate", disable=quiet or None, delay=1) as bar:
        while batch := list(islice(found, rows)):
            idx, targets = to_batch(batch)
            if engine is PLAIN:
                loss = batch_loss(model, idx, targets)
            else:
                loss, used = decoded_loss(model, idx, targets, engine)
            count = sum(n for _, n in batch)
            total, tokens = total + loss * count, tokens + count
            new_bytes = int(lengths[targets[targets != IGNORE_INDEX]].sum())
            n_bytes += new_bytes
            bar.set_postfix_str(f"loss {total / tokens:.4f}", refresh=False)
            bar.update(new_bytes)
    if not tokens:
        raise ValueError(f"{source.name} has fewer than two tokens: there is nothing to predict")
    return Evaluation(total / tokens, tokens, n_bytes, used)


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text behind each id, (vocab_size,) int64; none behind end-of-text."""
    ids = range(tokenizer.vocab_size)
    return np.array([0 if i == tokenizer.eot_id else len(tokenizer.token_bytes(i)) for i in ids], dtype=np.int64)


def token_stream(source: Source, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of a source, some at a time, with end-of-text between documents where the tokenizer has one."""
    separator = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    starts = False  # a document other than the first one
    for text, ends in source.pieces():
        yield [*(separator if starts else ()), *tokenizer.encode(text)]
        starts = ends


def windows(stream: Iterable[list[int]], block_size: int) -> Iterator[Window]:
    """Cuts a stream of ids into windows of block_size inputs and their targets; each id but the first is one once.

    The last window is filled up with ids from before it, which are then no targets, so that the model has as much to
    look back on as in the others. A stream that is shorter than a window is one by itself.
    """
    T = block_size
    before, rest = [], []  # rest begins with the id that was the last target
    for ids in stream:
        rest += ids
        end = max(0, (len(rest) - 1) // T * T)
        for start in range(0, end, T):
            yield rest[start : start + T + 1], T
        if end:
            before, rest = rest[end - T : end], rest[end:]
    if len(rest) > 1:
        yield (before + rest)[-T - 1 :], len(rest) - 1


def to_batch(batch: list[Window]) -> tuple[Tensor, Tensor]:
    """(idx, targets), each (B, T) int64, of windows of one length; IGNORE_INDEX where an id is no target."""
    ids = torch.tensor([ids for ids, _ in batch])
    idx, targets = ids[:, :-1], ids[:, 1:].clone()
    for row, (_, n) in zip(targets, batch, strict=True):
        row[: len(row) - n] = IGNORE_INDEX
    return idx, targets


def batch_loss(model: GPT, idx: Tensor, targets: Tensor) -> float:
    """The mean loss over the targets of a batch, each (B, T), in nats per token."""
    device = model.wte.weight.device
    with inference(model):
        _, loss = model(idx.to(device), targets.to(device))
    return loss.item()


def decoded_loss(model: GPT, idx: Tensor, targets: Tensor, engine: Engine) -> tuple[float, str]:
    """As `batch_loss`, by the decoder of an engine, one token of each window after the other from a KV cache; and which
    engine's decoder that was."""
    weight, total = model.wte.weight, 0.0
    with inference(model):
        cache = KVCache(model.config, len(idx), weight.device, weight.dtype, max_len=idx.size(1))
        decoder = engine.decoder(model, cache)
        for now, expected in zip(idx.to(weight.device).split(1, dim=1), targets.to(weight.device).T, strict=True):
            logits = decoder.head(decoder.hidden(now)[:, -1]).float()  # (B, V)
            total += F.cross_entropy(logits, expected, ignore_index=IGNORE_INDEX, reduction="sum").item()
    return total / (targets != IGNORE_INDEX).sum().item(), decoder.engine
