"""From a checked config to a finished run: what pre-training and fine-tuning have in common around the loop."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator, PartialState
from jsonargparse import Namespace

from nanogpt_hub.checkpoint import saved_as
from nanogpt_hub.edits.core import CORE_FILE, faults, running_core
from nanogpt_hub.hub.card import BaseFacts
from nanogpt_hub.hub.private import without_secrets
from nanogpt_hub.hub.publish import fetch_state
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.runs import METRICS
from nanogpt_hub.sources import Source
from nanogpt_hub.system.devices import choose_device
from nanogpt_hub.system.files import one_at_a_time, write_atomic
from nanogpt_hub.system.installed import command as hub_command
from nanogpt_hub.system.installed import joined, pip_line, shown
from nanogpt_hub.system.readable import reason
from nanogpt_hub.tokenizer import Tokenizer

from .auditing import look_through
from .budget import fix_steps, keep_recorded_steps, with_steps
from .commits import at_commits, find_commits
from .config import TrainConfig, parse
from .data import TOKENS, Data
from .facts import change_line, command_line, flat, lasting_facts
from .fetched import check_own, cleaner
from .folder import RunLock, TrainingError, disk_errors, empty, may_begin_again
from .hardware import check_precision, choose_precision, device_name, idle_parameters, is_out_of_memory
from .loading import cache_folder, load_data, open_source_of
from .parallel import is_sharded
from .plan import check_disk, memory_line
from .processes import (
    OtherProcessError,
    first_to_say,
    from_launcher,
    init_processes,
    is_lost_peer,
    launch_notes,
    lost_peer,
    on_main,
)
from .report import FLOOR, baseline_lines, describe_loss, size_warning
from .rows import RowSource
from .sharing import Sharing
from .state import PREVIOUS, STATE, StateError, check_files, find_whole, go_back, read_facts, remove_older, seal_fetched
from .tokenizing import wait_for
from .trainer import Trainer
from .typed import Parser

NOT_SHARED = 3  # exit status of a run that is finished here, of which something is not on the Hub


class Start(NamedTuple):
    """What a run starts from."""

    gpt: GPT
    tokenizer: Tokenizer
    base: BaseFacts | None = None  # of a fine-tune: the model it starts from, for the card


MakeStart = Callable[[TrainConfig, Namespace, Source | RowSource], Start]


def main(parser: Parser, make_start: MakeStart, argv: list[str] | None = None) -> int:
    """The whole command: returns its exit status, with a sentence where it is not 0.

    0: done, or asked to stop (SIGINT, SIGTERM, SIGHUP) and saved; 1: the run could not go on; 2: it was not begun,
    because of a setting or of what lies in its folder; 3: trained and saved, but something is not on the Hub; 130:
    stopped at once, by a second signal or before training.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        config, parsed = parse(parser, argv)
        config = from_launcher(config)
        if parsed.resume not in ("auto", "must", "previous"):
            config, parsed = fetch_run(config, parsed, parser, argv)
        processes = join_processes(config)
        with RunLock(Path(config.out_dir), processes.is_main_process) as lock:
            return run(config, parsed, parser, make_start, argv, lock)
    except KeyboardInterrupt:
        return fail("stopped at once; what was saved before is whole", 130)
    except OtherProcessError:
        return 2
    except (ValueError, OSError) as error:
        return fail(reason(error), 2)
    except TrainingError as error:
        return fail(str(error), 1)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return fail("out of memory: set a smaller --model.size, --batch_size or --model.block_size", 1)
        if not is_lost_peer(error):
            raise
        return fail(lost_peer(config), 1)


def fail(sentence: str, status: int) -> int:
    """Says once, whatever the number of processes, why the command ends, and returns its exit status."""
    if first_to_say():
        print(f"error: {without_secrets(sentence)}", file=sys.stderr, flush=True)
    return status


def fetch_run(config: TrainConfig, parsed: Namespace, parser: Parser, argv: list[str]) -> tuple[TrainConfig, Namespace]:
    """Brings a run from the Hub into out_dir; without a CONFIG what its own may decide counts, below the given flags.

    Raises ValueError, with the command to give, where the user has not said what the run shall read.
    """
    named = parsed.out_dir or parsed.config
    out = Path(config.out_dir if named else "out/" + parsed.resume.partition("@")[0].rpartition("/")[2])
    if not parsed.config:
        check_own(parsed.resume, out, parser, argv)
    if read_facts(out / "state") is None:
        with one_at_a_time(out):
            fetch_once(parsed.resume, out)
    if parsed.config:
        return config, parsed
    config, parsed = parse(parser, ["--config", str(out / "config.yaml"), *argv, "--out_dir", str(out)])
    if not config.hub.repo_id:
        print("hub: nothing is pushed; say --hub.repo_id you/name to share what comes of it")
    return config, parsed


def fetch_once(name: str, out: Path) -> None:
    """Fetches a run's training state, unless another process has done so meanwhile."""
    if read_facts(out / "state") is None:
        print(f"fetching the training state of {name} into {out}")
        fetch_state(name, out, clean=cleaner(out))
        seal_fetched(out / "state")


def run(
    config: TrainConfig,
    parsed: Namespace,
    parser: Parser,
    make_start: MakeStart,
    argv: list[str],
    lock: RunLock,
) -> int:
    """Prepares everything, trains, and says what came of it."""
    out, processes = Path(config.out_dir), PartialState()
    given, config = config, keep_recorded_steps(config, parsed)
    argv = argv if config is given else with_steps(argv, config.max_steps)
    state = on_main(lambda: find_state(out, parsed, parser))

    def say(line: str) -> None:
        if processes.is_main_process:  # (Accelerate's own print is one of each machine)
            print(without_secrets(line))

    found = on_main(lambda: find_commits(config.data, cache_folder(config), say, state))
    config = replace(config, data=at_commits(config.data, found))
    sharing = Sharing(config.hub, out, say) if config.hub.repo_id and processes.is_main_process else None
    source = open_source_of(config)
    looked = look_through(config, source) if processes.is_main_process else None
    gpt, tokenizer, base = make_start(config, parsed, source)
    data, lines = load_data(config, source, tokenizer, gpt, quiet=not processes.is_main_process)
    with contextlib.closing(data):
        accelerator, device_line = make_accelerator(config, gpt.config)
        facts = lasting_facts(config, command_line(parser.prog, argv), data, tokenizer, base)
        if looked:
            facts["audit"], lines = looked.facts, [*looked.lines, *lines]
        trainer = Trainer(config, gpt, tokenizer, data, accelerator, facts, sharing, looked.known if looked else None)
        if state is not None:
            trainer.resume(state)
        if config.minutes:
            wait_for(lambda: data.batches.ready(0, config.batch_size), data.tokenizing)
            lines = [*lines, fix_steps(trainer, parsed)]
        for line in (
            device_line,
            *launch_notes(config),
            *lines,
            *model_lines(config, gpt, data),
            *plan_lines(trainer.config, trainer),
            *resume_lines(trainer, state),
        ):
            say(line)
        closing = [*(train(trainer, parsed, parser, lock, state) if not trainer.finished else finished_lines(trainer))]
    left = sharing.finish() if sharing else []
    for line in (*closing, *left):
        say(line)
    return NOT_SHARED if left else 0


def train(trainer: Trainer, parsed: Namespace, parser: Parser, lock: RunLock, state: dict | None) -> list[str]:
    """The run itself, from the first thing that is written on. Returns what there is to say of it in the end."""
    accelerator, batches, step = trainer.accelerator, trainer.data.batches, trainer.progress.step
    wait_for(lambda: batches.ready(step, trainer.config.batch_size), trainer.data.tokenizing)
    if accelerator.is_main_process:
        with disk_errors(trainer.out, trainer.save_bytes):
            lock.claim()
            prepare_folder(trainer, parsed, parser, fresh=state is None)
    accelerator.init_trackers("nanogpt_hub", config=flat(asdict(trainer.config)))
    trainer.fit()
    accelerator.end_training()
    return closing_lines(trainer)


def find_state(out: Path, parsed: Namespace, parser: Parser) -> dict | None:
    """The state to go on from, or None for a fresh run.

    Raises ValueError where the wish and the folder disagree, or the state is damaged: nothing is changed then.
    """
    if parsed.overwrite:
        return None
    folder, name = out / "state", PREVIOUS if parsed.resume == "previous" else STATE
    try:
        facts = read_facts(folder, name)
        if facts is None and name == STATE and (folder / PREVIOUS).is_file():
            raise StateError(f"{folder / STATE} is missing")
        if facts is not None:
            check_files(folder, facts)
    except StateError as error:
        raise ValueError(f"{error}. {ways_on(folder, name)}") from error
    if facts is None and parsed.resume != "auto":
        raise ValueError(f"there is no training state in {out} to resume; run without --resume to start")
    if facts is None and any((out / name).exists() for name in ("best", "last")):
        if not may_begin_again(out, settings_text(parsed, parser)):
            raise ValueError(
                f"{out} holds a model of a run with other settings, or a finished one, but no training state; choose "
                "another --out_dir, or give --overwrite"
            )
        print(f"{out} was stopped before its first save: beginning again")
    return facts


def ways_on(folder: Path, damaged: str) -> str:
    """What can be done about a damaged state."""
    before = find_whole(folder, PREVIOUS) if damaged == STATE else find_whole(folder, STATE)
    if before is None:
        return "Bring the file back, or start anew with --overwrite"
    option = "--resume previous" if damaged == STATE else "no --resume"
    return f"The state of step {before['step']} is whole: go on from it with {option}, or start anew with --overwrite"


def join_processes(config: TrainConfig) -> PartialState:
    """This process among those of the run. Raises ValueError for a device, a precision or a tracker that is not there:
    before any work."""
    missing = [name for name in config.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"tracker {missing[0]} is not installed; run `{pip_line(missing[:1])}` or leave it out")
    device = choose_device(config.device)
    check_precision(config.precision, device)
    return init_processes(config, device)


def make_accelerator(config: TrainConfig, shape: GPTConfig) -> tuple[Accelerator, str]:
    """Accelerate on the device and in the precision that suit the model, and a line that says which and why."""
    device = choose_device(config.device)
    precision, reason = choose_precision(config.precision, device, shape.n_embd)
    if precision == "fp16" and is_sharded(config):
        raise ValueError("precision fp16 needs a loss scaler, which parallel.shard has not: use --precision fp32")
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=config.trackers or None,
        project_dir=config.out_dir,
    )
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    processes += ", the model cut over them" if is_sharded(config) else ""
    return accelerator, f"device: {device_name(device)}{processes}; precision {precision}: {reason}"


def model_lines(config: TrainConfig, gpt: GPT, data: Data) -> list[str]:
    """The model in numbers, who will be able to load it, and a word where it is too big for its text."""
    cfg = gpt.config
    family, why = saved_as(gpt)
    used = f" ({gpt.num_params() - idle_parameters(cfg):,} for each token)" if cfg.n_expert else ""
    experts = f", {cfg.n_expert_per_tok} of {cfg.n_expert} experts" if cfg.n_expert else ""
    lines = [
        f"model: {gpt.num_params():,} parameters{used}; {cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}"
        f"{experts}, context {cfg.block_size}; saved as {family}"
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
    tokens = data.facts.get("train_tokens")  # unknown while a long text is tokenised
    warning = size_warning(trained, tokens) if tokens is not None else None
    return [*lines, warning] if warning else lines


def plan_lines(config: TrainConfig, trainer: Trainer) -> list[str]:
    """What the run will do, how much memory that takes, and what a loss has to be compared with."""
    gpt, data = trainer.gpt, trainer.data
    tokens = config.max_steps * config.batch_size * gpt.config.block_size
    at_most = "at most " if config.data.format != "text" else ""  # rows are padded as far as their batch needs
    accumulation = config.batch_size // (trainer.micro * trainer.world)
    known = data.batches.epochs(config.max_steps, config.batch_size)
    epochs = "epochs not known yet" if known is None else f"{known:.2f} epochs"
    return [
        f"plan: {config.max_steps:,} steps of {config.batch_size} x {at_most}{gpt.config.block_size} tokens "
        f"({accumulation} x {trainer.micro} a process), {at_most}{tokens:,} in all, "
        f"{epochs}; {config.optim.name}",
        memory_line(trainer.bytes_needed, trainer.device.type),
        *([] if trainer.finished else [check_disk(trainer.out, gpt, trainer.save_bytes, trainer.progress.step == 0)]),
        *baseline_lines(data.baselines, data.bytes_per_token),
    ]


def resume_lines(trainer: Trainer, state: dict | None) -> list[str]:
    """Where the run goes on, what is different from there on, and what could not be checked."""
    if state is None:
        return []
    lines = [f"resuming at step {state['step']}"]
    lines += [change_line(change) for change in trainer.changes if change["step"] == state["step"]]
    if "sha256" not in state:
        lines.append(
            "note: the state is of an earlier version, without hashes and settings: damage to its files, and settings "
            "that differ from its own, would not be noticed"
        )
    if TOKENS not in state["fixed"]:
        lines.append(
            "note: the state is of an earlier version, which does not tell its text from another one of the same name "
            "and length"
        )
    if not (trainer.out / "best").exists():
        lines.append(f"note: {trainer.out / 'best'} is missing; the next evaluation writes one")
    if "log" in state and not (trainer.out / METRICS).is_file():
        lines.append(f"note: {trainer.out / METRICS} is missing; a new one begins here")
    return lines


def prepare_folder(trainer: Trainer, parsed: Namespace, parser: Parser, fresh: bool) -> None:
    """Empties the run's folder of an earlier run's files, and stores the resolved config."""
    out = trainer.out
    if fresh:
        empty(out)
    elif parsed.resume == "previous":
        go_back(out / "state")
    changed = "".join(f"# {change_line(change)}\n" for change in trainer.changes)
    write_atomic(out / "config.yaml", changed + settings_text(parsed, parser))


def settings_text(parsed: Namespace, parser: Parser) -> str:
    """The resolved settings of a run as YAML."""
    settings = parsed.clone()
    for key in ("config", "resume", "overwrite", "out_dir"):
        settings.pop(key, None)
    return parser.dump(settings, skip_validation=True)


def finished_lines(trainer: Trainer) -> list[str]:
    """What there is to say of a run that is at its end already."""
    trainer.repair_last()
    if trainer.accelerator.is_main_process:
        remove_older(trainer.out / "state")
    if trainer.sharing:
        trainer.sharing.state()
    return [
        f"{trainer.out} holds this run, finished: {trainer.progress.step} steps, best validation loss "
        f"{trainer.progress.best_loss:.4f}. Raise {trainer.finished} to go on, or start anew with --overwrite"
    ]


def closing_lines(trainer: Trainer) -> list[str]:
    """Where the result is and what to do with it."""
    best = trainer.out / "best"
    p = trainer.progress
    if p.best_step <= 0 < p.step:
        why = (
            "stopped before the first evaluation" if p.evaluated_step <= 0 else
            f"nothing was learned: no loss was below {p.first_loss:.4f}, that before the first step (the last one is "
            f"{p.last_loss:.4f}); try a lower learning rate or more steps"
        )  # fmt: skip
        return [f"{why}. {best} holds the model as it was before the first step"]
    quality = describe_loss(p.best_loss, trainer.data.bytes_per_token)
    floor = trainer.data.baselines.get(FLOOR)
    above = f"; {p.best_loss - floor:.4f} above the entropy of the text, {floor:.4f}" if floor else ""
    return [
        f"validation loss: {p.first_loss:.4f} before the first step, {p.best_loss:.4f} at its best "
        f"({p.best_loss - p.first_loss:+.4f}){above}",
        f"best model: {best} (validation {quality}); loss curve: {trainer.out / 'loss.png'}",
        try_it(trainer, best),
    ]


def try_it(trainer: Trainer, best: Path) -> str:
    """The command that shows what the model can do now: a chat where it was tuned on conversations."""
    sampler = trainer.sampler
    if sampler.question:
        return f"talk to it: {hub_command()} chat {shown(best)}"
    prompt = f" --prompt {joined([sampler.prompt])}" if sampler.prompt.strip() else ""
    return f"sample from it: {hub_command()} generate {shown(best)}{prompt}"
