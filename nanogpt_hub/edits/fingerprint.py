"""A fingerprint of the code in model.py that decides which numbers come out.

    parts(source)            # {"GPTConfig": "7a99d91c", "Block": "6c3a9a00", ...}: what each part of a core hashes to
    total(parts(source))     # "d767eb9b83de3475"
    total(VERIFIED)          # that of the core whose families were verified against Transformers

Covered are imports, GPTConfig with its defaults, and every class, function and constant but those in `NOT_FORWARD`.
Comments, docstrings, formatting, the annotations of functions, first weights and presets do not count. The hash is
taken of the syntax tree, which is parsed and never executed, and is the same on every version of Python.
"""

import ast
import hashlib
import threading
from typing import Any

VERIFIED = {  # part of model.py -> its hash; written by `python tests/renew_core.py`, after the parity tests
    "imports": "c159ec59",
    "IGNORE_INDEX": "deafd2b7",
    "GPTConfig": "a97ff7bd",
    "Norm": "8a62b68f",
    "KVCache": "558dd344",
    "rotary_angles": "ba45ba82",
    "rotate": "f52e8d20",
    "Context": "e580702a",
    "CausalSelfAttention": "b23b6726",
    "MLP": "1811bc20",
    "MixtureOfExperts": "40fc28ef",
    "Block": "629fc1a2",
    "GPT": "72ec9113",
}
NOT_FORWARD = {"PRESETS", "SIZES", "init_weights", "GPTConfig.init", "GPTConfig.preset", "GPT.num_params"}
NO_MEANING = {"ctx", "kind", "returns", "type_comment"}  # fields of syntax nodes that change nothing that is computed


PARSING = threading.Lock()


def parse(source: str) -> ast.Module:
    """The syntax tree, in one thread at a time: Python 3.11's parser fails in several (python/cpython#106905).

    Raises SyntaxError.
    """
    with PARSING:
        return ast.parse(source)


def parts(source: str) -> dict[str, str]:
    """Top-level name -> hash of its code, for all that can change what a core computes. SyntaxError."""
    texts: dict[str, list[str]] = {}
    for node in without_docstring(parse(source).body):
        name = name_of(node)
        if name not in NOT_FORWARD:
            texts.setdefault(name, []).append(canonical(node, name))
    return {name: digest("\n".join(lines)) for name, lines in texts.items()}


def total(found: dict[str, str]) -> str:
    """One fingerprint for all parts."""
    return digest("\n".join(f"{name} {value}" for name, value in sorted(found.items())), 16)


def digest(text: str, length: int = 8) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def verified_table(source: str) -> dict[str, str] | None:
    """The table `VERIFIED` in the text of another copy of this file, which is not executed; None where it has none."""
    for node in parse(source).body:
        if isinstance(node, ast.Assign) and name_of(node) == "VERIFIED":
            return ast.literal_eval(node.value)
    return None


# ---- the syntax tree ----


def canonical(node: Any, name: str = "") -> str:
    """A syntax tree as text. Unlike ast.dump and ast.unparse it does not depend on the version of Python.

    name: of a top-level class, whose members in `NOT_FORWARD` are left out.
    """
    if isinstance(node, list):
        return f"[{', '.join(canonical(item) for item in node)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    words = []
    for field, value in sorted(ast.iter_fields(node)):
        if field in NO_MEANING or value is None or (field == "annotation" and isinstance(node, ast.arg)):
            continue
        if field == "body" and isinstance(value, list):
            members = without_docstring(value)
            value = [each for each in members if not name or f"{name}.{name_of(each)}" not in NOT_FORWARD]
        if value != []:  # newer versions have more fields, empty where they are not used
            words.append(f"{field}={canonical(value)}")
    return f"{type(node).__name__}({', '.join(words)})"


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if is_text else body


def name_of(node: ast.stmt) -> str:
    """What a statement defines; of an import, whether it is one of what does not count."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = {alias.name for alias in node.names}
        return names.pop() if names <= NOT_FORWARD else "imports"
    name = getattr(node, "name", None)
    if isinstance(name, str):
        return name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else "other statements"
