"""The command line: `nanogpt-hub COMMAND ...`, or `python -m nanogpt_hub COMMAND ...`.

Each command is one function that reads the parsed arguments, and one `add_...` that declares them; `build_parser` lists
them. Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 a wrong argument or file, 130 interrupted.
"""

import argparse
import dataclasses
import io
import json
import os
import sys
import time
from pathlib import Path

import torch

from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.generate import SamplingConfig, encode_prompt, stream_tokens
from nanogpt_hub.model import GPT, PRESETS, SIZES, GPTConfig, KVCache

DTYPES = ("float32", "bfloat16", "float16")
SAMPLE_LINE = "-" * 15
SMALL_VOCABULARIES = {"1m": 256, "10m": 256, "30m": 16384}  # what the small sizes are usually trained with
GPT2_VOCABULARY = 50304  # 50257, padded to a multiple of 64
SAMPLING_FLAGS: dict[str, tuple[type, str]] = {  # fields of SamplingConfig: type, help
    "max_new_tokens": (int, "tokens to generate"),
    "temperature": (float, "below 1 sharpens, above 1 flattens, 0 always takes the likeliest token"),
    "top_k": (int, "only the k likeliest tokens, 0 for all"),
    "top_p": (float, "only the likeliest tokens that together reach this probability"),
    "min_p": (float, "only tokens at least this likely, relative to the likeliest"),
    "repetition_penalty": (float, "above 1 disfavours the tokens that the text has already"),
}


# ---- generate ----


def add_generate(commands) -> None:
    parser = add_command(commands, "generate", generate, "Streams text from a model folder.")
    parser.add_argument("path", metavar="PATH", help="model folder")
    parser.add_argument(
        "--prompt", default="", metavar="TEXT",
        help="text to go on from; FILE:path reads a file, - reads stdin (default: the start of a document)",
    )  # fmt: skip
    parser.add_argument("--num-samples", type=int, default=1, metavar="INT", help="texts to generate (default: 1)")
    parser.add_argument(
        "--seed", type=int, metavar="INT", help="sample i draws with seed + i (default: a random one, which is told)"
    )
    for name, (kind, text) in SAMPLING_FLAGS.items():
        default = getattr(SamplingConfig, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(),
            help=f"{text} (default: the model's own, else {default})",
        )  # fmt: skip
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text, taken literally; repeatable"
    )
    parser.add_argument("--ignore-eot", action="store_true", help="go on after end-of-text, for max-new-tokens")
    parser.add_argument("--no-echo", action="store_true", help="print what follows the prompt, not the prompt itself")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto, the fastest there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: as stored)")


def generate(args: argparse.Namespace) -> None:
    if args.num_samples < 1:
        raise ValueError(f"--num-samples is {args.num_samples}; it must be at least 1")
    prompt = read_prompt(args.prompt)
    given = {name: value for name in SAMPLING_FLAGS if (value := getattr(args, name)) is not None}
    config = SamplingConfig.from_folder(args.path, seed=args.seed, stop=tuple(args.stop), **given).seeded()
    if args.ignore_eot:
        config = dataclasses.replace(config, stop_tokens=())
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, tokenizer = load_model(args.path, device=pick_device(args.device), dtype=dtype)
    ids = encode_prompt(tokenizer, prompt)
    for sample in range(args.num_samples):
        if sample:
            print(SAMPLE_LINE)
        print("" if args.no_echo else prompt, end="", flush=True)
        n, started = 0, time.perf_counter()
        for token in stream_tokens(model, tokenizer, [ids], config, seed=config.seed + sample):
            print(token.text, end="", flush=True)
            n += 1
        print(flush=True)
        rate = n / (time.perf_counter() - started)
        print(f"[seed {config.seed + sample}, {n} tokens, {rate:,.0f} tokens/s]", file=sys.stderr)


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


def pick_device(name: str) -> str:
    """`name` if this machine has the device, ValueError if not; "auto" is CUDA, then MPS, then the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} is not to be had here; try --device cpu") from error
    return name


# ---- info ----


def add_info(commands) -> None:
    parser = add_command(commands, "info", info, "Tells what a model folder holds.")
    parser.add_argument("path", metavar="PATH", help="model folder")


def info(args: argparse.Namespace) -> None:
    folder = Path(args.path)
    model, tokenizer = load_model(folder)
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    print(f"model type   {model_type}")
    print(f"parameters   {model.num_params():,}")
    if tokenizer is None:
        print("tokenizer    none")
    else:
        print(f"tokenizer    {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, end-of-text id {tokenizer.eot_id}")
    print("\nshape")
    for name, value in dataclasses.asdict(model.config).items():
        if name != "init":  # how fresh weights are drawn, which a folder does not record
            print(f"  {name:<20} {value}")
    print("\nfiles")
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        print(f"  {file.name:<28} {size_text(file.stat().st_size):>10}")


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
    with torch.device("meta"):
        n = GPT(config).num_params()
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
        prog="nanogpt-hub", description="Generate from GPT model folders, and look at them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (add_generate, add_info, add_sizes):
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
        print(f"nanogpt-hub: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
