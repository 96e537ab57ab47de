"""A model cut over the processes of a run (FSDP2), for one whose weights and optimizer state no device holds alone.

    torchrun --nproc_per_node 8 -m train.pretrain CONFIG --parallel.shard true

Names and shapes stay as they are: a parameter becomes a DTensor, of which each process holds some rows, with the
gradients and the optimizer's moments of these rows. The weights of an attention or feed-forward layer are gathered
(all-gather) when it computes and freed behind it; its gradients are summed and cut (reduce-scatter) at once. What goes
into a file is whole again, on the main process, so no file tells how many processes wrote it.

PyTorch's modules for this take a second to import, which other runs save: so they are imported where they are needed.
"""

import copy
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
from accelerate import PartialState
from torch import Tensor, nn

from nanogpt_hub.edits.core import blocks_of, running_core
from nanogpt_hub.model import GPT, Norm

from .config import TrainConfig
from .processes import from_main

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(config: TrainConfig) -> bool:
    """Whether this run cuts its model."""
    return config.parallel.shard and PartialState().num_processes > 1


def gets_weights_later(config: TrainConfig) -> bool:
    """Whether this process starts from a model without memory: of a sharded one, the main process alone makes the
    first weights, and `shard` hands them out."""
    return is_sharded(config) and not PartialState().is_main_process


def shard(loss_of: nn.Module, gpt: GPT, device: torch.device, dtype: torch.dtype) -> GPT:
    """Cuts `gpt`, the model inside of `loss_of`, in place, with the main process's weights, which are sent one by one:
    a device holds its part and one whole parameter. Every process must call it.

    dtype: of the gathered weights of attention and feed-forward layers, whose products autocast takes in it anyway; the
    embeddings, the norms and the head, and all sums of gradients, stay in float32. Returns the model without memory,
    for `whole_model`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    weights = {name: p.detach() for name, p in gpt.named_parameters()} if PartialState().is_main_process else {}
    tied(gpt.to("meta"))
    empty = copy.deepcopy(gpt)
    if not running_core(gpt).changed:  # it adds nothing in place to what a layer returns, of which PyTorch warns
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    if device.type == "cpu":  # gloo gathers where NCCL exchanges, and PyTorch says so in each process
        logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
    mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers_of(gpt):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(loss_of, mesh=mesh)
    if device.type == "cpu":  # gloo has no mean: PyTorch 2.8 took the sum for it
        for module in (loss_of, *layers_of(gpt)):
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # as in `reshard`
    loss_of.to_empty(device=device)
    tied(gpt)
    named = dict(gpt.named_parameters())
    with torch.no_grad():
        for name, tensor in from_main(weights, device):
            named[name].copy_(cut_as(tensor, named[name]))
    return empty


def layers_of(gpt: GPT) -> list[nn.Module]:
    """What is gathered at a time: attention and feed-forward of each block."""
    return [layer for block in blocks_of(gpt) for layer in block.children() if not isinstance(layer, Norm)]


def compile_layers(gpt: GPT) -> None:
    """Compiles each layer of a sharded model by itself: gathering and freeing its weights stays around it."""
    for layer in layers_of(gpt):
        layer.forward = torch.compile(layer.forward, dynamic=False)


def tied(gpt: GPT) -> GPT:
    """The model, whose head is its embedding again, where moving it has made two of them."""
    if gpt.config.tie_word_embeddings:
        gpt.lm_head.weight = gpt.wte.weight
    return gpt


def reshard(loss_of: nn.Module) -> None:
    """Frees what an evaluation has gathered and kept for a backward pass that does not come."""
    loss_of.reshard()  # type: ignore[operator]  # fully_shard has made it an FSDPModule


# ---- whole and cut ---------------------------------------------------------------------------------------------------


def is_cut(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is cut over the processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor, without a copy; all of them, where it is not cut."""
    return tensor.to_local() if is_cut(tensor) else tensor


def cut_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut as the parameter is; one of another shape is returned as it is."""
    if not is_cut(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole and on the CPU, on the main process; {} on the others. Every process must call it."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if is_cut(tensor) else tensor
        if PartialState().is_main_process:
            found[name] = full.detach().cpu()
    return found


def whole_model(gpt: GPT, empty: GPT) -> GPT:
    """A copy of a sharded model on the CPU of the main process; without memory on the others. Every process must call
    it. empty: what `shard` returned."""
    weights = whole_tensors(dict(gpt.named_parameters()))
    if not weights:
        return empty
    model = tied(copy.deepcopy(empty))
    model.load_state_dict(weights, strict=False, assign=True)  # a tied head is listed once
    return tied(model).eval()


def by_whole_matrices(matrices: list[Tensor], update: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """This process's rows of `update` of each of N equal sharded matrices (rows, columns).

    `update` gets (n, rows, columns): a process computes some of the matrices, whole, and no matrix is computed twice.
    """
    from torch.distributed.tensor import DTensor, Shard

    first = matrices[0]
    assert isinstance(first, DTensor)
    mesh, shape = first.device_mesh, torch.Size((len(matrices), *first.shape))
    stride = (first.numel(), *first.stride())

    def stack(t: Tensor, dim: int) -> "DTensor":
        return DTensor.from_local(t, mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride)

    mine = stack(torch.stack([local(m) for m in matrices]), 1).redistribute(placements=[Shard(0)]).to_local()
    done = update(mine) if len(mine) else mine
    return list(stack(done.contiguous(), 0).redistribute(placements=[Shard(1)]).to_local().unbind())
