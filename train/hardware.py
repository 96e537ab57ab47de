"""What the run computes on: device and precision, chosen and explained, the matrix rate, and the memory it takes."""

import os
import platform
import time

import torch

from nanogpt_hub.model import GPTConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(asked: str) -> str:
    """cuda, mps or cpu. Raises ValueError when the one asked for is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return next(name for name, there in available.items() if there)
    if not available[asked]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ValueError(f"device {asked} is not available in this PyTorch on this machine; there is: {there}")
    return asked


def choose_precision(asked: str, device: str) -> tuple[str, str]:
    """fp32, bf16 or fp16, and why. Raises ValueError for a precision that the device would silently not use."""
    if asked == "fp16" and device != "cuda":
        raise ValueError(f"precision fp16 needs a CUDA device (its loss scaling does nothing on {device}); use fp32")
    if asked == "bf16" and device == "mps":
        raise ValueError("precision bf16 is not reliable on MPS; use fp32")
    if asked != "auto":
        return asked, "as asked"
    if device == "cpu":
        return "fp32", "on a CPU it is the fastest and the safest"
    if device == "mps":
        return "fp32", "on MPS the half precisions have given NaN and garbage"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "the GPU has it"
    if torch.cuda.get_device_capability() >= (7, 0):
        return "fp16", "the GPU has no bf16 of its own; with a loss scaler"
    return "fp32", "the GPU is fast at neither bf16 nor fp16"


def device_name(device: str) -> str:
    """What a model card calls it: the GPU's name, or the CPU's with its threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    if device == "mps":
        return f"Apple {cpu} (MPS)"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{cpu}, {torch.get_num_threads()} threads"


def matmul_flops(device: str, precision: str) -> float:
    """The device's matrix-product rate in FLOP/s, measured for a moment: what model FLOP use is a fraction of."""
    n = {"cuda": 8192, "mps": 4096}.get(device, 1024)
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    best = float("inf")
    for _ in range(12):  # the first ones warm up
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronize(device: str) -> None:
    """Waits until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def flops_per_token(config: GPTConfig, n_params_in_products: int) -> float:
    """Floating-point operations of a training token, forward and backward, counted as in arXiv:2204.02311, B."""
    return 6 * n_params_in_products + 12 * config.n_layer * config.n_embd * config.block_size


def training_bytes(config: GPTConfig, n_params: int, micro_batch_size: int, precision: str) -> int:
    """A first estimate of a training step's memory: weights, gradients and two moments in fp32, and activations.

    Kept for the backward pass of one token and layer: about 18 vectors of n_embd (inputs of the norms, of the linear
    layers and of the activation, at a feed-forward of 4 n_embd), and, once, the logits with their gradient in fp32.
    """
    per_token = config.n_layer * (10 * config.n_embd + 2 * config.ffn_width) * BYTES[precision]
    per_token += 2 * config.vocab_size * 4
    return 16 * n_params + micro_batch_size * config.block_size * per_token


def memory_bytes(device: str) -> int | None:
    """The device's whole memory, where it can be asked."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device (or the machine) had no room left."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )
