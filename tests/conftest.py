"""What all tests share: no network, few threads, and the GPT-2 ranks where the machine has them."""

import os
from pathlib import Path

# Before any import that reads them: nothing in the tests may look beyond this machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SHARED = Path(__file__).parents[2] / "shared"
if (SHARED / "tiktoken-cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken-cache"))

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gpt2_ranks() -> None:
    """Skips where tiktoken can get the GPT-2 ranks neither from a cache nor from the network."""
    import tiktoken

    try:
        tiktoken.get_encoding("r50k_base")
    except Exception as error:
        pytest.skip(f"the GPT-2 ranks are neither cached (TIKTOKEN_CACHE_DIR) nor to be had: {type(error).__name__}")


@pytest.fixture(scope="session")
def tinyshakespeare() -> Path:
    """The corpus that nanoGPT uses, where the machine has it."""
    path = SHARED / "data" / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("tinyshakespeare.txt is not on this machine")
    return path
