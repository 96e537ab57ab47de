"""The optimizer and the learning rate: AdamW, or Muon for the matrices with AdamW for the rest, behind one object.

One object, because everything around it (gradient scaler, saved state, schedule) then sees a single optimizer: with
two of them a loss scaler updates twice a step and one's infinite gradients do not hold back the other.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from nanogpt_hub.model import GPT

from .config import OptimConfig
from .hardware import has_fast_bf16
from .parallel import by_whole_matrices, cut_as, is_cut, local

OPTIMIZERS = {  # what cards say of a run's optimizer
    "adamw": "AdamW",
    "muon": "Muon for the blocks' matrices, AdamW for the rest",
}
# Newton-Schulz (Muon: Keller Jordan, 2024) by four odd quintics, one after the other, fitted for the smallest largest
# error (the idea: Polar Express, arXiv:2505.16932): singular values from 0.005 to 1 end within 0.15 of 1.
NS_COEFFICIENTS = (
    (7.9017, -23.2093, 17.1716), (3.5957, -2.8795, 0.5951), (2.7867, -2.5662, 0.6734), (2.5828, -2.6880, 1.0545),
)  # fmt: skip
BF16_MARGIN = 1.05  # keeps the largest singular value so far below 1 that no rounding to bfloat16 reaches it


def lr_scale(step: int, max_steps: int, config: OptimConfig) -> float:
    """The fraction of the peak learning rate at optimizer step 0 .. max_steps - 1: a function of the step alone."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    low = config.final_lr_fraction
    if config.schedule == "constant":
        return 1.0
    rest = max(1, max_steps - config.warmup_steps)
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup_steps) / rest)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = min(rest, config.decay_steps or rest)
    return low + (1 - low) * min(1.0, (max_steps - step) / decay)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices with all singular values near 1, for a stack (N, rows, columns), by Newton-Schulz.

    One call serves all matrices of a shape, in bfloat16 where the hardware is fast at it, which is precise enough for a
    direction, else in float32.
    """
    half = has_fast_bf16(matrices.device.type)
    x = matrices.bfloat16() if half else matrices.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # the Gram matrix x x^T is then the smaller one
    # The quintics are fitted up to 1, and steep there: a lone large value that rounding lifts above it would explode.
    x = x / ((BF16_MARGIN if half else 1.0) * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    long = x.size(-1) > 1.5 * x.size(-2)  # else the products of Gram matrices are the more work
    x = newton_schulz_by_gram(x) if long and not half else newton_schulz(x)
    return (x.mT if tall else x).to(matrices.dtype)


def newton_schulz(x: Tensor) -> Tensor:
    """Applies the quintics a s + b s^3 + c s^5 to the singular values s of each x (N, rows, columns)."""
    for a, b, c in NS_COEFFICIENTS:
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram gram
        x = torch.baddbmm(x, factor, x, beta=a)
    return x


def newton_schulz_by_gram(x: Tensor) -> Tensor:
    """The same by products of the small Gram matrices alone, up to the last one. It needs the precision of float32."""
    gram = x @ x.mT
    one = torch.eye(gram.size(-1), device=x.device)
    whole = one
    for a, b, c in NS_COEFFICIENTS:
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor += a * one
        whole = factor @ whole
        gram = factor @ gram @ factor  # all of them commute
    return whole @ x


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except for parameter groups with `muon=True`, which are updated by Muon (momentum, orthogonalised).

    A matrix that is several projections stacked (q, k and v in c_attn) is orthogonalised part by part: its group says
    how many rows each part has in `parts`.
    """

    def __init__(self, groups: list[dict], **adamw):
        super().__init__(groups, **adamw)
        self._step_supports_amp_scaling = False  # the fused AdamW would unscale its own gradients only

    @torch.no_grad()
    def step(self, closure=None):
        every_group = self.param_groups
        self.param_groups = [group for group in every_group if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every_group
        for group in every_group:
            if group["muon"]:
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params]
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        torch._foreach_lerp_(grads, buffers, group["momentum"])  # Nesterov: look ahead along the momentum
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        update = _sharded_update if is_cut(params[0]) else _update
        update(group, params, grads)


def update_size(rows: int, columns: int) -> float:
    """The factor of an orthogonalised update: equal size per entry, whatever the matrix's shape."""
    return math.sqrt(max(1, rows / columns))


def _update(group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
    """Adds Muon's update, for the gradients with momentum, to the matrices."""
    same_shape = defaultdict(list)  # views of parameters and their updates, stacked by shape
    for p, grad in zip(params, grads, strict=True):
        for part, update in zip(p.split(group["parts"] or len(p)), grad.split(group["parts"] or len(p)), strict=True):
            same_shape[part.shape].append((part, update))
    for (rows, columns), pairs in same_shape.items():
        updates = orthogonalise(torch.stack([update for _, update in pairs]))
        alpha = -group["lr"] * update_size(rows, columns)
        torch._foreach_add_([part for part, _ in pairs], list(updates.unbind()), alpha=alpha)


def _sharded_update(group: dict, params: list[Tensor], grads: list[Tensor]) -> None:
    """The same for matrices that are cut over the processes: each process orthogonalises some of them."""

    def direction(matrices: Tensor) -> Tensor:  # (n, rows, columns)
        parts = matrices.split(group["parts"] or matrices.size(1), dim=1)
        return torch.cat([orthogonalise(part) * update_size(part.size(1), part.size(2)) for part in parts], dim=1)

    by_shape = defaultdict(list)
    for p, grad in zip(params, grads, strict=True):
        by_shape[p.shape].append((local(p), grad))
    for pairs in by_shape.values():
        updates = by_whole_matrices([grad for _, grad in pairs], direction)
        torch._foreach_add_([p for p, _ in pairs], updates, alpha=-group["lr"])


def build_optimizer(model: GPT, config: OptimConfig) -> torch.optim.Optimizer:
    """The run's optimizer over what is not frozen. Matrices and embeddings decay, norms and biases do not.

    `peak_lr` is a group's full rate.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    muon = {n for n, p in named.items() if config.name == "muon" and n.startswith("h.") and p.ndim == 2}
    rates = defaultdict(list)
    for n, p in named.items():
        if n not in muon:
            own = config.embedding_learning_rate if n == "wte.weight" and not model.config.tie_word_embeddings else 0.0
            rates[own or config.learning_rate, config.weight_decay if p.ndim >= 2 else 0.0].append(p)
    groups = [_group(params, lr, weight_decay) for (lr, weight_decay), params in rates.items()]
    if muon:
        fused = [p for n, p in named.items() if n in muon and n.endswith("c_attn.weight")]
        others = [p for n, p in named.items() if n in muon and not n.endswith("c_attn.weight")]
        for params, parts in ((fused, _attention_parts(model)), (others, None)):
            group = _group(params, config.muon_learning_rate, config.weight_decay)
            groups.append({**group, "muon": True, "momentum": config.muon_momentum, "parts": parts})
    groups = [group for group in groups if group["params"]]
    fused_step = all(p.device.type in ("cuda", "cpu", "mps") for p in named.values())
    kind = MuonAdamW if muon else torch.optim.AdamW
    return kind(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused_step)


def _attention_parts(model: GPT) -> list[int]:
    cfg = model.config
    return [cfg.n_head * cfg.head_dim, cfg.kv_heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim]


def _group(params: Sequence[Tensor], lr: float, weight_decay: float) -> dict:
    return {"params": params, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay, "muon": False}


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Sets every group to `scale` of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak_lr"]


def optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat, named tensors: `h.0.mlp.c_fc.weight/exp_avg`, ..."""
    named = ((name, optimizer.state.get(p, {})) for name, p in model.named_parameters())
    return dict(chain.from_iterable(((f"{name}/{key}", value) for key, value in s.items()) for name, s in named))


def load_optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Puts back what `optimizer_tensors` gave. Raises ValueError for a parameter that the model does not have."""
    named = dict(model.named_parameters())
    for full_name, value in tensors:
        name, _, key = full_name.rpartition("/")
        if name not in named:
            raise ValueError(f"the training state has {full_name!r}, but the model has no parameter {name!r}")
        p = named[name]
        # AdamW's counter stays where its step reads it; moments live beside their parameter.
        optimizer.state[p][key] = (
            value.clone() if key == "step" and p.device.type == "cpu" else cut_as(value.to(p.device).clone(), p)
        )
