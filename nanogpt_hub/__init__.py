"""nanogpt_hub: the simplest way to train a GPT, understand it and share it."""

import importlib
from typing import TYPE_CHECKING

from nanogpt_hub.checkpoint import load_model, save_model
from nanogpt_hub.generate import generate, stream_text
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.sampling import SamplingConfig

if TYPE_CHECKING:
    from nanogpt_hub.hub.publish import push_to_hub
    from nanogpt_hub.hub.resolve import from_pretrained

__all__ = [
    "GPT",
    "GPTConfig",
    "SamplingConfig",
    "from_pretrained",
    "generate",
    "load_model",
    "push_to_hub",
    "save_model",
    "stream_text",
]

# What talks to the Hub is imported when it is first asked for: the client takes as long as half of a model's loading.
LATER = {"from_pretrained": "nanogpt_hub.hub.resolve", "push_to_hub": "nanogpt_hub.hub.publish"}


def __getattr__(name: str) -> object:
    if name in LATER:
        return getattr(importlib.import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
