"""The house's rooms: who may import whom, read from the source."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("nanogpt_hub/**/*.py"), *ROOT.glob("train/**/*.py"), *ROOT.glob("app.py")])
# What each room of the library may import of the others. One that is not listed stands on top, free but for cycles.
ROOMS = {
    "model": set(),
    "tokenizer": set(),
    "sources": set(),
    "convert": {"model"},
    "decode": {"model"},
    "quantize": {"model"},
    "loops": {"model", "decode", "quantize"},
    "choice": {"loops"},
    "compiler": {"model", "decode", "loops", "choice"},
    "generate": {"model", "tokenizer", "compiler"},
    "lens": {"model", "tokenizer", "generate"},
    "checkpoint": {"model", "tokenizer", "convert"},
    "readme": set(),
    "card": {"model", "tokenizer", "convert", "checkpoint", "readme"},
    "hub": {"model", "tokenizer", "convert", "checkpoint", "readme", "card"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in the file it does so."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide where a name comes from"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def is_library(path: Path) -> bool:
    return path.is_relative_to(ROOT / "nanogpt_hub")


def each(files: list[Path]):
    return pytest.mark.parametrize("path", files, ids=lambda path: path.relative_to(ROOT).as_posix())


LIBRARY = [path for path in FILES if is_library(path)]


@each(FILES)
def test_imports_point_one_way(path):
    forbidden = {"train", "app", "gradio", "accelerate", "jsonargparse"} if is_library(path) else {"app", "gradio"}
    if path.name == "app.py":
        forbidden = {"train", "accelerate"}
    assert not packages(path) & forbidden


def rooms_used(path: Path) -> set[str]:
    used = {name.split(".")[1] for name in imports(path) if name.startswith("nanogpt_hub.")}
    return used & {file.stem for file in LIBRARY}


@each([path for path in LIBRARY if path.stem in ROOMS])
def test_the_lower_rooms_import_no_more_than_they_may(path):
    assert rooms_used(path) <= ROOMS[path.stem]


def test_no_rooms_import_each_other():
    order = graphlib.TopologicalSorter({path.stem: rooms_used(path) for path in LIBRARY if path.stem != "__init__"})
    assert list(order.static_order())  # a cycle raises


def test_the_tokenizer_and_the_sources_need_no_torch():
    for room in ("tokenizer", "sources"):
        assert "torch" not in packages(ROOT / "nanogpt_hub" / f"{room}.py")


@each([path for path in LIBRARY if path.name != "__main__.py"])
def test_the_library_does_not_print(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"]


def test_loading_and_generating_do_not_import_the_hubs_client():
    code = "import sys, nanogpt_hub; assert 'huggingface_hub' not in sys.modules; from nanogpt_hub import *"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
