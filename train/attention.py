"""Attention over short contexts on a CPU: three plain products and a softmax, with a backward pass of its own.

    use_short_attention(gpt)                     # from now on the model attends by `attend`, where that is faster

PyTorch's kernel goes over the keys in blocks and never holds all weights (T, T), without which long contexts would not
fit. Over short ones it spends its time between products that are too small, most of all backward in bfloat16.
`python -m benchmarks.attention` shows from which length on it is the faster one. Computed is the same; PyTorch's
attention is the oracle of the test.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanogpt_hub.edits.core import blocks_of
from nanogpt_hub.model import GPT

SHORT = {torch.float32: 128, torch.bfloat16: 512}  # the longest contexts, in tokens, that are faster this way


def use_short_attention(gpt: GPT) -> None:
    """For a model on a CPU. Names of parameters stay as they are."""
    for block in blocks_of(gpt):
        block.attn.attend = attend  # type: ignore[assignment]  # it takes all that the core gives to its own


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """As F.scaled_dot_product_attention: q (B, H, T, D), k and v (B, G, T, D) to y (B, H, T, D)."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    short = is_causal and mask is None and q.size(2) <= SHORT.get(dtype, 0)
    if not short or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=enable_gqa)
    if enable_gqa:
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    with torch.autocast("cpu", enabled=False):
        return _CausalAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype))


attend.is_exact = True  # type: ignore[attr-defined]  # so that the fast decoders (engine/) still know the model


class _CausalAttention(torch.autograd.Function):
    """y = w v for w = softmax(q k^T / sqrt(D)), whose derivative by the logits is w (dw - sum of w dw)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.shape = q.shape  # (B, H, T, D)
        q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))  # (B H, T, D), each of them in one piece
        ctx.scale = q.size(-1) ** -0.5
        w = torch.baddbmm(causal_mask(q.size(1), q.dtype), q, k.mT, alpha=ctx.scale).softmax(dim=-1)  # (B H, T, T)
        ctx.save_for_backward(q, k, v, w)
        return (w @ v).view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, w = ctx.saved_tensors
        dy = dy.reshape(q.shape)
        dv = w.mT @ dy
        dlogits = torch._softmax_backward_data(dy @ v.mT, w, -1, w.dtype)
        dq = torch.baddbmm(q, dlogits, k, beta=0, alpha=ctx.scale)
        dk = torch.baddbmm(k, dlogits.mT, q, beta=0, alpha=ctx.scale)
        return dq.view(ctx.shape), dk.view(ctx.shape), dv.view(ctx.shape)


@functools.lru_cache(maxsize=8)
def causal_mask(T: int, dtype: torch.dtype) -> Tensor:
    """(T, T): minus infinity for the tokens that come later."""
    return torch.full((T, T), -torch.inf, dtype=dtype).triu(1)
