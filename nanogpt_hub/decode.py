"""A step of generation without its overhead: `GPT.hidden` for the newest tokens of texts that lie in a cache.

    decoder = Decoder(model, cache)
    x = decoder.hidden(idx)                      # what model.hidden(idx, cache) gives, up to rounding

With one token a pass, a small model spends most of its time on being asked the same questions in every layer: which
norm, which positions, where in the cache. Here each is answered once, for all layers or for good, and the layers are
called as functions. Read `GPT.hidden` in model.py for what is computed; this is the same, tested against it.

Shape legend: that of model.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_hub.model import GPT, MLP, GPTConfig, KVCache, Norm, rotary_angles, rotate

Function = Callable[[Tensor], Tensor]


class Layer(NamedTuple):
    """The parts of a block, each a function of (N, C)."""

    ln_1: Function
    c_attn: Function
    c_proj: Function
    ln_2: Function
    mlp: Function


class Decoder:
    """Continues the texts of a cache. The model must be in evaluation mode, and stay as it is."""

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache, self.config = model, cache, model.config
        self.ln_emb = norm(model.ln_emb, self.config) if self.config.embd_norm else None
        self.ln_f = norm(model.ln_f, self.config)
        self.layers = [
            Layer(norm(b.ln_1, self.config), linear(b.attn.c_attn), linear(b.attn.c_proj),
                  norm(b.ln_2, self.config), feed_forward(b.mlp))
            for b in model.h
        ]  # fmt: skip
        positions = torch.arange(cache.k.size(3), device=cache.k.device)[None]
        rotary = self.config.position == "rotary"
        self.rope = rotary_angles(self.config, positions, cache.k.dtype) if rotary else None  # each (1, S, 1, R)

    def hidden(self, idx: Tensor) -> Tensor:
        """The residual stream (B, T, C) after the last norm for idx (B, T), which continue what the cache has seen."""
        cfg, cache, lengths = self.config, self.cache, self.cache.lengths
        start, (B, T) = lengths[0], idx.shape
        end = start + T
        if min(lengths) != max(lengths) or end > cache.k.size(3):
            return self.model.hidden(idx, cache)  # rows that stand at different places; or the error for too many
        x = self.model.wte(idx.flatten())  # (B * T, C)
        if self.model.wpe is not None:
            places = self.model.wpe.weight[start:end]
            x = x + (places if B == 1 else places.repeat(B, 1))
        if self.ln_emb is not None:
            x = self.ln_emb(x)
        mask = None if T == 1 or start == 0 else causal_mask(T, end, x.device)
        rope = None if self.rope is None else [angles[:, start:end] for angles in self.rope]
        new = zip(cache.k[..., start:end, :].unbind(), cache.v[..., start:end, :].unbind(), strict=True)
        seen = zip(cache.k[..., :end, :].unbind(), cache.v[..., :end, :].unbind(), strict=True)
        H, G, D = cfg.n_head, cfg.kv_heads, cfg.head_dim
        for layer, (k_new, v_new), (k_seen, v_seen) in zip(self.layers, new, seen, strict=True):
            normed = layer.ln_1(x)
            qkv = layer.c_attn(normed).view(B, T, H + 2 * G, D)
            qk = qkv[:, :, : H + G]
            if rope is not None:
                qk = rotate(qk, *rope)
            if cfg.qk_norm:
                qk = rms_norm(qk, cfg.norm_eps)
            qk = qk.transpose(1, 2)  # (B, H + G, T, D)
            k_new.copy_(qk[:, H:])
            v_new.copy_(qkv[:, :, H + G :].transpose(1, 2))
            y = attend(qk[:, :H], k_seen, v_seen, mask, is_causal=start == 0 and T > 1)  # (B, H, T, D)
            y = layer.c_proj(y.transpose(1, 2).reshape(B * T, -1))
            if cfg.parallel_residual:
                x = x + y + layer.mlp(layer.ln_2(x))
            else:
                x = x + y
                x = x + layer.mlp(layer.ln_2(x))
        cache.lengths = [end] * B
        return self.ln_f(x).view(B, T, -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attention of q (B, H, T, D) to k, v (B, G, S, D). For a lone token the heads of a group stand in as its tokens,
    so that nothing is copied for each head."""
    (B, H, T, D), G = q.shape, k.size(1)
    if T == 1:
        return F.scaled_dot_product_attention(q.reshape(B, G, H // G, D), k, v).view(B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=G != H)


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S) booleans: the last T of S tokens may look at themselves and at what comes before."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def linear(module: nn.Module) -> Function:
    """A linear layer as a function; one of another kind (8 bits, adapters) is called as it is."""
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module


def norm(module: Norm, config: GPTConfig) -> Function:
    shape, weight, bias, eps = (config.n_embd,), module.weight, module.bias, module.eps
    if module.layer:
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    if weight is None:
        return lambda x: rms_norm(x, eps)
    return lambda x: rms_norm(x, eps).mul_(weight)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt_()


def feed_forward(mlp: MLP) -> Function:
    c_fc, c_proj = linear(mlp.c_fc), linear(mlp.c_proj)
    if mlp.activation == "swiglu":
        c_gate = linear(mlp.c_gate)
        return lambda x: c_proj(F.silu(c_gate(x)) * c_fc(x))
    if mlp.activation == "relu2":
        return lambda x: c_proj(c_fc(x).relu_().square_())
    approximate = "tanh" if mlp.activation == "gelu_tanh" else "none"
    return lambda x: c_proj(F.gelu(c_fc(x), approximate=approximate))
