"""What a run will cost, computed from its config before anything is downloaded or built.

    python -m train.cost configs/gpt2_124m_openwebtext.yaml --devices 8xH100
    python -m train.cost configs/quickstart.yaml                       # this machine, its matrix rate measured
    python -m train.cost configs/quickstart.yaml --devices 1xT4 --price 0.40
    python -m train.cost configs/gpt2_1558m_openwebtext.yaml --devices 8xH100 --parallel.shard true

(`nanogpt-hub plan` is the same.) Parameters, memory of a device by part, tokens, floating-point operations, hours at an
assumed MFU, and a price where a rate is given. Memory is the trainer's own estimate (train/plan.py).
"""

import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

from jsonargparse import Namespace

from nanogpt_hub.model import GPTConfig
from nanogpt_hub.system.devices import choose_device
from nanogpt_hub.system.readable import duration, size

from .config import TrainConfig, make_parser, parse
from .hardware import (
    choose_precision,
    flops_per_token,
    matmul_flops,
    memory_bytes,
    parameter_bytes,
    training_bytes,
)
from .plan import ROOM, count_parameters, divisors

PROG = f"python -m {__package__}.cost"  # as it is typed; `nanogpt-hub` gives its own
MFU = 0.4  # of a GPU, where none is given: what well-tuned runs of this size reach
MFU_HERE = 0.5  # of the measured matrix rate, where the run is on this machine
TOKENS_PER_PARAMETER = 20  # compute-optimal (arXiv:2203.15556)
GPT2_VOCABULARY = 50257
SMALL_ON_A_GPU = 50 * 10**6  # parameters, below which a step is too short to keep a GPU at work


class Device(NamedTuple):
    """An accelerator by its maker's data sheet."""

    flops: float  # dense products a second, bfloat16 (float16 for T4)
    memory: int  # bytes


GB = 10**9
DEVICES = {
    "T4": Device(65e12, 16 * GB), "L4": Device(121e12, 24 * GB), "RTX4090": Device(165e12, 24 * GB),
    "A100": Device(312e12, 80 * GB), "H100": Device(989e12, 80 * GB), "H200": Device(989e12, 141 * GB),
    "B200": Device(2250e12, 180 * GB),
}  # fmt: skip


class Cost(NamedTuple):
    """What `cost_of` finds: bytes, seconds, counts."""

    n_params: int
    tokens: int
    flops: float  # of the whole run
    parts: dict[str, int]  # bytes on each device
    seconds: float
    devices: int
    name: str  # of the device
    memory: int | None  # bytes of one device
    sharded: bool = False  # the model is cut over the devices

    @property
    def needed(self) -> int:
        return sum(self.parts.values())


def parse_devices(text: str) -> tuple[int, str]:
    """ "8xH100" as (8, "H100"), "here" as (1, "here"). Raises ValueError for a device that is not in the table."""
    match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?([A-Za-z]\w*)", text.strip())
    names = {name.lower(): name for name in [*DEVICES, "here"]}
    if not match or match[2].lower() not in names or match[1] == "0":
        raise ValueError(f"devices is {text!r}; write a number and one of {', '.join(DEVICES)}, as in 8xH100, or here")
    return int(match[1] or 1), names[match[2].lower()]


def vocabulary_size(config: TrainConfig) -> int:
    """The model's vocabulary, as far as the config tells without the text."""
    if config.model.vocab_size:
        return config.model.vocab_size
    kind, _, number = config.data.tokenizer.partition(":")
    known = {"gpt2": GPT2_VOCABULARY, "byte": 257, "char": 100}.get(kind) or (int(number) if number.isdigit() else 0)
    return known or GPT2_VOCABULARY


def memory_parts(
    config: TrainConfig, shape: GPTConfig, n_params: int, micro: int, precision: str, devices: int = 1
) -> dict[str, int]:
    """Bytes of a step on one device: what lies there for each parameter, and for the tokens of a micro-batch."""
    recompute = config.activation_checkpointing
    shards, replicas = (devices, 1) if config.parallel.shard else (1, devices)
    whole = training_bytes(shape, n_params, micro, precision, recompute, shards=shards, replicas=replicas)
    parts = parameter_bytes(shape, n_params, precision, shards, replicas)
    return {**parts, f"activations of {micro} x {shape.block_size} tokens": whole - sum(parts.values())}


def cost_of(config: TrainConfig, devices: int, name: str, mfu: float = 0.0) -> Cost:
    """The cost of a run on so many devices of a kind; mfu 0 takes the usual. Raises ValueError for an uneven batch."""
    if config.batch_size % devices:
        raise ValueError(
            f"batch_size {config.batch_size} cannot be divided among {devices} devices: choose a multiple of {devices}"
        )
    shape = config.model.gpt_config(vocabulary_size(config))
    if name == "here":
        device = choose_device(config.device)
        precision, _ = choose_precision(config.precision, device, shape.n_embd)
        rate, memory, usual = matmul_flops(device, precision), memory_bytes(device), MFU_HERE
    else:
        precision = "bf16" if config.precision == "auto" else config.precision
        rate, memory, usual = DEVICES[name].flops, DEVICES[name].memory, MFU
    n_params, each = count_parameters(shape), config.batch_size // devices
    micros = [config.micro_batch_size] if config.micro_batch_size else list(divisors(each))
    fitting = (
        parts
        for parts in (memory_parts(config, shape, n_params, micro, precision, devices) for micro in micros)
        if not memory or sum(parts.values()) <= ROOM * memory
    )
    parts = next(fitting, None) or memory_parts(config, shape, n_params, micros[-1], precision, devices)
    tokens = config.max_steps * config.batch_size * shape.block_size
    flops = flops_per_token(shape, count_parameters(shape, embeddings=False)) * tokens
    seconds = flops / (devices * rate * (mfu or usual))
    sharded = config.parallel.shard and devices > 1
    return Cost(n_params, tokens, flops, parts, seconds, devices, name, memory, sharded)


def lines(cost: Cost, mfu: float, price: float) -> Iterator[str]:
    """The cost for people."""
    best = TOKENS_PER_PARAMETER * cost.n_params
    yield f"parameters   {cost.n_params:,}"
    yield f"tokens       {cost.tokens:,} ({cost.tokens / best:.2g} of the {best:,} that are compute-optimal)"
    yield f"work         {cost.flops:.3g} floating-point operations"
    for part, n_bytes in cost.parts.items():
        yield f"memory       {size(n_bytes):>9} {part}"
    have = f" of {size(cost.memory)}" if cost.memory else ""
    fits = not cost.memory or cost.needed <= ROOM * cost.memory
    yield f"             {size(cost.needed):>9} on each device{have}" + ("" if fits else ": it does not fit")
    if not fits and cost.devices > 1 and not cost.sharded:
        yield "             --parallel.shard true cuts weights and optimizer over the devices"
    hours = cost.seconds / 3600
    place = "this machine" if cost.name == "here" else f"{cost.devices} x {cost.name}"
    usual = mfu or (MFU_HERE if cost.name == "here" else MFU)
    yield f"time         {duration(cost.seconds)} on {place} at an assumed MFU of {usual:.0%}"
    if cost.name != "here" and cost.n_params < SMALL_ON_A_GPU:
        yield "             a model this small keeps a GPU waiting for Python: expect several times as long"
    if price:
        yield f"price        {hours * cost.devices * price:,.2f} at {price:,.2f} per device and hour"


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """The command: returns its exit status, with a sentence on standard error where it is not 0."""
    parser = make_parser(prog, "What a run will cost: memory, tokens, time, price.")
    parser.add_argument("--devices", default="here", help=f"as in 8xH100: one of {', '.join(DEVICES)}, or here")
    parser.add_argument("--mfu", type=float, default=0.0, help="part of the device's matrix rate; 0 takes the usual")
    parser.add_argument("--price", type=float, default=0.0, help="what one device costs in an hour")
    config, parsed = parse(parser, argv)
    try:
        return show(config, parsed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def show(config: TrainConfig, parsed: Namespace) -> int:
    if not 0 <= parsed.mfu <= 1 or parsed.price < 0:
        raise ValueError(f"mfu is {parsed.mfu} and price {parsed.price}; mfu must be in [0, 1], price at least 0")
    if config.minutes:
        raise ValueError(f"minutes is {config.minutes}: the run sets its own steps; give --max_steps to plan them")
    cost = cost_of(config, *parse_devices(parsed.devices), mfu=parsed.mfu)
    for line in lines(cost, parsed.mfu, parsed.price):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
