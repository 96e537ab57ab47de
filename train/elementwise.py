"""RMS norm and squared ReLU on a CPU in fewer passes over memory, each with a backward pass of its own.

    use_fewer_passes(gpt)                        # from now on the model's norms and activation are these

PyTorch has a fused LayerNorm for CPUs but no fused RMS norm: its backward pass is a chain of a dozen operations, each of
which reads and writes whole activations. Here it is four; for the squared ReLU it is two. Computed is the same;
PyTorch's functions are the oracle of the test. `python -m benchmarks.train_step` shows what it gains.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanogpt_hub.model import GPT, Norm, relu2


def use_fewer_passes(gpt: GPT) -> None:
    """For a model on a CPU. Names of parameters stay as they are."""
    for module in gpt.modules():
        if isinstance(module, Norm):
            module.rms_norm = rms_norm
    for block in gpt.h:
        block.attn.rms_norm, block.mlp.relu2 = rms_norm, squared_relu


def _fits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """As F.rms_norm over the last dimension: x (..., C) and weight (C) to (..., C)."""
    if not _fits(x) or len(shape) != 1 or eps is None:
        return F.rms_norm(x, shape, weight, eps)
    normalised = _RMSNorm.apply(x, eps)
    return normalised if weight is None else normalised * weight


class _RMSNorm(torch.autograd.Function):
    """n = r x for r = 1 / sqrt(mean(x^2) + eps), whose derivative by x is r (dn - n mean(n dn))."""

    @staticmethod
    def forward(ctx, x, eps):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
        r = r.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        n = x * r
        ctx.save_for_backward(n, r)
        return n

    @staticmethod
    @once_differentiable
    def backward(ctx, dn):
        n, r = ctx.saved_tensors
        mean = (n * dn).mean(dim=-1, keepdim=True)
        return torch.addcmul(dn, n, mean, value=-1).mul_(r), None


def squared_relu(x: Tensor) -> Tensor:
    """As F.relu(x).square()."""
    return _SquaredReLU.apply(x) if _fits(x) else relu2(x)


class _SquaredReLU(torch.autograd.Function):
    """y = r^2 for r = max(x, 0), whose derivative by x is 2 r, zero where x is negative."""

    @staticmethod
    def forward(ctx, x):
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (r,) = ctx.saved_tensors
        return (dy * r).mul_(2)
