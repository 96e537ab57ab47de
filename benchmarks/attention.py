"""Attention on a CPU, forward and backward: the trainer's for short contexts against PyTorch's kernel.

    python -m benchmarks.attention [--rounds 5] [--threads N]

In float32 and bfloat16, over contexts of 32 to 1,024 tokens, 2,048 tokens and 256 features in all. A ratio above 1 is
the trainer's advantage; `SHORT` in train/attention.py says up to which length it is used.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

import train.attention as short
from benchmarks.common import alternate, ratio, report, times

N_TOKENS, N_EMBD = 2048, 256
CONTEXTS = (32, 64, 128, 192, 256, 384, 512, 768, 1024)


def passes(attend: Callable, T: int, head_dim: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward over queries, keys and values as the model has them: side by side."""
    B, H = max(1, N_TOKENS // T), N_EMBD // head_dim
    qkv = torch.randn(B, T, 3 * H, head_dim).to(dtype).requires_grad_()
    dy = torch.randn(B, T, H * head_dim).to(dtype)

    def run() -> None:
        q, k, v = (t.transpose(1, 2) for t in qkv.split(H, dim=2))
        torch.autograd.grad(attend(q, k, v, is_causal=True).transpose(1, 2).reshape(dy.shape), qkv, dy)

    return times(B, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limits, short.SHORT = short.SHORT, dict.fromkeys(short.SHORT, max(CONTEXTS))  # all of them, to see what it would be
    rows = []
    for T in CONTEXTS:
        row = {"context": T}
        for dtype in limits:
            for head_dim in (32, 64, 128):
                attends = {"ours": short.attend, "PyTorch": F.scaled_dot_product_attention}
                runs = {name: passes(attend, T, head_dim, dtype) for name, attend in attends.items()}
                name = f"{str(dtype).removeprefix('torch.')}, heads of {head_dim}"
                row[name] = ratio(alternate(runs, args.rounds, f"{T} tokens, {name}"), "PyTorch", "ours")
        rows.append(row)
    report("attention", rows)


if __name__ == "__main__":
    main()
