"""Which core runs here: model.py as it was verified against Transformers, or an edited one.

    core = running_core()        # core.changed is () for the verified core; ("Block", "MLP") names the edited parts
    core = running_core(model)   # the same, and what differs in this model: subclasses, replaced modules and methods

What counts as an edit is told in fingerprint.py. Changes at run time, as a notebook makes them, are noticed where that
is cheap: a class or a method of model.py that was replaced, a subclass of GPT or of a part of it, a module from
elsewhere in a model, a `forward` set on one module. Not noticed are hooks, constants and defaults set at run time, a
replaced `CausalSelfAttention.attend`, and what PyTorch itself computes.
"""

import ast
import functools
import importlib.util
import inspect
import textwrap
from types import CodeType
from typing import Any, NamedTuple

from torch import nn
from torch.utils.checkpoint import checkpoint

from nanogpt_hub import model as core_module
from nanogpt_hub.fingerprint import NOT_FORWARD, VERIFIED, canonical, digest, parts, total

CORE_FILE = "model.py.txt"  # the edited model.py beside the weights: text, which nothing imports or executes
LIBRARIES = {"torch", "peft", "nanogpt_hub"}  # whose modules are no change of the core
RUNTIME = "at run time"  # behind the name of a part that no file holds
# Read when this module is imported, right after model.py: the file may be edited while a training runs.
SOURCE = inspect.getsource(core_module) if importlib.util.find_spec(core_module.__name__).has_location else ""


class Core(NamedTuple):
    """The code that computes a model's output."""

    fingerprint: str  # 16 hexadecimal digits
    changed: tuple[str, ...]  # the parts that differ from the verified core; () for the verified core itself
    source: str  # the text of model.py, followed by what was replaced at run time

    def __str__(self) -> str:
        what = f"edited: {', '.join(self.changed)}" if self.changed else "as verified"
        return f"core {self.fingerprint}, {what}"


def running_core(model: nn.Module | None = None) -> Core:
    """The core of this process, or the one that computes `model`, whose modules may differ from the classes."""
    replaced = _replaced_code() | (_foreign_modules(model) if model is not None else {})
    found = source_parts() | {f"{name} {RUNTIME}": digest(_tree_text(text)) for name, text in replaced.items()}
    changed = (name for name in found.keys() | VERIFIED.keys() if found.get(name) != VERIFIED.get(name))
    notes = [f"# ---- {name} was replaced at run time ----\n{text}" for name, text in sorted(replaced.items())]
    return Core(total(found), tuple(sorted(changed)), "\n\n".join([SOURCE, *notes]))


def verified_fingerprint() -> str:
    """The fingerprint of the core that the stock families were verified with."""
    return total(VERIFIED)


@functools.lru_cache(maxsize=1)
def source_parts() -> dict[str, str]:
    """The parts of the model.py that runs here, each with its hash."""
    return parts(SOURCE)


# ---- changes at run time ----


def _replaced_code() -> dict[str, str]:
    """Functions and methods of model.py that run other code than the file has -> the source of what they run."""
    replaced = {}
    for name, code in _compiled_code().items():
        owner, _, member = name.rpartition(".")
        place = getattr(core_module, owner, None) if owner else core_module
        found = _function(vars(place).get(member)) if place is not None else None
        if not _same_code(code, getattr(found, "__code__", None)):
            replaced[name] = _source_of(found)
    return replaced


@functools.lru_cache(maxsize=1)
def _compiled_code() -> dict[str, CodeType]:
    """Dotted name -> code of the functions of model.py and of its classes' methods, as its source compiles here."""
    covered, found = source_parts().keys(), {}
    for outer in _inner_code(compile(SOURCE, core_module.__file__ or "model.py", "exec", dont_inherit=True)):
        is_class = inspect.isclass(getattr(core_module, outer.co_name, None))
        methods = {f"{outer.co_name}.{code.co_name}": code for code in _inner_code(outer)} if is_class else {}
        found |= methods if is_class else {outer.co_name: outer}
    return {name: code for name, code in found.items() if name.split(".")[0] in covered and name not in NOT_FORWARD}


def _inner_code(code: CodeType) -> list[CodeType]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return [const for const in inner if not const.co_name.startswith("<")]


def _function(found: Any) -> Any:
    """The function behind a method's decorators."""
    found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    return inspect.unwrap(found) if callable(found) else found


def _same_code(a: Any, b: Any) -> bool:
    """Whether two code objects compute the same; for anything else, whether the constants are equal."""
    if not isinstance(a, CodeType) or not isinstance(b, CodeType):
        return type(a) is type(b) and a == b
    if any(getattr(a, name) != getattr(b, name) for name in ("co_code", "co_names", "co_varnames", "co_freevars")):
        return False
    return len(a.co_consts) == len(b.co_consts) and all(map(_same_code, a.co_consts, b.co_consts))


def _foreign_modules(model: nn.Module) -> dict[str, str]:
    """Modules in a model that are neither the core's nor a library's, and replaced `forward`s -> their source."""
    foreign = {}
    for module in model.modules():
        kind, forward = type(module), vars(module).get("forward")
        if kind.__module__.split(".")[0] not in LIBRARIES:
            foreign[kind.__qualname__] = _source_of(kind)
        if kind.__module__ == core_module.__name__ and forward is not None and not _recomputes(module, forward):
            foreign[f"forward of a {kind.__name__}"] = _source_of(forward)
    return foreign


def _recomputes(module: nn.Module, forward: Any) -> bool:
    """Whether a `forward` is the module's own, run again in the backward pass (activation checkpointing)."""
    own = forward.args[:1] if isinstance(forward, functools.partial) and forward.func is checkpoint else ()
    return bool(own) and getattr(own[0], "__func__", None) is type(module).forward


def _source_of(found: Any) -> str:
    """The source of a function or a class, also of a notebook's; without one, something that tells it from others."""
    try:
        return inspect.getsource(found)
    except (OSError, TypeError):
        code = getattr(_function(found), "__code__", None)
        return f"# no source: {digest(code.co_code.hex()) if code else type(found).__qualname__}\n"


def _tree_text(text: str) -> str:
    """Canonical code where `text` is Python, else the text itself."""
    try:
        return canonical(ast.parse(textwrap.dedent(text)).body)
    except SyntaxError:
        return text
