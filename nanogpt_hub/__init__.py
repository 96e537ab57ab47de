"""nanogpt_hub: the simplest way to train a GPT, understand it and share it."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt_hub.chat import Chat
    from nanogpt_hub.checkpoint import load_model, save_model
    from nanogpt_hub.generate import generate, stream_text
    from nanogpt_hub.hub.publish import push_to_hub
    from nanogpt_hub.hub.resolve import from_pretrained
    from nanogpt_hub.model import GPT, GPTConfig
    from nanogpt_hub.sampling import SamplingConfig

__all__ = [
    "GPT",
    "Chat",
    "GPTConfig",
    "SamplingConfig",
    "from_pretrained",
    "generate",
    "load_model",
    "push_to_hub",
    "save_model",
    "stream_text",
]

# Imported when they are first asked for: torch takes seconds and the Hub's client half of one, and `nanogpt-hub --help`
# needs neither.
LATER = {
    "Chat": "chat",
    "GPT": "model",
    "GPTConfig": "model",
    "SamplingConfig": "sampling",
    "from_pretrained": "hub.resolve",
    "generate": "generate",
    "load_model": "checkpoint",
    "push_to_hub": "hub.publish",
    "save_model": "checkpoint",
    "stream_text": "generate",
}


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(importlib.import_module(f"{__name__}.{LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """This package. `generate` is the function: when Python has imported the module of that name, it would put the
    module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name == "generate" and isinstance(value, ModuleType)
        super().__setattr__(name, value.generate if is_module else value)


sys.modules[__name__].__class__ = _Package
