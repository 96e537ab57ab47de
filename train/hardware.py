"""What the run computes on: device and precision, chosen and explained, the matrix rate, and the memory it takes."""

import ctypes
import mmap
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from nanogpt_hub.model import GPTConfig

from .attention import SHORT
from .loss import count_chunks

WIDE = 128  # n_embd from which on a CPU that is fast at bf16 gains more by it than it loses by the conversions
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(asked: str, device: str) -> None:
    """Raises ValueError for a precision that the device would silently not use."""
    if asked == "fp16" and device != "cuda":
        raise ValueError(f"precision fp16 needs a CUDA device (its loss scaling does nothing on {device}); use fp32")
    if asked == "bf16" and device == "mps":
        raise ValueError("precision bf16 is not reliable on MPS; use fp32")


def choose_precision(asked: str, device: str, n_embd: int) -> tuple[str, str]:
    """fp32, bf16 or fp16 for a model of this width, and why. Raises ValueError as `check_precision` does."""
    check_precision(asked, device)
    if asked != "auto":
        return asked, "as asked"
    if device == "cpu":
        if not has_fast_bf16("cpu"):
            return "fp32", "the CPU is not fast at bf16"
        if n_embd < WIDE:
            return "fp32", f"below n_embd {WIDE} this CPU is no faster in bf16"
        return "bf16", "the CPU is fast at it"
    if device == "mps":
        return "fp32", "on MPS the half precisions have given NaN and garbage"
    if has_fast_bf16("cuda"):
        return "bf16", "the GPU has it"
    if torch.cuda.get_device_capability() >= (7, 0):
        return "fp16", "the GPU has no bf16 of its own; with a loss scaler"
    return "fp32", "the GPU is fast at neither bf16 nor fp16"


def has_fast_bf16(device: str) -> bool:
    """Whether products in bf16 are at least twice as fast as in fp32: on GPUs that have them; on CPUs with AMX, and
    AMD's with AVX512-BF16 (Intel's without AMX have the instructions, but no more speed)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    amd = "AMD" in cpu.get("cpu_name", "")
    return device == "cpu" and bool(cpu.get("amx_bf16") or (amd and cpu.get("avx512_bf16")))


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
    best, begun = float("inf"), time.perf_counter()
    for _ in range(12):  # the first ones warm up
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > 1:  # a CPU without bf16 takes seconds for one such product
            break
    return 2 * n**3 / best


def synchronize(device: str) -> None:
    """Waits until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def seed_dropout(device: str, seed: int) -> None:
    """Sets the random state of the CPU and of the device. (torch.manual_seed also asks after all other kinds of device,
    in a millisecond that a small step would notice.)"""
    torch.default_generator.manual_seed(seed)
    if device != "cpu":
        getattr(torch, device).manual_seed(seed)


def flops_per_token(config: GPTConfig, n_params_in_products: int) -> float:
    """Floating-point operations of a training token, forward and backward, counted as in arXiv:2204.02311, B. Of a
    mixture of experts, those that a token does not take cost it nothing."""
    n_params_in_products -= idle_parameters(config)
    return 6 * n_params_in_products + 12 * config.n_layer * config.n_embd * config.block_size


def idle_parameters(config: GPTConfig) -> int:
    """The weights of the experts that a token does not take; 0 for a dense model."""
    if not config.n_expert:
        return 0
    expert = (3 if config.activation == "swiglu" else 2) * config.n_embd * config.ffn_width
    return config.n_layer * (config.n_expert - config.n_expert_per_tok) * expert


def training_bytes(
    config: GPTConfig,
    n_params: int,
    micro_batch_size: int,
    precision: str,
    recompute: bool = False,
    short_attention: bool = False,
    shards: int = 1,
    replicas: int = 1,
) -> int:
    """An estimate of a training step's memory, without dropout: what is there for each parameter, token and logit.

    Parameters: see `parameter_bytes`. Tokens: what the blocks keep for the backward pass, or, where they `recompute`,
    their inputs and what one of them keeps. Logits: those of one chunk, their logarithmic softmax and its copies in the
    precision of the products. shards: over how many devices the model is cut; replicas: how many hold it whole.
    """
    tokens = micro_batch_size * config.block_size
    kept = bytes_kept_by_block(config, precision, short_attention)
    blocks = 4 * config.n_embd * config.n_layer + kept if recompute else kept * config.n_layer
    ends = 12 * config.n_embd  # the embedding, the last norm, and the gradient that comes back to it
    logits = 12 * config.vocab_size * tokens // count_chunks(tokens, config.vocab_size)
    per_parameter = sum(parameter_bytes(config, n_params, precision, shards, replicas).values())
    return per_parameter + tokens * (blocks + ends) + logits


def parameter_bytes(
    config: GPTConfig, n_params: int, precision: str, shards: int = 1, replicas: int = 1
) -> dict[str, int]:
    """What a device holds for the parameters, by part: weights, gradients and two moments in fp32, in half precision a
    copy of the weights, and with several `replicas` the buckets in which they exchange gradients (DDP). Cut over
    `shards` devices, each part of these is one device's, and beside it lie whole: the embeddings and the head with
    their gradients, and two blocks, of which one has its gradients.
    """
    if shards == 1:
        parts = {"weights": 4 * n_params, "gradients": 4 * n_params, "optimizer": 8 * n_params}
        parts |= {} if precision == "fp32" else {f"weights in {precision}": 2 * n_params}
        return parts | ({"gradient buckets": 4 * n_params} if replicas > 1 else {})
    part = -(-n_params // shards)
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.n_embd
    tables = min(n_params, tables + (config.block_size * config.n_embd if config.position == "learned" else 0))
    block = (n_params - tables) // config.n_layer
    gathered = 8 * tables + 3 * BYTES[precision] * block
    return {"weights": 4 * part, "gradients": 4 * part, "optimizer": 8 * part, "gathered weights": gathered}


def bytes_kept_by_block(config: GPTConfig, precision: str, short_attention: bool = False) -> int:
    """What a block keeps of one token for the backward pass: the inputs of all that is not linear in them, and where
    attention.py serves, the weights of attention."""
    C, G = config.n_embd, config.kv_heads * config.head_dim
    norms = (1 if config.parallel_residual else 2) * C  # the residual stream, always in fp32
    norms += 2 * C if config.norm == "rms" and config.norm_weight else 0  # before the scale
    products = 3 * C  # what c_attn, attention's c_proj and c_fc read
    attention = C + 2 * G + (C + G) * ((config.position == "rotary") + config.qk_norm)  # q, k, v; q and k turned
    if short_attention and config.block_size <= SHORT.get(DTYPES[precision], 0):  # its own q, k and v, and the weights
        attention = 3 * C + (C + G) * config.qk_norm + config.n_head * config.block_size
    mlp = config.ffn_width * (4 if config.activation == "swiglu" else 2)  # before and after the activation
    if config.n_expert:  # a token goes through several, what each of them reads and gives is kept too
        mlp = config.n_expert_per_tok * (mlp + 2 * C)
    return 4 * norms + BYTES[precision] * (products + attention + mlp)


def memory_bytes(device: str) -> int | None:
    """The device's whole memory, where it can be asked; of the machine's, what a container lets this process have."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return min([have, *cgroup_limits()])


def cgroup_limits(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The memory limits in bytes that Linux sets for this process's group and those around it, of either version."""
    try:
        groups = [line.split(":", 2) for line in proc.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    limits = []
    for _, kinds, name in (group for group in groups if len(group) == 3):
        if kinds not in ("", "memory"):
            continue
        top, file = (root / "memory", "memory.limit_in_bytes") if kinds else (root, "memory.max")
        place = top / name.lstrip("/")
        for folder in (place, *place.parents):
            if folder.is_relative_to(top):
                limits += read_number(folder / file)
    return limits


def read_number(path: Path) -> list[int]:
    """The number in a file of the kernel's, if there is one (without a limit it says "max")."""
    try:
        return [int(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []


def local_world_size() -> int:
    """How many processes of this run are on this machine, as torchrun and accelerate say."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def keep_freed_memory(n_bytes: int) -> bool:
    """Lets a run on a CPU use the same memory in each step, in large pages; returns whether it can (Linux, glibc).

    By itself glibc returns what is large to the system when it is freed, and gets it anew, a page fault for each 4 KiB,
    in the next step. Here `n_bytes` are taken at once, marked for pages of 2 MiB (which is no use of memory yet), and
    freed without returning them. A training step at 6 x 384 took a tenth less time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for option, value in ((M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0)):  # return nothing, no block outside of the heap
        if not libc.mallopt(option, value):
            return False
    block = libc.malloc(n_bytes + page)
    if block:
        libc.madvise(-(-block // page) * page, n_bytes // page * page, mmap.MADV_HUGEPAGE)
        libc.free(block)
    return bool(block)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device (or the machine) had no room left."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )
