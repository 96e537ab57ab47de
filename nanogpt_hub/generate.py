"""Text from a model: from logits to tokens, from tokens to text, one at a time or in batches.

    result = generate(model, tokenizer, "To be, or", temperature=0.8, seed=1)         # a Generation: text, ids, seed
    for piece in stream_text(model, tokenizer, "To be, or"): print(piece, end="")     # text as it comes
    for token in stream_tokens(model, tokenizer, [ids], alternatives=5): ...          # a Token record each

Read `generate_naive` first: it is all there is to generation, at the price of one whole forward pass for each token.
The rest gives the same tokens faster (a key/value cache), for many prompts at once, and as text.

Shape legend:  B rows of the batch   T tokens of this call   V vocab_size
"""

import copy
import json
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from nanogpt_hub.compiler import best_chooser, best_decoder
from nanogpt_hub.model import GPT, KVCache
from nanogpt_hub.tokenizer import StreamDecoder, Tokenizer

Finish = Literal["length", "stop", "eot", "time"]
GREEDY_BELOW = 1e-5  # a temperature under this counts as 0; float32 cannot divide by much less
LARGEST_LOGIT = 1e30  # infinite logits become this: finite in float32 under any penalty, so never inf - inf


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen and when to stop. Checked when made (ValueError)."""

    max_new_tokens: int = 200  # per prompt
    temperature: float = 0.8  # below 1 sharpens, above 1 flattens; 0 always takes the likeliest token (greedy)
    top_k: int | None = 200  # only the k likeliest tokens; 0 or None for all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability (arXiv:1904.09751)
    min_p: float = 0.0  # only tokens at least this likely, relative to the likeliest (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # above 1 disfavours the tokens that the row has already (arXiv:1909.05858)
    seed: int | None = None  # row i of a batch draws with seed + i; None draws a seed, which the result tells
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    stop_tokens: tuple[int, ...] | None = None  # ids that end a row; None means the tokenizer's end-of-text, () none
    max_seconds: float | None = None  # stop all rows after this time; None for no limit

    def __post_init__(self):
        for name in ("stop", "stop_tokens"):  # a lone string would otherwise be taken for its letters
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str | int) else tuple(value))
        for name, kind, least, most in (
            ("max_new_tokens", int, 1, math.inf), ("temperature", float, 0, 10**6), ("top_k", int, 0, math.inf),
            ("top_p", float, 0, 1), ("min_p", float, 0, 1), ("repetition_penalty", float, 1e-6, 10**6),
            ("seed", int, 0, 2**53), ("max_seconds", float, 0, 10**9),  # JSON keeps integers up to 2**53
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("top_k", "seed", "max_seconds"):
                continue
            number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
            if not number or not least <= value <= most:
                what = "a whole number" if kind is int else "a number"
                up_to = f" and at most {most:,}" if most < math.inf else ""
                raise ValueError(f"{name} is {value!r}; it must be {what} of at least {least}{up_to}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; each stop string must be a text of at least one character")
        if not all(isinstance(token, int) for token in self.stop_tokens or ()):
            raise ValueError(f"stop_tokens is {self.stop_tokens!r}; it must hold token ids")

    def seeded(self) -> "SamplingConfig":
        """The same with a seed drawn where there was none, so that the result can be had again."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**32))

    @classmethod
    def from_folder(cls, folder: str | Path, **overrides) -> "SamplingConfig":
        """The defaults of a model folder (its generation_config.json, where it has one), single fields overridden.

        Raises ValueError for a file that is no JSON object, or holds a value that is not allowed.
        """
        path = Path(folder) / "generation_config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            names = {field.name for field in fields(cls)} - {"seed", "stop", "stop_tokens", "max_seconds"}
            values = {name: found[name] for name in names if found.get(name) is not None}
            if found.get("do_sample") is False:
                values["temperature"] = 0.0
            defaults = cls(**values)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} does not hold sampling defaults: {error}") from error
        return replace(defaults, **overrides)


# ---- choosing a token: small functions on logits (B, V); a token that is cut has the logit -inf ----


def usable_logits(logits: Tensor, vocab_size: int) -> Tensor:
    """Float32 logits (B, V) without infinities, the ids from `vocab_size` on masked.

    A model's vocabulary may exceed its tokenizer's (padding to 64 is faster); what is surplus has no text.
    """
    logits = logits.float().clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    if vocab_size < logits.size(-1):
        logits[:, vocab_size:] = -math.inf
    return logits


def apply_repetition_penalty(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Moves the logits of `seen` tokens (B, V) down: positive ones are divided by `penalty`, others multiplied."""
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, changed, logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divides by `temperature`, the largest logit moved to 0 first; at 0 only the likeliest token is left."""
    if temperature < GREEDY_BELOW:
        return torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def apply_top_k(logits: Tensor, k: int) -> Tensor:
    """Cuts all but the `k` likeliest tokens; those that tie with the last of them stay too."""
    threshold = logits.topk(min(k, logits.size(-1))).values[..., -1:]
    return logits.masked_fill(logits < threshold, -math.inf)


def apply_top_p(logits: Tensor, p: float) -> Tensor:
    """Cuts the tokens before which, from the likeliest down, probability `p` is reached. The likeliest stays."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    cut = probs.cumsum(-1) - probs >= p
    cut[..., 0] = False
    return logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)


def apply_min_p(logits: Tensor, p: float) -> Tensor:
    """Cuts the tokens less likely than `p` times the likeliest."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def sampler_stages(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """The logits (B, V) as the model gives them ("model") and after each sampler that is on, by its field's name.

    The order is that of Transformers, so the same settings give the same distribution there. `seen` (B, V) marks the
    tokens a row holds already (`seen_tokens`). The softmax of a stage is its distribution; -inf marks what was cut.
    """
    yield "model", logits
    if config.repetition_penalty != 1 and seen is not None:
        logits = apply_repetition_penalty(logits, config.repetition_penalty, seen)
        yield "repetition_penalty", logits
    if config.temperature != 1:
        logits = apply_temperature(logits, config.temperature)
        yield "temperature", logits
    if config.top_k and config.top_k < logits.size(-1):
        logits = apply_top_k(logits, config.top_k)
        yield "top_k", logits
    if config.top_p < 1:
        logits = apply_top_p(logits, config.top_p)
        yield "top_p", logits
    if config.min_p > 0:
        logits = apply_min_p(logits, config.min_p)
        yield "min_p", logits


def filter_logits(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """The logits (B, V) after the last of `sampler_stages`: a token is drawn from their softmax."""
    *_, (_, filtered) = sampler_stages(logits, config, seen)
    return filtered


def seen_tokens(batch: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """(B, V) booleans: which tokens each row holds."""
    seen = torch.zeros(len(batch), vocab_size, dtype=torch.bool)
    for row, tokens in zip(seen, batch, strict=True):
        row[list(set(tokens))] = True
    return seen


def pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row (B,) whose share of probs (B, V), laid end to end, holds `uniform` (B, 1) in [0, 1).

    One number a token, drawn on the CPU, gives the same choice on every device. Whatever the rounding of the sums, a
    token of probability zero reaches 0, which is never above the number looked for.
    """
    reach = torch.where(probs > 0, probs.cumsum(-1), 0.0)
    return (reach > uniform * reach.amax(-1, keepdim=True)).int().argmax(-1)


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
    generator = torch.Generator().manual_seed(config.seeded().seed)
    for _ in range(config.max_new_tokens):
        context = tokens[window_start(len(tokens), model.config.block_size) :]
        with inference(model):
            logits, _ = model(torch.tensor([context], device=device))  # (1, T, V)
        logits = usable_logits(logits[:, -1], vocab_size or V)
        probs = filter_logits(logits, config, seen_tokens([tokens], V).to(device)).softmax(-1)  # (1, V)
        tokens.append(pick(probs, torch.rand(1, 1, generator=generator).to(device)).item())
        if tokens[-1] in (config.stop_tokens or ()):
            break
    return tokens[len(ids) :]


class CachedBatch:
    """The rows of a batch with the keys and values of their tokens: one step gives each row its next-token logits.

    The cache holds what each row's window begins with. The step feeds the rest: one token, or a window as a whole.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int):
        self.model, self.tokens = model, [list(prompt) for prompt in prompts]
        weight, block_size = model.wte.weight, model.config.block_size
        longest = min(block_size, max(map(len, self.tokens)) + max_new_tokens)
        self.cache = KVCache(model.config, len(self.tokens), weight.device, weight.dtype, max_len=longest)
        self.decoder = best_decoder(model, self.cache)
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


class Alternative(NamedTuple):
    """A token that could have come."""

    id: int
    prob: float  # as the model has it
    sampled_prob: float  # after all samplers; 0 where they cut it


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

    @property
    def prob(self) -> float:
        """The probability that the model itself gave it."""
        return math.exp(self.logprob)


class Drawn(NamedTuple):
    """What the samplers chose for a row; the fields are those of `Token`."""

    id: int
    logprob: float
    sampled_prob: float
    alternatives: tuple[Alternative, ...] = ()


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
        self.generator = torch.Generator().manual_seed(config.seed + index)
        self.decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self.stop = StopText(config.stop)
        self.finish: Finish | None = None
        for id in prompt[-8:] if self.decoder else ():  # a decoder may look back: is there a space to strip, an open
            if id != eot:  # character to complete? End-of-text begins a document and is no text.
                self.decoder.push(id)

    def push(self, drawn: Drawn, late: bool) -> Token:
        """The record of a token that was drawn; `late` says that time is up."""
        self.left -= 1
        eot = drawn.id in self.stop_tokens
        text = self.stop.push(self.decoder.push(drawn.id)) if self.decoder and not eot else ""
        if self.stop.found:
            self.finish = "stop"
        elif eot or late or not self.left:
            self.finish = "eot" if eot else "time" if late else "length"
            text += self._rest()
        return Token(self.index, drawn.id, text, *drawn[1:], self.finish)

    def _rest(self) -> str:
        rest = self.stop.push(self.decoder.flush()) if self.decoder else ""
        return rest if self.stop.found else rest + self.stop.flush()


def draw(
    logits: Tensor,
    vocab_size: int,
    config: SamplingConfig,
    batch: Sequence[Sequence[int]],
    uniform: Tensor,
    alternatives: int = 0,
) -> list[Drawn]:
    """What follows each of a batch of texts, by the model's logits (B, V) for it and its random number in `uniform`
    (B, 1), among the first `vocab_size` ids. Raises ValueError for NaN."""
    choose = best_chooser(logits.device) if config.top_p == 1 and config.repetition_penalty == 1 else None
    if choose:
        temperature = config.temperature if config.temperature >= GREEDY_BELOW else 0.0
        drawn = choose(logits, vocab_size, uniform, temperature, config.top_k or 0, config.min_p, alternatives)
    else:
        drawn = draw_by_stages(usable_logits(logits, vocab_size), config, batch, uniform, alternatives)
    drawn = [Drawn(id, logprob, prob, tuple(map(Alternative._make, likely))) for id, logprob, prob, likely in drawn]
    if any(math.isnan(each.logprob) for each in drawn):
        raise ValueError("the model gives no numbers (NaN): its weights are damaged, or the precision is too low")
    return drawn


def draw_by_stages(
    logits: Tensor, config: SamplingConfig, batch: Sequence[Sequence[int]], uniform: Tensor, alternatives: int
) -> Iterator[tuple[int, float, float, list[tuple[int, float, float]]]]:
    """The fields of `Drawn` for each row of usable logits (B, V), by `sampler_stages`."""
    seen, logprobs = None, logits.log_softmax(-1)  # (B, V)
    if config.repetition_penalty != 1:
        seen = seen_tokens(batch, logits.size(-1)).to(logits.device)
    known = None if seen is not None else only_top_k(logits, config.top_k)  # (B, k)
    probs = filter_logits(logits if known is None else logits.gather(1, known), config, seen).softmax(-1)
    place = pick(probs, uniform.to(probs.device))[:, None]  # (B, 1)
    ids = place if known is None else known.gather(1, place)
    columns = [column.flatten().tolist() for column in (ids, logprobs.gather(1, ids), probs.gather(1, place))]
    if alternatives and known is not None:
        probs = torch.zeros_like(logits).scatter(1, known, probs)
    return zip(*columns, likeliest(logprobs, probs, alternatives) if alternatives else [[]] * len(logits), strict=True)


def only_top_k(logits: Tensor, k: int | None) -> Tensor | None:
    """The ids (B, k), in their order, of the tokens that `apply_top_k` leaves, where k is so small that the samplers
    are spared work. None where it is not, or more tokens tie with the last of them."""
    if not k or 4 * k > logits.size(-1):
        return None
    values, ids = logits.topk(k + 1)
    return None if (values[:, k] == values[:, k - 1]).any() else ids[:, :k].sort(-1).values


def likeliest(logprobs: Tensor, probs: Tensor, n: int) -> list[list[tuple[int, float, float]]]:
    """The `n` tokens of each row that the model finds likeliest, as the fields of `Alternative`."""
    top = logprobs.topk(min(n, logprobs.size(-1)))
    columns = top.indices.tolist(), top.values.exp().tolist(), probs.gather(1, top.indices).tolist()
    return [list(zip(*row, strict=True)) for row in zip(*columns, strict=True)]


# ---- the public ways in ----


class Draft(Protocol):
    """Another way to the same tokens of a lone prompt, in fewer passes of the model."""

    def stream(
        self, model: GPT, prompt: Sequence[int], config: SamplingConfig, row: Row, vocab_size: int, alternatives: int
    ) -> Iterator[Token]: ...


def stream_tokens(
    model: GPT,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig | None = None,
    *,
    alternatives: int = 0,
    draft: Draft | None = None,
    **overrides,
) -> Iterator[Token]:
    """Token records as they come, step by step and within a step row by row; closing the iterator ends the work.

    `prompts` are token ids (`encode_prompt`). `alternatives` asks for so many of the likeliest tokens in each record;
    `overrides` are single fields of the config. A `draft` guesses ahead, for a lone prompt only: the same tokens,
    sooner (speculate.py). A prompt longer than block_size is cropped by `window_start`. Each row gives what it would
    give alone with seed + row. Without a tokenizer the records have no text. Raises ValueError for a prompt that is
    empty or holds ids that the model does not know, and when the model's output is not a number.
    """
    config = replace(config or SamplingConfig(), **overrides).seeded()
    vocab_size = min(model.config.vocab_size, tokenizer.vocab_size if tokenizer else model.config.vocab_size)
    if tokenizer is None and config.stop:
        raise ValueError("stop strings need a tokenizer, and this model has none; stop_tokens do not")
    for prompt in prompts:
        check_ids(prompt, model.config.vocab_size)
    rows = [Row(index, prompt, tokenizer, config) for index, prompt in enumerate(prompts)]
    if draft is not None and len(rows) == 1:
        return draft.stream(model, prompts[0], config, rows[0], vocab_size, alternatives)
    return _stream(model, prompts, config, rows, vocab_size, alternatives)


def _stream(
    model: GPT, prompts: Sequence[Sequence[int]], config: SamplingConfig, rows: list[Row], vocab_size: int, n: int
) -> Iterator[Token]:
    deadline = time.monotonic() + (config.max_seconds if config.max_seconds is not None else math.inf)
    batch = None
    while rows:
        with inference(model):
            batch = batch or CachedBatch(model, prompts, config.max_new_tokens)
            uniform = torch.stack([torch.rand(1, generator=row.generator) for row in rows])  # (B, 1)
            drawn = draw(batch.next_logits(), vocab_size, config, batch.tokens, uniform, n)
        late = time.monotonic() >= deadline
        for row, tokens, choice in zip(rows, batch.tokens, drawn, strict=True):
            tokens.append(choice[0])
            yield row.push(choice, late)
        alive = [place for place, row in enumerate(rows) if not row.finish]
        if len(alive) < len(rows):
            rows = [rows[place] for place in alive]
            with inference(model):
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
    seed: int  # gives the same text again, for this prompt alone

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
def generate(model, tokenizer, prompts, config=None, *, draft=None, **overrides):
    """What follows one prompt, or each of several (they may differ in length); `overrides` are fields of the config.

    For many samples of one prompt repeat it: row i draws with seed + i, and gives what it would give alone. `draft` is
    that of `stream_tokens`, and can be given to `stream_text` too. Raises ValueError for a prompt that cannot be
    encoded, and when model and tokenizer do not belong together.
    """
    config = replace(config or SamplingConfig(), **overrides).seeded()
    texts = [prompts] if isinstance(prompts, str) else prompts
    rows: list[list[Token]] = [[] for _ in texts]
    ids = [encode_prompt(tokenizer, text) for text in texts]
    for token in stream_tokens(model, tokenizer, ids, config, draft=draft):
        rows[token.row].append(token)
    results = [
        Generation(text, "".join(t.text for t in row), tuple(row), row[-1].finish, config.seed + index)
        for index, (text, row) in enumerate(zip(texts, rows, strict=True))
    ]
    return results[0] if isinstance(prompts, str) else results
