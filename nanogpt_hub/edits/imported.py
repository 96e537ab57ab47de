"""Modules of one's own that a model.py imports: they decide what it computes as much as the file itself.

    own_modules(source, "nanogpt_hub.model")     # {"nanogpt_hub.mine": "def swish(x): ..."}

One's own are all but Python's, installed packages and the file of the first weights. They are read, not executed.
"""

import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from nanogpt_hub.edits.fingerprint import NOT_FORWARD, name_of, parse

PACKAGE = __name__.partition(".")[0]
INSTALLED = {"site-packages", "dist-packages"}


def own_modules(source: str, name: str) -> dict[str, str]:
    """Dotted name -> text of the modules of one's own that the text of module `name` imports, and those that they do.

    Modules that cannot be found are left out: importing them is an error of its own. SyntaxError.
    """
    found: dict[str, str] = {}
    waiting = [(source, name)]
    while waiting:
        for module in imported_by(*waiting.pop()):
            path = own_file(module)
            if path and module not in {name, PACKAGE, *found}:
                found[module] = path.read_text(encoding="utf-8", errors="replace")
                waiting.append((found[module], module))
    return found


def imported_by(source: str, name: str) -> Iterator[str]:
    """What a module's import statements name, wherever they stand: modules, and of packages what may be one."""
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and name_of(node) not in NOT_FORWARD:
            relative = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(relative, name.rpartition(".")[0])
            yield module
            if (spec := spec_of(module)) and spec.submodule_search_locations is not None:  # a package: of its modules
                yield from (f"{module}.{alias.name}" for alias in node.names)


def spec_of(module: str) -> ModuleSpec | None:
    """Where a module is; None where there is none. Imports the package that it lies in, as the import itself does."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def own_file(module: str) -> Path | None:
    """The file of a module; None where it is none, or Python's, or an installed package's."""
    spec = spec_of(module)
    path = Path(spec.origin) if spec and spec.has_location and spec.origin else None
    if path is None or path.suffix != ".py":
        return None
    installed = INSTALLED & {*path.parts} or path.is_relative_to(sysconfig.get_path("stdlib"))
    return None if installed and module.partition(".")[0] != PACKAGE else path
