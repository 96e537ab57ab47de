"""A text to train on: `TEXT` is the test file's own."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def text(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(request.module.TEXT, encoding="utf-8")
    return path
