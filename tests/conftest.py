"""What all tests share: no network, few threads, and the GPT-2 ranks where the machine has them."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from hub_server import HubServer

# Before any import that reads them: nothing in the tests may look beyond this machine. The Hub that huggingface_hub
# knows is the one in hub_server.py, its cache and its login an empty folder; so what asks the Hub gets a quick answer.
HUB = HubServer()
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="nanogpt-hub-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
    os.environ.pop(name, None)
# Nor does git: a card asks whether the commit of this code can be had by everybody.
os.environ |= {
    "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "url.file:///nowhere/.insteadOf", "GIT_CONFIG_VALUE_0": "https://",
}  # fmt: skip
os.environ.setdefault("NANOGPT_HUB_ENGINE", "torch")  # compiled code only where a test or a lane asks for it
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

from nanogpt_hub.engine import select

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def compiled() -> ModuleType:
    """numba_decoder.py with its compiled code. Skips where Numba is not installed; fails where preparing it fails."""
    pytest.importorskip("numba", reason="Numba is not installed: the compiled engine is not tested")
    code = select.preparation.wait()
    assert code, "the compiled engine could not be prepared: python -m nanogpt_hub.engine.prepare says why"
    return code


@pytest.fixture(params=["plain", "torch", "numba"])
def every_engine(request, monkeypatch) -> str:
    """Generation by each engine."""
    if request.param == "numba":
        request.getfixturevalue("compiled")
    monkeypatch.setenv(select.VARIABLE, request.param)
    return request.param


@pytest.fixture
def hub() -> HubServer:
    """The loopback Hub, empty."""
    HUB.reset()
    return HUB


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that asks no other machine by itself."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with playwright.sync_playwright() as p:
        if path is None and not os.path.exists(p.chromium.executable_path):
            pytest.skip("no chromium is installed: apt-get install chromium, or playwright install chromium")
        browser = p.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def text(request, tmp_path_factory) -> Path:
    """A file that holds the `TEXT` of the test file."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(request.module.TEXT, encoding="utf-8")
    return path


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
