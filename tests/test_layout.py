"""The house's rooms: who may import whom, read from the source."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("nanogpt_hub/**/*.py"), *ROOT.glob("train/**/*.py"), *ROOT.glob("app.py")])
# What each room of the library may import of the others. One that is not listed stands on top, free but for cycles.
ROOMS = {
    "model": {"initialisation"},
    "initialisation": set(),
    "tokenizer": set(),
    "system.*": set(),
    "corpus.formats": set(),
    "corpus.stories": set(),
    "sources": {"system.files", "corpus.formats", "corpus.stories", "hub.resolve"},
    "corpus.*": {"sources", "corpus.*", "system.installed"},
    "edits.fingerprint": set(),
    "edits.imported": {"edits.fingerprint"},
    "edits.core": {"model", "edits.fingerprint", "edits.imported"},
    "families": {"model"},
    "engine.*": {"model", "edits.core", "engine.*", "sampling"},
    "engine.prepare": {"engine.*", "sources", "system.files"},
    "sampling": {"system.later"},
    "generate": {"model", "tokenizer", "sampling", "engine.select", "engine.torch_decoder"},
    "sandbox.child": set(),
    "sandbox.renderer": {"sandbox.child"},
    "chat": {"model", "tokenizer", "sampling", "generate", "sandbox.*"},
    "speculate": {"model", "sampling", "generate", "engine.select"},
    "lens": {"model", "edits.core", "tokenizer", "sampling", "generate"},
    "checkpoint": {"model", "tokenizer", "families", "edits.*", "system.files"},
    "evaluate": {"model", "tokenizer", "sources", "generate", "engine.select"},
    "hub.plain_yaml": set(),
    "hub.readme": {"hub.plain_yaml"},
    "exporters.*": {"model", "tokenizer", "checkpoint", "system.files"},
    "hub.*": {"model", "tokenizer", "families", "checkpoint", "edits.*", "system.*", "corpus.audit", "hub.*"},
    "importers.*": {"model", "tokenizer", "families", "checkpoint", "system.files", "hub.card"},
}

# What one reads to learn how a GPT is made, and where the rest begins. Every craft has a folder.
FLAT = {
    *"__init__ __main__ cli model initialisation tokenizer sampling generate speculate chat lens evaluate".split(),
    *"checkpoint families sources runs compare".split(),
}


def room_of(path: Path) -> str:
    """The dotted name of a module within the library; a package goes by its own name."""
    parts = path.relative_to(ROOT / "nanogpt_hub").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def allowed_in(room: str) -> set[str] | None:
    """What a module may import, by the most exact entry of ROOMS. None: whatever it likes."""
    return ROOMS.get(room, ROOMS.get(f"{room.partition('.')[0]}.*"))


def fits(used: str, allowed: set[str]) -> bool:
    return used in allowed or f"{used.partition('.')[0]}.*" in allowed


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in the file it does so."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            in_train = path.is_relative_to(ROOT / "train")  # a package of two names, which never says its own
            assert node.level == 0 or in_train, f"{path.name}: relative imports hide where a name comes from"
            module = f"train.{node.module}" if node.level else node.module
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def is_library(path: Path) -> bool:
    return path.is_relative_to(ROOT / "nanogpt_hub")


def each(files: list[Path]):
    return pytest.mark.parametrize("path", files, ids=lambda path: path.relative_to(ROOT).as_posix())


LIBRARY = [path for path in FILES if is_library(path)]


@each([path for path in FILES if path.is_relative_to(ROOT / "train")])
def test_the_trainer_never_says_its_own_name(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) train\b", text, re.MULTILINE), "a wheel has it as nanogpt_hub.train"


@each(FILES)
def test_imports_point_one_way(path):
    forbidden = {"train", "app", "gradio", "accelerate", "jsonargparse"} if is_library(path) else {"app", "gradio"}
    if path.name == "app.py":
        forbidden = {"train", "accelerate"}
    if path.is_relative_to(ROOT / "nanogpt_hub" / "page"):
        forbidden -= {"gradio"}
    assert not packages(path) & forbidden


ALL_ROOMS = {room_of(path) for path in LIBRARY}


def rooms_used(path: Path) -> set[str]:
    """The modules of the library that a file imports: `from nanogpt_hub.hub import card` is hub.card."""
    used = {name.removeprefix("nanogpt_hub.") for name in imports(path) if name.startswith("nanogpt_hub.")}
    return {name for name in used if name in ALL_ROOMS and not is_package(name)}


def is_package(room: str) -> bool:
    return (ROOT / "nanogpt_hub" / room.replace(".", "/")).is_dir()


@each([path for path in LIBRARY if allowed_in(room_of(path)) is not None and path.name != "__init__.py"])
def test_the_lower_rooms_import_no_more_than_they_may(path):
    assert [used for used in rooms_used(path) if not fits(used, allowed_in(room_of(path)))] == []


def test_what_one_learns_from_lies_flat_and_every_craft_has_a_folder_that_says_what_it_is():
    assert {path.stem for path in ROOT.glob("nanogpt_hub/*.py")} == FLAT
    for path in ROOT.glob("nanogpt_hub/*/__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_no_rooms_import_each_other():
    order = graphlib.TopologicalSorter({room_of(path): rooms_used(path) for path in LIBRARY if room_of(path)})
    assert list(order.static_order())  # a cycle raises


def test_the_tokenizer_and_the_sources_need_no_torch():
    for room in ("tokenizer", "sources", "corpus/formats", "corpus/stories"):
        assert "torch" not in packages(ROOT / "nanogpt_hub" / f"{room}.py")


@each([path for path in LIBRARY if path.name not in ("cli.py", "__main__.py") and path.parent.name != "commands"])
def test_the_library_does_not_print(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"]


def test_loading_and_generating_do_not_import_the_hubs_client():
    code = "import sys, nanogpt_hub; assert 'huggingface_hub' not in sys.modules; from nanogpt_hub import *"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
