"""The compiled way of decoding: `GPT.hidden` and `GPT.head` for few tokens of texts that lie in a cache, on a CPU.

    decoder = NumbaDecoder(model, cache)
    x = decoder.hidden(idx)                      # what model.hidden(idx, cache) gives, up to rounding
    logits = decoder.head(x[:, -1])              # what model.head gives

kernels.py has what is computed; here its inputs are laid out. Importing this module takes half a second (Numba) and
compiles nothing. Shape legend: that of kernels.py.
"""

from collections.abc import Callable, Collection
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from nanogpt_hub.edits.core import blocks_of
from nanogpt_hub.engine.int8 import LINE, Int8Linear
from nanogpt_hub.engine.intrinsics import Layer, Pass
from nanogpt_hub.engine.kernels import ACTIVATIONS, decode_pass
from nanogpt_hub.engine.numba_sampler import SAMPLERS, choose
from nanogpt_hub.engine.threads import team
from nanogpt_hub.engine.torch_decoder import TorchDecoder, known_structure
from nanogpt_hub.engine.tuning import LANES, MAX_ROWS, PER_THREAD_BYTES
from nanogpt_hub.model import GPT, MLP, KVCache

LARGEST_INT8_INPUTS = 2**16  # sums of more products of bytes could overflow 32 bits


class NumbaDecoder(TorchDecoder):
    """The decoder of a model and a cache that `supports` says yes to. Passes of more than MAX_ROWS tokens go through
    PyTorch."""

    engine = "numba"

    def __init__(self, model: GPT, cache: KVCache):
        super().__init__(model, cache)
        cfg, S_max = self.config, cache.k.size(3)
        weights = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear | Int8Linear))
        self.threads = max(1, min(torch.get_num_threads(), weights // PER_THREAD_BYTES))
        C, scratch = MAX_ROWS * cfg.n_embd, 2 * MAX_ROWS * cfg.n_embd + 2 * cfg.head_dim + S_max
        scratch += -scratch % LANES  # whole cache lines
        sizes = {"x": C, "y": C, "qkv": MAX_ROWS * (cfg.n_head + 2 * cfg.kv_heads) * cfg.head_dim,
                 "h": 2 * MAX_ROWS * cfg.ffn_width, "scratch": self.threads * scratch}  # fmt: skip
        self.rows = {name: np.zeros(MAX_ROWS, np.int64) for name in ("tokens", "texts", "positions", "barrier_state")}
        self.layer_addresses, self.record = layers_of(model), np.zeros(1, Pass)
        self.arrays = self.rows | {name: aligned_zeros(size) for name, size in sizes.items()}
        values = {name: array.ctypes.data for name, array in self.arrays.items()} | team().functions
        values |= addresses(ln_emb=model.ln_emb, ln_f=model.ln_f, lm_head=model.lm_head)
        values |= dict(
            C=cfg.n_embd, H=cfg.n_head, G=cfg.kv_heads, D=cfg.head_dim, F=cfg.ffn_width, V=cfg.vocab_size, S_max=S_max,
            layer_norm=cfg.norm == "layer", activation=ACTIVATIONS.index(cfg.activation), eps=cfg.norm_eps,
            parallel=cfg.parallel_residual, qk_norm=cfg.qk_norm, embd_norm=cfg.embd_norm, n_layer=cfg.n_layer,
            wte=model.wte.weight.data_ptr(), wpe=model.wpe.weight.data_ptr() if model.wpe else 0,
            layers=self.layer_addresses.ctypes.data, scratch_size=scratch, levels=input_levels(model),
        )  # fmt: skip
        if self.rope is not None:
            cos, sin = self.rope  # (1, S_max, 1, rotated); the second half repeats the first, but for a sign
            half = cos.size(-1) // 2
            self.angles = cos[0, :, 0, :half].contiguous(), sin[0, :, 0, half:].contiguous()
            values |= dict(rotated=2 * half, cos=self.angles[0].data_ptr(), sin=self.angles[1].data_ptr())
        self._set(**values)

    def hidden(self, idx: Tensor) -> Tensor:
        """As `TorchDecoder.hidden`."""
        (B, T), lengths, cache = idx.shape, self.cache.lengths, self.cache
        if B * T > MAX_ROWS or max(lengths) + T > cache.k.size(3):
            return super().hidden(idx)
        self.rows["tokens"][: B * T] = idx.flatten().tolist()
        self.rows["texts"][: B * T] = [text for text in range(B) for _ in range(T)]
        self.rows["positions"][: B * T] = [length + t for length in lengths for t in range(T)]
        out = torch.empty(B, T, self.config.n_embd)
        self._run(B * T, out, only_head=False, B=B, k=cache.k.data_ptr(), v=cache.v.data_ptr())
        cache.lengths = [length + T for length in lengths]
        return out

    def head(self, x: Tensor) -> Tensor:
        """As `TorchDecoder.head`."""
        if len(x) > MAX_ROWS:
            return super().head(x)
        x, logits = x.contiguous(), torch.empty(len(x), self.config.vocab_size)
        self._run(len(x), logits, only_head=True, given=x.data_ptr())
        return self.softcap(logits)

    def sampler(self, logits: Tensor, samplers: Collection[str]) -> Callable | None:
        """As `PlainDecoder.sampler`."""
        return choose if set(samplers) <= SAMPLERS and logits.device.type == "cpu" else None

    def _run(self, rows: int, out: Tensor, **values: int) -> None:
        self._set(R=rows, lanes=1 if rows == 1 else rows + -rows % LANES, out=out.data_ptr(), **values)
        team().run(decode_pass, self.record.ctypes.data, self.threads)

    def _set(self, **values: float) -> None:
        one = self.record[0]
        for name, value in values.items():
            one[name] = value


def supports(model: GPT, cache: KVCache) -> bool:
    """Whether the kernels compute this model: a structure they know, plain layers (no adapters) in float32 or 8 bits,
    in the memory of a CPU. They read by address and check nothing, so all shapes are compared with the config's."""
    cfg, tensors = model.config, [cache.k, cache.v, *model.parameters()]
    shape = (cfg.n_layer, len(cache.lengths), cfg.kv_heads, cache.k.size(3), cfg.head_dim)
    return (
        known_structure(model, is_int8_layer)
        and all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        and cache.k.shape == cache.v.shape == shape
        and cfg.ffn_width <= LARGEST_INT8_INPUTS
        and len({module.input_levels for module in model.modules() if type(module) is Int8Linear}) <= 1
    )


def is_int8_layer(module: nn.Module, fresh: nn.Linear) -> bool:
    """Whether a module lies in memory as the kernels read a linear layer of 8 bits with the shape of `fresh`."""
    if type(module) is not Int8Linear:
        return False
    (O, I), weight, scale = fresh.weight.shape, module.weight, module.scale
    return (
        (weight.shape, weight.dtype, scale.shape, scale.dtype) == ((O, I + -I % LINE), torch.uint8, (O,), torch.float32)
        and getattr(module.bias, "shape", None) == getattr(fresh.bias, "shape", None)
        and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (weight, scale))
    )


def input_levels(model: GPT) -> int:
    """To how many levels the inputs of the model's 8-bit layers are rounded; 0 where it has none."""
    return next((module.input_levels for module in model.modules() if type(module) is Int8Linear), 0)


def aligned_zeros(size: int) -> np.ndarray:
    """Zeros (size,) from the beginning of a cache line on: vectors that lie across two lines take longer to read."""
    zeros = np.zeros(size + LANES, np.float32)
    first = -zeros.ctypes.data % (4 * LANES) // 4
    return zeros[first : first + size]


def layers_of(model: GPT) -> np.ndarray:
    """The addresses of each layer's parameters: an array (n_layer,) of `Layer`."""
    layers = np.zeros(len(model.h), Layer)
    for layer, block in zip(layers, blocks_of(model), strict=True):
        mlp = cast(MLP, block.mlp)
        found = addresses(
            ln_1=block.ln_1, c_attn=block.attn.c_attn, attn_proj=block.attn.c_proj, ln_2=block.ln_2,
            c_fc=mlp.c_fc, c_gate=getattr(mlp, "c_gate", None), mlp_proj=mlp.c_proj,
        )  # fmt: skip
        for name, address in found.items():
            layer[name] = address
    return layers


def addresses(**modules: nn.Module | None) -> dict[str, int]:
    """The address of the weight, its scale and the bias of each module, of those that have them."""
    kinds = ("weight", "scale", "bias")
    found = {f"{name}_{kind}": getattr(m, kind, None) for name, m in modules.items() for kind in kinds}
    return {name: tensor.data_ptr() for name, tensor in found.items() if tensor is not None}
