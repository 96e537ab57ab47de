"""One position of a text, seen from inside: what the model expects there, and how it comes to that.

    view = position_view(loaded, ids, n, settings)     # n: which of `ids`, or len(ids) for what comes next

The browser gets the logits themselves, so that it can apply the samplers again whenever a slider moves. `given_tokens`
makes the records of tokens that were not generated but chosen.
"""

import base64
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanogpt_hub.generate import Token, inference, window_start
from nanogpt_hub.lens import Position, look_at_end
from nanogpt_hub.model import GPT
from nanogpt_hub.playground.models import Loaded
from nanogpt_hub.sampling import (
    SAMPLERS,
    Alternative,
    SamplingConfig,
    filter_logits,
    likeliest,
    seen_tokens,
    usable_logits,
)
from nanogpt_hub.tokenizer import StreamDecoder, Tokenizer

SHOWN = 24  # likeliest tokens that go to the page by name; a temperature or a cut never brings another one up
ALTERNATIVES = 8  # likeliest tokens kept with each record


def position_view(loaded: Loaded, ids: Sequence[int], n: int, config: SamplingConfig) -> dict:
    """What the panel beside a text draws of position `n`. ValueError for a place that the text does not have."""
    tokenizer = loaded.tokenizer
    if not 0 <= n <= len(ids):
        raise ValueError("there is no such token in this text any more: choose another one")
    view: dict = {"n": n, "name": tokenizer.token_str(ids[n]) if n < len(ids) else None}
    if n == 0:
        return {**view, "first": True}
    start = window_start(n, loaded.model.config.block_size)
    found = look_at_end(loaded.model, tokenizer, ids[start:n])
    token = ids[n] if n < len(ids) else None
    return {
        **view,
        "id": token,
        "start": start,
        "heads": list(found.attention.shape[:2]),
        "attention": encoded((found.attention * 255).round().byte()),
        "depths": depth_rows(found, tokenizer, token),
        **distribution(found, tokenizer, ids[:n], config, token),
    }


def encoded(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def depth_rows(found: Position, tokenizer: Tokenizer, token: int | None) -> list[dict]:
    """The logit lens at one position: a row for each depth, from the embeddings to the answer."""
    rows = []
    answer = int(found.depths[-1].argmax()) if token is None else token
    for probs in found.depths:
        top, entropy = probs.topk(min(3, len(probs))), torch.special.entr(probs).sum().item() / math.log(2)
        best = [[tokenizer.token_str(id), p] for id, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        rank = 1 + int((probs > probs[answer]).sum())
        rows.append({"top": best, "p": probs[answer].item(), "rank": rank, "bits": round(entropy, 3)})
    return rows


def distribution(
    found: Position, tokenizer: Tokenizer, before: Sequence[int], config: SamplingConfig, token: int | None
) -> dict:
    """Logits for the browser, the names of the likeliest tokens, and what the samplers of this program make of them.

    The largest logit is moved to 0, so that half precision is exact to half a percent where it counts.
    """
    vocab = min(len(found.logits), tokenizer.vocab_size)
    logits = found.logits[None, :vocab]
    seen = seen_tokens([before], vocab)
    sampled = filter_logits(logits, config, seen).softmax(-1)[0]
    shown = logits[0].topk(min(SHOWN, vocab)).indices.tolist()
    shown += [] if token is None or token in shown or token >= vocab else [token]
    return {
        "logits": encoded((logits[0] - logits.max()).clamp(min=-60000).half()),
        "largest": logits.max().item(),
        "shown": [[id, tokenizer.token_str(id), round(sampled[id].item(), 6)] for id in shown],
        "seen": sorted(set(before)),
        "samplers": [[each.name, each.neutral, getattr(config, each.name)] for each in SAMPLERS.values()],
    }


# ---- tokens that were chosen ----


def given_tokens(loaded: Loaded, before: Sequence[int], ids: Sequence[int], config: SamplingConfig) -> list[Token]:
    """Records of `ids` that follow the tokens `before`, as if the model had drawn them."""
    tokenizer, decoder = loaded.tokenizer, StreamDecoder(loaded.tokenizer)
    for id in before[-8:]:
        if id != tokenizer.eot_id:
            decoder.push(id)
    tokens, records = [*before], []
    for row in next_logits(loaded.model, before, ids, tokenizer.vocab_size):
        id, logits = ids[len(tokens) - len(before)], row[None]
        seen = seen_tokens([tokens], logits.size(-1))
        logprobs, probs = logits.log_softmax(-1), filter_logits(logits, config, seen).softmax(-1)
        (others,) = likeliest(logprobs, probs, ALTERNATIVES)
        text = "" if id == tokenizer.eot_id else decoder.push(id)
        records.append(
            Token(0, id, text, logprobs[0, id].item(), probs[0, id].item(), tuple(map(Alternative._make, others)))
        )
        tokens.append(id)
    return records


def next_logits(model: GPT, before: Sequence[int], ids: Sequence[int], vocab: int) -> Iterator[Tensor]:
    """Logits (V,) at each of `ids`, by one pass for all that see the same window: what generation sees."""
    tokens, block_size = [*before, *ids], model.config.block_size
    n = len(before)
    while n < len(tokens):
        start = window_start(n, block_size)
        end = next((m for m in range(n + 1, len(tokens)) if window_start(m, block_size) != start), len(tokens))
        idx = torch.tensor([tokens[start : end - 1]], device=model.wte.weight.device)
        with inference(model):
            hidden = model.hidden(idx)[0, n - 1 - start :]  # (ids of this window, C)
            logits = usable_logits(model.head(hidden), vocab).cpu()[:, : min(vocab, model.config.vocab_size)]
        yield from logits.clone()
        n = end
