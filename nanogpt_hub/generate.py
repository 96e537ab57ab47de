"""Text from a model: from logits to tokens, from tokens to text, one at a time or in batches.

    result = generate(model, tokenizer, "To be, or", temperature=0.8, seed=1)         # a Generation: text, ids, seed
    for piece in stream_text(model, tokenizer, "To be, or"): print(piece, end="")     # text as it comes
    for token in stream_tokens(model, tokenizer, [ids], alternatives=5): ...          # a Token record each

Read `generate_naive` first: it is all there is to generation, at the price of one whole forward pass for each token.
The rest gives the same tokens faster (a key/value cache), for many prompts at once, and as text.

Shape legend:  B rows of the batch   T tokens of this call   V vocab_size
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol, overload

import torch
from torch import Tensor

from nanogpt_hub.engine.select import Engine, engine_setting, open_engine
from nanogpt_hub.engine.torch_decoder import EngineName
from nanogpt_hub.model import GPT, KVCache
from nanogpt_hub.sampling import (
    Alternative,
    Drawn,
    SamplingConfig,
    draw,
    filter_logits,
    pick,
    seen_tokens,
    usable_logits,
)
from nanogpt_hub.tokenizer import StreamDecoder, Tokenizer

Finish = Literal["length", "stop", "eot", "time"]


# ---- the model: next-token logits, slowly and fast ----


def window_start(n_tokens: int, block_size: int) -> int:
    """Index of the first of `n_tokens` tokens that the model still sees.

    A full context loses its older half and grows again. Dropping one token at each step would keep more in view but
    make the cache worthless: the keys of deeper layers depend on the dropped token, and learned positions move. This
    way a token costs at most about two on average, and the slow and the fast way see the same.
    """
    drop = (block_size + 1) // 2
    return drop * max(0, math.ceil((n_tokens - block_size) / drop))


@contextmanager
def inference(model: GPT) -> Iterator[None]:
    """No gradients and no dropout inside; the model's mode is given back. Wrap one step, never a `yield`."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


def generate_naive(model: GPT, ids: Sequence[int], config: SamplingConfig, vocab_size: int | None = None) -> list[int]:
    """The new token ids after `ids`, by one whole forward pass for each: the oracle of everything below.

    Draws from the first `vocab_size` ids (None: all of the model's). Stop strings need text, so they play no part.
    """
    tokens, device, V = list(ids), model.wte.weight.device, model.config.vocab_size
    seed = config.seeded().seed
    assert seed is not None
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.max_new_tokens):
        context = tokens[window_start(len(tokens), model.config.block_size) :]
        with inference(model):
            logits, _ = model(torch.tensor([context], device=device))  # (1, T, V)
        logits = usable_logits(logits[:, -1], vocab_size or V)
        probs = filter_logits(logits, config, seen_tokens([tokens], V).to(device)).softmax(-1)  # (1, V)
        tokens.append(int(pick(probs, torch.rand(1, 1, generator=generator).to(device)).item()))
        if tokens[-1] in (config.stop_tokens or ()):
            break
    return tokens[len(ids) :]


class CachedBatch:
    """The rows of a batch with the keys and values of their tokens: one step gives each row its next-token logits.

    The cache holds what each row's window begins with. The step feeds the rest: one token, or a window as a whole.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, engine: Engine):
        self.model, self.tokens = model, [list(prompt) for prompt in prompts]
        weight, block_size = model.wte.weight, model.config.block_size
        longest = min(block_size, max(map(len, self.tokens)) + max_new_tokens)
        self.cache = KVCache(model.config, len(self.tokens), weight.device, weight.dtype, max_len=longest)
        self.decoder = engine.decoder(model, self.cache)
        self.starts = [-1] * len(self.tokens)  # of the windows in the cache: none yet

    def next_logits(self) -> Tensor:
        """Logits (B, V) of the token that follows each row."""
        starts = [window_start(len(tokens), self.model.config.block_size) for tokens in self.tokens]
        if starts != self.starts:
            self._move([row for row, start in enumerate(starts) if start != self.starts[row]], starts)
        rows = zip(self.tokens, starts, self.cache.lengths, strict=True)
        idx = torch.tensor([tokens[start + length :] for tokens, start, length in rows], device=self.cache.k.device)
        return self.decoder.head(self.decoder.hidden(idx)[:, -1])  # (B, T) to (B, V)

    def keep(self, rows: list[int]) -> None:
        """Goes on with these rows only."""
        self.tokens, self.starts = [self.tokens[row] for row in rows], [self.starts[row] for row in rows]
        self.cache.k, self.cache.v = self.cache.k[:, rows], self.cache.v[:, rows]
        self.cache.lengths = [self.cache.lengths[row] for row in rows]

    def _move(self, rows: list[int], starts: list[int]) -> None:
        """Moves the windows of some rows: their positions changed, so their part of the cache is computed anew."""
        self.starts = starts
        windows = [self.tokens[row][starts[row] :] for row in rows]
        longest = max(map(len, windows))
        if len(rows) == len(self.tokens) and min(map(len, windows)) == longest:
            self.cache.lengths = [0] * len(rows)  # the step reads them whole
            return
        part = copy.copy(self.cache)
        part.k, part.v, part.lengths = self.cache.k[:, rows], self.cache.v[:, rows], [0] * len(rows)
        if longest > 1:  # all but the last token, padded on the right; what the padding leaves is overwritten later
            padded = [window[:-1] + [0] * (longest - len(window)) for window in windows]
            self.model.hidden(torch.tensor(padded, device=part.k.device), part)
        self.cache.k[:, rows], self.cache.v[:, rows] = part.k, part.v
        for row, window in zip(rows, windows, strict=True):
            self.cache.lengths[row] = len(window) - 1


# ---- tokens as records ----


@dataclass(frozen=True)
class Token:
    """One generated token, and what is known of the choice."""

    row: int  # index of the prompt in its batch
    id: int
    text: str  # what became certain of the row's text; a row's pieces joined are its text
    logprob: float  # natural logarithm of the probability that the model itself gave it
    sampled_prob: float  # the probability with which it was drawn, after all samplers
    alternatives: tuple[Alternative, ...] = ()  # the likeliest for the model, most likely first, when asked for
    finish: Finish | None = None  # on a row's last token, why it is the last
    engine: EngineName = "plain"  # what computed it: plain, torch or numba

    @property
    def prob(self) -> float:
        """The probability that the model itself gave it."""
        return math.exp(self.logprob)


class StopText:
    """Lets text through up to the first stop string, holding back what may still become one."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.held, self.found = stops, "", False

    def push(self, text: str) -> str:
        """What is safe to show after `text` came. `found` turns true when a stop string is complete."""
        text, self.held = self.held + text, ""
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.found = True
            return text[: min(places)]
        held = max((self._overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self.held = self.held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` with which `stop` begins."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Row:
    """One prompt of a batch: its random numbers, its text so far, and whether it is done."""

    def __init__(self, index: int, prompt: Sequence[int], tokenizer: Tokenizer | None, config: SamplingConfig):
        eot = tokenizer.eot_id if tokenizer is not None else None
        self.index, self.left = index, config.max_new_tokens
        self.stop_tokens = ((eot,) if eot is not None else ()) if config.stop_tokens is None else config.stop_tokens
        assert config.seed is not None  # `seeded` has drawn one
        self.generator = torch.Generator().manual_seed(config.seed + index)
        self.decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self.stop = StopText(config.stop)
        self.finish: Finish | None = None
        if self.decoder is not None:
            for id in prompt[-8:]:  # a decoder may look back: is there a space to strip, an open character to complete?
                if id != eot:  # end-of-text begins a document and is no text
                    self.decoder.push(id)

    def push(self, drawn: Drawn, late: bool, engine: EngineName = "plain") -> Token:
        """The record of a token that an engine drew; `late` says that time is up."""
        self.left -= 1
        eot = drawn.id in self.stop_tokens
        text = self.stop.push(self.decoder.push(drawn.id)) if self.decoder and not eot else ""
        if self.stop.found:
            self.finish = "stop"
        elif eot or late or not self.left:
            self.finish = "eot" if eot else "time" if late else "length"
            text += self._rest()
        return Token(self.index, drawn.id, text, *drawn[1:], self.finish, engine)

    def _rest(self) -> str:
        rest = self.stop.push(self.decoder.flush()) if self.decoder else ""
        return rest if self.stop.found else rest + self.stop.flush()


# ---- the public ways in ----


class Draft(Protocol):
    """Another way to the same tokens of a lone prompt, in fewer passes of the model."""

    def stream(self, job: "Job", row: Row) -> Iterator[Token]: ...


def stream_tokens(
    model: GPT,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | None = None,
    *,
    alternatives: int = 0,
    draft: Draft | None = None,
    engine: str | None = None,
    **overrides,
) -> Iterator[Token]:
    """Token records as they come, step by step and within a step row by row; closing the iterator ends the work.

    `prompts` are token ids (`encode_prompt`). `alternatives` asks for so many of the likeliest tokens in each record;
    `overrides` are single fields of the config. A `draft` guesses ahead, for a lone prompt only: the same tokens,
    sooner (speculate.py). `engine` is one of engine/select.py's ENGINES, by default what NANOGPT_HUB_ENGINE says, else
    "auto"; it is settled before the first token and stays for all of them. A prompt longer than block_size is cropped
    by `window_start`. Each row gives what it would give alone with seed + row. Without a tokenizer the records have no
    text. Raises ValueError for a prompt that is empty or holds ids that the model does not know, and when the model's
    output is not a number.
    """
    config = replace(config or SamplingConfig(), **overrides).seeded()
    vocab_size = min(model.config.vocab_size, tokenizer.vocab_size if tokenizer else model.config.vocab_size)
    if tokenizer is None and config.stop:
        raise ValueError("stop strings need a tokenizer, and this model has none; stop_tokens do not")
    for prompt in prompts:
        check_ids(prompt, model.config.vocab_size)
    rows = [Row(index, prompt, tokenizer, config) for index, prompt in enumerate(prompts)]
    engine_setting(engine)  # a wrong name is an error here and not at the first token
    job = Job(model, tuple(prompts), config, vocab_size, alternatives, engine)
    if draft is not None and len(rows) == 1:
        return draft.stream(job, rows[0])
    return _stream(job, rows)


@dataclass(frozen=True)
class Job:
    """What is to be generated, checked."""

    model: GPT
    prompts: tuple[Sequence[int], ...]
    config: SamplingConfig
    vocab_size: int  # ids below it may be drawn
    alternatives: int
    engine: str | None

    def open_engine(self) -> Engine:
        return open_engine(self.engine, self.model.wte.weight.device)

    def deadline(self) -> float:
        """The time (of time.monotonic) at which all rows stop."""
        return time.monotonic() + (self.config.max_seconds if self.config.max_seconds is not None else math.inf)


def _stream(job: Job, rows: list[Row]) -> Iterator[Token]:
    deadline = job.deadline()
    batch = None
    while rows:
        with inference(job.model):
            batch = batch or CachedBatch(job.model, job.prompts, job.config.max_new_tokens, job.open_engine())
            uniform = torch.stack([torch.rand(1, generator=row.generator) for row in rows])  # (B, 1)
            decoder = batch.decoder
            drawn = draw(
                batch.next_logits(),
                job.vocab_size,
                job.config,
                batch.tokens,
                uniform,
                job.alternatives,
                decoder.sampler,
            )
        late = time.monotonic() >= deadline
        for row, tokens, choice in zip(rows, batch.tokens, drawn, strict=True):
            tokens.append(choice[0])
            yield row.push(choice, late, decoder.engine)
        alive = [place for place, row in enumerate(rows) if not row.finish]
        if len(alive) < len(rows):
            rows = [rows[place] for place in alive]
            with inference(job.model):
                batch.keep(alive)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError for no ids at all, or for one that a vocabulary of this size does not have."""
    if not len(ids):
        raise ValueError("the prompt has no tokens; give at least one")
    for id in (min(ids), max(ids)):
        if not 0 <= id < vocab_size:
            raise ValueError(
                f"the prompt holds token id {id}, but the model's vocabulary is 0 to {vocab_size - 1}: "
                "tokenizer and model do not belong together"
            )


def encode_prompt(tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    """Token ids to start from. An empty prompt starts at end-of-text or, where the tokenizer has none, at a new line.

    Raises ValueError when there is no tokenizer, for an unknown character, or when an empty prompt has no start.
    """
    if tokenizer is None:
        raise ValueError("this model has no tokenizer; call stream_tokens with token ids")
    if prompt:
        return tokenizer.encode(prompt)
    if tokenizer.eot_id is not None:
        return [tokenizer.eot_id]
    try:
        return tokenizer.encode("\n")
    except ValueError as error:
        raise ValueError("the prompt is empty; this model needs at least one character to start from") from error


def stream_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, config: SamplingConfig | None = None, **overrides
) -> Iterator[str]:
    """The text that follows `prompt`, in pieces as it comes; joined they are the text that `generate` gives.

    No piece holds a broken character or any part of a stop string. Closing the iterator ends the work. With seed None
    pass `SamplingConfig(...).seeded()` to know the seed. Raises ValueError as `generate` does.
    """
    tokens = stream_tokens(model, tokenizer, [encode_prompt(tokenizer, prompt)], config, **overrides)
    return (token.text for token in tokens if token.text)


@dataclass(frozen=True)
class Generation:
    """What followed a prompt."""

    prompt: str
    text: str  # without the prompt, the stop string and end-of-text
    tokens: tuple[Token, ...]  # all that were drawn, the one that ended the row included
    finish: Finish  # length: max_new_tokens reached; stop: a stop string; eot: a stop token; time: max_seconds over
    seed: int  # gives the same text again, for this prompt alone and the same engine

    @property
    def engine(self) -> EngineName:
        """What computed it: plain, torch or numba."""
        return self.tokens[0].engine

    @property
    def ids(self) -> list[int]:
        """Ids of the drawn tokens."""
        return [token.id for token in self.tokens]


@overload
def generate(
    model: GPT, tokenizer: Tokenizer, prompts: str, config: SamplingConfig | None = None, **overrides
) -> Generation: ...
@overload
def generate(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], config: SamplingConfig | None = None, **overrides
) -> list[Generation]: ...
def generate(model, tokenizer, prompts, config=None, *, draft=None, engine=None, **overrides):
    """What follows one prompt, or each of several (they may differ in length); `overrides` are fields of the config.

    For many samples of one prompt repeat it: row i draws with seed + i, and gives what it would give alone. `draft` is
    that of `stream_tokens`, and so is `engine`; both can be given to `stream_text` too. Raises ValueError for a prompt
    that cannot be encoded, and when model and tokenizer do not belong together.
    """
    config = replace(config or SamplingConfig(), **overrides).seeded()
    texts = [prompts] if isinstance(prompts, str) else prompts
    rows: list[list[Token]] = [[] for _ in texts]
    ids = [encode_prompt(tokenizer, text) for text in texts]
    for token in stream_tokens(model, tokenizer, ids, config, draft=draft, engine=engine):
        rows[token.row].append(token)
    results = [_generation(text, row, config.seed + i) for i, (text, row) in enumerate(zip(texts, rows, strict=True))]
    return results[0] if isinstance(prompts, str) else results


def _generation(prompt: str, row: list[Token], seed: int) -> Generation:
    finish = row[-1].finish
    assert finish is not None  # the last token tells why it is the last
    return Generation(prompt, "".join(token.text for token in row), tuple(row), finish, seed)
