"""Models trained with nanoGPT: its ckpt.pt, and its meta.pkl for characters, become a model folder.

    found = import_checkpoint("out-shakespeare-char/ckpt.pt", "out/mine", meta="data/shakespeare_char/meta.pkl")

Neither file gets to run anything: the checkpoint is read by PyTorch's weights-only reader, and of the meta file, a
pickle too, `read_pickle` understands dictionaries of numbers and texts and nothing else.
"""

import json
import math
import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from nanogpt_hub.checkpoint import CheckpointError, check_core, save_model
from nanogpt_hub.families import (
    OWN_TYPE,
    config_from_hf,
    empty_model,
    is_buffer,
    later_nanochat,
    parameter_shapes,
)
from nanogpt_hub.hub.card import RunFacts, write_card
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.system.files import write_atomic
from nanogpt_hub.tokenizer import Tokenizer, build_tokenizer

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
SETTINGS = (  # of nanoGPT's train.py, what says how a model was trained; the others are paths and machinery
    "batch_size", "gradient_accumulation_steps", "max_iters", "learning_rate", "min_lr", "decay_lr", "warmup_iters",
    "lr_decay_iters", "weight_decay", "beta1", "beta2", "grad_clip", "dtype",
)  # fmt: skip
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # what nanoGPT can start from
GPT2_VOCABULARIES = (50257, 50304)  # as it is, and padded to a multiple of 64
MAX_META_BYTES = 2**24  # every character that Unicode has fits
NANOCHAT = (
    "; its tensors are those of karpathy's nanochat, which is another model. As it is today (smear gate, value "
    "embeddings, scalars on the residual stream) it is not the one that Transformers and this project call nanochat"
)
LITERALS = ("NONE", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE")


@dataclass(frozen=True)
class Imported:
    """A nanoGPT checkpoint that is now a model folder."""

    folder: Path
    model: GPT
    tokenizer: Tokenizer
    facts: RunFacts  # what the checkpoint knew of its training


def import_checkpoint(
    checkpoint: str | Path, folder: str | Path, meta: str | Path | None = None, *, any_core: bool = False
) -> Imported:
    """Writes a new model folder, with its tokenizer and card, from nanoGPT's files.

    meta: the meta.pkl beside the training data; None for a model of GPT-2's vocabulary. any_core: also where model.py
    is edited, whose model the folder then becomes. Raises CheckpointError where the files are not nanoGPT's or the
    folder holds something already, OSError where one cannot be read or written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already: give the path of a new folder")
    content = read_checkpoint(checkpoint)
    try:
        if not any_core:
            check_core({})  # nanoGPT's weights are no edited model's
        model = build_model(content)
        tokenizer = build_gpt2(model.config) if meta is None else build_characters(model.config, read_meta(meta))
    except ValueError as error:
        raise CheckpointError(f"cannot import {checkpoint}: {error}") from error
    facts = training_facts(content)
    save_model(folder, model, tokenizer)
    (folder / "training").mkdir()
    write_atomic(folder / "training" / "run.json", json.dumps(facts, indent=2) + "\n")  # what a push tells
    write_card(folder, facts)
    return Imported(folder, model, tokenizer, facts)


# ---- the weights ----


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a ckpt.pt holds; tensors stay on the disk until they are used. CheckpointError for another file, OSError."""
    with open(path, "rb"):
        pass  # it can be opened: what goes wrong from here on is the content's fault
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of whatever kind: the reader promises none for made-up content
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it wants to run {code[1]}, and was not opened" if code else "it is no whole file of torch.save"
        raise CheckpointError(f"{path} is no checkpoint of nanoGPT: {reason}") from error
    parts = [content.get(part) for part in ("model", "model_args")] if isinstance(content, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        names = [name for name in content if isinstance(name, str)] if isinstance(content, dict) else []
        other = NANOCHAT if any(name.endswith(".attn.c_q.weight") or later_nanochat(name) for name in names) else ""
        raise CheckpointError(f"{path} is no checkpoint of nanoGPT: it has no 'model' and 'model_args'{other}")
    return content


def build_model(content: Mapping[str, Any]) -> GPT:
    """The GPT in a checkpoint, in float32 and eval mode. ValueError names the first thing that does not fit."""
    state = {clean_name(name): tensor for name, tensor in content["model"].items()}
    state = {name: tensor for name, tensor in state.items() if not is_buffer(name)}
    state.setdefault("lm_head.weight", state.get("wte.weight"))
    config = build_config(content["model_args"])
    check_tensors(state, parameter_shapes(config))
    config = replace(config, tie_word_embeddings=torch.equal(state["lm_head.weight"], state["wte.weight"]))
    model = empty_model(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.wte.weight
    return model.eval()


def clean_name(name: object) -> str:
    """A tensor's name as ours: nanoGPT's, without what torch.compile and its own ModuleDict put before it."""
    return str(name).removeprefix("_orig_mod.").removeprefix("transformer.")


def build_config(args: Mapping[str, Any]) -> GPTConfig:
    """The shape, with a head of its own, that model_args stand for: GPT-2's with the exact GELU, all biases or none."""
    args = {"dropout": 0.0, "bias": True, **args}  # older checkpoints do not name these
    differing = sorted(map(str, args.keys() ^ {*MODEL_ARGS}))
    if differing:
        raise ValueError(
            f"its model_args {'have' if differing[0] in args else 'lack'} {differing[0][:80]!r}, unlike those of "
            "nanoGPT: a changed model cannot be imported"
        )
    bias = args.pop("bias")
    biases = dict.fromkeys(("attn_bias", "mlp_bias", "norm_bias"), bias)
    shape = dict(position="learned", activation="gelu", tie_word_embeddings=False, **biases)
    return config_from_hf({"model_type": OWN_TYPE, **args, **shape})  # which checks types and bounds


def check_tensors(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless `state` holds the expected tensors, and these hold numbers."""
    differing = sorted(state.keys() ^ expected.keys())
    if differing:
        what = "missing" if differing[0] in expected else "not part of nanoGPT's model"
        raise ValueError(f"tensor {differing[0][:80]!r} is {what}")
    for name, shape in expected.items():
        tensor = state[name]
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"tensor {name!r} is {found}; its model_args ask for {list(shape)}")
        if tensor.layout != torch.strided or not tensor.is_contiguous() or not tensor.is_floating_point():
            raise ValueError(f"tensor {name!r} is no plain tensor of floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name!r} holds values that are not finite; the training had diverged")


# ---- the tokenizer ----


def build_gpt2(config: GPTConfig) -> Tokenizer:
    """GPT-2's, for a model that has its vocabulary. ValueError for another, OSError where it cannot be had."""
    if config.vocab_size not in GPT2_VOCABULARIES:
        raise ValueError(
            f"its vocab_size is {config.vocab_size}, not GPT-2's ({' or '.join(map(str, GPT2_VOCABULARIES))}): name "
            "the meta.pkl of the data that it was trained on, such as --meta data/shakespeare_char/meta.pkl"
        )
    return build_tokenizer("gpt2", [])


def build_characters(config: GPTConfig, characters: list[str]) -> Tokenizer:
    """A character tokenizer with nanoGPT's ids. It has no end-of-text: the model never saw one."""
    if not 0 <= config.vocab_size - len(characters) < 64:  # a multiple of 64 at most
        raise ValueError(
            f"its vocab_size is {config.vocab_size}, but the meta file has {len(characters)} characters: they do not "
            "belong together"
        )
    # A BPE without merges keeps each character by itself; Fuse joins them without spaces.
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(characters)}, []))
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend.to_str(pretty=True) + "\n")


def read_meta(path: str | Path) -> list[str]:
    """The characters of a meta.pkl in the order of their ids. CheckpointError for a file that holds anything else."""
    path = Path(path)
    if path.stat().st_size > MAX_META_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_META_BYTES:,} are read")
    try:
        meta = read_pickle(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no meta.pkl of nanoGPT: {error}") from error
    itos = meta.get("itos") if isinstance(meta, dict) else None
    characters: list[Any] = [itos.get(i) for i in range(len(itos))] if isinstance(itos, dict) else []
    single = all(isinstance(c, str) and len(c) == 1 and not "\ud800" <= c <= "\udfff" for c in characters)
    if not characters or not single or len({*characters}) < len(characters):
        raise CheckpointError(f"{path} is no meta.pkl of nanoGPT: its 'itos' must give each id from 0 on a character")
    return characters


def read_pickle(data: bytes) -> Any:
    """The value of a pickle made of dictionaries, whole numbers and texts (protocols 2 to 5).

    The instructions are taken one by one; those that could do more than build such a value are refused by name, with a
    ValueError, like bytes that are no pickle.
    (Python's own Unpickler is no help: one that imports nothing still builds tuples nested a million deep, whose hash
    ends the process, and takes gigabytes for a memo when a number asks for it.)
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return stack.pop()
            _step(opcode.name, arg, stack, marks, memo)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError("it is damaged") from error
    raise ValueError("it is empty")


def _step(name: str, arg: Any, stack: list, marks: list[int], memo: dict) -> None:
    """One instruction of a pickle."""
    if name in LITERALS:
        stack.append(arg)
    elif name == "EMPTY_DICT":
        stack.append({})
    elif name == "MARK":
        marks.append(len(stack))
    elif name in ("SETITEM", "SETITEMS"):
        start = marks.pop() if name == "SETITEMS" else len(stack) - 2
        items = stack[start:]
        del stack[start:]
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
        memo[len(memo) if arg is None else arg] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[arg])
    elif name not in ("PROTO", "FRAME"):
        raise ValueError(f"it asks for {name}, and only dictionaries of numbers and texts are read")


# ---- what it knows of its training ----


def training_facts(content: Mapping[str, Any]) -> RunFacts:
    """The facts for the model's card: no paths, and a loss only where it is that of these weights."""
    config, step = content.get("config"), content.get("iter_num")
    config = config if isinstance(config, dict) else {}
    facts: RunFacts = {"training": {"steps": step} if type(step) is int else {}}
    if settings := {name: config[name] for name in SETTINGS if is_plain(config.get(name))}:
        facts["training"] |= {"hyperparameters": settings, "optimizer": "AdamW"}
    dataset = config.get("dataset")
    if isinstance(dataset, str) and dataset:
        facts["data"] = {"source": {"kind": "folder", "name": re.split(r"[/\\]", dataset)[-1]}}
    if config.get("init_from") in GPT2_NAMES:
        facts["base_model"] = {"id": f"openai-community/{config['init_from']}", "relation": "finetune"}
    loss = content.get("best_val_loss")
    loss = loss.item() if isinstance(loss, Tensor) and loss.numel() == 1 else loss
    if config.get("always_save_checkpoint") is False and isinstance(loss, float) and is_plain(loss):
        facts["evaluation"] = {"val_loss": loss}  # saved only when it was the best: the loss is that of these weights
        if type(step) is int:
            facts["evaluation"]["step"] = step
    return facts


def is_plain(value: object) -> bool:
    """Whether JSON can hold a setting."""
    return isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
