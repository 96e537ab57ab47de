"""The processes of a run: how they start, agree and end together, whether or not they see the same disk.

What lies on a disk is read by the main process (rank 0) alone and sent to the others, so a node needs no copy of a
run's folder. One error is said once: by the process that meets it first. A process whose peer has ended or hangs ends
with a sentence, after `parallel.timeout_minutes` at the latest.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from .config import TrainConfig
from .folder import what_is_safe

T = TypeVar("T")
GRACE = 30.0  # seconds that a collective gets to report its own timeout, before the watchdog ends the process
LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out|socket|gloo|heartbeat|remote process", re.IGNORECASE
)


class OtherProcessError(ValueError):
    """What a process raises for an error that another one says."""


# ---- starting --------------------------------------------------------------------------------------------------------


def from_launcher(config: TrainConfig) -> TrainConfig:
    """The config with what `accelerate launch` asks for by FSDP: its settings reach a process as variables.

    Accelerate itself would wrap the model another way, and not at all on CPUs, so it is not told. Raises ValueError for
    a setting that would be ignored.
    """
    if not is_set("ACCELERATE_USE_FSDP"):
        return config
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("the launcher asks for FSDP 1, and this trainer has FSDP 2: set fsdp_version: 2 in its config")
    if is_set("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("the launcher asks for fsdp_offload_params, which this trainer does not do: set it to false")
    del os.environ["ACCELERATE_USE_FSDP"]
    recompute = config.activation_checkpointing or is_set("FSDP_ACTIVATION_CHECKPOINTING")
    return replace(config, activation_checkpointing=recompute, parallel=replace(config.parallel, shard=True))


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def init_processes(config: TrainConfig, device: str) -> PartialState:
    """This process among those of the run."""
    wait = timedelta(minutes=config.parallel.timeout_minutes)
    # NCCL aborts the process without a sentence when its time is over, so the watchdog goes first.
    return PartialState(cpu=device == "cpu", timeout=wait if device == "cpu" else wait + timedelta(seconds=2 * GRACE))


def launch_notes(config: TrainConfig) -> list[str]:
    """What the way in which the processes were started does not do, though it was asked for."""
    if PartialState().num_processes > 1:
        return []
    notes = []
    if is_set("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        notes.append(
            "warning: accelerate launch starts one process on a CPU, whatever --num_processes says; for several, use "
            "torchrun --nproc_per_node, or configs/accelerate/two_cpu_processes.yaml"
        )
    if config.parallel.shard:
        notes.append(
            "warning: parallel.shard does nothing in a single process; start one for each device, as in "
            "torchrun --nproc_per_node 8 -m train.pretrain CONFIG --parallel.shard true"
        )
    return notes


# ---- agreeing --------------------------------------------------------------------------------------------------------


def shared(value: T) -> T:
    """The main process's value, in every process; every process must call it."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, which alone calls it, in every process.

    An error is raised on the main process, and in the others an OtherProcessError with the same text.
    """
    result: Any = None
    error: BaseException | None = None
    if PartialState().is_main_process:
        try:
            result = work()
        except (ValueError, OSError, RuntimeError) as failed:
            error = failed
    result, failed_too = shared((result, None if error is None else str(error)))
    if error is not None:
        raise error
    if failed_too is not None:
        raise OtherProcessError(failed_too)
    return result


def least(value: int) -> int:
    """The smallest of the processes' values, in every process; every process must call it."""
    return min(gather_object([value]))


def check_same(mine: dict[str, Any], what: str) -> None:
    """Raises ValueError in a process whose facts are not the main process's."""
    main = shared(mine)
    differing = {key: (mine.get(key), main.get(key)) for key in {**mine, **main} if mine.get(key) != main.get(key)}
    if differing:
        here, there = ({key: pair[side] for key, pair in differing.items()} for side in (0, 1))
        raise ValueError(f"process {PartialState().process_index} has {what} {here}, and the first one has {there}")


def from_main(tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The main process's tensors by name, one at a time, on the device of each process; the others may give none."""
    if PartialState().num_processes == 1:
        yield from tensors.items()
        return
    for name, shape, dtype in shared([(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]):
        mine = PartialState().is_main_process
        tensor = tensors[name].to(device).contiguous() if mine else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(tensor, src=0)
        yield name, tensor


# ---- ending ----------------------------------------------------------------------------------------------------------


def first_to_say() -> bool:
    """Whether no other process of the run has said yet why it ends. Each process asks once."""
    if not (dist.is_available() and dist.is_initialized()):  # one of each machine, then
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        return store.add("nanogpt_hub/said", 1) == 1
    except RuntimeError:  # the store went with the process that kept it
        return os.environ.get("LOCAL_RANK", "0") == "0"


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception says that another process of the run has ended or does not answer."""
    if not (isinstance(error, RuntimeError) and dist.is_available() and dist.is_initialized()):
        return False
    return isinstance(error, dist.DistError) or bool(LOST.search(str(error)))


def safe_so_far(out: Path) -> str:
    """What of the run is saved, as far as this process can tell: only the main one's disk counts."""
    if PartialState().is_main_process:
        return what_is_safe(out)
    return "The same command goes on from what the first process has saved"


def lost_peer(config: TrainConfig) -> str:
    """The sentence for it."""
    minutes, safe = config.parallel.timeout_minutes, safe_so_far(Path(config.out_dir))
    return f"another process of this run has ended, or has not answered for {minutes:g} minutes. {safe}"


def say_lost(config: TrainConfig) -> None:
    if first_to_say():
        print(f"error: {lost_peer(config)}", file=sys.stderr, flush=True)


class Watchdog:
    """Ends this process, after `last_words`, when `beat` was not called for so long: Python cannot interrupt a
    collective of a GPU, which waits for a process that has ended."""

    def __init__(self, seconds: float, last_words: Callable[[], None]):
        self.seconds, self.last_words = seconds, last_words
        self.last, self.ended = time.monotonic(), threading.Event()

    def __enter__(self) -> "Watchdog":
        self.beat()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def beat(self) -> None:
        self.last = time.monotonic()

    def _watch(self) -> None:
        while not self.ended.wait(min(5.0, self.seconds / 4)):
            if time.monotonic() - self.last > self.seconds:
                self.last_words()
                sys.stderr.flush()
                os._exit(1)
