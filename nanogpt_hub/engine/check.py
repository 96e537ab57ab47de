"""Whether a fast way gives what the plain way gives: at first use with a model, and before compiled code is let in.

    first_difference(model, NumbaDecoder)        # None, or a sentence

The comparison feeds a few random tokens to `model.hidden` and `model.head` and to the decoder, each with a cache of
its own, and compares hidden states, logits, keys and values.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nanogpt_hub.engine.int8 import Int8Linear
from nanogpt_hub.engine.torch_decoder import PlainDecoder
from nanogpt_hub.model import GPT, KVCache

MakeDecoder = Callable[[GPT, KVCache], PlainDecoder]
# The largest difference that rounding makes, as a part of the values (their norm): sums in another order.
FLOAT32_TOLERANCE, FLOAT16_TOLERANCE = 1e-3, 5e-2
# In 8 bits an input on the border between two levels goes one way or the other, which shifts borders in the layers
# after it: exact but for a few of these after one product, as rough as 8 bits themselves after many layers.
INT8_TOLERANCE, INT8_AFTER_LAYERS = 5e-3, 0.25
PIECES = (2, 1)  # tokens a pass: a prefill and a step, of which the step goes the fast way in every decoder


@torch.inference_mode()
def first_difference(
    model: GPT, make: MakeDecoder, *, rows: int = 1, pieces: Sequence[int] = PIECES, ragged: bool = False
) -> str | None:
    """A sentence about the first pass whose values differ by more than rounding, or None.

    `pieces` are the tokens (per row) of one pass after the other. `ragged`: the rows have different lengths after the
    first pass. The model must be in evaluation mode.
    """
    total, device = sum(pieces), model.wte.weight.device
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (rows, total), generator=generator).to(device)
    caches = [KVCache(model.config, rows, device, model.wte.weight.dtype, max_len=total) for _ in range(2)]
    plain, fast = PlainDecoder(model, caches[0]), make(model, caches[1])
    for number, piece in enumerate(idx.split(list(pieces), dim=1)):
        expected, got = plain.hidden(piece), fast.hidden(piece)
        layers = slice(1) if is_int8(model) else slice(None)  # whose keys and values are compared exactly
        compared = {
            "keys": (caches[1].k[layers], caches[0].k[layers], tolerance(model)),
            "values": (caches[1].v[layers], caches[0].v[layers], tolerance(model)),
            "hidden states": (got, expected, INT8_AFTER_LAYERS if is_int8(model) else tolerance(model)),
            "logits": (fast.head(expected[:, -1]), plain.head(expected[:, -1]), tolerance(model)),
        }
        for name, (mine, true, allowed) in compared.items():
            off = relative_difference(mine, true)
            if not off <= allowed:
                return f"{name} of pass {number + 1} differ by {off:.1%}"
        for mine, true in ((caches[1].k, caches[0].k), (caches[1].v, caches[0].v)):
            mine.copy_(true)  # so that roundings do not add up
        if ragged and number == 0:
            for cache in caches:
                cache.lengths = [length - row % length for row, length in enumerate(cache.lengths)]
    return None


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of the expected values. NaN must meet NaN: else infinite."""
    if got.shape != expected.shape or not torch.equal(got.isnan(), expected.isnan()):
        return math.inf
    got, expected = got.nan_to_num().double(), expected.nan_to_num().double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def tolerance(model: GPT) -> float:
    if model.wte.weight.dtype in (torch.float16, torch.bfloat16):
        return FLOAT16_TOLERANCE
    return INT8_TOLERANCE if is_int8(model) else FLOAT32_TOLERANCE


def is_int8(model: GPT) -> bool:
    return any(type(module) is Int8Linear for module in model.modules())


def pieces_for(block_size: int) -> tuple[int, ...]:
    """The passes that are compared at first use: a prefill and a step, as far as they fit the context."""
    return PIECES if block_size >= sum(PIECES) else (1,) * block_size


# ---- all kinds of models and draws, once, before compiled code is used ----


def tiny_models() -> Iterator[tuple[str, GPT]]:
    """A small random model of each kind that the kernels know, by name."""
    from nanogpt_hub.engine.int8 import quantize_int8
    from nanogpt_hub.model import PRESETS, GPTConfig

    shape: dict[str, Any] = dict(n_layer=2, n_head=4, n_embd=96, n_inner=75, block_size=48, vocab_size=51)
    variants: list[tuple[str, dict[str, Any]]] = [
        *((name, {}) for name in PRESETS if name != "mixtral"),  # which they do not know
        ("llama", {"n_kv_head": 2}), ("nanochat", {"rotary_fraction": 0.5}),
        ("nanochat", {"n_kv_head": 1, "norm_weight": True}), ("gpt2", {"embd_norm": True, "n_embd": 36}),
        ("pythia", {"activation": "relu2"}),
    ]  # fmt: skip
    for name, overrides in variants:
        torch.manual_seed(0)
        model = GPT(GPTConfig.preset(name, **{**shape, **overrides})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        yield f"{name} {overrides or ''}".strip(), model
        yield f"{name} {overrides or ''} in 8 bits", quantize_int8(model)


def check_decoder(make: MakeDecoder) -> None:
    """Compares a decoder with the plain way on each kind of model, alone and in batches. RuntimeError: they differ."""
    for name, model in tiny_models():
        for rows in (1, 3, 16):
            for ragged in (False, True):
                pieces = (5, 1, 1, 3, 1, 16, 1)
                difference = first_difference(model, make, rows=rows, pieces=pieces, ragged=ragged and rows > 1)
                if difference:
                    raise RuntimeError(f"{name}, {rows} texts: {difference}")


def check_sampler(sample: Callable) -> None:
    """Compares a sampler with the plain one, for many settings, vocabularies and draws. RuntimeError if it differs."""
    from nanogpt_hub.sampling import SamplingConfig, draw_by_stages, usable_logits

    generator = torch.Generator().manual_seed(0)
    for V in (1, 7, 65, 1000, 5000):
        logits = 3 * torch.randn(9, V, generator=generator)
        uniform = torch.rand(9, 1, generator=generator)
        for temperature in (0.0, 0.5, 1.0, 1.7):
            for top_k in (0, 1, 20, V):
                for min_p in (0.0, 0.1):
                    config = SamplingConfig(temperature=temperature, top_k=top_k, min_p=min_p)
                    plain = list(draw_by_stages(usable_logits(logits, V), config, [[0]] * 9, uniform, 3))
                    for mine, true in zip(sample(logits, V, uniform, 3, **config.samplers()), plain, strict=True):
                        if mine[0] != true[0] or not math.isclose(mine[2], true[2], rel_tol=1e-3, abs_tol=1e-6):
                            raise RuntimeError(f"the draw from {V} tokens with {config.samplers()} differs")
