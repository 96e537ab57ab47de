"""What the commands of `nanogpt-hub` do: one function each, which reads the arguments that cli.py has parsed.

cli.py imports this file when a command runs, and so everything that is slow to import.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from tqdm import tqdm

from nanogpt_hub import readable
from nanogpt_hub.audit import VERBATIM, audit, overlap
from nanogpt_hub.chat import Chat, NoTemplateError, has_template
from nanogpt_hub.checkpoint import (
    CheckpointError,
    load_model,
    read_config_and_type,
    read_json,
    read_shapes,
    recorded_core,
    weight_files,
)
from nanogpt_hub.cli import GPT2_VOCABULARY, SMALL_VOCABULARIES
from nanogpt_hub.compare import compare, plot, read_experiment, tables
from nanogpt_hub.core import CORE_FILE, faults, running_core
from nanogpt_hub.devices import choose_device
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.engine.select import engine_setting, open_engine, preparation
from nanogpt_hub.evaluate import evaluate
from nanogpt_hub.exporters.gguf import export_gguf
from nanogpt_hub.families import FAMILIES, empty_model, match_tensors
from nanogpt_hub.files import sha256_of
from nanogpt_hub.generate import encode_prompt, stream_tokens
from nanogpt_hub.generate import generate as generate_texts
from nanogpt_hub.hub.card import RunFacts, write_card
from nanogpt_hub.hub.publish import push_state, push_to_hub
from nanogpt_hub.hub.readme import Readme
from nanogpt_hub.hub.resolve import Resolved, blob_name, repair, resolve, split_name, with_repair
from nanogpt_hub.hub.space import create_space
from nanogpt_hub.hub.static import create_static_space
from nanogpt_hub.importers.nanogpt import import_checkpoint
from nanogpt_hub.installed import pip_line
from nanogpt_hub.model import GPT, PRESETS, SIZES, GPTConfig, KVCache
from nanogpt_hub.runs import run_record
from nanogpt_hub.sampling import SAMPLERS, SamplingConfig
from nanogpt_hub.serve import PageServer
from nanogpt_hub.sources import open_source
from nanogpt_hub.speculate import Speculator
from nanogpt_hub.tokenizer import Tokenizer

SAMPLE_LINE = "-" * 15
FACTS = ("base_model", "data", "training", "evaluation")  # the parts of run.json that `info` shows


# ---- models ----


def open_model(place: Resolved, args: argparse.Namespace) -> tuple[GPT, Tokenizer | None]:
    """The model that `add_path` and `add_device` ask for, and its tokenizer."""
    if getattr(args, "quantize", None) and args.device == "auto":
        args.device = "cpu"
    dtype = getattr(torch, args.dtype) if args.dtype else None
    device = choose_device(args.device)
    return with_repair(place, lambda: load_model(place, device=device, dtype=dtype, any_core=args.any_core))


def say(text: str) -> None:
    """What is not the result itself."""
    print(text, file=sys.stderr)


# ---- generate ----


def generate(args: argparse.Namespace) -> None:
    if args.num_samples < 1:
        raise ValueError(f"--num-samples is {args.num_samples}; it must be at least 1")
    prepare_engine(args)
    prompt = read_prompt(args.prompt)
    place = resolve(args.path)
    config = sampling_settings(place, args)
    if args.ignore_eot:
        config = dataclasses.replace(config, stop_tokens=())
    model, tokenizer = open_model(place, args)
    ids = encode_prompt(tokenizer, prompt)
    draft, seed = open_draft(args, tokenizer), config.seed or 0
    if args.quantize:
        model = quantize_int8(model)
    for sample in range(args.num_samples):
        if sample:
            print(SAMPLE_LINE)
        print("" if args.no_echo else prompt, end="", flush=True)
        n, started = 0, time.perf_counter()
        config = dataclasses.replace(config, seed=seed + sample)
        for token in stream_tokens(model, tokenizer, [ids], config, draft=draft, engine=args.engine):
            print(token.text, end="", flush=True)
            n += 1
        print(flush=True)
        rate = n / (time.perf_counter() - started)
        say(f"[seed {config.seed}, {n} tokens, {rate:,.0f} tokens/s, engine {token.engine}]")


def sampling_settings(place: Resolved, args: argparse.Namespace) -> SamplingConfig:
    """The model's own settings and what `add_sampling` asks for, with a seed."""
    names = ("max_new_tokens", *SAMPLERS)
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    return SamplingConfig.from_folder(place, seed=args.seed, stop=tuple(args.stop), **given).seeded()


def prepare_engine(args: argparse.Namespace) -> None:
    """Has the compiled engine made where it was asked for by name, and says so: it takes a while, once per machine."""
    if (args.engine or engine_setting()) == "numba" and preparation.poll() is None and not preparation.over:
        say("preparing the compiled engine, once for this machine: about a minute ...")
        preparation.wait()


def open_draft(args: argparse.Namespace, tokenizer: Tokenizer | None) -> Speculator | None:
    """What guesses ahead, if anything shall. ValueError for a model with another tokenizer."""
    if args.speculate in (None, "ngram"):
        return Speculator() if args.speculate else None
    place = resolve(args.speculate)
    small, its_tokenizer = open_model(place, args)
    if its_tokenizer is None or tokenizer is None or its_tokenizer.hash != tokenizer.hash:
        raise ValueError(f"{place} cannot guess for {args.path}: its tokenizer is not the same")
    return Speculator(quantize_int8(small) if args.quantize else small)


def read_prompt(prompt: str) -> str:
    """The prompt itself, or what `FILE:path` or `-` (stdin) hold, byte for byte as UTF-8."""
    if prompt == "-":
        data, name = sys.stdin.buffer.read(), "stdin"
    elif prompt.startswith("FILE:"):
        name = prompt.removeprefix("FILE:")
        data = Path(name).read_bytes()
    else:
        return prompt
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt from {name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


# ---- chat ----

RESET = "/reset"


def chat(args: argparse.Namespace) -> None:
    prepare_engine(args)
    if args.system == "-":
        raise ValueError("--system - would read the messages; give the text itself, or FILE:path")
    system = read_prompt(args.system)
    place = resolve(args.path)
    config = sampling_settings(place, args)
    model, tokenizer = open_model(place, args)
    try:
        talk = Chat(quantize_int8(model) if args.quantize else model, tokenizer, system, config)
    except NoTemplateError as error:
        raise NoTemplateError(f"{place}: {error}; to continue a text: nanogpt-hub generate PATH") from error
    say(f"[seed {config.seed}; a line is a message, {RESET} forgets what was said, Ctrl-D ends]")
    for text in typed_lines():
        if text == RESET:
            talk.reset()
            say("[what was said is forgotten]")
        elif text:
            try:
                answer(talk, text, args.engine)
            except ValueError as error:  # of this message alone: a character, say, that the model does not know
                if not sys.stdin.isatty():
                    raise
                say(f"[{error}]")


def answer(talk: Chat, text: str, engine: str | None) -> None:
    """Prints one answer as it comes. Ctrl-C ends it; what has come is part of the conversation."""
    finish: str | None = None
    try:
        for token in talk.stream(text, engine):
            print(token.text, end="", flush=True)
            finish = token.finish
    except KeyboardInterrupt:
        finish = "stopped"
    print(flush=True)
    if finish == "length":
        say("[cut: --max-new-tokens allows longer answers]")
    if finish == "stopped":
        say("[stopped]")
    if talk.left_out:
        say(f"[the context is full: the first {talk.left_out} messages were left out]")


def typed_lines() -> Iterator[str]:
    """The lines of stdin, without their ends, as they are typed or piped. ValueError where they are not UTF-8."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # arrow keys work
        while True:
            try:
                yield input("> ").strip()
            except EOFError:
                print(flush=True)
                return
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        try:
            yield line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of stdin is not UTF-8 text: {error.reason}") from error


# ---- eval ----


def evaluate_model(args: argparse.Namespace) -> None:
    if args.max_windows < 0:
        raise ValueError(f"--max-windows is {args.max_windows}; it must be at least 0")
    about = dict(text_column=args.text_column, config=args.config, split=args.split, revision=args.revision)
    source = open_source(args.data, **about)
    place = resolve(args.path)
    model, tokenizer = open_model(place, args)
    if tokenizer is None:
        raise ValueError(f"{place} has no tokenizer, and so cannot read a text")
    prepare_engine(args)
    engine = open_engine(args.engine or "plain", model.wte.weight.device)
    result = evaluate(model, tokenizer, source, args.max_windows, engine=engine)
    measured = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    if args.json:
        numbers = {name: value if math.isfinite(value) else None for name, value in measured.items()}
        counts = {"tokens": result.tokens, "bytes": result.bytes, "max_windows": args.max_windows}
        about = {"model": str(place), "data": source.describe(), "engine": engine.name}
        print(json.dumps({**about, **numbers, **counts}, indent=2))
        return
    print(f"model          {place}")
    print(f"data           {source.name}")
    print(f"engine         {engine.name}")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.4g}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"tokens         {result.tokens:,} predicted, {result.bytes:,} bytes")


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


# ---- audit ----


def audit_text(args: argparse.Namespace) -> None:
    source = open_source(args.data, text_column=args.text_column)
    report = audit(source)
    print(f"looked at  {source.name}: {report.documents:,} documents, {report.characters:,} characters")
    if report.cut_short:
        print("note       there is more, which was not looked at")
    for found in report.findings:
        print(f"{found.count:>9,}  {found.kind}; for example in document {found.document}: {found.example}")
    if not report.findings:
        print("nothing found")
    if args.model:
        model, tokenizer = open_model(resolve(args.model), args)
        if tokenizer is None:
            raise CheckpointError(f"{args.model} has no tokenizer.json, so it cannot write texts to compare with")
        sampling = SamplingConfig(max_new_tokens=200, temperature=1.0, seed=1)
        written = [result.text for result in generate_texts(model, tokenizer, [""] * 20, sampling)]
        again = overlap(written, source.documents())
        print(f"verbatim   {again.share:.0%} of 20 texts by the model, in matches of {VERBATIM} bytes or more")
        if again.longest:
            print(f"longest    {again.longest} bytes: {again.example}")


# ---- compare ----


def compare_runs(args: argparse.Namespace) -> None:
    comparison = compare([read_experiment(folder) for folder in args.runs])
    print("\n\n".join(tables(comparison)))
    if args.plot:
        plot(comparison, args.plot)
        say(f"drawn: {args.plot}")


# ---- import ----


def import_nanogpt(args: argparse.Namespace) -> None:
    found = import_checkpoint(args.checkpoint, args.out, args.meta, any_core=args.any_core)
    config, tokenizer = found.model.config, found.tokenizer
    shape = (f"{config.n_layer} layers", f"{config.n_head} heads", f"width {config.n_embd}",
             f"context {config.block_size}", "biases" if config.attn_bias else "no biases")  # fmt: skip
    steps, evaluation = found.facts["training"].get("steps"), found.facts.get("evaluation", {})
    print(f"model      {found.model.num_params():,} parameters: {', '.join(shape)}")
    if steps is not None:
        loss = f", validation loss {evaluation['val_loss']:.4f}" if evaluation else ""
        print(f"training   {steps:,} steps{loss}")
    print(f"tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    print(f"written    {found.folder}")
    print(f"\nNext: nanogpt-hub generate {found.folder}")
    print(f"      nanogpt-hub eval {found.folder} --data FILE")
    print(f"      nanogpt-hub push {found.folder} user/name")


# ---- gguf ----


def gguf(args: argparse.Namespace) -> None:
    try:
        place = resolve(args.path)
        path = with_repair(place, lambda: export_gguf(place, args.out, args.type))
    except ImportError as error:
        raise ValueError(f"the package gguf is missing: run `{pip_line(['gguf'])}`") from error
    print(f"{path} ({readable.size(path.stat().st_size)}, {args.type})")


# ---- push ----


def push(args: argparse.Namespace) -> None:
    if "@" in args.repo_id:
        raise ValueError(f"{args.repo_id!r} names a revision: give the branch to push to by --branch")
    token = Path(args.token_file).expanduser().read_text(encoding="utf-8").strip() if args.token_file else None
    common: dict[str, Any] = dict(private=args.private, message=args.message, token=token, say=say)
    if args.state:
        done = push_state(args.path, args.repo_id, **common)
        print(f"{done.url} ({done.branch}, commit {done.sha})")
        say(f"to go on elsewhere: nanogpt-hub train --resume {done.repo_id} --data.source FILE")
        return
    place = resolve(args.path)
    about = {name: value for name in ("license", "description") if (value := getattr(args, name))}
    if args.description and not place.repo_id:  # kept in the folder too, or the next push would take it away
        facts = cast(RunFacts, run_record(place.folder) | {"description": args.description})
        write_card(place.folder, facts)
    if "license" not in about:
        about = ask_license(place.folder) | about
    done = push_to_hub(
        place,
        args.repo_id,
        branch=args.branch,
        tags=tuple(args.tag),
        about=cast(RunFacts, about),
        pull_request=args.create_pr,
        notebook=not args.no_notebook,
        **common,
    )
    print(f"{done.url} ({done.branch}, commit {done.sha})")
    if not about.get("license"):
        say("no license is given, so others may not use the model: push again with --license mit (or another)")
    if not args.create_pr:
        talks = (place.folder / "tokenizer.json").is_file() and has_template(Tokenizer.load(place))
        at = "" if done.branch == "main" else f"@{done.branch}"
        say(f"to try it: nanogpt-hub {'chat' if talks else 'generate'} {done.repo_id}{at}")


def ask_license(folder: Path) -> dict[str, str]:
    """The license that the folder's card or run tells, else what is typed where somebody sits at a terminal."""
    card = folder / "README.md"
    known = Readme.parse(card.read_text(encoding="utf-8")).data.get("license") if card.is_file() else None
    known = known or run_record(folder).get("license")
    if not known and sys.stdin.isatty():
        known = input("license of the weights, such as mit or apache-2.0 (nothing for none): ").strip()
    return {"license": known} if isinstance(known, str) and known else {}


# ---- space ----


def space(args: argparse.Namespace) -> None:
    if args.static:
        no_server = {"--hardware": args.hardware, "--secret": args.secret, "--app-folder": args.app_folder}
        if given := [flag for flag, value in no_server.items() if value]:
            raise ValueError(f"{given[0]} is for a Space with a server; leave it out with --static")
        done = create_static_space(args.space_id, args.model, private=args.private, say=say)
        print(f"{done.url} (commit {done.sha})")
        return
    done = create_space(
        args.space_id, args.model, private=args.private, hardware=args.hardware, app_folder=args.app_folder,
        secrets={name: secret_of(name) for name in args.secret}, say=say,
    )  # fmt: skip
    print(f"{done.url} (commit {done.sha})")
    say(done.how_to_duplicate)


def secret_of(name: str) -> str:
    """A secret from the environment: on a command line the other users of a machine could read it."""
    value = os.environ.get(name) or (huggingface_hub.get_token() if name == "HF_TOKEN" else None)
    if not value:
        raise ValueError(f"there is no environment variable {name} to take the Space's secret from: set it first")
    return value


# ---- web ----


def web(args: argparse.Namespace) -> None:
    if args.path and not Path(args.path).is_dir():
        split_name(args.path)  # a sentence now is better than an empty page
    server = PageServer(args.path, args.host, args.port)
    print(f"the page is at {server.url}; Ctrl-C stops it", flush=True)
    server.run()


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
