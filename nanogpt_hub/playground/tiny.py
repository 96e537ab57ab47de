"""A tiny model made in seconds on any machine, for an app that was given no other: it learns its own description.

    folder = make_tiny("somewhere")      # a run folder like a real one: early/, last/, metrics.jsonl, samples/
    model, tokenizer = load_model(folder / "last")

A lesson in small, too: `train_tiny` is all there is to training, without anything that makes it fast or safe.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_hub.checkpoint import save_model
from nanogpt_hub.generate import generate
from nanogpt_hub.lens import attention_maps
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.runs import attention_file, attention_json
from nanogpt_hub.tokenizer import Tokenizer, build_tokenizer

TEXT = """\
A language model reads a text and guesses what comes next. It gives every token of its vocabulary a probability, one of
them is drawn, and the text has grown by one. Then it reads again.

This model is as small as it can be. It was made on this machine a moment ago, it knows single letters and this one
page, and it has learned the page by heart. It does not know what a page is.

To learn is to be wrong a little less. The model guesses, the right letter is shown, and each number in it moves by a
hair so that the right letter would have been likelier. After some hundred steps it spells, after some more it quotes.

Inside there are layers. In each one the letters look back at the letters before them: that is attention. Then each
letter thinks about what it has seen: that is the feed-forward. What the last layer says is turned into a guess.

A larger model has more layers and has read more pages. Nothing else in it is new. Train one on your own text, push it
to the Hub, and load it here.
"""
STEPS, BATCH, EARLY = 300, 12, 50  # some seconds on one core; `early` is kept to compare with
CONFIG: dict[str, Any] = dict(n_layer=2, n_head=4, n_embd=64, block_size=48)
PROMPT = "A language model "


def make_tiny(folder: str | Path, steps: int = STEPS) -> Path:
    """Trains the model and writes it as a run folder. Returns the folder; always the same model on one machine."""
    folder = Path(folder)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer("char", [TEXT])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **CONFIG))
    rows: list[dict] = []
    started = time.perf_counter()

    def keep(step: int, loss: float, rate: float) -> None:
        tokens, seconds = step * BATCH * CONFIG["block_size"], time.perf_counter() - started
        speed = {"tokens_per_second": tokens / seconds} if step else {}
        rows.append({"step": step, "tokens": tokens, "train_loss": loss, "learning_rate": rate, **speed})
        if step in (0, steps) or step % 50 == 0:
            text = PROMPT + generate(model, tokenizer, PROMPT, max_new_tokens=160, temperature=0.5, seed=1).text
            (folder / "samples" / f"step-{step:06d}.txt").write_text(text, encoding="utf-8", newline="")
            ids = tokenizer.encode(TEXT[:32])
            maps = attention_json([tokenizer.token_str(id) for id in ids], attention_maps(model, ids))
            (folder / "samples" / attention_file(step)).write_text(json.dumps(maps), encoding="utf-8")
        if step == min(EARLY, steps):
            save_model(folder / "early", model, tokenizer)

    train_tiny(model, torch.tensor(tokenizer.encode(TEXT)), steps, keep)
    save_model(folder / "last", model.eval(), tokenizer, generation_config=dict(temperature=0.4, max_new_tokens=240))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "last" / "README.md").write_text(card(model, tokenizer, steps), encoding="utf-8")
    return folder


def train_tiny(model: GPT, data: Tensor, steps: int, keep: Callable[[int, float, float], None]) -> None:
    """Plain training on data (N,): random pieces of the text, AdamW, a rate that warms up and falls."""
    T, generator = model.config.block_size, torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 6e-3 * min(1, (step + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    for step in range(steps + 1):
        at = torch.randint(len(data) - T, (BATCH, 1), generator=generator) + torch.arange(T)  # (B, T)
        _, loss = model.train()(data[at], data[at + 1])
        if step % 10 == 0:
            keep(step, loss.item(), float(schedule.get_last_lr()[0]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def card(model: GPT, tokenizer: Tokenizer, steps: int) -> str:
    """A word about it, in place of the card that a real run gets."""
    return (
        "# The built-in tiny model\n\n"
        f"{model.num_params():,} parameters, {tokenizer.vocab_size} characters, {steps} steps on one page, made "
        "on this machine when the app was started without a model. It is here so that there is something to see. "
        "Load another by its name on the Hub, or start the app with `--model`.\n\n"
        f"All that it ever read:\n\n```text\n{TEXT}```\n"
    )
