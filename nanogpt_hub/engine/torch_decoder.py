"""Decoding one token by PyTorch without the overhead: `GPT.hidden` for the newest token of texts that lie in a cache.

    decoder = TorchDecoder(model, cache)
    x = decoder.hidden(idx)                      # what model.hidden(idx, cache) gives, up to rounding

With one token a pass, a small model spends most of its time on answering the same questions in every layer: which norm,
which positions, where in the cache. Here each is answered once, and the layers are called as functions. Read
`GPT.hidden` in model.py for what is computed; this is the same, checked against it before it is used.

Shape legend: that of model.py, and T = 1.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from nanogpt_hub.edits.core import blocks_of
from nanogpt_hub.model import GPT, MLP, CausalSelfAttention, GPTConfig, KVCache, Norm, rotary_angles, rotate

Function = Callable[[Tensor], Tensor]
EngineName = Literal["plain", "torch", "numba"]

# The fields of GPTConfig that the fast decoders know, with the values they know of each; None stands for any. A field
# or a value that is not here is computed the plain way.
SUPPORTED: dict[str, tuple | None] = {
    "position": ("rotary", "learned"),
    "norm": ("layer", "rms"),
    "activation": ("gelu", "gelu_tanh", "relu2", "swiglu"),
    "n_expert": (0,),  # a mixture of experts is computed by model.py
    **dict.fromkeys((
        "vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "rope_theta",
        "rotary_fraction", "norm_weight", "norm_bias", "norm_eps", "attn_bias", "mlp_bias", "parallel_residual",
        "qk_norm", "embd_norm", "tie_word_embeddings", "logit_softcap", "dropout", "init", "n_expert_per_tok",
        "router_aux_loss_coef",
    )),
}  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
SCALARS = (bool, int, float, str, type(None), GPTConfig)
IsLinear = Callable[[nn.Module, nn.Linear], bool]


# ---- whether a model is what the fast decoders repeat ----


def known_structure(model: GPT, may_replace: IsLinear = lambda module, fresh: True) -> bool:
    """Whether a model is built as a new one of its config, and the fast decoders know that config.

    Weights may have any values. Linear layers may be of another class (8 bits, adapters) where `may_replace` says so of
    the module and the layer of the new model, which has shapes and no data. All else makes a model unknown: other
    shapes or classes, a missing block, hooks, a changed attribute, a replaced function.
    """
    values = {f.name: getattr(model.config, f.name) for f in fields(model.config)}
    if not all(name in SUPPORTED and value in (SUPPORTED[name] or (value,)) for name, value in values.items()):
        return False
    if any(getattr(torch_module, f"_global{name}") for name in HOOKS):
        return False
    return (
        is_like(model, new_model(model.config), may_replace)
        and all(attends_as_new(block.attn) for block in blocks_of(model))
        and not any(getattr(module, name) for module in model.modules() for name in HOOKS)
    )


@functools.lru_cache(maxsize=8)
def new_model(config: GPTConfig) -> GPT:
    """A model of shapes alone, without data."""
    with torch.device("meta"):
        return GPT(config).eval()


def is_like(module: nn.Module | None, fresh: nn.Module, may_replace: IsLinear) -> bool:
    """Whether a module and all in it are what they are in a new model."""
    if type(fresh) is nn.Linear and type(module) is not nn.Linear:
        return module is not None and may_replace(module, fresh)
    if module is None or facts(module) != facts(fresh):
        return False
    return all(is_like(module._modules[name], child, may_replace) for name, child in fresh.named_children())


def facts(module: nn.Module) -> tuple:
    """What decides how a module computes, but for the values of its weights: its class, scalars and shapes, the names
    of its parts, and what was set on it in the place of something of its class, as a `forward`."""
    attributes = {
        name: value if isinstance(value, SCALARS) else type(value)
        for name, value in vars(module).items()
        if name[0] != "_" and name != "attend" and (isinstance(value, SCALARS) or hasattr(type(module), name))
    }
    shapes = {name: p if p is None else p.shape for name, p in module._parameters.items()}
    return type(module), attributes, shapes, list(module._modules)


def structure(model: GPT) -> list[tuple]:
    """The `facts` of each module of a model: a decoder that gave what the model gives will do so while these stay."""
    return [facts(module) for module in model.modules()]


def attends_as_new(attention: CausalSelfAttention) -> bool:
    """Whether attention is PyTorch's, or a function that is marked as the same: `attend.is_exact = True`."""
    return attention.attend is F.scaled_dot_product_attention or getattr(attention.attend, "is_exact", False) is True


# ---- decoders ----


class PlainDecoder:
    """What every faster decoder is measured by: `model.hidden` and `model.head` themselves."""

    engine: EngineName = "plain"

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache = model, cache

    def hidden(self, idx: Tensor) -> Tensor:
        """The residual stream (B, T, C) after the last norm for idx (B, T), which continue what the cache has seen.

        Raises ValueError when the tokens, the cached ones included, exceed block_size.
        """
        return self.model.hidden(idx, self.cache)

    def head(self, x: Tensor) -> Tensor:
        """Logits (N, V) for hidden states x (N, C)."""
        return self.model.head(x)

    def sampler(self, logits: Tensor, samplers: Collection[str]) -> Callable | None:
        """A faster way to choose tokens by logits (N, V), where it knows all `samplers` that are on. None: the plain
        one of sampling.py."""
        return None


class Layer(NamedTuple):
    """The parts of a block, each a function of (B, C)."""

    ln_1: Function
    c_attn: Function
    c_proj: Function
    ln_2: Function
    mlp: Function


class TorchDecoder(PlainDecoder):
    """Continues the texts of a cache. The model must be in evaluation mode, and stay as it is."""

    engine: EngineName = "torch"

    def __init__(self, model: GPT, cache: KVCache):
        super().__init__(model, cache)
        self.config = model.config
        self.ln_emb = norm(model.ln_emb, self.config) if isinstance(model.ln_emb, Norm) else nn.Identity()
        self.ln_f, self.lm_head = norm(model.ln_f, self.config), linear(model.lm_head)
        self.layers = [
            Layer(norm(b.ln_1, self.config), linear(b.attn.c_attn), linear(b.attn.c_proj),
                  norm(b.ln_2, self.config), feed_forward(cast(MLP, b.mlp)))
            for b in blocks_of(model)
        ]  # fmt: skip
        positions = torch.arange(cache.k.size(3), device=cache.k.device)[None]
        rotary = self.config.position == "rotary"
        self.rope = rotary_angles(self.config, positions, cache.k.dtype) if rotary else None  # each (1, S, 1, R)

    def hidden(self, idx: Tensor) -> Tensor:
        """As `PlainDecoder.hidden`. Several tokens at once (prefill) go through the model itself."""
        cfg, cache, lengths = self.config, self.cache, self.cache.lengths
        B, S = idx.size(0), max(lengths) + 1
        if idx.size(1) > 1 or S > cache.k.size(3):
            return self.model.hidden(idx, cache)
        H, G, D = cfg.n_head, cfg.kv_heads, cfg.head_dim
        place: int | Tensor
        if uniform := min(lengths) == max(lengths):
            place, mask = lengths[0], None
            k_new, v_new = cache.k.select(3, place).unbind(), cache.v.select(3, place).unbind()  # each (B, G, D)
        else:
            rows, place = torch.arange(B, device=idx.device), torch.tensor(lengths, device=idx.device)  # (B,)
            mask = (torch.arange(S, device=idx.device) <= place[:, None])[:, None, None]  # (B, 1, 1, S)
        k_seen, v_seen = cache.k[..., :S, :].unbind(), cache.v[..., :S, :].unbind()  # each (B, G, S, D)
        x = self.model.wte(idx[:, 0])  # (B, C)
        if self.model.wpe is not None:
            x = x + self.model.wpe.weight[place]
        x = self.ln_emb(x)
        rope = None if self.rope is None else [angles[0, place] for angles in self.rope]  # each (1, R) or (B, 1, R)
        for i, layer in enumerate(self.layers):
            qkv = layer.c_attn(layer.ln_1(x)).view(B, H + 2 * G, D)
            qk, v = qkv.split((H + G, G), dim=1)
            if rope is not None:
                qk = rotate(qk, *rope)
            if cfg.qk_norm:
                qk = rms_norm(qk, cfg.norm_eps)
            q, k = qk.split((H, G), dim=1)
            if uniform:
                k_new[i].copy_(k)
                v_new[i].copy_(v)
            else:
                cache.k[i][rows, :, place], cache.v[i][rows, :, place] = k, v
            # The heads of a group stand in as its tokens, so that no key is copied for each head.
            y = F.scaled_dot_product_attention(q.reshape(B, G, H // G, D), k_seen[i], v_seen[i], attn_mask=mask)
            y = layer.c_proj(y.reshape(B, -1))
            if cfg.parallel_residual:
                x = x + y + layer.mlp(layer.ln_2(x))
            else:
                x = x + y
                x = x + layer.mlp(layer.ln_2(x))
        cache.lengths = [length + 1 for length in lengths]
        return self.ln_f(x)[:, None]

    def head(self, x: Tensor) -> Tensor:
        return self.softcap(self.lm_head(x))

    def softcap(self, logits: Tensor) -> Tensor:
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


def linear(module: nn.Module) -> Function:
    """A linear layer as a function; one of another kind (8 bits, adapters) is called as it is."""
    if type(module) is not nn.Linear:
        return module
    weight, bias = module.weight, module.bias
    return lambda x: F.linear(x, weight, bias)


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
