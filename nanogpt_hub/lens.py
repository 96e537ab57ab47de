"""What happens inside a GPT, as numbers: attention, logit lens, surprise, and what the samplers do to a distribution.

    next_tokens(model, tokenizer, "To be, or", SamplingConfig(top_k=5))  # the likeliest, before and after each sampler
    inside = look_inside(model, tokenizer, "To be, or")                  # one pass: attention maps and residual stream
    lens = logit_lens(model, tokenizer, inside)                          # what each layer would have answered
    surprise(model, tokenizer, "To be, or not").bits_per_byte            # how well the model knows a text

All functions leave the model in the mode in which it was, and change nothing in one that is in eval mode, so that
threads may share it. What they return is on the CPU. Ids beyond the tokenizer's vocabulary have no text and no part in
any distribution, as when generating. Entropies, divergences and surprise are in bits.

Shape legend:  T tokens   V vocab_size   L n_layer   H n_head   D head_dim   C n_embd   E n_expert
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from nanogpt_hub.edits.core import blocks_of, mixtures_of, watch_routers
from nanogpt_hub.generate import check_ids, encode_prompt, inference, window_start
from nanogpt_hub.model import GPT
from nanogpt_hub.sampling import SamplingConfig, sampler_stages, seen_tokens, usable_logits
from nanogpt_hub.tokenizer import Tokenizer

EDITED = "the lens cannot show what this edited model.py computes"
HEAD_ROWS = 128  # positions whose logits are held at once: 25 MB with GPT-2's vocabulary


# ---- the tokenizer ----


class Piece(NamedTuple):
    """A token of a text."""

    id: int
    data: bytes  # what it stands for; may be a part of a character
    text: str  # for display
    start: int | None  # text[start:end] are the characters of which it holds at least a byte
    end: int | None  # None for both where the tokenizer changed the text, so that bytes and characters do not meet
    group: int  # tokens that share a character share a number, counted from 0


def tokens_of(tokenizer: Tokenizer, text: str, max_tokens: int = 1024) -> list[Piece]:
    """How a text is cut. ValueError for more than `max_tokens` tokens, or for an unknown character."""
    ids = _encode(tokenizer, text, max_tokens)
    parts = [tokenizer.token_bytes(id) for id in ids]
    spans = _spans(parts, text)
    pieces: list[Piece] = []
    group, reach = -1, 0  # reach: where the characters of the group end
    for place, (id, data) in enumerate(zip(ids, parts, strict=True)):
        start, end = spans[place] if spans else (None, None)
        if not pieces or start is None or start >= reach:
            group += 1
        reach = end or 0
        pieces.append(Piece(id, data, tokenizer.token_str(id), start, end, group))
    return pieces


def _spans(parts: list[bytes], text: str) -> list[tuple[int, int]] | None:
    """The characters that each part of a text's bytes touches, None where the parts are not the text's bytes."""
    data, joined = text.encode(), b"".join(parts)
    if joined not in (data, b" " + data):  # Llama's tokenizers put a space in front
        return None
    character = [place for place, letter in enumerate(text) for _ in letter.encode()] + [len(text)]
    spans, at = [], len(data) - len(joined)
    for part in parts:
        start, at = max(at, 0), at + len(part)
        spans.append((character[start], character[at - 1] + 1 if at > start else character[start]))
    return spans


def _encode(tokenizer: Tokenizer | None, text: str, most: int) -> list[int]:
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so no text can be given to it")
    ids = tokenizer.encode(text)
    if len(ids) > most:
        raise ValueError(f"the text has {len(ids):,} tokens; at most {most:,} are allowed here: shorten it")
    return ids


# ---- the next token ----


class NextToken(NamedTuple):
    """A token that may come next."""

    id: int
    text: str
    probs: tuple[float, ...]  # one for each of `NextTokens.stages`
    cut_by: str | None  # the stage that cut it; None where it may be drawn


@dataclass(frozen=True)
class NextTokens:
    """The next-token distribution before and after each sampler. The tuples by stage are parallel to `stages`."""

    stages: tuple[str, ...]  # "model", then each sampler that is on by its field's name: "temperature", "top_k"...
    tokens: tuple[NextToken, ...]  # the likeliest for the model, most likely first
    entropy: tuple[float, ...]  # bits, by stage
    kept: tuple[int, ...]  # how many tokens may still be drawn, by stage
    rest: tuple[float, ...]  # probability of all tokens that are not in `tokens`, by stage


def next_tokens(
    model: GPT, tokenizer: Tokenizer, text: str, sampling: SamplingConfig | None = None, n: int = 10
) -> NextTokens:
    """The `n` tokens that the model finds likeliest after `text`, and what each sampler makes of them.

    Without `sampling` only the model's own distribution. An empty text starts at end-of-text, a long one is cropped,
    both as when generating. Raises ValueError as `generate` does, and for n below 1.
    """
    ids = encode_prompt(tokenizer, text)
    logits = _next_logits(model, ids, vocab := _vocab(model, tokenizer))
    sampling = sampling or SamplingConfig(temperature=1.0, top_k=None)
    stages = dict(sampler_stages(logits, sampling, seen_tokens([ids], logits.size(-1))))
    after = torch.cat(list(stages.values()))  # (stages, V)
    probs, alive = after.softmax(-1), after > -math.inf
    shown = _likeliest(probs[0, :vocab], n)
    tokens = []
    for id in shown.tolist():
        cut_by = next((name for name, kept in zip(stages, alive[:, id], strict=True) if not kept), None)
        tokens.append(NextToken(id, tokenizer.token_str(id), tuple(probs[:, id].tolist()), cut_by))
    rest = (1 - probs[:, shown].sum(-1)).clamp(min=0)
    columns = (_entropy(probs), alive.sum(-1), rest)
    return NextTokens(tuple(stages), tuple(tokens), *(tuple(column.tolist()) for column in columns))


class SharedToken(NamedTuple):
    """A token that may come next, as two models see it."""

    id: int
    text: str
    prob_a: float
    prob_b: float


class Divergence(NamedTuple):
    """How far two next-token distributions are apart, in bits."""

    kl_ab: float  # Kullback-Leibler: bits wasted on text that a writes by who expects b; without limit
    kl_ba: float
    js: float  # Jensen-Shannon: symmetric; 0 for equal ones, 1 for those that have no token in common
    tokens: tuple[SharedToken, ...]  # the likeliest on average first


def divergence(
    model_a: GPT, model_b: GPT, tokenizer_a: Tokenizer, tokenizer_b: Tokenizer, text: str, n: int = 10
) -> Divergence:
    """Compares what two models expect after the same text, and the `n` tokens that they find likeliest on average.

    Raises ValueError when the tokenizers differ (ids would not mean the same), and as `next_tokens` does.
    """
    ids = encode_prompt(tokenizer_a, text)
    if tokenizer_b is None or tokenizer_a.hash != tokenizer_b.hash:
        raise ValueError(
            "the two models do not have the same tokenizer, so their next tokens cannot be "
            "compared: choose two that share one"
        )
    vocab = min(_vocab(model_a, tokenizer_a), model_b.config.vocab_size)
    log_a, log_b = (_next_logits(model, ids, vocab)[0, :vocab].double().log_softmax(-1) for model in (model_a, model_b))
    a, b = log_a.exp(), log_b.exp()
    js = _entropy((a + b) / 2) - (_entropy(a) + _entropy(b)) / 2
    kl_ab, kl_ba = (
        (p * (p_log - q_log)).sum() / math.log(2) for p, p_log, q_log in ((a, log_a, log_b), (b, log_b, log_a))
    )
    top = _likeliest(a + b, n).tolist()
    tokens = tuple(SharedToken(id, tokenizer_a.token_str(id), a[id].item(), b[id].item()) for id in top)
    bits = [max(0.0, each.item()) for each in (kl_ab, kl_ba, js)]
    return Divergence(kl_ab=bits[0], kl_ba=bits[1], js=bits[2], tokens=tokens)


def first_difference(ids_a: Sequence[int], ids_b: Sequence[int]) -> int | None:
    """Index of the first token that differs, or that only one of the two has; None where they are equal."""
    pairs = zip_longest(ids_a, ids_b)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), None)


def _vocab(model: GPT, tokenizer: Tokenizer) -> int:
    return min(model.config.vocab_size, tokenizer.vocab_size)


def _next_logits(model: GPT, ids: Sequence[int], vocab: int) -> Tensor:
    """Logits (1, V) of the token after `ids`, cropped as when generating, on the CPU."""
    check_ids(ids, model.config.vocab_size)
    window = ids[window_start(len(ids), model.config.block_size) :]
    with inference(model):
        hidden = model.hidden(torch.tensor([window], device=model.wte.weight.device))
        return _logits(model, hidden[:, -1], vocab).cpu()


def _logits(model: GPT, hidden: Tensor, vocab: int) -> Tensor:
    """Logits (T, V) for what the head reads, (T, C), in float32 and the surplus ids masked. ValueError for NaN."""
    logits = usable_logits(model.head(hidden), vocab)
    if logits.isnan().any():
        raise ValueError("the model gives no numbers (NaN): its weights are damaged, or the precision is too low")
    return logits


def _likeliest(probs: Tensor, n: int) -> Tensor:
    """Ids (n,) of the largest of probs (V,), largest first."""
    if n < 1:
        raise ValueError(f"n is {n}; ask for at least 1 token")
    return probs.topk(min(n, len(probs))).indices


def _entropy(probs: Tensor) -> Tensor:
    """Entropy in bits over the last dimension."""
    return torch.special.entr(probs).sum(-1) / math.log(2)


# ---- inside one pass ----


@dataclass(frozen=True, eq=False)
class Inside:
    """What one pass over a text computed on the way."""

    ids: tuple[int, ...]  # T of them
    tokens: tuple[str, ...]  # the same for display
    attention: Tensor  # (L, H, T, T) float32: row t is how token t spreads its attention over tokens 0 to t; sums to 1
    residual: Tensor  # (L + 1, T, C): the embeddings, then the residual stream after each block, in the model's dtype
    experts: Tensor | None = None  # (L, T, E) float32, of a mixture of experts: how much a token takes of each, 0 for
    # those that its router did not choose; sums to 1


def look_inside(model: GPT, tokenizer: Tokenizer, text: str, max_tokens: int = 64) -> Inside:
    """Runs the model once over `text` and keeps all attention maps and the residual stream.

    Raises ValueError for a text without tokens, or with more than `max_tokens` or block_size, as `generate` does, and
    where an edited model.py is built otherwise than as blocks with attention and a last norm.
    """
    ids = _encode(tokenizer, text, min(max_tokens, model.config.block_size))
    _check_text(model, ids, least=1)
    with inference(model):
        seen = _record_checked(model, torch.tensor([ids], device=model.wte.weight.device))
    experts = torch.stack(seen.experts).cpu() if seen.experts else None
    tokens = tuple(map(tokenizer.token_str, ids))
    return Inside(tuple(ids), tokens, torch.cat(seen.maps).cpu(), torch.cat(seen.stream).cpu(), experts)


def attention_maps(model: GPT, ids: Sequence[int]) -> Tensor:
    """All attention maps (L, H, T, T) of one pass over T ids, as `Inside` has them. ValueError as `look_inside`."""
    _check_text(model, ids, least=1)
    with inference(model):
        seen = _record_checked(model, torch.tensor([list(ids)], device=model.wte.weight.device))
    return torch.cat(seen.maps).cpu()


@dataclass(frozen=True, eq=False)
class Position:
    """What the model computes at the last of T tokens: how it comes to expect the next one."""

    logits: Tensor  # (V,) float32: of the next token, those without text masked
    attention: Tensor  # (L, H, T) float32: how the last token spreads its attention in each head; sums to 1
    depths: Tensor  # (L + 1, V) float32: probabilities of the next token, read before the first block and after each


def look_at_end(model: GPT, tokenizer: Tokenizer, ids: Sequence[int]) -> Position:
    """The last position of `ids`, at most block_size of them. Keeps memory for one row of attention a head.

    Raises ValueError for ids that the model does not know, for NaN, and for an edited model that the lens cannot read.
    """
    check_ids(ids, model.config.vocab_size)
    vocab = _vocab(model, tokenizer)
    with inference(model):
        idx = torch.tensor([list(ids)], device=model.wte.weight.device)
        seen = _record_checked(model, idx, last=True)
        logits = _logits(model, seen.hidden[0, -1:], vocab)[0]  # (V,)
        depths = torch.cat([_read(model, x[0, -1:], vocab) for x in seen.stream])
    return Position(logits.cpu(), torch.stack([weights[0, :, 0] for weights in seen.maps]).cpu(), depths.cpu())


class Recorded(NamedTuple):
    """What a pass over idx (1, T) computed on the way."""

    hidden: Tensor  # (1, T, C): what the head reads
    stream: list[Tensor]  # (1, T, C) before the first and after each block
    maps: list[Tensor]  # of each block: attention's weights (1, H, T, T), or those of the last token, (1, H, 1, T)
    experts: list[Tensor]  # of each mixture of experts: how much each token takes of each expert, (T, E)


def _record_checked(model: GPT, idx: Tensor, last: bool = False) -> Recorded:
    """`_record`, or ValueError for an edited model in which the lens would show something else than what it means."""
    seen = _record(model, idx, last)
    if len(seen.stream) == 1 or not torch.allclose(model.ln_f(seen.stream[-1]), seen.hidden, equal_nan=True):
        raise ValueError(f"{EDITED}: its output is not the last norm of what the blocks have left in the stream")
    if len(seen.maps) != len(seen.stream) - 1:
        raise ValueError(f"{EDITED}: its blocks do not call `attend` once each, where the lens reads attention")
    return seen


def _record(model: GPT, idx: Tensor, last: bool = False) -> Recorded:
    """`model.hidden(idx)` for idx (1, T), and what is computed on the way; with `last` only the last token's attention.

    Recorded while model.py computes, so that an edited one is shown as it is. The pass goes through copies of the
    modules, which share the weights: other threads may be using the model itself.
    """
    own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    watched = copy.deepcopy(model, own)
    stream: list[Tensor] = []
    maps: list[Tensor] = []
    watched.h[0].register_forward_pre_hook(lambda _, args: stream.append(args[0]))
    for block in blocks_of(watched):
        block.register_forward_hook(lambda _, args, x: stream.append(x))
        block.attn.attend = functools.partial(_recording_attend, block.attn.attend, maps, last)
    with watch_routers(watched) as routed:
        hidden = watched.hidden(idx)
    mixtures = mixtures_of(watched)
    known = len(routed) == len(mixtures)  # an edited model.py may have other uses for a router
    pairs = zip(mixtures, routed, strict=True) if known else ()
    return Recorded(hidden, stream, maps, [_shares(mixture.choose(logits), logits) for mixture, logits in pairs])


def _shares(choice: tuple[Tensor, Tensor], logits: Tensor) -> Tensor:
    """How much each token takes of each expert, (T, E), from the weights and numbers (T, k) of those it takes."""
    weights, chosen = choice
    return torch.zeros_like(logits, dtype=weights.dtype).scatter_(-1, chosen, weights)


def _recording_attend(
    attend: Callable[..., Tensor], maps: list[Tensor], last: bool, q: Tensor, k: Tensor, v: Tensor, *args, **kw
) -> Tensor:
    """`attend(q, k, v, ...)`, its weights added to `maps`. ValueError where it is not softmax attention."""
    y = attend(q, k, v, *args, **kw)
    mask = args[0] if args else kw.get("attn_mask")
    weights = attention_weights(q, k, mask, kw.get("is_causal", False), kw.get("scale"))
    average = weights @ v.float().repeat_interleave(q.size(1) // v.size(1), dim=1)
    if (average - y.float()).abs().max() > 0.02 * y.abs().max():  # far more than rounding to bfloat16
        raise ValueError(f"{EDITED}: its `attend` is not softmax attention over q, k and v")
    maps.append(weights[:, :, -1:] if last else weights)
    return y


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor | None = None, is_causal: bool = True, scale: float | None = None
) -> Tensor:
    """The weights (B, H, T, S), float32, with which scaled_dot_product_attention averages values, which it never holds.

    q (B, H, T, D), k (B, G, S, D); mask: None, or one that broadcasts to (B, H, T, S), False where a token must not
    look, or numbers that are added to the scores; scale: of the scores, usually 1 / sqrt(D).
    """
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # each key head serves a group of query heads
    scores = q.float() @ k.float().transpose(-2, -1) * (scale or q.size(-1) ** -0.5)  # (B, H, T, S)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What the model would answer if it ended early. Tensors are (L + 1, T): row 0 is before the first block.

    The last row is the model's own output. "The answer" is the token that it finds likeliest there.
    """

    top_ids: Tensor  # the likeliest token at that depth
    top_probs: Tensor
    top_tokens: tuple[tuple[str, ...], ...]  # for display
    entropy: Tensor  # bits: how undecided it still is
    answer_probs: Tensor  # what it already gives to the answer
    answer_ranks: Tensor  # 1 where the answer is already the likeliest


def logit_lens(model: GPT, tokenizer: Tokenizer, inside: Inside) -> LogitLens:
    """Reads the residual stream after each block with the last norm and the head (nostalgebraist 2020, logit lens).

    `inside` is what `look_inside` gave for the same model.
    """
    vocab, device = _vocab(model, tokenizer), model.wte.weight.device
    with inference(model):
        answers = _read(model, inside.residual[-1].to(device), vocab).argmax(-1, keepdim=True)  # (T, 1)
        rows = [_lens_row(_read(model, x.to(device), vocab), answers) for x in inside.residual]
    top_ids, top_probs, entropy, probs, ranks = (torch.stack(column).cpu() for column in zip(*rows, strict=True))
    top_tokens = tuple(tuple(map(tokenizer.token_str, row)) for row in top_ids.tolist())
    return LogitLens(top_ids, top_probs, top_tokens, entropy, probs, ranks)


def _read(model: GPT, stream: Tensor, vocab: int) -> Tensor:
    """Probabilities (T, V) that the residual stream (T, C) would give if it were the last."""
    return _logits(model, model.ln_f(stream), vocab).softmax(-1)


def _lens_row(probs: Tensor, answers: Tensor) -> tuple[Tensor, ...]:
    """One depth of the lens from probs (T, V): five tensors (T,)."""
    top, answer = probs.max(-1), probs.gather(-1, answers)  # answer (T, 1)
    return top.indices, top.values, _entropy(probs), answer[:, 0], 1 + (probs > answer).sum(-1)


# ---- surprise ----


class ScoredToken(NamedTuple):
    """A token of a text and how the model took it. The first has no scores (None): nothing stands before it."""

    piece: Piece
    bits: float | None = None  # surprise: -log2 of its probability
    rank: int | None = None  # 1 where it was the likeliest
    best_id: int | None = None  # the likeliest
    best_text: str | None = None
    best_prob: float | None = None


@dataclass(frozen=True)
class Surprise:
    """How well a model foresees a text. All figures leave out the first token and the text that it completes."""

    text: str
    tokens: tuple[ScoredToken, ...]

    @property
    def scored_text(self) -> str:
        """The characters that the scored tokens complete; all where the tokenizer changed the text (`Piece.start`)."""
        return self.text[self.tokens[1].piece.start or 0 :]

    @property
    def total_bits(self) -> float:
        """Bits that the model needs to write the scored text down (arithmetic coding)."""
        return math.fsum(token.bits for token in self.tokens if token.bits is not None)

    @property
    def bits_per_token(self) -> float:
        """Cross entropy in bits: the validation loss divided by ln 2."""
        return self.total_bits / (len(self.tokens) - 1)

    @property
    def bits_per_character(self) -> float:
        """Comparable between tokenizers, within a language."""
        return self.total_bits / len(self.scored_text)

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of UTF-8: comparable between tokenizers; 8 is knowing nothing."""
        return self.total_bits / len(self.scored_text.encode())

    @property
    def perplexity(self) -> float:
        """Among how many equally likely tokens the model wavers, on average: 2 to the bits per token."""
        return 2.0**self.bits_per_token if self.bits_per_token < 1024 else math.inf


def surprise(model: GPT, tokenizer: Tokenizer, text: str, max_tokens: int = 1024) -> Surprise:
    """Scores each token of `text` by what the model expected there.

    The first token is not scored: whether a model saw texts begin after end-of-text cannot be told from its files.
    A text longer than block_size is read in windows that overlap by half. Raises ValueError for a text of fewer than
    two tokens or more than `max_tokens`, and as `generate` does.
    """
    pieces = tokens_of(tokenizer, text, max_tokens)
    ids, block_size = [piece.id for piece in pieces], model.config.block_size
    _check_text(model, ids, least=2)
    windows = list(scoring_windows(len(ids) - 1, block_size))
    scores: list[tuple] = []
    with inference(model):
        for start, first, end in tqdm(windows, desc="scoring", unit="window", delay=1, leave=False):
            scores += _score_window(model, ids[start : end + 1], first - start, _vocab(model, tokenizer))
    scored = (
        ScoredToken(piece, bits, rank, best_id, tokenizer.token_str(best_id), best_prob)
        for piece, (bits, rank, best_id, best_prob) in zip(pieces[1:], scores, strict=True)
    )
    return Surprise(text, (ScoredToken(pieces[0]), *scored))


def scoring_windows(n: int, block_size: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end) of windows over n inputs: the model reads start to end, outputs count from `first` on.

    Each output counts once, and from the second window on it has at least half a block to look back on.
    """
    end = 0
    while end < n:
        first, end = end, min(n, end + max(1, block_size // 2) if end else block_size)
        yield max(0, end - block_size), first, end


def _score_window(model: GPT, ids: list[int], first: int, vocab: int) -> list[tuple]:
    """(bits, rank, best id, its probability) of each of `ids` that follows the inputs from `first` on."""
    idx = torch.tensor([ids], device=model.wte.weight.device)
    hidden = model.hidden(idx[:, :-1])[0, first:]  # (T, C)
    scores: list[tuple] = []
    for part, actual in zip(hidden.split(HEAD_ROWS), idx[0, first + 1 :, None].split(HEAD_ROWS), strict=True):
        logprobs = _logits(model, part, vocab).log_softmax(-1)
        best, own = logprobs.max(-1), logprobs.gather(-1, actual)  # own (T, 1)
        rank = 1 + (logprobs > own).sum(-1)
        columns = -own[:, 0] / math.log(2), rank, best.indices, best.values.exp()
        scores += zip(*(column.tolist() for column in columns), strict=True)
    return scores


def _check_text(model: GPT, ids: Sequence[int], least: int) -> None:
    if len(ids) < least:
        raise ValueError(f"the text has {len(ids)} tokens; write a text of at least {least}")
    check_ids(ids, model.config.vocab_size)


# ---- the parts of a model ----


class Part(NamedTuple):
    """A kind of weights, summed over all blocks."""

    name: str
    parameters: int
    note: str = ""


def parameters_by_part(model: GPT) -> list[Part]:
    """How many parameters each kind of weights has; the sum is `model.num_params()`, a tied head counts as 0."""
    tied = model.lm_head.weight is model.wte.weight
    names = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention", "mlp": "feed-forward",
             "norm": "norms", "lm_head": "head"}  # fmt: skip
    counts = dict.fromkeys(names, 0)
    for name, parameter in model.named_parameters():
        counts[next((part for part in name.split(".") if part in names), "norm")] += parameter.numel()
    notes = {
        "lm_head": "the token embedding, used again" if tied else "",
        "wpe": "none: positions are rotations" if model.config.position == "rotary" else "",
    }
    return [Part(names[kind], count, notes.get(kind, "")) for kind, count in counts.items()]
