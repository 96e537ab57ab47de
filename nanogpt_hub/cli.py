"""The command line: `nanogpt-hub COMMAND ...`, or `python -m nanogpt_hub COMMAND ...`.

Each command is one function that reads the parsed arguments, and one `add_...` that declares them; `build_parser` lists
them. Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 a wrong argument or file, 130 interrupted.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
from tqdm import tqdm

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
from nanogpt_hub.compare import compare, plot, read_experiment, tables
from nanogpt_hub.core import CORE_FILE, faults, running_core
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.engine.select import ENGINES, engine_setting, open_engine, preparation
from nanogpt_hub.evaluate import evaluate
from nanogpt_hub.exporters.gguf import KINDS, export_gguf
from nanogpt_hub.families import empty_model, match_tensors
from nanogpt_hub.files import sha256_of
from nanogpt_hub.generate import encode_prompt, stream_tokens
from nanogpt_hub.generate import generate as generate_texts
from nanogpt_hub.hub.card import flatten, write_card
from nanogpt_hub.hub.private import without_secrets
from nanogpt_hub.hub.publish import push_state, push_to_hub
from nanogpt_hub.hub.readme import Readme
from nanogpt_hub.hub.resolve import Resolved, resolve, split_name
from nanogpt_hub.hub.space import create_space
from nanogpt_hub.hub.static import create_static_space
from nanogpt_hub.importers.nanogpt import import_checkpoint
from nanogpt_hub.model import GPT, PRESETS, SIZES, GPTConfig, KVCache
from nanogpt_hub.sampling import SAMPLERS, SamplingConfig
from nanogpt_hub.serve import PageServer
from nanogpt_hub.sources import open_source
from nanogpt_hub.speculate import Speculator
from nanogpt_hub.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
SAMPLE_LINE = "-" * 15
FACTS = ("base_model", "data", "training", "evaluation")  # the parts of run.json that `info` shows
SMALL_VOCABULARIES = {"1m": 256, "10m": 256, "30m": 16384}  # what the small sizes are usually trained with
GPT2_VOCABULARY = 50304  # 50257, padded to a multiple of 64


# ---- models ----


def add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="model folder, or user/name[@revision] on the Hub")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto, the fastest there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: float32)")
    add_any_core(parser)


def add_any_core(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--any-core", action="store_true",
        help="take the weights even if they belong to another model.py than this one, which gives other results",
    )  # fmt: skip


def add_engine(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "--engine", choices=ENGINES,
        help="what computes the tokens: plain (model.py itself), torch, numba (compiled once, then fastest on "
        f"a CPU), auto (numba where it is prepared, else torch){more}",
    )  # fmt: skip


def open_model(place: Resolved, args: argparse.Namespace) -> tuple[GPT, Tokenizer | None]:
    """The model that `add_path` and `add_device` ask for, and its tokenizer."""
    if getattr(args, "quantize", None) and args.device == "auto":
        args.device = "cpu"
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return load_model(place, device=pick_device(args.device), dtype=dtype, any_core=args.any_core)


def pick_device(name: str) -> str:
    """`name` if this machine has the device, ValueError if not; "auto" is CUDA, then MPS, then the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} is not available here; try --device cpu") from error
    return name


def say(text: str) -> None:
    """What is not the result itself."""
    print(text, file=sys.stderr)


# ---- generate ----


def add_generate(commands) -> None:
    parser = add_command(commands, "generate", generate, "Streams text from a model.")
    add_path(parser)
    parser.add_argument(
        "--prompt", default="", metavar="TEXT",
        help="text to go on from; FILE:path reads a file, - reads stdin (default: the start of a document)",
    )  # fmt: skip
    parser.add_argument("--num-samples", type=int, default=1, metavar="INT", help="texts to generate (default: 1)")
    parser.add_argument(
        "--seed", type=int, metavar="INT", help="sample i draws with seed + i (default: a random one, which is told)"
    )
    add_sampling(parser)
    parser.add_argument("--ignore-eot", action="store_true", help="go on after end-of-text, for max-new-tokens")
    parser.add_argument("--no-echo", action="store_true", help="print what follows the prompt, not the prompt itself")
    parser.add_argument(
        "--speculate", metavar="ngram|PATH",
        help="guess ahead for speed, the tokens stay the same: from the text (ngram), or by a smaller model",
    )  # fmt: skip
    add_computing(parser)


def add_computing(parser: argparse.ArgumentParser) -> None:
    """What computes the tokens, and where."""
    parser.add_argument("--quantize", choices=("int8",), help="weights of 8 bits: faster for large models on a CPU")
    add_engine(parser)
    add_device(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How the tokens are chosen and when a text ends."""
    add_sampling_flag(parser, "max_new_tokens", int, "tokens to generate")
    for each in SAMPLERS.values():
        add_sampling_flag(parser, each.name, each.kind, each.help)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text, taken literally; repeatable"
    )


def add_sampling_flag(parser: argparse.ArgumentParser, name: str, kind: type, text: str) -> None:
    default = getattr(SamplingConfig, name)
    parser.add_argument(
        f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(),
        help=f"{text} (default: the model's own, else {default})",
    )  # fmt: skip


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
    draft = open_draft(args, tokenizer)
    if args.quantize:
        model = quantize_int8(model)
    for sample in range(args.num_samples):
        if sample:
            print(SAMPLE_LINE)
        print("" if args.no_echo else prompt, end="", flush=True)
        n, started = 0, time.perf_counter()
        settings = dict(seed=config.seed + sample, draft=draft, engine=args.engine)
        for token in stream_tokens(model, tokenizer, [ids], config, **settings):
            print(token.text, end="", flush=True)
            n += 1
        print(flush=True)
        rate = n / (time.perf_counter() - started)
        say(f"[seed {config.seed + sample}, {n} tokens, {rate:,.0f} tokens/s, engine {token.engine}]")


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


def open_draft(args: argparse.Namespace, tokenizer: Tokenizer) -> Speculator | None:
    """What guesses ahead, if anything shall. ValueError for a model with another tokenizer."""
    if args.speculate in (None, "ngram"):
        return Speculator() if args.speculate else None
    place = resolve(args.speculate)
    small, its_tokenizer = open_model(place, args)
    if its_tokenizer is None or its_tokenizer.hash != tokenizer.hash:
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


def add_chat(commands) -> None:
    parser = add_command(
        commands, "chat", chat,
        "Talks with a model that was tuned on conversations: a line is a message, the answer streams. /reset forgets "
        "what was said, Ctrl-C ends an answer, Ctrl-D the chat. What is piped in is taken line by line.",
    )  # fmt: skip
    add_path(parser)
    parser.add_argument(
        "--system", default="", metavar="TEXT",
        help="how the model shall be, said before everything else; FILE:path reads a file",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, metavar="INT", help="answer i draws with seed + i (default: a random one, which is told)"
    )
    add_sampling(parser)
    add_computing(parser)


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
        raise NoTemplateError(f"{place}: {error}; nanogpt-hub generate continues text") from error
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
    finish = None
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


def add_eval(commands) -> None:
    parser = add_command(commands, "eval", evaluate_model, "Measures how well a model predicts a text.")
    add_path(parser)
    parser.add_argument(
        "--data", required=True, metavar="SOURCE",
        help='text file, jsonl, parquet or csv, folder of these, URL, Hub dataset, "python" or "stories"',
    )  # fmt: skip
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of tables (default: text)")
    parser.add_argument("--config", default="", metavar="NAME", help="of a Hub dataset")
    parser.add_argument("--split", default="train", metavar="NAME", help="of a Hub dataset (default: train)")
    parser.add_argument("--revision", default="", metavar="NAME", help="of a Hub dataset: branch, tag or commit")
    parser.add_argument(
        "--max-windows", type=int, default=0, metavar="INT",
        help="only the first so many pieces of the model's context length (default: 0, the whole text)",
    )  # fmt: skip
    add_engine(parser, "; the default here is plain")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


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


def add_info(commands) -> None:
    add_path(add_command(commands, "info", info, "Tells a model's shape, tokenizer, provenance and files."))


def info(args: argparse.Namespace) -> None:
    place = resolve(args.path)
    config = print_model(place)
    print_rows("shape", {k: v for k, v in dataclasses.asdict(config).items() if k != "init"})  # which is not stored
    origin = {"repo": place.repo_id, "revision": place.revision, "commit": place.sha} if place.repo_id else {}
    print_rows("provenance", {**origin, **training_facts(place.folder)})
    print("\nfiles")
    weights = weight_files(place)
    for file in sorted(path for path in place.folder.iterdir() if path.is_file()):
        digest = f"  sha256 {shown_sha256(file)}" if file in weights else ""
        print(f"  {file.name:<28} {size_text(file.stat().st_size):>10}{digest}")


def print_model(place: Resolved) -> GPTConfig:
    """Family, size and tokenizer of a model, read without loading its weights. CheckpointError where it is none."""
    try:
        config, model_type = read_config_and_type(place, any_core=True)
        match_tensors(config, read_shapes(weight_files(place)), model_type)
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
        print("chat         it has a template: nanogpt-hub chat talks with it")
    return config


def training_facts(folder: Path) -> dict[str, object]:
    """What is known of a model's training, from the run.json that came with it or lies in the run around it."""
    facts = run_record(folder)
    known = {part: facts[part] for part in FACTS if isinstance(facts.get(part), dict)}
    return {name: value for name, value in flatten(known) if not name.startswith("training.hyperparameters")}


def run_record(folder: Path) -> dict[str, object]:
    """The run.json that came with a model or lies in the run around it; empty where there is none."""
    places = (folder / "training" / "run.json", folder.resolve().parent / "run.json")
    return next((read_json(path) for path in places if path.is_file()), {})


def print_rows(title: str, rows: dict[str, object]) -> None:
    if rows:
        print(f"\n{title}")
    for name, value in rows.items():
        text = f"{value:,}" if type(value) is int else f"{value:.6g}" if isinstance(value, float) else printable(value)
        print(f"  {printable(name):<28} {text}")


def printable(value: object) -> str:
    """A value from somebody's file as a terminal may see it."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def shown_sha256(path: Path) -> str:
    """The hash of a file, as the Hub shows it, with a bar where that takes its time."""
    size = path.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, delay=1, leave=False) as bar:
        return sha256_of(path, bar.update)


# ---- core ----


def add_core(commands) -> None:
    parser = add_command(commands, "core", core, "Tells whether model.py is edited, and tries what it must keep.")
    parser.add_argument("--preset", choices=list(PRESETS), help="lineage to try (default: all of them)")
    parser.add_argument("fields", metavar="FIELD=VALUE", nargs="*", help="of the config, such as activation=relu2")


def core(args: argparse.Namespace) -> None:
    found = running_core()
    print(f"model.py     {'edited: ' + ', '.join(found.changed) if found.changed else 'unedited'}")
    print(f"core         {found.fingerprint}")
    own = f"nanogpt_hub, with model.py as {CORE_FILE}; Transformers cannot load it"
    print(f"saved as     {own if found.changed else 'gpt2, gpt_neox, llama, nanochat, where one fits'}")
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


def add_audit(commands) -> None:
    text = "Looks for duplicates, secrets, personal data, invisible characters and planted triggers in a text."
    parser = add_command(commands, "audit", audit_text, text)
    parser.add_argument("data", metavar="SOURCE", help="as of train.pretrain: file, folder, URL, Hub dataset, stories")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of tables (default: text)")
    parser.add_argument("--model", metavar="PATH", help="how much of what this model writes stands in the text")
    add_device(parser)


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
        sampling = SamplingConfig(max_new_tokens=200, temperature=1.0, seed=1)
        written = [result.text for result in generate_texts(model, tokenizer, [""] * 20, sampling)]
        found = overlap(written, source.documents())
        print(f"verbatim   {found.share:.0%} of 20 texts by the model, in matches of {VERBATIM} bytes or more")
        print(f"longest    {found.longest} bytes: {found.example}")


# ---- compare ----


def add_compare(commands) -> None:
    text = "Compares training runs: settings, losses at equal steps, tokens and time, and what is beyond noise."
    parser = add_command(commands, "compare", compare_runs, text)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders; those that differ in the seed are averaged"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses into this png")


def compare_runs(args: argparse.Namespace) -> None:
    comparison = compare([read_experiment(folder) for folder in args.runs])
    print("\n\n".join(tables(comparison)))
    if args.plot:
        plot(comparison, args.plot)
        say(f"drawn: {args.plot}")


# ---- import ----


def add_prepare(commands) -> None:
    text = "Tokenises the text of a run ahead of it: CONFIG.yaml [--workers N] [--option value ...], as for training."
    # Every word is the trainer's, options too: with a prefix that nobody types none of them is taken for ours.
    parser = commands.add_parser("prepare", help=text, description=text, add_help=False, prefix_chars="\0")
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=prepare)


def prepare(args: argparse.Namespace) -> None:
    """The library does not know the trainer; the command hands over to it where it is installed."""
    if importlib.util.find_spec("train") is None or importlib.util.find_spec("train.prepare") is None:
        raise ValueError(
            "prepare belongs to the trainer, which is not installed here; run it in a checkout of nanogpt_hub"
        )
    status = importlib.import_module("train.prepare").main(args.arguments)
    if status:
        raise SystemExit(status)


def add_import(commands) -> None:
    parser = add_command(commands, "import", import_nanogpt, "Makes a model folder of a checkpoint that nanoGPT wrote.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="nanoGPT's ckpt.pt")
    parser.add_argument("out", metavar="OUT", help="the new model folder")
    parser.add_argument(
        "--meta", metavar="PATH", help="the meta.pkl beside nanoGPT's data, for characters (default: GPT-2's tokenizer)"
    )
    add_any_core(parser)


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


def add_gguf(commands) -> None:
    parser = add_command(commands, "gguf", gguf, "Writes a model as a GGUF file, for llama.cpp and its kin.")
    add_path(parser)
    parser.add_argument("out", metavar="OUT", help="the new file, such as mine.gguf")
    parser.add_argument("--type", choices=KINDS, default="f32", help="of the matrices (default: f32)")


def gguf(args: argparse.Namespace) -> None:
    try:
        path = export_gguf(resolve(args.path), args.out, args.type)
    except ImportError as error:
        raise ValueError("the package gguf is missing: run `pip install gguf`") from error
    print(f"{path} ({size_text(path.stat().st_size)}, {args.type})")


# ---- push ----


def add_push(commands) -> None:
    parser = add_command(commands, "push", push, "Publishes a model folder on the Hub, with its card, in one commit.")
    add_path(parser)
    parser.add_argument("repo_id", metavar="REPO", help="user/name, or the address of its page; created if need be")
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument(
        "--branch", "--revision", default="main", metavar="NAME", help="branch to push to (default: main)"
    )
    parser.add_argument("--tag", action="append", default=[], metavar="NAME", help="tag the commit; repeatable")
    parser.add_argument("--message", metavar="TEXT", help="of the commit (default: step and loss, where known)")
    parser.add_argument("--license", default="", metavar="NAME", help="of the weights: mit, apache-2.0, cc-by-4.0, ...")
    parser.add_argument("--description", default="", metavar="TEXT", help="words of yours, put above the card")
    parser.add_argument("--create-pr", action="store_true", help="offer it to the repo's owner as a pull request")
    parser.add_argument(
        "--state", action="store_true", help="PATH is a run's folder: publish its training state, for --resume REPO"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="read the token from this file (default: HF_TOKEN, or `hf auth login`)"
    )


def push(args: argparse.Namespace) -> None:
    if "@" in args.repo_id:
        raise ValueError(f"{args.repo_id!r} names a revision: give the branch to push to by --branch")
    token = Path(args.token_file).expanduser().read_text(encoding="utf-8").strip() if args.token_file else None
    common = dict(private=args.private, message=args.message, token=token, say=say)
    if args.state:
        done = push_state(args.path, args.repo_id, **common)
        print(f"{done.url} ({done.branch}, commit {done.sha})")
        say(f"to go on elsewhere: python -m train.pretrain --resume {done.repo_id} --data.source FILE")
        return
    place = resolve(args.path)
    about = {name: value for name in ("license", "description") if (value := getattr(args, name))}
    if args.description and not place.repo_id:  # kept in the folder too, or the next push would take it away
        write_card(place.folder, {**run_record(place.folder), "description": args.description})
    if "license" not in about:
        about = ask_license(place.folder) | about
    done = push_to_hub(
        place,
        args.repo_id,
        branch=args.branch,
        tags=tuple(args.tag),
        about=about,
        pull_request=args.create_pr,
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


def add_space(commands) -> None:
    parser = add_command(commands, "space", space, "Creates or updates a Space that opens with a model.")
    parser.add_argument("space_id", metavar="SPACE", help="user/name of the Space")
    parser.add_argument("--model", required=True, metavar="REPO", help="user/name[@revision] of the model on the Hub")
    parser.add_argument(
        "--static", action="store_true",
        help="a page in which the visitor's browser runs the model: free, for small models (default: a Gradio app)",
    )  # fmt: skip
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument(
        "--hardware", metavar="NAME", help="such as cpu-basic, t4-small (default: ZeroGPU for a new one)"
    )
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME",
        help="environment variable to set as a secret of the Space, such as HF_TOKEN for a private model; repeatable",
    )  # fmt: skip
    parser.add_argument("--app-folder", metavar="PATH", help="where app.py is (default: this checkout)")


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


def add_web(commands) -> None:
    parser = add_command(
        commands,
        "web",
        web,
        "Serves the page in which a browser runs a model: what a static Space shows, on this machine.",
    )
    parser.add_argument("path", metavar="PATH", nargs="?", help="model folder, or user/name on the Hub (default: none)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, metavar="INT", help="0 takes a free one (default: 8000)")


def web(args: argparse.Namespace) -> None:
    if args.path and not Path(args.path).is_dir():
        split_name(args.path)  # a sentence now is better than an empty page
    server = PageServer(args.path, args.host, args.port)
    print(f"the page is at {server.url}; Ctrl-C stops it", flush=True)
    server.run()


# ---- sizes ----


def add_sizes(commands) -> None:
    parser = add_command(
        commands, "sizes", sizes, "Prints a Markdown table of the named sizes and the memory they need."
    )
    parser.add_argument("--preset", choices=list(PRESETS), default="nanogpt", help="lineage (default: nanogpt)")
    usual = ", ".join(f"{vocab} for {size}" for size, vocab in SMALL_VOCABULARIES.items())
    parser.add_argument(
        "--vocab-size", type=int, metavar="INT", help=f"for all sizes (default: {usual}, {GPT2_VOCABULARY} above)"
    )


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
    return (size, *map(str, shape), f"{n / 1e6:,.1f} M", *map(size_text, memory))


def size_text(n_bytes: int) -> str:
    """Bytes as people read them: 1.2 MB, 3.4 GB (powers of ten, as the Hub counts)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.1f} {unit}"
    return f"{n_bytes} B"


# ---- the parser ----


def add_command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanogpt-hub", description="Generate from GPTs, measure them, look at them and share them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        add_generate, add_chat, add_eval, add_compare, add_audit, add_info, add_core, add_sizes, add_prepare,
        add_import, add_gguf, add_push, add_space, add_web,
    ):  # fmt: skip
        add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a Windows console or pipe may not speak UTF-8 by itself
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`| head`) has left; nothing may be written when Python closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"nanogpt-hub: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    return 0
