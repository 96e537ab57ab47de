"""Jupyter notebooks as text, and a mark that tells whether anybody has changed one since it was made here.

text = notebook([("markdown", "# A title"), ("code", "print(1)")])
is_ours(text)              # whether its cells are still those that were made here
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

NOTEBOOK = "notebook.ipynb"  # in a model's repo: what the Hub opens in Colab and Kaggle from "Use this model"
MARK = "nanogpt_hub"  # the key of the metadata that holds the digest of the cells


def notebook(cells: Iterable[tuple[str, str]], marked: bool = False) -> str:
    """A notebook without output. cells: (markdown or code, source). marked: with the digest that `is_ours` reads."""
    made = [cell(kind, source, number) for number, (kind, source) in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata: dict[str, Any] = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return as_text(with_mark(content) if marked else content)


def cell(kind: str, source: str, number: int) -> dict[str, Any]:
    made = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}, "source": source.splitlines(keepends=True)}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def with_mark(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "metadata": {**content["metadata"], MARK: digest(content["cells"])}}


def as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def is_ours(text: str) -> bool:
    """Whether a notebook was made here and nobody has changed or run it since."""
    try:
        content = json.loads(text)
        return content["metadata"][MARK] == digest(content["cells"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def digest(cells: Any) -> str:
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()[:12]
