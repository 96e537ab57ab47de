"""Mixtures of experts in training: the loss that spreads the tokens over the experts, and how evenly they are used.

Left alone, a router soon sends most tokens to a few experts: those learn more, so they are chosen more. A second loss,
weighted by the model's `router_aux_loss_coef`, pulls the other way (arXiv:2101.03961, section 2.2). It is that of each
micro-batch: here alone, how a batch is split changes more than rounding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_hub.edits.core import watch_routers
from nanogpt_hub.model import GPT, IGNORE_INDEX, GPTConfig

from .loss import summed_loss


def training_loss(gpt: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """`summed_loss`, with the gradient of the balance loss of a mixture of experts.

    Its value is the cross entropy alone, so that it can be compared with that of a dense model and of an evaluation.
    """
    if not gpt.config.n_expert:
        return summed_loss(gpt, idx, targets)
    with watch_routers(gpt) as routed:
        loss = summed_loss(gpt, idx, targets)
    weight = gpt.config.router_aux_loss_coef * (targets != IGNORE_INDEX).sum()  # as the loss, a sum over the targets
    extra = weight * balance_loss(routed, gpt.config.n_expert_per_tok)
    return loss + (extra - extra.detach())


def balance_loss(routed: list[Tensor], k: int) -> Tensor:
    """How unevenly the experts of each layer are used, for its router's logits (N, E), as the mean over the layers.

    E times the sum over the experts of (choices per token) * (mean probability): k where all are used alike, up to E
    where all tokens agree. Transformers' Mixtral first adds up the counts of all layers, so that one layer may make up
    for another; for one layer the two are the same.
    """
    losses = []
    for logits in routed:
        probs = logits.float().softmax(-1)  # (N, E)
        choices = count_choices(logits, k) / len(logits)  # (E,): sums to k
        losses.append(logits.size(-1) * (choices * probs.mean(0)).sum())
    return torch.stack(losses).mean()


def count_choices(logits: Tensor, k: int) -> Tensor:
    """How many tokens chose each expert, (E,), for a router's logits (N, E)."""
    chosen = F.one_hot(logits.topk(k, dim=-1).indices, logits.size(-1))  # (N, k, E)
    return chosen.sum((0, 1))


class ExpertUse:
    """How often each expert was chosen over the passes of an evaluation."""

    def __init__(self, config: GPTConfig):
        self.config = config
        self.counts = torch.zeros(config.n_layer, config.n_expert, dtype=torch.float64)

    def add(self, routed: list[Tensor]) -> None:
        """Counts the choices of one pass, for its routers' logits (N, E), layer by layer."""
        for counts, logits in zip(self.counts, routed, strict=True):
            counts += count_choices(logits, self.config.n_expert_per_tok).cpu()

    def row(self) -> dict[str, float]:
        """The largest share of its layer's choices that an expert has, and how even the use is, the entropy
        of the shares as a part of its greatest value, as the mean over the layers. Nothing for a dense model."""
        if not self.config.n_expert or not self.counts.sum():
            return {}
        shares = self.counts / self.counts.sum(-1, keepdim=True)
        evenness = torch.special.entr(shares).sum(-1).mean() / math.log(max(2, self.config.n_expert))
        return {"busiest_expert": float(shares.max()), "expert_evenness": float(evenness)}


def describe_use(row: dict, config: GPTConfig) -> str:
    """The use of the experts at an evaluation, in words; empty for a dense model."""
    if "busiest_expert" not in row:
        return ""
    return (
        f"  experts: evenness {row['expert_evenness']:.3f}, the busiest gets {row['busiest_expert']:.0%} of its "
        f"layer's choices (even: {1 / config.n_expert:.0%})"
    )
