"""nanogpt_hub: the simplest way to train a GPT, understand it and share it."""

from nanogpt_hub.model import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
