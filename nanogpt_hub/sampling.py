"""Choosing the next token: from a model's logits to one id of the vocabulary.

    config = SamplingConfig(temperature=0.8, top_k=200, seed=1)
    probs = filter_logits(logits, config).softmax(-1)              # (B, V): what a token is drawn from
    drawn = draw(logits, vocab_size, config, texts, uniform)       # a Drawn for each row

Each sampler is a small function on logits that cuts tokens (their logit becomes -inf) or moves them. Adding one is one
field of `SamplingConfig`, declared by `sampler(...)`: the command line, the page, the API, links and views read its
name, default, range, label, help and function from there (`SAMPLERS`).

Shape legend:  B rows of the batch   V vocab_size
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanogpt_hub.system.later import Later

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Later("torch")  # `nanogpt-hub generate --help` reads the table of samplers and need not wait for it

GREEDY_BELOW = 1e-5  # a temperature under this counts as 0; float32 cannot divide by much less
LARGEST_LOGIT = 1e30  # infinite logits become this: finite in float32 under any penalty, so never inf - inf


# ---- samplers: functions on logits (B, V). What changes nothing returns the logits themselves. ----


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
    if k >= logits.size(-1):
        return logits
    threshold = logits.topk(k).values[..., -1:]
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


# ---- the settings ----


class Sampler(NamedTuple):
    """A sampler as everything that offers it needs to know it."""

    name: str  # of the field of SamplingConfig
    kind: type  # int or float
    default: float | None
    neutral: float  # the value that changes nothing
    least: float
    most: float
    label: str  # for people, a word or two
    help: str
    apply: Callable[..., Tensor]  # (logits (B, V), value), and with `needs_seen` the tokens seen (B, V)
    needs_seen: bool = False
    basic: bool = False  # shown at once; the others under "More"
    widget: tuple[float, float] | None = None  # range of its slider, where `least` to `most` is too wide for one

    @property
    def slider(self) -> tuple[float, float]:
        """The range that a slider offers."""
        return self.widget or (self.least, self.most)

    def is_on(self, value: float | None) -> bool:
        return value is not None and value != self.neutral


def sampler(default: float | None, **about: Any) -> Any:
    """Declares a field of SamplingConfig as a sampler; `about` holds the other fields of `Sampler`."""
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen and when to stop. Checked when made (ValueError).

    Samplers apply in the order of their fields, which is that of Transformers: the same settings give the same
    distribution there.
    """

    max_new_tokens: int = 200  # per prompt
    repetition_penalty: float = sampler(
        1.0, kind=float, neutral=1.0, least=1e-6, most=10**6, label="Repetition penalty",
        apply=apply_repetition_penalty, needs_seen=True, widget=(1, 2),
        help="above 1 disfavours the tokens that the text has already (arXiv:1909.05858)",
    )  # fmt: skip
    temperature: float = sampler(
        0.8, kind=float, neutral=1.0, least=0, most=10**6, label="Temperature", apply=apply_temperature, basic=True,
        widget=(0, 2),
        help="below 1 sharpens, above 1 flattens, 0 always takes the likeliest token",
    )  # fmt: skip
    top_k: int | None = sampler(
        200, kind=int, neutral=0, least=0, most=math.inf, label="Top-k", apply=apply_top_k, basic=True,
        widget=(0, 500),
        help="only the k likeliest tokens, 0 for all",
    )  # fmt: skip
    top_p: float = sampler(
        1.0, kind=float, neutral=1.0, least=0, most=1, label="Top-p", apply=apply_top_p,
        help="only the likeliest tokens that together reach this probability (arXiv:1904.09751)",
    )  # fmt: skip
    min_p: float = sampler(
        0.0, kind=float, neutral=0.0, least=0, most=1, label="Min-p", apply=apply_min_p,
        help="only tokens at least this likely, relative to the likeliest (arXiv:2407.01082)",
    )  # fmt: skip
    seed: int | None = None  # row i of a batch draws with seed + i; None draws a seed, which the result tells
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    stop_tokens: tuple[int, ...] | None = None  # ids that end a row; None means the tokenizer's end-of-text, () none
    max_seconds: float | None = None  # stop all rows after this time; None for no limit

    def __post_init__(self):
        for name in ("stop", "stop_tokens"):  # a lone string would otherwise be taken for its letters
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str | int) else tuple(value))
        self._check_number("max_new_tokens", int, 1, math.inf)
        for each in SAMPLERS.values():
            self._check_number(each.name, each.kind, each.least, each.most, optional=each.kind is int)
        self._check_number("seed", int, 0, 2**53, optional=True)  # JSON keeps integers up to 2**53
        self._check_number("max_seconds", float, 0, 10**9, optional=True)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; each stop string must be a text of at least one character")
        if not all(isinstance(token, int) for token in self.stop_tokens or ()):
            raise ValueError(f"stop_tokens is {self.stop_tokens!r}; it must hold token ids")

    def _check_number(self, name: str, kind: type, least: float, most: float, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            up_to = f" and at most {most:,}" if most < math.inf else ""
            raise ValueError(f"{name} is {value!r}; it must be {what} of at least {least}{up_to}")

    def samplers(self) -> dict[str, float]:
        """The samplers that are on, and their values, in the order in which they apply."""
        values = {name: getattr(self, name) for name in SAMPLERS}
        return {name: value for name, value in values.items() if SAMPLERS[name].is_on(value)}

    def seeded(self) -> SamplingConfig:
        """The same with a seed drawn where there was none, so that the result can be had again."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**32))

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], **overrides) -> SamplingConfig:
        """The defaults of a model folder (its generation_config.json, where it has one), single fields overridden.

        Raises ValueError for a file that is not a JSON object, or holds a value that is not allowed.
        """
        path = Path(folder) / "generation_config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            names = {"max_new_tokens", *SAMPLERS}
            values = {name: found[name] for name in names if found.get(name) is not None}
            if found.get("do_sample") is False:
                values["temperature"] = 0.0
            defaults = cls(**values)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} does not hold sampling defaults: {error}") from error
        return replace(defaults, **overrides)


def declared_sampler(declared: Field) -> Sampler:
    assert declared.default is not MISSING
    return Sampler(name=declared.name, default=declared.default, **declared.metadata)


SAMPLERS: dict[str, Sampler] = {f.name: declared_sampler(f) for f in fields(SamplingConfig) if f.metadata}


# ---- the distribution ----


def usable_logits(logits: Tensor, vocab_size: int) -> Tensor:
    """Float32 logits (B, V) without infinities, the ids from `vocab_size` on masked.

    A model's vocabulary may exceed its tokenizer's (padding to 64 is faster); what is surplus has no text.
    """
    logits = logits.float().clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
    if vocab_size < logits.size(-1):
        logits[:, vocab_size:] = -math.inf
    return logits


def sampler_stages(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """The logits (B, V) as the model gives them ("model") and after each sampler that is on, by its field's name.

    `seen` (B, V) marks the tokens a row holds already (`seen_tokens`); without it samplers that need it are left out.
    The softmax of a stage is its distribution; -inf marks what was cut.
    """
    yield "model", logits
    for name, value in config.samplers().items():
        needs_seen = SAMPLERS[name].needs_seen
        if needs_seen and seen is None:
            continue
        changed = SAMPLERS[name].apply(logits, value, *([seen] if needs_seen else []))
        if changed is not logits:
            logits = changed
            yield name, logits


def filter_logits(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """The logits (B, V) after the last of `sampler_stages`: a token is drawn from their softmax."""
    *_, (_, filtered) = sampler_stages(logits, config, seen)
    return filtered


def needs_seen(config: SamplingConfig) -> bool:
    """Whether a sampler that is on asks which tokens a row holds already."""
    return any(SAMPLERS[name].needs_seen for name in config.samplers())


def seen_tokens(batch: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """(B, V) booleans: which tokens each row holds."""
    seen = torch.zeros(len(batch), vocab_size, dtype=torch.bool)
    for row, tokens in zip(seen, batch, strict=True):
        row[list(set(tokens))] = True
    return seen


# ---- the draw ----


def pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token of each row (B,) at which the cumulative sum of probs (B, V) exceeds
    `uniform` (B, 1) in [0, 1).

    One number a token, drawn on the CPU, gives the same choice on every device. Whatever the rounding of the sums, a
    token of probability zero reaches 0, which is never above the number looked for.
    """
    reach = torch.where(probs > 0, probs.cumsum(-1), 0.0)
    return (reach > uniform * reach.amax(-1, keepdim=True)).int().argmax(-1)


class Alternative(NamedTuple):
    """A token that could have come."""

    id: int
    prob: float  # as the model has it
    sampled_prob: float  # after all samplers; 0 where they cut it


class Drawn(NamedTuple):
    """The token that was drawn for a row."""

    id: int
    logprob: float  # natural logarithm of the probability that the model itself gave it
    sampled_prob: float  # the probability with which it was drawn, after all samplers
    alternatives: tuple[Alternative, ...] = ()  # the likeliest for the model, most likely first, when asked for


def draw(
    logits: Tensor,
    vocab_size: int,
    config: SamplingConfig,
    batch: Sequence[Sequence[int]],
    uniform: Tensor,
    alternatives: int = 0,
    sampler_for: Callable[[Tensor, Collection[str]], Callable | None] | None = None,
) -> list[Drawn]:
    """What follows each of a batch of texts, by the model's logits (B, V) for it and its random number in `uniform`
    (B, 1), among the first `vocab_size` ids. Raises ValueError for NaN.

    `sampler_for` (a decoder's `sampler`) may know a faster way to the same for the samplers that are on.
    """
    on = config.samplers()
    fast = sampler_for(logits, on) if sampler_for else None
    if fast:
        if on.get("temperature", 1.0) < GREEDY_BELOW:
            on["temperature"] = 0.0
        drawn = fast(logits, vocab_size, uniform, n=alternatives, **on)
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
    if needs_seen(config):
        seen = seen_tokens(batch, logits.size(-1)).to(logits.device)
    known = only_top_k(logits, config)  # (B, k)
    probs = filter_logits(logits if known is None else logits.gather(1, known), config, seen).softmax(-1)
    place = pick(probs, uniform.to(probs.device))[:, None]  # (B, 1)
    ids = place if known is None else known.gather(1, place)
    columns = [column.flatten().tolist() for column in (ids, logprobs.gather(1, ids), probs.gather(1, place))]
    if alternatives and known is not None:
        probs = torch.zeros_like(logits).scatter(1, known, probs)
    return zip(*columns, likeliest(logprobs, probs, alternatives) if alternatives else [[]] * len(logits), strict=True)


# Samplers that need nothing but the k likeliest logits, once the others are cut.
WITHIN_TOP_K = {"temperature", "top_k", "top_p", "min_p"}


def only_top_k(logits: Tensor, config: SamplingConfig) -> Tensor | None:
    """The ids (B, k), in their order, of the tokens that `apply_top_k` leaves, where k is so small that the samplers
    are spared work. None where it is not, a sampler needs all logits, or more tokens tie with the last of them."""
    on = config.samplers()
    if "top_k" not in on or not on.keys() <= WITHIN_TOP_K or 4 * on["top_k"] > logits.size(-1):
        return None
    k = int(on["top_k"])
    values, ids = logits.topk(k + 1)
    return None if (values[:, k] == values[:, k - 1]).any() else ids[:, :k].sort(-1).values


def likeliest(logprobs: Tensor, probs: Tensor, n: int) -> list[list[tuple[int, float, float]]]:
    """The `n` tokens of each row that the model finds likeliest, as the fields of `Alternative`."""
    top = logprobs.topk(min(n, logprobs.size(-1)))
    columns = top.indices.tolist(), top.values.exp().tolist(), probs.gather(1, top.indices).tolist()
    return [list(zip(*row, strict=True)) for row in zip(*columns, strict=True)]
