"""What PyTorch computes on.

choose_device("auto")                                    # "cuda", else "mps", else "cpu"
"""

import torch


def choose_device(asked: str = "auto") -> str:
    """`asked` (cpu, cuda, cuda:1, mps); auto is CUDA, else MPS, else the CPU. ValueError for one that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return next(name for name, is_there in available.items() if is_there)
    try:
        torch.zeros(1, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ValueError(f"device {asked} is not available here; there is: {there}") from error
    return asked
