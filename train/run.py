"""From a checked config to a finished run: what pre-training and fine-tuning have in common around the loop."""

import contextlib
import importlib.util
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator, PartialState
from jsonargparse import ArgumentParser, Namespace

from nanogpt_hub.checkpoint import saved_as, write_atomic
from nanogpt_hub.core import CORE_FILE, faults, running_core
from nanogpt_hub.evaluate import token_lengths
from nanogpt_hub.hub.private import public_config, without_secrets
from nanogpt_hub.hub.publish import fetch_state
from nanogpt_hub.hub.resolve import resolve
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.sources import Source, cache_root, open_source
from nanogpt_hub.tokenizer import Tokenizer, build_tokenizer
from train.config import TrainConfig, parse
from train.data import Batches, Data, EvalWindows, prepare, summary, unigram_loss
from train.facts import command_line, lasting_facts
from train.fetched import check_own, cleaner
from train.hardware import check_precision, choose_device, choose_precision, device_name, memory_bytes
from train.report import EVEN, UNIGRAM, baseline_lines, describe_loss, size, size_warning
from train.rows import RowSource, load_rows, open_rows_of
from train.sharing import Sharing
from train.state import read_facts
from train.trainer import Trainer, TrainingError

TOKENIZER_FILES = re.compile(r"(tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template\.jinja")


NOT_SHARED = 3  # exit status of a run that is finished here, of which something is not on the Hub


class Start(NamedTuple):
    """What a run starts from."""

    gpt: GPT
    tokenizer: Tokenizer
    base: dict | None = None  # of a fine-tune: the model it starts from, for the card


MakeStart = Callable[[TrainConfig, Namespace, Source], Start]


def main(parser: ArgumentParser, make_start: MakeStart, argv: list[str] | None = None) -> int:
    """The whole command: returns its exit status, with a sentence where it is not 0.

    1: the training had to stop; 2: what was asked for cannot be; 3: trained, but something is not on the Hub.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        config, parsed = parse(parser, argv)
        if parsed.resume not in ("auto", "must"):
            config, parsed = fetch_run(config, parsed, parser, argv)
        return run(config, parsed, parser, make_start, argv)
    except (ValueError, OSError) as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 1


def fetch_run(
    config: TrainConfig, parsed: Namespace, parser: ArgumentParser, argv: list[str]
) -> tuple[TrainConfig, Namespace]:
    """Brings a run from the Hub into out_dir; without a CONFIG what its own may decide counts, below the given flags.

    Raises ValueError, with the command to give, where the user has not said what the run shall read.
    """
    named = parsed.out_dir or parsed.config
    out = Path(config.out_dir if named else "out/" + parsed.resume.partition("@")[0].rpartition("/")[2])
    if not parsed.config:
        check_own(parsed.resume, out, parser, argv)
    if read_facts(out / "state") is None:
        print(f"fetching the training state of {parsed.resume} into {out}")
        fetch_state(parsed.resume, out, clean=cleaner(out))
    if parsed.config:
        return config, parsed
    config, parsed = parse(parser, ["--config", str(out / "config.yaml"), *argv, "--out_dir", str(out)])
    if not config.hub.repo_id:
        print("hub: nothing is pushed; say --hub.repo_id you/name to share what comes of it")
    return config, parsed


def run(config: TrainConfig, parsed: Namespace, parser: ArgumentParser, make_start: MakeStart, argv: list[str]) -> int:
    """Prepares everything, trains, and says what came of it."""
    out = Path(config.out_dir)
    state = find_state(out, parsed)
    processes = join_processes(config)

    def say(line: str) -> None:
        processes.print(without_secrets(line))

    sharing = Sharing(config.hub, out, say) if config.hub.repo_id and processes.is_main_process else None
    source = open_source_of(config)
    with processes.main_process_first():  # the others find the tokenizer and the shards in the cache
        gpt, tokenizer, base = make_start(config, parsed, source)
        data, lines = load_data(config, source, tokenizer, gpt, quiet=not processes.is_main_process)
    accelerator, device_line = make_accelerator(config, gpt.config)
    command = command_line(parser.prog, argv)
    facts = lasting_facts(config, command, data, tokenizer, base)
    trainer = Trainer(config, gpt, tokenizer, data, accelerator, facts, sharing)
    if state is not None:
        trainer.resume(state)
    for line in (device_line, *lines, *model_lines(config, gpt, data), *plan_lines(config, trainer)):
        say(line)
    if trainer.progress.step >= config.max_steps:
        say(
            f"{out} holds this run, finished: {trainer.progress.step} steps, best validation loss "
            f"{trainer.progress.best_loss:.4f}. Raise --max_steps to go on, or start anew with --overwrite"
        )
        return 0
    if accelerator.is_main_process:
        prepare_folder(out, parsed, parser, fresh=state is None)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("nanogpt_hub", config=flat(public_config(asdict(config), facts)))
    trainer.fit()
    accelerator.end_training()
    left = sharing.finish() if sharing else []
    for line in (*closing_lines(trainer), *left):
        say(line)
    return NOT_SHARED if left else 0


def find_state(out: Path, parsed: Namespace) -> dict | None:
    """The state to go on from, or None for a fresh run. Raises ValueError where the wish and the folder disagree."""
    if parsed.overwrite:
        return None
    facts = read_facts(out / "state")
    if facts is None and parsed.resume != "auto":
        raise ValueError(f"there is no training state in {out} to resume; run without --resume to start")
    if facts is None and (out / "last").exists():
        raise ValueError(f"{out} holds a model but no training state; choose another --out_dir, or give --overwrite")
    return facts


def join_processes(config: TrainConfig) -> PartialState:
    """This process among those of the run. Raises ValueError for a device, a precision or a tracker that is not there:
    before any work."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError("this trainer keeps the whole model on each device; launch without FSDP")
    missing = [name for name in config.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"tracker {missing[0]} is not installed; run `pip install {missing[0]}` or leave it out")
    device = choose_device(config.device)
    check_precision(config.precision, device)
    return PartialState(cpu=device == "cpu")


def make_accelerator(config: TrainConfig, shape: GPTConfig) -> tuple[Accelerator, str]:
    """Accelerate on the device and in the precision that suit the model, and a line that says which and why."""
    device = choose_device(config.device)
    precision, reason = choose_precision(config.precision, device, shape.n_embd)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=config.trackers or None,
        project_dir=config.out_dir,
    )
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return accelerator, f"device: {device_name(device)}{processes}; precision {precision}: {reason}"


def open_source_of(config: TrainConfig) -> Source | RowSource:
    d = config.data
    if d.format != "text":
        return open_rows_of(d)
    return open_source(d.source, text_column=d.text_column, config=d.config, split=d.split, revision=d.revision)


def open_validation_of(config: TrainConfig) -> Source | None:
    """The validation text, where it is not the last part of the training text."""
    d = config.data
    if not (d.val_source or d.val_split):
        return None
    split = d.val_split or d.split
    return open_source(
        d.val_source or d.source, text_column=d.text_column, config=d.config, split=split, revision=d.revision
    )


def cache_folder(config: TrainConfig) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else cache_root() / "tokens"


def cached_tokenizer(config: TrainConfig, source: Source) -> Tokenizer:
    """The tokenizer that the config asks for; one that has to be learned from the text is learned once and kept."""
    spec = config.data.tokenizer
    if "/" in spec and not Path(spec).expanduser().exists():
        spec = str(resolve(spec, files=TOKENIZER_FILES).folder)
    if spec != "char" and not spec.startswith("bpe:"):
        return build_tokenizer(spec, source.texts)
    folder = cache_folder(config) / "tokenizers" / f"{source.fingerprint[:24]}-{spec.replace(':', '')}"
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    tokenizer = build_tokenizer(spec, source.texts)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    tokenizer.save(part)
    with contextlib.suppress(OSError):  # another process was faster: the same tokenizer is there
        part.rename(folder)
    shutil.rmtree(part, ignore_errors=True)
    return tokenizer


def load_data(
    config: TrainConfig, source: Source | RowSource, tokenizer: Tokenizer, gpt: GPT, quiet: bool
) -> tuple[Data, list[str]]:
    """Batches and what every evaluation reads, for a model, and lines that describe them."""
    block_size, vocab_size = gpt.config.block_size, tokenizer.vocab_size
    if isinstance(source, RowSource):
        return load_rows(config, source, tokenizer, block_size, quiet)
    corpus = prepare(source, tokenizer, cache_folder(config), quiet)
    corpus.check_vocab(gpt.config.vocab_size)
    apart = open_validation_of(config)
    if apart is None:
        train, val = corpus.split(config.data.val_fraction, block_size)
    else:
        train, val = corpus.tokens(), prepare(apart, tokenizer, cache_folder(config), quiet).tokens()
    windows = EvalWindows(val, block_size, config.eval.max_windows)
    unigram = unigram_loss(train, val, vocab_size)
    data = Data(
        batches=Batches(train, block_size, config.seed),
        val=windows.read(),
        bytes_per_token=windows.bytes_per_token(token_lengths(tokenizer)),
        baselines={EVEN: math.log(vocab_size), UNIGRAM: unigram},
        facts={"source": corpus.manifest["source"], "train_tokens": len(train), "val_tokens": len(val)},
    )
    return data, summary(corpus, train, val, tokenizer)


def model_lines(config: TrainConfig, gpt: GPT, data: Data) -> list[str]:
    """The model in numbers, who will be able to load it, and a word where it is too big for its text."""
    cfg = gpt.config
    family, why = saved_as(gpt)
    lines = [
        f"model: {gpt.num_params():,} parameters; {cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, "
        f"context {cfg.block_size}; saved as {family}"
    ]
    if running_core(gpt).changed:
        loads = "loads only where that is nanogpt_hub/model.py, and not in Transformers"
        lines.append(f"note: {why}: the folder holds it as {CORE_FILE} and {loads}")
        lines += [f"warning: {fault}" for fault in faults(cfg)]
    elif family == "nanogpt_hub":
        lines.append(f"note: Transformers has no such model ({why}); the folder loads with nanogpt_hub only")
    trained = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    if config.lora.rank:
        share = trained / gpt.num_params()
        lines.append(f"LoRA: adapters of rank {config.lora.rank}; {trained:,} parameters are trained ({share:.2%})")
    warning = size_warning(trained, data.facts["train_tokens"])
    return [*lines, warning] if warning else lines


def plan_lines(config: TrainConfig, trainer: Trainer) -> list[str]:
    """What the run will do, how much memory that takes, and what a loss has to be compared with."""
    gpt, data = trainer.gpt, trainer.data
    tokens = config.max_steps * config.batch_size * gpt.config.block_size
    at_most = "at most " if config.data.format != "text" else ""  # rows are padded as far as their batch needs
    have = memory_bytes(trainer.device.type)
    share = f" of {size(have)}" if have else ""
    accumulation = config.batch_size // (trainer.micro * trainer.world)
    lines = [
        f"plan: {config.max_steps:,} steps of {config.batch_size} x {at_most}{gpt.config.block_size} tokens "
        f"({accumulation} x {trainer.micro} a process), {at_most}{tokens:,} in all, "
        f"{data.batches.epochs(config.max_steps, config.batch_size):.2f} epochs; {config.optim.name}",
        f"memory: about {size(trainer.bytes_needed)}{share}",
        *baseline_lines(data.baselines, data.bytes_per_token),
    ]
    if trainer.progress.step:
        lines.append(f"resuming at step {trainer.progress.step}")
    return lines


def prepare_folder(out: Path, parsed: Namespace, parser: ArgumentParser, fresh: bool) -> None:
    """Makes the run's folder, empties it of an earlier run's files, and stores the resolved config."""
    if fresh:
        for old in ("best", "last", "state", "samples"):
            shutil.rmtree(out / old, ignore_errors=True)
    settings = parsed.clone()
    for key in ("config", "resume", "overwrite", "out_dir"):
        settings.pop(key, None)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "config.yaml", parser.dump(settings, skip_validation=True))


def flat(nested: dict, prefix: str = "") -> dict:
    """{"optim": {"name": "adamw"}} as {"optim.name": "adamw"}, with only what trackers accept."""
    out = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        elif value is not None:
            out[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return out


def closing_lines(trainer: Trainer) -> list[str]:
    """Where the result is and what to do with it."""
    best = trainer.out / "best"
    p = trainer.progress
    quality = describe_loss(p.best_loss, trainer.data.bytes_per_token)
    prompt = f" --prompt {shlex.quote(trainer.prompt)}" if trainer.prompt.strip() else ""
    return [
        f"validation loss: {p.first_loss:.4f} before the first step, {p.best_loss:.4f} at its best "
        f"({p.best_loss - p.first_loss:+.4f})",
        f"best model: {best} (validation {quality}); loss curve: {trainer.out / 'loss.png'}",
        f"sample from it: {python_command()} -m nanogpt_hub generate {best}{prompt}",
    ]


def python_command() -> str:
    """This interpreter as one would type it here."""
    python, here = Path(sys.executable), Path.cwd()
    return python.relative_to(here).as_posix() if python.is_relative_to(here) else "python"
