"""What a run keeps of each evaluation to look at: a text that the model writes, and where its heads look.

samples/step-000500.txt               prompt and text; of a run on conversations a question and its answer
samples/step-000500-attention.json    every head's map over the beginning of the validation text (nanogpt_hub/runs.py)
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from nanogpt_hub.chat import USER, ChatTemplate, Messages, message, room_for_prompt
from nanogpt_hub.generate import encode_prompt, stream_tokens
from nanogpt_hub.lens import attention_maps
from nanogpt_hub.model import GPT, IGNORE_INDEX
from nanogpt_hub.runs import attention_file, attention_json
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.tokenizer import Tokenizer, UnknownCharacterError

from .config import EvalConfig
from .data import Data

LOOKED_AT = 32  # tokens of text whose attention is kept
MAP_BYTES = 75_000  # of all maps of a step together: of a model with many heads fewer tokens are kept


class Sample:
    """The same prompt, settings and text at every step. `question`: the messages behind the prompt of a chat model."""

    def __init__(self, config: EvalConfig, gpt: GPT, tokenizer: Tokenizer, data: Data, seed: int):
        self.tokenizer, self.question = tokenizer, question_of(config.prompt, data.question)
        self.settings = SamplingConfig(
            config.sample_tokens or 1, temperature=config.temperature, top_k=config.top_k, seed=seed
        )
        if self.question:
            template = ChatTemplate(tokenizer)
            self.settings = template.stopped(self.settings)
            read = template.prompt(self.question, room_for_prompt(gpt.config.block_size, config.sample_tokens))
            self.prompt, self.ids = read.text, list(read.ids)
        else:
            self.prompt = usable_prompt(config.prompt, tokenizer, data.val[0])
            self.ids = encode_prompt(tokenizer, self.prompt)
        idx, targets = (tensor[0].tolist() for tensor in data.val)
        end = max((n for n, target in enumerate(targets) if target != IGNORE_INDEX), default=0) + 1
        heads = gpt.config.n_layer * gpt.config.n_head
        self.looked_at: list[int] = idx[: min(end, LOOKED_AT, max(8, math.isqrt(MAP_BYTES // heads)))]

    def text(self, gpt: GPT, max_new_tokens: int | None = None) -> str:
        """What the model writes after the prompt. By PyTorch, so that it does not depend on when compiled code was
        ready: a resumed run writes the same."""
        settings = self.settings if max_new_tokens is None else replace(self.settings, max_new_tokens=max_new_tokens)
        tokens = stream_tokens(gpt, self.tokenizer, [self.ids], settings, engine="torch")
        return "".join(token.text for token in tokens)

    def write(self, folder: Path, step: int, gpt: GPT) -> str:
        """Keeps both files of a step; returns the text."""
        folder.mkdir(parents=True, exist_ok=True)
        text = self.text(gpt)
        (folder / sample_name(step)).write_text(self.prompt + text, encoding="utf-8", newline="")
        if maps := self.look(gpt):
            (folder / attention_file(step)).write_text(maps, encoding="utf-8")
        return text

    @torch.no_grad()
    def look(self, gpt: GPT) -> str:
        """The maps as JSON; empty for an edited model that the lens cannot read."""
        try:
            maps = attention_maps(gpt, self.looked_at)
        except ValueError:
            return ""
        return json.dumps(attention_json([self.tokenizer.token_str(id) for id in self.looked_at], maps))

    def read(self, folder: Path, step: int) -> str:
        """The text of a step that was kept; empty where there is none."""
        path = folder / sample_name(step)
        return path.read_bytes().decode("utf-8", "replace").removeprefix(self.prompt) if path.is_file() else ""


def question_of(prompt: str, found: Messages) -> Messages:
    """What a run on conversations (`found`: a question of its validation rows) asks: the user's own, where given."""
    return [message(USER, prompt)] if found and prompt.strip() else found


def sample_name(step: int) -> str:
    return f"step-{step:06d}.txt"


def usable_prompt(prompt: str, tokenizer: Tokenizer, val_idx: Tensor) -> str:
    """The prompt, or where the tokenizer cannot write it, the first character of the validation text."""
    try:
        if tokenizer.encode(prompt):
            return prompt
    except UnknownCharacterError:
        pass
    return tokenizer.decode(val_idx[0].tolist())[:1]
