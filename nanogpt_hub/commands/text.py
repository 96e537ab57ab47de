"""Text from a model: `nanogpt-hub generate` and `chat`."""

import argparse
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nanogpt_hub.chat import Chat, NoTemplateError
from nanogpt_hub.commands.common import open_model, prepare_engine, say
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.generate import encode_prompt, stream_tokens
from nanogpt_hub.hub.resolve import Resolved, resolve
from nanogpt_hub.sampling import SAMPLERS, SamplingConfig
from nanogpt_hub.speculate import Speculator
from nanogpt_hub.tokenizer import Tokenizer

SAMPLE_LINE = "-" * 15


# ---- generate ----


def generate(args: argparse.Namespace) -> None:
    if args.num_samples < 1:
        raise ValueError(f"--num-samples is {args.num_samples}; it must be at least 1")
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
    prepare_engine(args)
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
    prepare_engine(args)
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
