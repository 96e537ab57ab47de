"""What the exercises' tests share: the exercise of the lesson, and failures that say what to do in a sentence."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"exercise_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Exercise:
    """Calls the functions of an exercise file; what is not written yet fails with the sentence in it."""

    def __init__(self, path: Path):
        self.path = path
        self.module = load(path)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args, **kwargs):
            try:
                return getattr(self.module, name)(*args, **kwargs)
            except NotImplementedError as todo:
                sentence = f"{self.path.parent.name}/{self.path.name}: {todo}"
            pytest.fail(sentence, pytrace=False)  # outside of `except`: else pytest shows the first exception, too

        return call

    def expect(self, holds: bool, sentence: str) -> None:
        """Fails with a sentence for the student, without a traceback."""
        if not holds:
            pytest.fail(sentence, pytrace=False)


@pytest.fixture
def exercise(request) -> Exercise:
    """exercise.py beside the test, or NUMBER_NAME.py in the folder LESSON_SOLUTIONS."""
    folder, solutions = request.path.parent, os.environ.get("LESSON_SOLUTIONS")
    return Exercise(Path(solutions) / f"{folder.name}.py" if solutions else folder / "exercise.py")
