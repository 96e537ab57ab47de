"""What a model is: `nanogpt-hub info`, `core` and `sizes`."""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from tqdm import tqdm

from nanogpt_hub.chat import has_template
from nanogpt_hub.checkpoint import (
    CheckpointError,
    read_config_and_type,
    read_json,
    read_shapes,
    recorded_core,
    weight_files,
)
from nanogpt_hub.cli import GPT2_VOCABULARY, SMALL_VOCABULARIES
from nanogpt_hub.edits.core import CORE_FILE, faults, running_core
from nanogpt_hub.families import FAMILIES, empty_model, match_tensors
from nanogpt_hub.hub.resolve import Resolved, blob_name, repair, resolve, with_repair
from nanogpt_hub.model import PRESETS, SIZES, GPTConfig, KVCache
from nanogpt_hub.runs import run_record
from nanogpt_hub.system import readable
from nanogpt_hub.system.files import sha256_of
from nanogpt_hub.tokenizer import Tokenizer

FACTS = ("base_model", "data", "training", "evaluation")  # the parts of run.json that `info` shows


# ---- info ----


def info(args: argparse.Namespace) -> None:
    place = resolve(args.path)
    config = print_model(place)
    print_rows("shape", {k: v for k, v in dataclasses.asdict(config).items() if k != "init"})  # which is not stored
    origin = {"repo": place.repo_id, "revision": place.revision, "commit": place.sha} if place.repo_id else {}
    print_rows("provenance", {**origin, **training_facts(place.folder)})
    print("\nfiles")
    weights = weight_files(place)
    for file in sorted(path for path in place.folder.iterdir() if path.is_file()):
        digest = f"  sha256 {checked_sha256(place, file)}" if file in weights else ""
        print(f"  {file.name:<28} {readable.size(file.stat().st_size):>10}{digest}")


def print_model(place: Resolved) -> GPTConfig:
    """Family, size and tokenizer of a model, read without loading its weights. CheckpointError where it is none."""
    try:
        config, model_type = with_repair(place, lambda: read_shape(place))
    except ValueError as error:
        raise CheckpointError(f"{place} is no model that can be loaded: {error}") from error
    content = read_json(place.folder / "config.json")
    dtype = content.get("dtype") or content.get("torch_dtype") or "float32"
    print(f"model type   {model_type}, {printable(dtype)}")
    if edited := recorded_core(content):
        print(f"model.py     edited ({', '.join(edited.changed)}), see {CORE_FILE}; core {edited.fingerprint}")
    print(f"parameters   {empty_model(config).num_params():,}")
    if not (place.folder / "tokenizer.json").is_file():
        print("tokenizer    none")
        return config
    tokenizer = Tokenizer.load(place)
    eot = "no end-of-text" if tokenizer.eot_id is None else f"end-of-text id {tokenizer.eot_id}"
    print(f"tokenizer    {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {eot}")
    if has_template(tokenizer):
        print("chat         it has a template; to talk with it: nanogpt-hub chat PATH")
    return config


def read_shape(place: Resolved) -> tuple[GPTConfig, str]:
    """Config and model type of a folder whose weights have the shapes that these ask for. ValueError where not."""
    config, model_type = read_config_and_type(place, any_core=True)
    match_tensors(config, read_shapes(weight_files(place)), model_type)
    return config, model_type


def training_facts(folder: Path) -> dict[str, object]:
    """What is known of a model's training, from the run.json that came with it or lies in the run around it."""
    facts = run_record(folder)
    known = {part: facts[part] for part in FACTS if isinstance(facts.get(part), dict)}
    settings = readable.flatten(known)
    return {name: value for name, value in settings.items() if not name.startswith("training.hyperparameters")}


def print_rows(title: str, rows: dict[str, object]) -> None:
    if rows:
        print(f"\n{title}")
    for name, value in rows.items():
        text = f"{value:,}" if type(value) is int else f"{value:.6g}" if isinstance(value, float) else printable(value)
        print(f"  {printable(name):<28} {text}")


def printable(value: object) -> str:
    """A value from somebody's file as a terminal may see it."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def checked_sha256(place: Resolved, file: Path) -> str:
    """`shown_sha256`, compared with the hash that the Hub's cache tells; a damaged file is fetched again before."""
    digest = shown_sha256(file)
    if digest != blob_name(file) and repair(place, None, [file.name]):
        return shown_sha256(file)
    return digest


def shown_sha256(path: Path) -> str:
    """The hash of a file, as the Hub shows it, with a bar where that takes its time."""
    size = path.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, delay=1, leave=False) as bar:
        return sha256_of(path, bar.update)


# ---- core ----


def core(args: argparse.Namespace) -> None:
    found = running_core()
    print(f"model.py     {'edited: ' + ', '.join(found.changed) if found.changed else 'unedited'}")
    print(f"core         {found.fingerprint}")
    own = f"nanogpt_hub, with model.py as {CORE_FILE}; Transformers cannot load it"
    print(f"saved as     {own if found.changed else ', '.join(FAMILIES) + ', where one fits'}")
    given, broken = dict(field_of(text) for text in args.fields), 0
    for preset in [args.preset] if args.preset else PRESETS:
        wrong = faults(GPTConfig.preset(preset, "1m", **given))
        print(f"{preset:<12} {'; '.join(wrong) or 'keeps what generation, training and lens count on'}")
        broken += bool(wrong)
    if broken:
        raise ValueError("what this model.py computes is not what is generated and trained with: see above")


def field_of(text: str) -> tuple[str, object]:
    """A field of GPTConfig and its value, from FIELD=VALUE. ValueError for a field that there is not."""
    name, _, value = text.partition("=")
    names = [field.name for field in dataclasses.fields(GPTConfig)]
    if name not in names or not value:
        raise ValueError(f"{text!r} is not FIELD=VALUE; the fields are {', '.join(names)}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# ---- sizes ----


def sizes(args: argparse.Namespace) -> None:
    head = ("size", "layers", "heads", "width", "block", "vocabulary", "parameters", "weights fp32", "weights bf16",
            "training", "KV cache")  # fmt: skip
    rows = [size_row(size, args.preset, args.vocab_size) for size in SIZES]
    for cells in (head, ("---",) + ("---:",) * (len(head) - 1), *rows):
        print(f"| {' | '.join(cells)} |")
    print("\nTraining: fp32 weights, gradients and AdamW's two averages; activations come on top, by batch and block.")
    print("KV cache: bf16, for one text of block tokens.")


def size_row(size: str, preset: str, vocab_size: int | None) -> tuple[str, ...]:
    """The cells of one size, measured on a model without storage."""
    vocab_size = vocab_size if vocab_size is not None else SMALL_VOCABULARIES.get(size, GPT2_VOCABULARY)
    config = GPTConfig.preset(preset, size, vocab_size=vocab_size)
    n = empty_model(config).num_params()
    cache = KVCache(config, 1, device="meta", dtype=torch.bfloat16)
    shape = (config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size)
    memory = (4 * n, 2 * n, 16 * n, cache.k.nbytes + cache.v.nbytes)
    return (size, *map(str, shape), f"{n / 1e6:,.1f} M", *map(readable.size, memory))
