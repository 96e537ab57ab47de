"""Peak memory of one training step: ours, plain and with recomputed blocks, and nanoGPT's, the same architecture.

    python -m benchmarks.memory [--nanogpt DIR] [--preset gpt2] [--size 124m] [--batch 12]

*Computed* is the step run on tensors without contents: every allocation of every operation is counted, in bf16, with
weights, gradients and AdamW's moments in fp32. *Measured* is the same step in earnest, in a process of its own: on a
GPU the peak of the allocator, on a CPU (at the size 1m with GPT-2's vocabulary, in fp32) the growth of the process,
beside what is computed for that. nanoGPT's step holds on to the logits, as the loop of its train.py does.
"""

import argparse
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import in_fresh_process, process_peak, report
from benchmarks.peers import nanogpt_module
from nanogpt_hub.families import empty_model
from nanogpt_hub.model import GPT, PRESETS, SIZES, GPTConfig
from train.hardware import training_bytes
from train.loss import recompute_blocks
from train.trainer import LossOnly

WAYS = ("nanoGPT", "ours", "ours, blocks recomputed")
SMALL = {"preset": "gpt2", "size": "1m", "batch": 16, "block_size": 256, "precision": "fp32"}  # for a CPU


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, from their making until they are freed."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}  # by storage
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._note(t.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def model_of(way: str, config: GPTConfig, nanogpt: Path | None) -> nn.Module:
    """What is called with ids and targets and gives the loss, alone or last."""
    if way == "nanoGPT":
        module = nanogpt_module(nanogpt)
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        return module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in names}))
    gpt = GPT(config)
    if way != "ours":
        recompute_blocks(gpt)
    return LossOnly(gpt)


def run_steps(make: Callable[[], nn.Module], config: GPTConfig, batch: int, precision: str, device: str) -> None:
    """Two steps: from the second on the moments are there."""
    with torch.device(device):
        model = make()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    idx, targets = torch.randint(config.vocab_size, (2, batch, config.block_size), device=device)
    for _ in range(2):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            out = model(idx, targets)
        (out[-1] if isinstance(out, tuple) else out).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def computed_bytes(way: str, config: GPTConfig, batch: int, precision: str, nanogpt: Path | None) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True), Allocations() as allocations:
        run_steps(lambda: model_of(way, config, nanogpt), config, batch, precision, "cpu")
    return allocations.peak


def measured_bytes(way: str, config: GPTConfig, batch: int, precision: str, nanogpt: Path | None) -> int:
    """In this process, which must be a fresh one: a process's peak never falls."""
    if torch.cuda.is_available():
        run_steps(lambda: model_of(way, config, nanogpt), config, batch, precision, "cuda")
        return torch.cuda.max_memory_allocated()
    tiny = GPTConfig(vocab_size=8, block_size=8, n_layer=1, n_head=1, n_embd=8)  # whatever is loaded on first use
    run_steps(lambda: LossOnly(GPT(tiny)), tiny, 1, precision, "cpu")
    before = process_peak()
    run_steps(lambda: model_of(way, config, nanogpt), config, batch, precision, "cpu")
    return process_peak() - before


def config_of(case: dict) -> GPTConfig:
    activation = {"activation": "gelu"} if case["preset"] == "gpt2" else {}  # nanoGPT's is the exact one
    block = {"block_size": case["block_size"]} if case.get("block_size") else {}
    return GPTConfig.preset(case["preset"], case["size"], vocab_size=50304, **activation, **block)


def rows_of(case: dict, ways: list[str], nanogpt: Path | None, measured: bool) -> list[dict[str, object]]:
    config, batch, precision, rows = config_of(case), case["batch"], case["precision"], []
    for way in ways:
        row = {"step": f"{case['preset']} {case['size']}, {batch} x {config.block_size}, {precision}", "way": way}
        row["computed, GB"] = computed_bytes(way, config, batch, precision, nanogpt) / 1e9
        if nanogpt:
            row["part of nanoGPT's"] = row["computed, GB"] / (rows or [row])[0]["computed, GB"]
        given = json.dumps({"way": way, "nanogpt": str(nanogpt) if nanogpt else None, **case})
        row["measured, GB"] = in_fresh_process("benchmarks.memory", "--one", given) / 1e9 if measured else "-"
        row["planned, GB"] = "-" if way == "nanoGPT" else planned(config, batch, precision, way != "ours") / 1e9
        rows.append(row)
    return rows


def planned(config: GPTConfig, batch: int, precision: str, recompute: bool) -> int:
    """What the trainer says before it starts."""
    return training_bytes(config, empty_model(config).num_params(), batch, precision, recompute)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--preset", choices=PRESETS, default="gpt2", help="gpt2 has nanoGPT's architecture")
    parser.add_argument("--size", choices=SIZES, default="124m")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the fresh process
    args = parser.parse_args()
    if args.one:
        case = json.loads(args.one)
        nanogpt = Path(case["nanogpt"]) if case["nanogpt"] else None
        print(measured_bytes(case["way"], config_of(case), case["batch"], case["precision"], nanogpt))
        return
    ways = [way for way in WAYS if args.nanogpt or way != "nanoGPT"]
    case = {"preset": args.preset, "size": args.size, "batch": args.batch, "precision": "bf16"}
    rows = rows_of(case, ways, args.nanogpt, measured=torch.cuda.is_available())
    if not torch.cuda.is_available():
        rows += rows_of(SMALL, ways, args.nanogpt, measured=True)
    report("memory", rows)


if __name__ == "__main__":
    main()
