"""The loss as the trainers compute it: token ids in, summed cross entropy out, the logits never held all at once.

    loss = summed_loss(gpt, idx, targets)

For a vocabulary of 50,000 the logits and their gradient in float32 outweigh all else that a training step keeps. Where
they are that large, they are made for some tokens at a time, and the gradients that the head will ask for are taken
then and there, while those logits exist: no product is done twice. (The idea: Liger's fused linear cross entropy,
arXiv:2410.10989, and Cut Cross-Entropy, arXiv:2411.09009.)
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nanogpt_hub.edits.core import running_core
from nanogpt_hub.model import GPT, IGNORE_INDEX

CHUNK = 2**27  # bytes of logits in float32 that are made at once; where all are fewer, the plain loss does
COMPILED = 4  # times as many where torch.compile fuses what is done with them: in float32 they are then not stored


def summed_loss(gpt: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats of targets (B, T) given idx (B, T), summed: `gpt(idx, targets)[1]` times their number.

    Targets of `IGNORE_INDEX` do not count; where all are, the loss is 0. A sum, so that of the parts of a batch each
    counts for as much as it has targets.
    """
    x, targets = gpt.hidden(idx).flatten(0, 1), targets.flatten()  # (B * T, C), (B * T)
    n_chunks = count_chunks(len(targets), gpt.config.vocab_size)
    if n_chunks == 1:
        return head_loss(gpt, x, targets)
    if core_is_edited():  # another head, maybe, than the one whose gradient is written out below
        parts = zip(x.tensor_split(n_chunks), targets.tensor_split(n_chunks), strict=True)
        return sum(checkpoint(head_loss, gpt, *part, use_reentrant=False) for part in parts)
    return chunked_cross_entropy(x, gpt.lm_head.weight, targets, gpt.config.logit_softcap, n_chunks)


@torch.compiler.assume_constant_result  # not for torch.compile to trace
def core_is_edited() -> bool:
    return bool(running_core().changed)


def head_loss(gpt: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of targets (N,) for hidden states x (N, C), all logits at once."""
    return F.cross_entropy(gpt.head(x).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def count_targets(targets: Tensor) -> int:
    """How many targets count: what a `summed_loss` is the sum of."""
    return int((targets != IGNORE_INDEX).sum())


def count_chunks(n_tokens: int, vocab_size: int) -> int:
    """In how many pieces the logits of so many tokens are made; 1 is the plain loss."""
    chunk = CHUNK * COMPILED if torch.compiler.is_compiling() else CHUNK
    return max(1, math.ceil(4 * n_tokens * vocab_size / chunk))


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, n_chunks: int) -> Tensor:
    """Summed cross entropy of targets (N,) under the head `weight` (V, C) for hidden states x (N, C), in float32.

    Computes in the dtype of autocast where that is on. It can be differentiated once.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    wanted = torch.is_grad_enabled()  # inside the function it is always off
    return _ChunkedCrossEntropy.apply(x, weight, targets, softcap, n_chunks, dtype, wanted)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, n_chunks, dtype, wanted):
        want_x, want_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        w = weight.to(dtype)  # (V, C)
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if want_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        size = math.ceil(len(x) / n_chunks)
        for rows in (slice(first, first + size) for first in range(0, len(x), size)):
            part = x[rows].to(dtype)  # (n, C)
            loss, grad = loss_and_gradient(part @ w.T, targets[rows], softcap, want_x or want_weight)
            total += loss
            if grad is None:
                continue
            grad = grad.to(dtype)
            if grad_x is not None:
                grad_x[rows] = grad @ w
            if grad_weight is not None:
                grad_weight += grad.T @ part
        ctx.save_for_backward(grad_x, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        # In place, for the gradient of the head is large; a second backward pass is refused by autograd's own check.
        # A loss scaler's factor comes in here, after the half precision: what it guards against cannot happen before,
        # because the gradients of a sum are not small.
        scaled = (grad if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors)
        return *scaled, None, None, None, None, None


def loss_and_gradient(logits: Tensor, targets: Tensor, softcap: float, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Summed cross entropy for the head's raw logits (n, V), and, if wanted, its gradient with respect to them."""
    logits = logits.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    grad = F.log_softmax(logits, dim=-1)
    loss = F.nll_loss(grad, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    if not wanted:
        return loss, None
    kept = (targets != IGNORE_INDEX)[:, None]  # (n, 1)
    grad = grad.exp_().scatter_add_(1, targets[:, None].clamp(min=0), -kept.to(grad.dtype)).mul_(kept)
    return loss, grad * (1 - (logits / softcap) ** 2) if softcap else grad


def recompute_blocks(gpt: GPT) -> None:
    """From now on each block keeps its input alone and is run again in the backward pass (arXiv:1604.06174).

    Costs a third more computation. Names of parameters stay as they are, and dropout drops the same again.
    """
    for block in gpt.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
