"""What tests that train share: a text (`TEXT` is the test file's own), and a cache away from the user's."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def text(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(request.module.TEXT, encoding="utf-8")
    return path


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Several processes in a moment."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork here, and torchrun needs libuv")
    ranks = Ranks()
    yield ranks
    ranks.close()
