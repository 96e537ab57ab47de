"""A model folder: the stock Transformers files, written atomically and read strictly.

    save_model("out/mine", model, tokenizer)
    model, tokenizer = load_model("out/mine")

A model of an edited model.py (see edits/) is no stock model: its folder is of our own type, holds that file as
model.py.txt, and loads only where the same code runs, or where another core is asked for on purpose (`any_core`).

Safetensors and JSON only: nothing in a folder is ever unpickled or executed, whoever made it. What does not fit is
refused in one sentence (`CheckpointError`) before any memory is taken for it.
"""

import ctypes
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nanogpt_hub.edits.core import CORE_FILE, IMPORTED, RUNTIME, Core, running_core
from nanogpt_hub.edits.fingerprint import VERIFIED, digest, total
from nanogpt_hub.families import (
    OWN_TYPE,
    config_from_hf,
    config_to_hf,
    empty_model,
    family_of,
    head_copy,
    is_buffer,
    match_tensors,
    parameter_shapes,
    show,
    state_from_hf,
    state_to_hf,
)
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.system.files import sync
from nanogpt_hub.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
PLAIN_WORDS = re.compile(r"[\w. ]{1,100}")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
WRAPPERS = ("_orig_mod", "module")  # torch.compile; DistributedDataParallel and its kin
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # that are loaded
WEIGHT_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
BUFFER_BYTES = {**WEIGHT_BYTES, "BOOL": 1, "U8": 1}  # of those that masks may have, which are skipped
MAX_HEADER = 16 * 2**20  # bytes; a thousand layers fit many times
MAX_JSON = 16 * 2**20
LARGE_PAGE, MADV_COLLAPSE = 2**21, 25  # bytes; of Linux's mman.h


class CheckpointError(ValueError):
    """A folder that is no model of ours, or not one that can be trusted; the message says what to do."""


class CoreError(CheckpointError):
    """A folder whose weights belong to another model.py than the one that runs here."""


# Saving --------------------------------------------------------------------------------------------------------------


def save_model(
    folder: str | Path,
    model: nn.Module,
    tokenizer: Tokenizer | None = None,
    *,
    generation_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes the folder that Transformers, this project and the tools around them load, and returns its path.

    The GPT inside any wrappers (compile, DDP) is saved, in its own dtype or in `dtype`. `generation_config` is added
    to the defaults of generation_config.json. Where model.py is edited (`saved_as`), its text goes along. Everything is
    first written beside the folder; a new folder then appears at once, an existing one file by file, the weights last.
    Other files, such as README.md, are left alone. One writer at a time. CheckpointError when the tokenizer has more
    ids than the model; OSError when the disk is full.
    """
    folder, gpt = Path(folder), unwrap(model)
    config, state = gpt.config, clean_state(gpt)
    _check_vocabulary(config, tokenizer)
    core = _core_of(gpt, state)
    dtype = dtype or gpt.wte.weight.dtype
    eot = tokenizer.eot_id if tokenizer else None
    generation = default_generation_config(config, tokenizer) | dict(generation_config or {})
    content = config_to_hf(
        config,
        bos_token_id=generation.get("bos_token_id", eot),
        eos_token_id=generation.get("eos_token_id", eot),
        dtype=str(dtype).removeprefix("torch."),
        core={"fingerprint": core.fingerprint, "changed": core.changed} if core.changed else None,
    )
    staging = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
    staging.mkdir(parents=True)
    try:
        for name, data in (("config.json", content), ("generation_config.json", generation)):
            (staging / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8", newline="\n")
        if tokenizer:
            tokenizer.save(staging, model_max_length=config.block_size)
        if core.changed:
            (staging / CORE_FILE).write_text(core.source, encoding="utf-8", newline="\n")
        _write_weights(staging, state_to_hf(config, state, content["model_type"]), dtype, head_copy(config))
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def saved_as(gpt: GPT) -> tuple[str, str]:
    """The model type that `save_model` gives a model, and "", or OWN_TYPE and why no stock family is claimed."""
    core = running_core(gpt)
    if not core.changed:
        return family_of(gpt.config)
    return OWN_TYPE, f"model.py is edited ({', '.join(core.changed)})"


def _core_of(gpt: GPT, state: Mapping[str, Tensor]) -> Core:
    """The core that computes a model. One whose tensors are not those of its config was changed at run time, too."""
    core, expected = running_core(gpt), parameter_shapes(gpt.config).keys()
    if state.keys() - {"lm_head.weight"} == expected - {"lm_head.weight"}:
        return core
    names = " ".join([core.fingerprint, *sorted(state)])
    return core._replace(changed=(*core.changed, f"parameters {RUNTIME}"), fingerprint=digest(names, 16))


def unwrap(model: nn.Module) -> GPT:
    """The GPT inside any nesting of torch.compile and DDP. TypeError where there is none."""
    inner = model
    while not isinstance(inner, GPT):
        wrapped = next((w for w in WRAPPERS if isinstance(getattr(inner, w, None), nn.Module)), None)
        if wrapped is None:
            raise TypeError(f"a {type(model).__name__} holds no GPT; pass the model, wrapped or not")
        inner = getattr(inner, wrapped)
    return inner


def clean_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict by the names of GPT, also where the whole model or single blocks are wrapped."""
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor
        for name, tensor in model.state_dict().items()
    }


def default_generation_config(config: GPTConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Sampling defaults, by the stock keys that Transformers, vLLM and the app read."""
    vocab = tokenizer.vocab_size if tokenizer else config.vocab_size
    result = dict(do_sample=True, temperature=0.8, top_k=min(200, vocab), max_new_tokens=300)
    if tokenizer is not None and tokenizer.eot_id is not None:
        result |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot_id)
    return result


def _write_weights(
    folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, copy: tuple[str, str] | None = None
) -> None:
    """The tensors as one file; of `copy`, (name, other name), the second under the first name too."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    if copy and copy[1] in tensors:
        tensors[copy[0]] = tensors[copy[1]].clone()  # the format has no two names for one tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / WEIGHTS)  # the library's 0600 ignores the umask


def _publish(staging: Path, folder: Path) -> None:
    """Moves the finished files to where they belong, so that no moment shows half a file."""
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: (name == WEIGHTS, name))
    for name in names:
        sync(staging / name)
    if not folder.exists():
        os.rename(staging, folder)
        sync(folder.parent)
        return
    for name in names:
        os.replace(staging / name, folder / name)
    sync(folder)
    for path in folder.iterdir():
        replaced = path.name == INDEX or SHARD.fullmatch(path.name)  # by a model in one file
        if replaced or (path.name == CORE_FILE and CORE_FILE not in names):
            path.unlink()


# Loading -------------------------------------------------------------------------------------------------------------


def load_model(
    folder: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    any_core: bool = False,
) -> tuple[GPT, Tokenizer | None]:
    """The model of a folder, in eval mode, and its tokenizer (None where there is no tokenizer.json).

    Weights may be one safetensors file or shards with an index, float32, bfloat16 or float16. They become float32
    unless `dtype` says otherwise: exact, fit to train on, and on CPUs no slower than half precision. any_core: take the
    weights also where they belong to another model.py than this one, which then computes something else with them.
    CheckpointError names the first thing that is wrong: weights of another core (CoreError), a key of the config that
    asks for what this project does not have, a tensor that is missing, unknown, misshapen or not finite, a tokenizer
    with more ids than the model.
    """
    folder = Path(folder)
    try:
        config, model_type = read_config_and_type(folder, any_core)
        files = weight_files(folder)
        match_tensors(config, read_shapes(files), model_type)  # before anything is allocated
        tensors: dict[str, Tensor] = {}
        for path in files:
            tensors |= _read_tensors(path)
        state = state_from_hf(config, tensors, model_type)
        model = _assemble(config, state, torch.device(device), dtype or torch.float32)
        tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
        _check_vocabulary(config, tokenizer)
    except CoreError as error:
        raise CoreError(f"cannot load {folder}: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"cannot load {folder}: {error}") from error
    return model, tokenizer


def read_config(folder: str | Path, any_core: bool = False) -> GPTConfig:
    """The shape of the model in a folder, without its weights. ValueError where it is none of ours, or CoreError."""
    return read_config_and_type(folder, any_core)[0]


def read_config_and_type(folder: str | PathLike[str], any_core: bool = False) -> tuple[GPTConfig, str]:
    """The same, and the model type, which tells the names of the tensors."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError("there is no config.json; give the path of a model folder, such as out/NAME/best")
    content = read_json(path)
    if not any_core:
        check_core(content)
    return config_from_hf(content), content["model_type"]


def recorded_core(content: Mapping[str, Any]) -> Core | None:
    """What a config.json says of an edited model.py, without its text; None where it says nothing. CheckpointError."""
    core = content.get("core")
    if core is None:
        return None
    fingerprint, changed = (core.get("fingerprint"), core.get("changed")) if isinstance(core, dict) else (None, None)
    words: list[Any] = [fingerprint, *changed] if isinstance(changed, list) and len(changed) < 100 else [None]
    if not all(isinstance(word, str) and PLAIN_WORDS.fullmatch(word) for word in words):
        raise CheckpointError(f"core is {show(core)}; it must be the fingerprint and the changed parts of a model.py")
    return Core(words[0], tuple(words[1:]), "")


def check_core(content: Mapping[str, Any]) -> None:
    """Raises CoreError unless the weights beside a config.json with this `content` belong to the core that runs."""
    difference = core_difference(content, running_core())
    if not difference:
        return
    theirs = recorded_core(content)
    if theirs is None:
        remedy = "use an unedited copy, or, to fine-tune them with the edit, say,"
    elif RUNTIME in " ".join(theirs.changed):
        remedy = f"make the same changes again, the end of the {CORE_FILE} beside the weights tells them, or"
    else:
        remedy = f"put the {CORE_FILE} beside the weights in the place of nanogpt_hub/model.py, after reading it, or"
        if IMPORTED in " ".join(theirs.changed):
            remedy = f"make the modules anew that stand at the end of the {CORE_FILE}, and {remedy}"
    raise CoreError(f"{difference}: {remedy} take them as they are by --any-core, in Python any_core=True")


def core_difference(content: Mapping[str, Any], here: Core) -> str:
    """To which core the weights beside a config.json belong, in words; "" where that is the core `here`.

    Weights of which nothing is recorded belong to the verified core: those of the stock families, wherever they are
    from, and those that this project saved before it recorded edits.
    """
    theirs = recorded_core(content) or Core(total(VERIFIED), (), "")
    if theirs.fingerprint == here.fingerprint:
        return ""
    mine = f"edited ({', '.join(here.changed)})" if here.changed else "unedited"
    edited = f"an edited model.py ({', '.join(theirs.changed)}; core {theirs.fingerprint})"
    return f"its weights belong to {edited if theirs.changed else 'the unedited model.py'}, and the one here is {mine}"


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file from anywhere. CheckpointError for a file that is huge, malformed or ambiguous."""
    path = Path(path)
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path.name} has {path.stat().st_size:,} bytes; at most {MAX_JSON:,} are read")
    return _parse_json(path.read_bytes(), path.name)


def _parse_json(data: bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key is there twice")
        return content

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        content = json.loads(data, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} holds a {type(content).__name__} where a JSON object belongs")
    return content


def weight_files(folder: str | PathLike[str]) -> list[Path]:
    """The safetensors files that make up a folder's weights. CheckpointError where there are none that can be read."""
    folder = Path(folder)
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        files = read_json(folder / INDEX).get("weight_map")
        names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
        bad = [name for name in names if not PLAIN_NAME.fullmatch(name)]
        if bad or not names:
            raise CheckpointError(f"{INDEX} must name safetensors files in its own folder, not {bad or 'none'}")
        return [folder / name for name in names]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"there are only pickled weights, which may run code when opened and are never read; make a {WEIGHTS} "
            f"where you trust them: AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH)"
        )
    raise CheckpointError(f"there are no weights; {WEIGHTS} or {INDEX} must be in the folder")


def read_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights in all files of a model. CheckpointError for a name that is in two of them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        header = read_header(path)
        twice = shapes.keys() & header.keys()
        if twice:
            raise CheckpointError(f"tensor {min(twice)[:80]!r} is in {path.name} and in another file")
        shapes |= header
    return shapes


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights in a safetensors file, from its header alone, checked against the file's size.

    The library's own reader takes headers of 100 MB and duplicate names; this one is stricter. CheckpointError.
    """
    return {entry.name: entry.shape for entry in _read_entries(path) if not is_buffer(entry.name)}


class _Entry(NamedTuple):
    """A tensor of a safetensors file: where its bytes are, and what they mean."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int  # of its bytes in the file
    n_bytes: int


def _read_entries(path: Path) -> list[_Entry]:
    """What a safetensors file holds, in the order of its bytes: each tensor's follow those of the one before."""
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing or not a regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{path.name} is no complete safetensors file: fetch or save it again")
        header = _parse_json(file.read(length), f"the header of {path.name}")
    header.pop("__metadata__", None)
    entries = sorted((_entry(path, name, entry, 8 + length) for name, entry in header.items()), key=lambda e: e[3:])
    at = 8 + length
    for entry in entries:
        if entry.start != at:
            raise CheckpointError(f"{path.name}: the bytes of tensor {entry.name[:80]!r} are not where they belong")
        at += entry.n_bytes
    if size != at:
        raise CheckpointError(
            f"{path.name} has {size:,} bytes where its header announces {at:,}; fetch or save it again"
        )
    return entries


def _entry(path: Path, name: str, entry: Any, first: int) -> _Entry:
    """A header's entry, checked; `first` is where the tensors begin in the file."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise CheckpointError(f"{path.name} has a malformed entry for tensor {name[:80]!r}")
    sizes = BUFFER_BYTES if is_buffer(name) else WEIGHT_BYTES
    dtype = str(entry.get("dtype"))[:80]
    if dtype not in sizes:
        raise CheckpointError(f"tensor {name[:80]!r} is {dtype!r}; {', '.join(sizes)} can be loaded")
    n_bytes, offsets = math.prod(shape) * sizes[dtype], entry.get("data_offsets")
    whole = isinstance(offsets, list) and [type(n) for n in offsets] == [int, int]
    if not whole or not 0 <= offsets[0] < 2**60:
        raise CheckpointError(f"{path.name} has a malformed entry for tensor {name[:80]!r}")
    if offsets[1] - offsets[0] != n_bytes:
        raise CheckpointError(f"{path.name}: tensor {name[:80]!r} has other bytes than its shape needs")
    return _Entry(name, tuple(shape), dtype, first + offsets[0], n_bytes)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, read into memory.

    Not mapped, as the library does: where a mapped file is cut while it is read, the system ends the process.
    """
    tensors = {}
    with open(path, "rb") as file:
        for entry in _read_entries(path):
            if is_buffer(entry.name):
                continue
            room = torch.empty(entry.n_bytes, dtype=torch.uint8)
            file.seek(entry.start)
            if file.readinto(room.numpy().data) != entry.n_bytes:
                raise CheckpointError(f"{path.name} was cut while it was read; fetch or save it again")
            tensor = tensors[entry.name] = room.view(DTYPES[entry.dtype]).view(entry.shape)
            # The sum is quick, and finite unless a value is not or many are huge.
            if not (torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"tensor {entry.name!r} holds values that are not finite; the training had diverged"
                )
    return tensors


def _assemble(config: GPTConfig, state: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> GPT:
    """A GPT around private copies of the tensors, without initialising weights that are replaced at once."""
    model = empty_model(config)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    room = torch.empty(sum(t.numel() for t in state.values()), device=device, dtype=dtype)
    for name, tensor in state.items():
        place, room = room.split((tensor.numel(), len(room) - tensor.numel()))
        state[name] = place.view(tensor.shape).copy_(tensor)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["wte.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.wte.weight
    _into_large_pages(model.wte.weight)
    return model.eval()


def _into_large_pages(weight: Tensor) -> None:
    """Has Linux move the memory in which a weight and its neighbours lie into pages of 2 MB: what every token reads is
    then read some 5 % faster.

    For processes that stay: in the background and a page at a time, since that takes milliseconds for each, in which
    the process may have to wait. Elsewhere, and where the system will not, nothing happens.
    """
    storage, still_there = weight.untyped_storage(), weakref.ref(weight)
    first = -(-storage.data_ptr() // LARGE_PAGE)
    pages = range(first, (storage.data_ptr() + storage.nbytes()) // LARGE_PAGE)
    if sys.platform != "linux" or weight.device.type != "cpu" or len(pages) < 8:
        return
    where, madvise = storage.data_ptr(), ctypes.CDLL(None).madvise

    def move() -> None:
        time.sleep(10)  # it slows the next seconds down: nothing for a command that ends soon
        weight = still_there()  # from here on its memory stays its own
        if weight is None or weight.untyped_storage().data_ptr() != where:
            return
        for page in pages:
            if madvise(ctypes.c_void_p(page * LARGE_PAGE), ctypes.c_size_t(LARGE_PAGE), MADV_COLLAPSE):
                return
            time.sleep(0.005)

    threading.Thread(target=move, daemon=True).start()


def _check_vocabulary(config: GPTConfig, tokenizer: Tokenizer | None) -> None:
    """More model ids than tokenizer ids are padding; the reverse would index past the embedding."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer ({tokenizer.kind}) has {tokenizer.vocab_size} ids, but the model's vocab_size is "
            f"{config.vocab_size}: they do not belong together"
        )
