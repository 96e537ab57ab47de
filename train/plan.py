"""Whether a run fits the machine, computed from its config before a weight is made: memory, and room on the disk."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

from nanogpt_hub.families import empty_model
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.system.devices import choose_device
from nanogpt_hub.system.readable import size

from .config import TrainConfig
from .folder import OUTPUTS, free_bytes
from .hardware import choose_precision, local_world_size, memory_bytes, training_bytes
from .parallel import is_sharded

ENORMOUS = 2**62  # parameters, where their number cannot be computed
ROOM = 0.9  # of a device's memory, for a step; the rest is the runtime's own


def count_parameters(shape: GPTConfig, embeddings: bool = True) -> int:
    """The parameters of a model that is not made, as `GPT.num_params` counts them: those of one block and of two,
    without memory, tell the rest."""
    try:
        one, two = (empty_model(replace(shape, n_layer=n)).num_params(embeddings) for n in (1, 2))
    except (RuntimeError, OverflowError):  # more numbers in a matrix than can be counted
        return ENORMOUS
    return one + (shape.n_layer - 1) * (two - one)


def check_fits(config: TrainConfig, shape: GPTConfig) -> None:
    """Raises ValueError for a model, or a batch, that this machine has no memory for, whatever else is set."""
    n_params = count_parameters(shape)
    device = choose_device(config.device)
    precision, _ = choose_precision(config.precision, device, shape.n_embd)
    here, cut = processes_in_memory_of(device), shards(config)
    trained = n_params if not config.lora.rank else 0
    least = here * (4 * (n_params - trained) // cut + step_bytes(config, shape, trained, 1, precision, device))
    have, host = memory_bytes(device), memory_bytes("cpu")
    if have and least > have:
        raise ValueError(
            f"a model of {n_params:,} parameters does not fit: training it takes {size(least)} at least, and there are "
            f"{size(have)} ({device}); choose a smaller --model.size, --model.n_embd or --model.n_layer, or a shorter "
            "--model.block_size, or cut it over several devices with --parallel.shard true"
        )
    weights = 4 * n_params * (1 if cut > 1 else local_world_size())  # a sharded model is made by the first process
    made = weights + local_world_size() * 16 * config.batch_size * shape.block_size  # and ids and targets
    if host and made > host:
        raise ValueError(
            f"weights and a batch of {config.batch_size:,} x {shape.block_size:,} tokens take {size(made)}, and this "
            f"machine has {size(host)}; choose a smaller --batch_size or --model.size"
        )


def shards(config: TrainConfig) -> int:
    """Over how many devices this run cuts its model."""
    return PartialState().num_processes if is_sharded(config) else 1


def step_bytes(
    config: TrainConfig, shape: GPTConfig, trained: int, micro_batch_size: int, precision: str, device: str
) -> int:
    """An estimate of the memory of a step on one device, without the weights that are not trained."""
    kept: dict[str, bool] = {
        "recompute": config.activation_checkpointing,
        "short_attention": device == "cpu" and config.fast_cpu,
    }
    cut = shards(config)
    replicas = PartialState().num_processes // cut
    return training_bytes(shape, trained, micro_batch_size, precision, **kept, shards=cut, replicas=replicas)


def bytes_needed(config: TrainConfig, gpt: GPT, micro_batch_size: int, precision: str, device: str) -> int:
    """An estimate of the memory of a step; weights that are not trained have neither gradients nor moments."""
    trained = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    frozen = gpt.num_params() - trained
    return 4 * frozen // shards(config) + step_bytes(config, gpt.config, trained, micro_batch_size, precision, device)


def micro_batch_size(config: TrainConfig, gpt: GPT, world: int, precision: str, device: str) -> int:
    """Sequences per forward pass: as the config says, or as many as fit. On a single GPU trying tells better than
    computing. One of several processes cannot try: the others wait for it in the middle of a step. And where memory is
    the machine's own, the system would end a run that takes too much.

    Raises ValueError when the batch does not divide evenly over the processes.
    """
    B, asked = config.batch_size, config.micro_batch_size
    if B % (world * max(1, asked)):
        raise ValueError(
            f"batch_size {B} is not a multiple of {world} processes times micro_batch_size {max(1, asked)}"
        )
    most, have = B // world, memory_bytes(device)
    if asked or not have or (device != "cpu" and world == 1):
        return asked or most
    here = processes_in_memory_of(device)
    fitting = (
        micro for micro in divisors(most)
        if here * bytes_needed(config, gpt, micro, precision, device) <= ROOM * have
    )  # fmt: skip
    return next(fitting, 1)


def divisors(number: int, at_most: int = 0) -> Iterator[int]:
    """What divides `number`, the largest first; with `at_most` only what is no larger."""
    return (part for part in range(at_most or number, 0, -1) if number % part == 0)


def processes_in_memory_of(device: str) -> int:
    """How many processes of this run share the memory of a device: all of a machine, where that is the machine's."""
    return 1 if device == "cuda" else local_world_size()


def memory_line(needed: int, device: str) -> str:
    """What a step takes of what there is, and a word where that is not enough."""
    have, here = memory_bytes(device), processes_in_memory_of(device)
    line = f"memory: about {size(needed)}" + (f" of {size(have)}" if have else "")
    if here > 1:
        line += f", in each of {here} processes"
    if have and here * needed > have:
        line += "; that is more than there is: set a smaller --micro_batch_size, or --activation_checkpointing true"
    return line


def save_bytes(gpt: GPT, optimizer: torch.optim.Optimizer) -> int:
    """What one training state takes on the disk: weights and what the optimizer keeps for each of them, in fp32."""
    averages = sum(
        p.numel() * (4 if group.get("muon") else 8) for group in optimizer.param_groups for p in group["params"]
    )
    return 4 * sum(p.numel() for p in gpt.parameters()) + averages


def check_disk(out: Path, gpt: GPT, state_bytes: int, fresh: bool) -> str:
    """A line that says what the run takes on the disk. Raises ValueError where not even one save would fit.

    best/ and last/, the state and the one before it, and while it is written a third.
    """
    model, free = 4 * gpt.num_params(), free_bytes(out)
    if fresh:  # what lies there goes first
        free += sum(path.stat().st_size for name in OUTPUTS for path in (out / name).rglob("*") if path.is_file())
    first, whole = 2 * model + state_bytes if fresh else state_bytes, 2 * model + 3 * state_bytes
    if first > free:
        raise ValueError(
            f"the disk of {out} has {size(free)} left, and a save of this run takes {size(first)}: make room, or "
            "choose an --out_dir on another disk"
        )
    line = f"disk: {size(whole)} at most, {size(free)} free"
    return line + ("; that is not enough for all saves: make room" if fresh and whole > free else "")
