"""What all tests share: no network, few threads, and the GPT-2 ranks where the machine has them."""

import atexit
import math
import os
import shutil
import tempfile
from pathlib import Path

from hub_server import HubServer

# Before any import that reads them: nothing in the tests may look beyond this machine. The Hub that huggingface_hub
# knows is the one in hub_server.py, its cache and its login an empty folder; so what asks the Hub gets a quick answer.
HUB = HubServer()
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="nanogpt-hub-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
    os.environ.pop(name, None)
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SHARED = Path(__file__).parents[2] / "shared"
if (SHARED / "tiktoken-cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken-cache"))

import pytest
import torch

from nanogpt_hub.engine import select as compiler

torch.set_num_threads(1)
compiler.PATIENCE = math.inf  # compiled loops only where a test asks for them: the same every time


@pytest.fixture(params=["decode", "loops"])
def every_decoder(request, monkeypatch) -> None:
    """Generation by PyTorch, and by compiled loops."""
    if request.param == "loops":
        compiler.compiler.start().join()
        assert compiler.compiler.loops
    else:
        monkeypatch.setattr(compiler.compiler, "loops", None)
        monkeypatch.setattr(compiler.compiler, "choice", None)


@pytest.fixture
def hub() -> HubServer:
    """The loopback Hub, empty."""
    HUB.reset()
    return HUB


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
