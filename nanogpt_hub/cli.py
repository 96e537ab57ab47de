"""The command line: `nanogpt-hub COMMAND ...`, or `python -m nanogpt_hub COMMAND ...`.

One `add_...` declares the arguments of each command, and `build_parser` lists them. What a command does is one function
in commands/, imported when its command runs: this file needs no torch, so that help comes at once. Results go to
stdout, everything else to stderr. Exit codes: 0 done, 2 a wrong argument or file, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from nanogpt_hub.engine import ENGINES
from nanogpt_hub.sampling import SAMPLERS, SamplingConfig
from nanogpt_hub.system.installed import EXTRAS, MissingPackagesError, how_to_get, load, requirement, what_is_missing

DTYPES = ("float32", "bfloat16", "float16")
PRESETS = ("nanogpt", "gpt2", "pythia", "llama", "mixtral", "nanochat")  # as in model.py, which imports torch
GGUF_KINDS = ("f32", "f16", "q8_0")  # as in exporters/gguf.py
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


# ---- generate ----


def add_generate(commands) -> None:
    parser = add_command(commands, "generate", "text.generate", "Streams text from a model.")
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


# ---- chat ----


def add_chat(commands) -> None:
    parser = add_command(
        commands, "chat", "text.chat",
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


# ---- eval ----


def add_eval(commands) -> None:
    parser = add_command(commands, "eval", "measure.evaluate_model", "Measures how well a model predicts a text.")
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


# ---- info ----


def add_info(commands) -> None:
    add_path(add_command(commands, "info", "show.info", "Tells a model's shape, tokenizer, provenance and files."))


# ---- core ----


def add_core(commands) -> None:
    text = "Tells whether model.py is edited, and tries what it must keep."
    parser = add_command(commands, "core", "show.core", text)
    parser.add_argument("--preset", choices=PRESETS, help="lineage to try (default: all of them)")
    parser.add_argument("fields", metavar="FIELD=VALUE", nargs="*", help="of the config, such as activation=relu2")


# ---- audit ----


def add_audit(commands) -> None:
    text = "Looks for duplicates, secrets, personal data, invisible characters and planted triggers in a text."
    parser = add_command(commands, "audit", "measure.audit_text", text)
    parser.add_argument("data", metavar="SOURCE", help="as of train.pretrain: file, folder, URL, Hub dataset, stories")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of tables (default: text)")
    parser.add_argument("--model", metavar="PATH", help="how much of what this model writes stands in the text")
    add_device(parser)


# ---- compare ----


def add_compare(commands) -> None:
    text = "Compares training runs: settings, losses at equal steps, tokens and time, and what is beyond noise."
    parser = add_command(commands, "compare", "measure.compare_runs", text)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders; those that differ in the seed are averaged"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses into this png")


# ---- import ----


def add_import(commands) -> None:
    parser = add_command(
        commands, "import", "convert.import_nanogpt", "Makes a model folder of a checkpoint that nanoGPT wrote."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="nanoGPT's ckpt.pt")
    parser.add_argument("out", metavar="OUT", help="the new model folder")
    parser.add_argument(
        "--meta", metavar="PATH", help="the meta.pkl beside nanoGPT's data, for characters (default: GPT-2's tokenizer)"
    )
    add_any_core(parser)


# ---- gguf ----


def add_gguf(commands) -> None:
    parser = add_command(commands, "gguf", "convert.gguf", "Writes a model as a GGUF file, for llama.cpp and its kin.")
    add_path(parser)
    parser.add_argument("out", metavar="OUT", help="the new file, such as mine.gguf")
    parser.add_argument("--type", choices=GGUF_KINDS, default="f32", help="of the matrices (default: f32)")


# ---- push ----


def add_push(commands) -> None:
    text = "Publishes a model folder on the Hub, with its card, in one commit."
    parser = add_command(commands, "push", "share.push", text)
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
    parser.add_argument(
        "--no-notebook",
        action="store_true",
        help="put no notebook.ipynb beside it, which the Hub opens in Colab and Kaggle",
    )
    parser.add_argument("--create-pr", action="store_true", help="offer it to the repo's owner as a pull request")
    parser.add_argument(
        "--state", action="store_true", help="PATH is a run's folder: publish its training state, for --resume REPO"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="read the token from this file (default: HF_TOKEN, or `hf auth login`)"
    )


# ---- space ----


def add_space(commands) -> None:
    parser = add_command(commands, "space", "share.space", "Creates or updates a Space that opens with a model.")
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
    parser.add_argument(
        "--app-folder", metavar="PATH", help="where another app.py is (default: the one that comes along)"
    )


# ---- web ----


def add_web(commands) -> None:
    text = "Serves the page in which a browser runs a model: what a static Space shows, on this machine."
    parser = add_command(commands, "web", "share.web", text)
    parser.add_argument("path", metavar="PATH", nargs="?", help="model folder, or user/name on the Hub (default: none)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, metavar="INT", help="0 takes a free one (default: 8000)")


# ---- sizes ----


def add_sizes(commands) -> None:
    text = "Prints a Markdown table of the named sizes and the memory they need."
    parser = add_command(commands, "sizes", "show.sizes", text)
    parser.add_argument("--preset", choices=PRESETS, default="nanogpt", help="lineage (default: nanogpt)")
    usual = ", ".join(f"{vocab} for {size}" for size, vocab in SMALL_VOCABULARIES.items())
    parser.add_argument(
        "--vocab-size", type=int, metavar="INT", help=f"for all sizes (default: {usual}, {GPT2_VOCABULARY} above)"
    )


# ---- what has a command line of its own ----


def add_handed_over(commands, name: str, text: str, module: str, extra: str) -> None:
    """A command of the trainer or the app, which are not the library's to import. What follows is theirs."""
    # With a prefix that nobody types none of the words is taken for ours.
    parser = commands.add_parser(name, help=text, description=text, add_help=False, prefix_chars="\0")
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=lambda args: hand_over(name, module, extra, args.arguments))


def hand_over(name: str, module: str, extra: str, arguments: list[str]) -> None:
    """Runs a command of the trainer or the app. Raises MissingPackagesError, or the SystemExit of a status above 0."""
    prog = f"nanogpt-hub {name}"
    if sentence := what_is_missing(prog, extra):
        raise MissingPackagesError(sentence)
    if status := load(module).main(arguments, prog):
        raise SystemExit(status)


def add_trainer(commands) -> None:
    for name, text, module in (
        ("train", "Trains a GPT: CONFIG or --data.source FILE, then [--option value ...].", "train.pretrain"),
        ("finetune", "Goes on from a model: --from PATH --data.source FILE [--option value ...].", "train.finetune"),
        ("prepare", "Tokenises the text of a run ahead of it, by the words of train.", "train.prepare"),
        ("jobs", "Trains on a machine of Hugging Face: CONFIG --flavor t4-small --hub.repo_id you/name.", "train.jobs"),
        ("plan", "What a run will cost: memory, tokens, time, price; --devices 8xH100.", "train.cost"),
        ("speedrun", "Races a config against a track's record: fixed text, goal and hardware.", "train.speedrun"),
    ):
        add_handed_over(commands, name, text, module, "train")


def add_app(commands) -> None:
    add_handed_over(commands, "app", "Opens the page that generates with models and looks inside them.", "app", "app")


# ---- the parser ----


def add_command(commands, name: str, run: str, text: str) -> argparse.ArgumentParser:
    """A command, and the MODULE.FUNCTION of commands/ that does it."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanogpt-hub", description="Train GPTs, generate from them, measure them, look at them and share them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        add_trainer, add_generate, add_chat, add_app, add_eval, add_compare, add_audit, add_info, add_core, add_sizes,
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
        run = args.run if callable(args.run) else command_of(args.run)
        run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`| head`) has left; nothing may be written when Python closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        return fail(sentence_for(error))
    except MissingPackagesError as error:
        return fail(str(error))
    except (ValueError, OSError) as error:
        from nanogpt_hub.hub.private import without_secrets

        return fail(without_secrets(str(error)))
    return 0


def command_of(name: str) -> Callable[[argparse.Namespace], None]:
    """The function of commands/ that is called MODULE.FUNCTION."""
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"nanogpt_hub.commands.{module}"), function)


def fail(sentence: str) -> int:
    print(f"nanogpt-hub: {sentence}", file=sys.stderr)
    return 2


def sentence_for(error: ModuleNotFoundError) -> str:
    """What to install. Raises the error itself where it is none of the packages that a user installs."""
    name = (error.name or "").partition(".")[0]
    if not any(name in names for names in EXTRAS.values()):
        raise error
    return what_is_missing("this command") or how_to_get("this command", [requirement(name)])
