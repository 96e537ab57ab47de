"""nanogpt_hub: the simplest way to train a GPT, understand it and share it."""

from nanogpt_hub.checkpoint import load_model, save_model
from nanogpt_hub.generate import SamplingConfig, generate, stream_text
from nanogpt_hub.hub import from_pretrained
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.publish import push_to_hub

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
