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
import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanogpt_hub.model import GPT

LEVELS = 127  # of either sign
OFFSET = 128  # more than a weight is the byte that stands for it
EXACT = 2**24 // LEVELS**2  # columns whose products add up to an integer that float32 holds
LINE = 64  # bytes that memory gives at once
TINY = 1e-20  # in place of the zero that is the peak of a row of zeros


class PlainWeights(NamedTuple):
    """Weights of 8 bits where PyTorch has no product for them, as on Arm."""

    values: Tensor  # (O, I), whole numbers in float32
    scale: Tensor  # (O,)


class Int8Linear(nn.Module):
    """A linear layer with weights (O, I) of 8 bits, for inputs (B, ..., I) in float32 on a CPU.

    They are here twice: as PyTorch multiplies them (`pack`), for several tokens, and as kernels.py reads them, for few
    tokens: as bytes `weight` (O, I padded to whole lines of memory), each with its row's `scale` (O,).
    """

    def __init__(self, linear: nn.Linear, input_levels: int = LEVELS):
        super().__init__()
        self.input_levels, self.bias = input_levels, linear.bias
        values, self.scale = round_weights(linear.weight.detach().float())
        self.packed = pack(values, self.scale)
        weight = nn.functional.pad(values.short() + OFFSET, (0, -linear.in_features % LINE), value=OFFSET)
        self.weight = weight.to(torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        peak = x.abs().amax(-1, keepdim=True).clamp_min_(TINY)  # (..., 1)
        packed, levels = self.packed, self.input_levels
        if isinstance(packed, PlainWeights):
            y = plain_product(x / peak, packed, levels)
        else:
            y = int8_product(x / peak, packed, levels)
        return y * peak if self.bias is None else torch.addcmul(self.bias, y, peak)

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        raise ValueError("an int8 model is for generating only; save the model that it was made of")


def round_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (O, I) rounded to 8 bits, int8, and the scale of each output (O,)."""
    scale = weight.abs().amax(1).clamp_min(TINY) / LEVELS
    return (weight / scale[:, None]).round().to(torch.int8), scale


def pack(values: Tensor, scale: Tensor) -> torch.ScriptObject | PlainWeights:
    """Weights (O, I) of 8 bits as PyTorch's kernel has them, or, where there is none, for `plain_product`.

    Some builds refuse only the product. PyTorch will drop this kernel one day.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deprecated", category=UserWarning)
            zero = torch.zeros_like(scale).int()
            packed = torch.ops.quantized.linear_prepack(
                torch._make_per_channel_quantized_tensor(values, scale, zero, 0), None
            )
        int8_product(torch.zeros(1, values.size(1)), packed, LEVELS)
    except (RuntimeError, AttributeError, NotImplementedError):
        return PlainWeights(values.float(), scale.clone())
    return packed


def int8_product(x: Tensor, packed: torch.ScriptObject, levels: int) -> Tensor:
    """x (B, ..., I) within [-1, 1], rounded to steps of 1 / levels, times packed weights (O, I): (B, ..., O)."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1 / levels, levels + 1, packed)


def plain_product(x: Tensor, packed: PlainWeights, levels: int) -> Tensor:
    """The same in float32. So many columns at a time that the sums are exact integers, whatever the order of the
    additions: a token's numbers are the same in each batch."""
    parts = zip((x * levels).round().split(EXACT, dim=-1), packed.values.split(EXACT, dim=1), strict=True)
    return functools.reduce(torch.add, (nn.functional.linear(*part) for part in parts)) * (packed.scale / levels)


def exact_levels() -> int:
    """How many levels of input can be multiplied without overflow here.

    PyTorch's kernel adds two products in 16 bits on CPUs without VNNI: there, inputs get 7 bits.
    """
    packed = pack(torch.full((16, 64), LEVELS, dtype=torch.int8), torch.ones(16))
    if isinstance(packed, PlainWeights):
        return LEVELS
    exact = int8_product(torch.ones(1, 64), packed, LEVELS)[0, 0].item() == 64 * LEVELS
    return LEVELS if exact else LEVELS // 2


def quantize_int8(model: GPT) -> GPT:
    """A copy of a model on a CPU for generating, its linear layers in 8 bits; the model itself stays as it is.

    Raises ValueError for a model on another device or not in float32.
    """
    weight = model.wte.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"int8 needs a float32 model on the CPU, and this one is {dtype} on {weight.device}")
    result = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # the parameters are shared, not copied
    places = [(parent, name) for parent in result.modules() for name, child in parent.named_children()
              if isinstance(child, nn.Linear) and name != "router"]  # fmt: skip
    levels = exact_levels()
    for parent, name in tqdm(places, desc="int8", unit="layer", delay=1, leave=False):
        setattr(parent, name, Int8Linear(getattr(parent, name), levels))
    return result.eval()
