"""What tests that train share: a text (`TEXT` is the test file's own), and a cache away from the user's."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def text(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(request.module.TEXT, encoding="utf-8")
    return path


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
