"""Which core runs here: model.py as it was verified against Transformers, or an edited one.

    core = running_core()        # core.changed is () for the verified core; ("Block", "MLP") names the edited parts
    core = running_core(model)   # the same, and what differs in this model: subclasses, replaced modules and methods
    faults(model.config)         # what generation, training and lens count on and this core does not keep

What counts as an edit is told in fingerprint.py; modules of one's own that model.py imports count with their text
(imported.py). Changes at run time, as a notebook makes them, are noticed where that is cheap: a class or a method of
model.py that was replaced, a subclass of GPT or of a part of it, a module from elsewhere in a model, a `forward` set on
one module. Not noticed are hooks, constants and defaults set at run time, a replaced `CausalSelfAttention.attend`, and
what PyTorch itself computes.
"""

import contextlib
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from types import CodeType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanogpt_hub import model as core_module
from nanogpt_hub.edits import imported
from nanogpt_hub.edits.fingerprint import NOT_FORWARD, VERIFIED, canonical, digest, parse, parts, total
from nanogpt_hub.model import GPT, Block, GPTConfig, KVCache, MixtureOfExperts

CORE_FILE = "model.py.txt"  # the edited model.py beside the weights: text, which nothing imports or executes
LIBRARIES = {"torch", "peft"}  # whose modules are no change of the core
OURS = {core_module.__name__, "nanogpt_hub.engine.int8"}  # nor are these
RUNTIME = "at run time"  # behind the name of a part that no file holds
IMPORTED = "imported"  # behind the name of a module of one's own that model.py imports


def _read_source() -> str:
    """The text of model.py; "" where Python was given none, and every part counts as edited."""
    try:
        return inspect.getsource(core_module)
    except OSError:
        return ""


SOURCE = _read_source()  # now, right after model.py was imported: the file may be edited while a training runs


class Core(NamedTuple):
    """The code that computes a model's output."""

    fingerprint: str  # 16 hexadecimal digits
    changed: tuple[str, ...]  # the parts that differ from the verified core; () for the verified core itself
    source: str  # the text of model.py, followed by what it imports and what was replaced at run time

    def __str__(self) -> str:
        what = f"edited: {', '.join(self.changed)}" if self.changed else "as verified"
        return f"core {self.fingerprint}, {what}"


def running_core(model: nn.Module | None = None) -> Core:
    """The core of this process, or the one that computes `model`, whose modules may differ from the classes."""
    replaced = _replaced_code() | (_foreign_modules(model) if model is not None else {})
    texts = {f"{name} {IMPORTED}": text for name, text in _imported_modules().items()}
    texts |= {f"{name} {RUNTIME}": text for name, text in replaced.items()}
    found = source_parts() | {name: digest(_tree_text(text)) for name, text in texts.items()}
    notes = [f"# ---- {name} ----\n{text}" for name, text in sorted(texts.items())]
    return Core(total(found), _changed(found, VERIFIED), "\n\n".join([SOURCE, *notes]))


def core_of_text(source: str, verified: dict[str, str]) -> Core:
    """The core in the text of a model.py, beside a table of verified parts. Nothing is executed; SyntaxError."""
    found = parts(source)
    return Core(total(found), _changed(found, verified), source)


def _changed(found: dict[str, str], verified: dict[str, str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in found.keys() | verified.keys() if found.get(name) != verified.get(name)))


@functools.lru_cache(maxsize=1)
def source_parts() -> dict[str, str]:
    """The parts of the model.py that runs here, each with its hash."""
    return parts(SOURCE)


@functools.lru_cache(maxsize=1)
def _imported_modules() -> dict[str, str]:
    return imported.own_modules(SOURCE, core_module.__name__)


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
    covered = source_parts().keys()
    found: dict[str, CodeType] = {}
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
    foreign, known = {}, OURS | _imported_modules().keys()
    for module in model.modules():
        kind, forward = type(module), vars(module).get("forward")
        if kind.__module__.split(".")[0] not in LIBRARIES and kind.__module__ not in known:
            foreign[kind.__name__] = _source_of(kind)
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
        known = digest(_code_text(code)) if code else type(found).__qualname__.replace(".", "_")
        return f"no_source_{known}\n"  # a name: a comment would not count


def _code_text(code: CodeType) -> str:
    """What a code object computes, as text without addresses; another one for each version of Python."""
    constants = [_code_text(const) if isinstance(const, CodeType) else repr(const) for const in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_freevars} {constants}"


def _tree_text(text: str) -> str:
    """Canonical code where `text` is Python, else the text itself."""
    try:
        return canonical(parse(textwrap.dedent(text)).body)
    except SyntaxError:
        return text


# ---- what the rest of the project counts on ----


def blocks_of(model: GPT) -> list[Block]:
    """The blocks of a model, first to last. (An nn.ModuleList does not tell a type checker what it holds.)"""
    return [cast(Block, block) for block in model.h]


def mixtures_of(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts in a model, first to last; none in a dense one."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@contextlib.contextmanager
def watch_routers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, each pass of the model appends its routers' logits, a tensor (N, E) for each mixture, to a list."""
    seen: list[Tensor] = []
    hooks = [
        mixture.router.register_forward_hook(lambda _, args, logits: seen.append(logits))
        for mixture in mixtures_of(model)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def faults(config: GPTConfig) -> list[str]:
    """What a core fails to keep of that which generation, training and lens count on, in sentences.

    Tried on a random model of this config with two layers and a small vocabulary, on the CPU.
    """
    apart = [
        f"{name} is imported: move it into model.py, the one file that a Space or another user puts in place"
        for name in _imported_modules()
    ]
    return apart + _broken_promises(config)


def _broken_promises(config: GPTConfig) -> list[str]:
    """Of what the methods of the model promise each other."""
    model = _random_model(replace(config, vocab_size=61, block_size=12, n_layer=2, dropout=0.0))
    idx = torch.arange(24).view(2, 12) * 7919 % 61
    whole = model.head(model.hidden(idx))  # (2, 12, 61)
    found = {
        "GPT.forward gives other logits than head(hidden(idx)), which training and generation call": model(idx)[0],
        "a token's logits depend on tokens that come after it": _without_future(model, idx),
        "the tokens one by one, with a KVCache, give other logits than all at once": _one_by_one(model, idx),
        "with a KVCache, rows of different lengths give other logits than each alone": _ragged(model, idx, whole),
    }
    limit = 1e-3 * whole.abs().max()
    worst = {sentence: (logits - whole).abs().max() for sentence, logits in found.items()}
    return [f"{sentence} (off by up to {off:.2g})" for sentence, off in worst.items() if not off <= limit]


def _random_model(config: GPTConfig) -> GPT:
    """Weights in which everything counts: fresh ones may leave the residual stream as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = GPT(config).eval()
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.2)
    return model


def _without_future(model: GPT, idx: Tensor) -> Tensor:
    """Logits (B, T, V), each computed without the tokens behind its own."""
    ends = range(1, idx.size(1) + 1)
    return torch.cat([model.head(model.hidden(idx[:, :end]))[:, -1:] for end in ends], dim=1)


def _one_by_one(model: GPT, idx: Tensor) -> Tensor:
    """Logits (B, T, V) of tokens given to a cache in three pieces and then singly."""
    cache = KVCache(model.config, len(idx))
    pieces = idx.split([4, 3, 2, *[1] * (idx.size(1) - 9)], dim=1)
    return torch.cat([model.head(model.hidden(piece, cache)) for piece in pieces], dim=1)


def _ragged(model: GPT, idx: Tensor, whole: Tensor) -> Tensor:
    """`whole`, with the logits of one token in each row put in that a cache of rows of 5 and 8 tokens gives."""
    cache, lengths = KVCache(model.config, 2), [5, 8]
    model.hidden(idx[:, :8], cache)
    cache.lengths = [*lengths]
    rows = torch.arange(2)
    logits = model.head(model.hidden(idx[rows, lengths][:, None], cache))
    result = whole.clone()
    result[rows, lengths] = logits[:, 0]
    return result
