"""Reinforcement learning by GRPO (arXiv:2402.03300): a model writes, a rule rewards, what is rewarded gets likelier.

    python lessons/12_reinforcement/grpo.py [out/first_gpt/best] [--reward well] [--seed 1]

The whole algorithm is `learn`. All texts of a step begin from nothing, so that they are one group. The model is updated
once from each group, so that the ratio of new to old probabilities is 1, and clipping it would never do anything.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_hub import load_model
from nanogpt_hub.checkpoint import save_model
from nanogpt_hub.corpus.stories import first_error

SKY = ("dance on the moon", "marry a cloud", "find the end of the rainbow", "catch a falling star")
REWARDS = {  # a text -> its reward
    "well": lambda text: float(first_error(text, 2) is None and text.endswith(tuple(f"{wish}." for wish in SKY))),
    "moon": lambda text: float(min(text.count("moon"), 5)),
}
GROUP, LENGTH, STEPS = 32, 40, 50  # texts of a step, tokens of a text at most, steps
RATE, KEEP = 1e-3, 0.02  # the learning rate; how much it costs to move away from the model as it was


@torch.no_grad()
def write(model, eot: int, n: int, generator: torch.Generator) -> Tensor:
    """n texts at temperature 1, (n, T): end-of-text, the text, and end-of-text again up to the longest one's."""
    ids = torch.full((n, 1), eot)
    over = torch.zeros(n, 1, dtype=torch.bool)
    while ids.size(1) <= LENGTH and not over.all():
        drawn = torch.multinomial(model(ids)[0][:, -1].softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn.where(~over, eot)], 1)
        over = over | (drawn == eot)
    return ids


def read(ids: Tensor, tokenizer) -> list[str]:
    """The texts up to their ends."""
    rows = [row[1:].tolist() for row in ids]
    return [tokenizer.decode(row[: row.index(tokenizer.eot_id)] if tokenizer.eot_id in row else row) for row in rows]


def log_probabilities(model, ids: Tensor) -> Tensor:
    """What the model gives each token of texts (n, T), (n, T - 1)."""
    return -F.cross_entropy(model(ids[:, :-1])[0].transpose(1, 2), ids[:, 1:], reduction="none")


def learn(model, tokenizer, reward, seed: int) -> None:
    """Makes rewarded texts likelier: STEPS groups, one update from each."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    before = copy.deepcopy(model).requires_grad_(False)
    for step in range(STEPS):
        ids = write(model, tokenizer.eot_id, GROUP, generator)
        rewards = torch.tensor([reward(text) for text in read(ids, tokenizer)])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # better or worse than the group
        ends = (ids[:, 1:] == tokenizer.eot_id).int()
        written = (ends.cumsum(1) - ends == 0).float()  # 1 up to the first end-of-text, which the model wrote too
        new, old = log_probabilities(model, ids), log_probabilities(before, ids)
        away = (old - new).exp() - (old - new) - 1  # an estimate of KL(new || old), never below 0
        loss = ((KEEP * away - advantages[:, None] * new) * written).sum() / written.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}, mean reward {rewards.mean():.2f}", flush=True)


def measure(when: str, model, tokenizer, seed: int) -> None:
    texts = read(write(model, tokenizer.eot_id, 100, torch.Generator().manual_seed(1000 + seed)), tokenizer)
    print(f"{when}, end well of 100: {sum(map(REWARDS['well'], texts)):.0f}")
    print(f"{when}, flawless of 100: {sum(first_error(text, 2) is None for text in texts)}")
    print(f"{when}, different: {len({*texts})}")
    print(f"for example {texts[0][:100]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="out/first_gpt/best")
    parser.add_argument("--reward", choices=REWARDS, default="well")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="out/reinforced", help="folder of the new model")
    args = parser.parse_args()
    torch.set_num_threads(1)  # its matrices are too small for more
    model, tokenizer = load_model(args.model)
    measure("before", model, tokenizer, args.seed)
    learn(model, tokenizer, REWARDS[args.reward], args.seed)
    measure("after", model, tokenizer, args.seed)
    save_model(args.out, model, tokenizer)


if __name__ == "__main__":
    main()
