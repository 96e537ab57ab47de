"""The core: a GPT in one file, from token ids to logits, read top to bottom.

One set of declared fields (`GPTConfig`) covers the lineages GPT-2, GPT-NeoX/Pythia, Llama, Mixtral and nanochat, and
the rotary nanoGPT in between. To build one and look at its loss before any training (about ln(vocab_size)):

    model = GPT(GPTConfig.preset("nanogpt", size="10m", vocab_size=65))
    logits, loss = model(idx, targets)

Shape legend, used in every comment of this file:
    B batch   T tokens of this call   S tokens seen so far, the cached ones included   C n_embd
    H n_head  G key/value heads       D head_dim = C / H   E n_expert                   V vocab_size
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanogpt_hub.initialisation import init_weights

IGNORE_INDEX = -100  # a target with this value carries no loss (padding, masked prompts)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT: a field for each thing in which the lineages differ. Checked when made (ValueError)."""

    vocab_size: int = 50304  # token ids the model knows; may exceed the tokenizer's (padding to 64 is faster)
    block_size: int = 1024  # longest context in tokens
    n_layer: int = 12  # decoder blocks
    n_head: int = 12  # query heads; divides n_embd
    n_kv_head: int = 0  # key/value heads shared by groups of query heads (arXiv:2305.13245); 0 means n_head
    n_embd: int = 768  # width of the residual stream
    n_inner: int = 0  # width of the feed-forward; 0 means 4 n_embd (swiglu: 8/3 n_embd, rounded up to 64)
    position: Literal["rotary", "learned"] = "rotary"  # rotary (arXiv:2104.09864), or GPT-2's table wpe
    rope_theta: float = 10000.0  # base of the rotary frequencies; larger turns slower, for longer contexts
    rotary_fraction: float = 1.0  # part of each head that is rotated (Pythia: 0.25)
    norm: Literal["layer", "rms"] = "layer"  # LayerNorm or RMSNorm (arXiv:1910.07467)
    norm_weight: bool = True  # the norms have a learned scale
    norm_bias: bool = True  # the norms have a learned shift (layer norm only)
    norm_eps: float = 1e-5  # added under the root of the norms
    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu"  # exact, GPT-2's; arXiv:2109.08668, 2002.05202
    attn_bias: bool = True  # biases in the linear layers of attention
    mlp_bias: bool = True  # biases in the linear layers of the feed-forward
    n_expert: int = 0  # feed-forwards of a block, of which a token takes a few (arXiv:2401.04088); 0 means a single one
    n_expert_per_tok: int = 2  # how many of them a token takes
    router_aux_loss_coef: float = 0.01  # weight of the loss that spreads tokens over them evenly, in training only
    parallel_residual: bool = False  # attention and feed-forward read the same input (NeoX), not one after the other
    qk_norm: bool = False  # RMS-normalise queries and keys (arXiv:2010.04245)
    embd_norm: bool = False  # normalise the embeddings before the first block
    tie_word_embeddings: bool = True  # the head is the embedding table, transposed (arXiv:1608.05859)
    logit_softcap: float = 0.0  # squeeze logits into (-cap, cap) by tanh; 0 leaves them alone
    dropout: float = 0.0  # part of embeddings, attention's values and branches dropped in training
    init: Literal["gpt2", "neox", "nanochat"] = field(default="gpt2", compare=False)  # see init_weights; not saved

    @classmethod
    def preset(cls, name: str = "nanogpt", size: str = "124m", **overrides) -> "GPTConfig":
        """A lineage (`PRESETS`) at a size (`SIZES`), single fields overridden. ValueError for an unknown name."""
        for got, table, what in ((name, PRESETS, "preset"), (size, SIZES, "size")):
            if got not in table:
                raise ValueError(f"unknown {what} {got!r}; choose one of {', '.join(table)}")
        return cls(**{**SIZES[size], **PRESETS[name], **overrides})

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            value, allowed = getattr(self, name), get_args(kind)
            if allowed and value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
            least = 1 if kind is int and name not in ("n_kv_head", "n_inner", "n_expert") else 0
            if kind in (int, float) and not value >= least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        rotated = self.head_dim * self.rotary_fraction
        for holds, message in (
            (self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}"),
            (self.n_head % self.kv_heads == 0, f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"),
            (0 < self.rotary_fraction <= 1, f"rotary_fraction is {self.rotary_fraction}; it must be in (0, 1]"),
            (self.position == "learned" or int(rotated) in range(2, self.head_dim + 1, 2),
             f"rotary positions turn pairs: head size {self.head_dim} * {self.rotary_fraction} = {rotated}, not even"),
            (not self.norm_bias or (self.norm == "layer" and self.norm_weight),
             "norm_bias needs norm=layer with norm_weight; set norm_bias to false"),
            (0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be in [0, 1)"),
            (self.rope_theta > 0 and self.norm_eps > 0, "rope_theta and norm_eps must be above 0"),
            (self.n_expert_per_tok <= (self.n_expert or math.inf), f"n_expert_per_tok > n_expert ({self.n_expert})"),
        ):  # fmt: skip
            if not holds:
                raise ValueError(message)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def ffn_width(self) -> int:
        usual = 64 * math.ceil(self.n_embd * 8 / 3 / 64) if self.activation == "swiglu" else 4 * self.n_embd
        return self.n_inner or usual


PRESETS: dict[str, dict] = {  # what differs from the defaults above, which are the article's nanoGPT
    "nanogpt": {},
    "gpt2": dict(position="learned", activation="gelu_tanh"),
    "pythia": dict(rotary_fraction=0.25, parallel_residual=True, tie_word_embeddings=False, init="neox"),
    "llama": dict(norm="rms", norm_bias=False, activation="swiglu", attn_bias=False, mlp_bias=False,
                  tie_word_embeddings=False),
    "mixtral": dict(norm="rms", norm_bias=False, activation="swiglu", attn_bias=False, mlp_bias=False,
                    tie_word_embeddings=False, n_expert=8),
    "nanochat": dict(norm="rms", norm_weight=False, norm_bias=False, norm_eps=1e-6, activation="relu2",
                     attn_bias=False, mlp_bias=False, qk_norm=True, embd_norm=True, tie_word_embeddings=False,
                     logit_softcap=15.0, init="nanochat"),
}  # fmt: skip
SIZES: dict[str, dict] = {  # named by their parameters, roughly, with a GPT-2 vocabulary from 124m on
    "1m": dict(n_layer=4, n_head=4, n_embd=128, block_size=64),
    "10m": dict(n_layer=6, n_head=6, n_embd=384, block_size=256),
    "30m": dict(n_layer=6, n_head=8, n_embd=512, block_size=512),
    "124m": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),
    "350m": dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024),
    "774m": dict(n_layer=36, n_head=20, n_embd=1280, block_size=1024),
    "1558m": dict(n_layer=48, n_head=25, n_embd=1600, block_size=1024),
}


class Norm(nn.Module):
    """Layer or RMS norm over the last dimension, with the learned parts that the config asks for."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.layer, self.eps = config.norm == "layer", config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.n_embd)) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.layer:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class KVCache:
    """Keys and values of the tokens already seen, so that the next token costs one step instead of a whole pass.

    A token's slot in the buffers is its position. Rows may have different `lengths`: what lies beyond a row's length is
    stale and never attended to, so ragged prompts are padded on the right and need no mask of their own.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device=None, dtype=None, max_len: int = 0):
        shape = (config.n_layer, batch_size, config.kv_heads, max_len or config.block_size, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, G, S_max, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch_size

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, G, T, D) at `positions` and returns all of the layer's, (B, G, S, D)."""
        end = max(self.lengths) + k.size(2)
        for buffer, new in ((self.k[layer], k), (self.v[layer], v)):
            if positions.size(0) == 1:  # all rows stand at the same place
                buffer[:, :, end - k.size(2) : end] = new
            else:  # each row has its own slots; indexing at dims 0 and 2 asks for (B, T, G, D)
                rows = torch.arange(new.size(0), device=new.device)[:, None]
                buffer[rows, :, positions] = new.transpose(1, 2)
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


def rotary_angles(config: GPTConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors (1 or B, T, 1, R) of a head's R turning dimensions: cosines; sines, minus first, for their partners."""
    rotated = int(config.head_dim * config.rotary_fraction)
    pair = torch.arange(0, rotated, 2, device=positions.device, dtype=torch.float32)
    angle = positions[:, :, None, None] * (1.0 / config.rope_theta ** (pair / rotated))
    return angle.cos().repeat(1, 1, 1, 2).to(dtype), torch.cat((-angle.sin(), angle.sin()), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x (B, T, heads, D) by its position. Pairs are dimension i of the first half with i of the second."""
    turning, rest = x[..., : cos.size(-1)], x[..., cos.size(-1) :]
    turned = turning * cos + turning.roll(cos.size(-1) // 2, dims=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned


class Context:
    """What all blocks of one pass share: where the tokens stand, whom they may look at, what is remembered."""

    def __init__(self, config: GPTConfig, T: int, device: torch.device, dtype: torch.dtype, kv_cache: KVCache | None):
        past = kv_cache.lengths if kv_cache is not None else [0]
        S = max(past) + T
        if S > config.block_size:
            raise ValueError(f"{S} tokens do not fit block_size {config.block_size}: crop to the last ones")
        self.kv_cache = kv_cache
        uniform = len(set(past)) == 1  # one row of positions, and no mask for a lone token, serve all rows
        start = torch.tensor(past[:1] if uniform else past, device=device)
        self.positions = start[:, None] + torch.arange(T, device=device)  # (1 or B, T)
        self.is_causal = S == T and T > 1
        self.mask = None
        if not self.is_causal and not (uniform and T == 1):
            self.mask = (torch.arange(S, device=device) <= self.positions[:, :, None])[:, None]  # (1 or B, 1, T, S)
        self.rope = rotary_angles(config, self.positions, dtype) if config.position == "rotary" else None


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and the tokens before it, by as many heads as n_head."""

    attend = staticmethod(F.scaled_dot_product_attention)  # softmax(q k^T / sqrt(D)) v; a trainer may set another

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        heads = config.n_head + 2 * config.kv_heads  # query, key and value projections in one matrix, in that order
        self.c_attn = nn.Linear(config.n_embd, heads * config.head_dim, bias=config.attn_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.attn_bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        (B, T, C), cfg = x.shape, self.config
        qkv = self.c_attn(x).view(B, T, -1, cfg.head_dim)  # (B, T, H+2G, D)
        q, k, v = qkv.split((cfg.n_head, cfg.kv_heads, cfg.kv_heads), dim=2)
        if context.rope is not None:
            q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        if cfg.qk_norm:
            q, k = (F.rms_norm(t, (cfg.head_dim,), eps=cfg.norm_eps) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H or G, T, D)
        if context.kv_cache is not None:
            k, v = context.kv_cache.update(self.layer, k, v, context.positions)
        v = F.dropout(v, cfg.dropout, self.training)  # not the weights: with those, CPUs have no fast kernel
        y = self.attend(q, k, v, context.mask, is_causal=context.is_causal, enable_gqa=cfg.kv_heads != cfg.n_head)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """The feed-forward layer: what each token computes by itself from what it gathered."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, config.ffn_width, bias=config.mlp_bias)
        if config.activation == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, config.ffn_width, bias=config.mlp_bias)
        self.c_proj = nn.Linear(config.ffn_width, config.n_embd, bias=config.mlp_bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        if self.activation == "swiglu":
            h = F.silu(self.c_gate(x)) * h
        elif self.activation == "relu2":
            h = F.relu(h).square()
        else:
            h = F.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.resid_dropout(self.c_proj(h))


class MixtureOfExperts(nn.Module):
    """Several feed-forwards: a token takes the weighted mean of the few that the router chooses (arXiv:2401.04088)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.k = config.n_expert_per_tok
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.n_expert))  # in training all get a gradient

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers, (N, k) each, of the experts that logits (N, E) of the router choose."""
        weights, chosen = logits.float().softmax(-1).topk(self.k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (N, C), N = B * T
        weights, chosen = self.choose(self.router(tokens))
        order = chosen.flatten().argsort(stable=True)  # the N * k choices, expert by expert
        parts = tokens[order // self.k].split(torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist())
        y = torch.cat([f(part) for f, part in zip(self.experts, parts, strict=True) if self.training or len(part)])
        y = y[order.argsort()].unflatten(0, chosen.shape)  # (N, k, C), in the order of the tokens again
        return (weights.to(y.dtype)[..., None] * y).sum(1).view(x.shape)


class Block(nn.Module):
    """Communicate, then think: attention and feed-forward, each a branch added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.parallel = config.parallel_residual
        self.ln_1 = Norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = Norm(config)
        self.mlp = MixtureOfExperts(config) if config.n_expert else MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.parallel:
            return x + self.attn(self.ln_1(x), context) + self.mlp(self.ln_2(x))
        x = x + self.attn(self.ln_1(x), context)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids in, logits for the next token out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.ln_emb = Norm(config) if config.embd_norm else nn.Identity()
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = Norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        init_weights(self)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, kv_cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) for idx (B, T), and the mean cross entropy in nats where targets (B, T) are given.

        Targets of `IGNORE_INDEX` do not count. With a `kv_cache`, idx continues what the cache has seen. Raises
        ValueError when the tokens, the cached ones included, exceed block_size.
        """
        logits = self.head(self.hidden(idx, kv_cache))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)

    def hidden(self, idx: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """The residual stream (B, T, C) after the last norm: what the head reads."""
        x, T = self.wte(idx), idx.size(1)  # (B, T, C)
        context = Context(self.config, T, idx.device, x.dtype, kv_cache)
        if self.wpe is not None:
            x = x + self.wpe(context.positions)
        x = self.drop(self.ln_emb(x))
        for block in self.h:
            x = block(x, context)
        if kv_cache is not None:
            kv_cache.lengths = [length + T for length in kv_cache.lengths]
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) for hidden states x (..., C)."""
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def num_params(self, embeddings: bool = True) -> int:
        """Parameters, a tied head counted once; without `embeddings`, only those that take part in matrix products."""
        n = sum(p.numel() for p in self.parameters())
        tables = [self.wpe] if self.config.tie_word_embeddings else [self.wpe, self.wte]
        return n if embeddings else n - sum(table.weight.numel() for table in tables if table is not None)
