"""The commands that a newcomer types, as processes: they give text on whatever CPU Numba is told to compile for.

The lanes of continuous integration run this file again with `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` set to CPUs that
most people have, and without Numba.
"""

import os
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT, make_model

HAS_NUMBA = subprocess.run([sys.executable, "-c", "import numba"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("commands") / "model")


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    return {**os.environ, "PYTHONPATH": path, **more}


def text_of(folder, engine: str) -> tuple[str, str]:
    """What the command prints, and what it says about it."""
    words = [sys.executable, "-m", "nanogpt_hub", "generate", str(folder), "--prompt", "To be", "--seed", "1"]
    result = subprocess.run(
        [*words, "--engine", engine], capture_output=True, text=True, env=environment(), timeout=280
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_generate_gives_the_same_text_by_each_engine(folder):
    plain, _ = text_of(folder, "plain")
    assert plain.startswith("To be")
    for engine in ("torch", "numba"):
        text, said = text_of(folder, engine)
        assert text == plain
        expected = "torch" if engine == "numba" and not HAS_NUMBA else engine
        assert f"engine {expected}]" in said, said


def test_the_app_serves_a_page_that_generates(folder):
    from gradio_client import Client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "app.py", "--model", str(folder), "--port", str(port)]
    app = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(NANOGPT_HUB_ENGINE="auto"),
    )  # fmt: skip
    try:
        client = connect(Client, app, port)
        text = client.predict("To be", max_new_tokens=8, seed=1, api_name="/generate")
        assert app.poll() is None
        assert text
    finally:
        app.terminate()
        app.wait(30)


def connect(kind, app: subprocess.Popen, port: int):
    """A client of the app, as soon as it listens."""
    for _ in range(120):
        assert app.poll() is None, app.stdout.read()
        try:
            return kind(f"http://127.0.0.1:{port}", verbose=False)
        except OSError:
            time.sleep(1)
        except Exception as error:
            if "connect" not in str(error).lower():
                raise
            time.sleep(1)
    raise AssertionError("the app does not listen after two minutes")
