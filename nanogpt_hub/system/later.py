"""A module that is imported when something of it is first used."""

import importlib
from typing import Any


class Later:
    """`torch = Later("torch")` stands for the module in a file that is also read for its tables alone."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
