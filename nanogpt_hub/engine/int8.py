"""Weights in 8 bits, for generating with larger models on a CPU: a quarter of the bytes to read for each token.

    small = quantize_int8(model)                 # a new model; norms, embeddings and biases are shared with the old one
    generate(small, tokenizer, "To be, or")

Each output of a linear layer has its own scale for its weights, each token its own for what goes in; sums are exact
integers. So a token's numbers do not depend on what else is in its batch. The embeddings stay as they are, and so do
the routers of a mixture of experts, in which a little error would send a token elsewhere; a head that is tied to the
embeddings becomes a copy in 8 bits. Saved folders stay whole: save the model that this one was made of.

Small models gain nothing: what their tokens cost is calls, not bytes.
"""

import copy
import warnings

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanogpt_hub.model import GPT

LEVELS = 127  # of either sign
OFFSET = 128  # more than a weight is the byte that stands for it
LINE = 64  # bytes that memory gives at once
TINY = 1e-20  # in place of the zero that is the peak of a row of zeros


class Int8Linear(nn.Module):
    """A linear layer with weights (O, I) of 8 bits, for inputs (B, ..., I) in float32 on a CPU.

    They are here twice: `packed` for PyTorch's kernel, which several tokens go through, and as loops.py reads them, for
    few tokens: as bytes `weight` (O, I padded to whole lines of memory), each with its row's `scale` (O,).
    """

    def __init__(self, linear: nn.Linear, input_levels: int = LEVELS):
        super().__init__()
        self.input_levels, self.bias = input_levels, linear.bias
        rounded = round_weights(linear.weight.detach().float())
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.scale = rounded.q_per_channel_scales().float()
        weight = nn.functional.pad(rounded.int_repr().short() + OFFSET, (0, -linear.in_features % LINE), value=OFFSET)
        self.weight = weight.to(torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        peak = x.abs().amax(-1, keepdim=True).clamp_min_(TINY)  # (..., 1)
        y = int8_product(x / peak, self.packed, self.input_levels)
        return y * peak if self.bias is None else torch.addcmul(self.bias, y, peak)

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        raise ValueError("an int8 model is for generating only; save the model that it was made of")


def round_weights(weight: Tensor) -> Tensor:
    """Weights (O, I) rounded to 8 bits, a scale for each output."""
    scale = weight.abs().amax(1).clamp_min(TINY) / LEVELS
    with warnings.catch_warnings():  # PyTorch will drop quantized tensors one day: quantize_int8 is ready for that
        warnings.filterwarnings("ignore", message=".*deprecated", category=UserWarning)
        return torch.quantize_per_channel(weight, scale, torch.zeros_like(scale).int(), 0, torch.qint8)


def int8_product(x: Tensor, packed: torch.ScriptObject, levels: int) -> Tensor:
    """x (B, ..., I) within [-1, 1], rounded to steps of 1 / levels, times packed weights (O, I): (B, ..., O)."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1 / levels, levels + 1, packed)


def exact_levels() -> int:
    """How many levels of input this CPU can multiply without overflow. RuntimeError where it has no int8 kernel.

    CPUs without VNNI add two products in 16 bits, which large numbers overflow: they get inputs of 7 bits.
    """
    packed = torch.ops.quantized.linear_prepack(round_weights(torch.full((16, 64), float(LEVELS))), None)  # scale 1
    exact = int8_product(torch.ones(1, 64), packed, LEVELS)[0, 0].item() == 64 * LEVELS
    return LEVELS if exact else LEVELS // 2


def quantize_int8(model: GPT) -> GPT:
    """A copy of a model on a CPU for generating, its linear layers in 8 bits; the model itself stays as it is.

    Where this machine or this PyTorch cannot do it, the copy is as it was, and a RuntimeWarning says so. Raises
    ValueError for a model on another device or not in float32.
    """
    weight = model.wte.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"int8 needs a float32 model on the CPU, and this one is {dtype} on {weight.device}")
    result = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # the parameters are shared, not copied
    places = [(parent, name) for parent in result.modules() for name, child in parent.named_children()
              if isinstance(child, nn.Linear) and name != "router"]  # fmt: skip
    try:
        levels = exact_levels()
        for parent, name in tqdm(places, desc="int8", unit="layer", delay=1, leave=False):
            setattr(parent, name, Int8Linear(getattr(parent, name), levels))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        warnings.warn(f"no int8 on this machine, going on in float32: {error}", RuntimeWarning, stacklevel=2)
        return copy.deepcopy(model, {id(p): p for p in model.parameters()})
    return result.eval()
