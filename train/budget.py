"""A run that shall take so many minutes: how many steps that is, measured before the first one.

    python -m train.pretrain configs/shakespeare_char_cpu.yaml --minutes 2

A few steps, a part of an evaluation and the beginning of a sample are timed, and what they changed is put back. What
comes of it is `max_steps`, which the run records as if it had been given: the schedule of the learning rate uses it, a
resume keeps it, and config.yaml starts the same run on any machine.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import yaml
from accelerate import PartialState
from jsonargparse import Namespace

from nanogpt_hub.evaluate import BATCH_TOKENS

from .config import TrainConfig
from .hardware import synchronize
from .processes import on_main
from .trainer import Trainer

WARM_UP, TIMED_SECONDS, TIMED_STEPS = 2, 3.0, (3, 20)  # steps before the timed ones; how long and how many those are
SAMPLE_TOKENS = 16  # of a sample, timed for all of them
KEPT = 0.97  # of the time, for steps and evaluations; the rest is for saving


def keep_recorded_steps(config: TrainConfig, parsed: Namespace) -> TrainConfig:
    """For `minutes` in a folder that holds a run: the config with the steps that it began with, in `parsed`, too.

    Raises ValueError where a run that would go on does not say them.
    """
    if not config.minutes or parsed.overwrite:
        return config
    steps = on_main(lambda: recorded_steps(Path(config.out_dir)))
    if steps is None:
        return config
    if PartialState().is_main_process:
        print(f"time: the run keeps the {steps:,} steps that it began with")
    return with_given(config, parsed, steps)


def recorded_steps(out: Path) -> int | None:
    """The max_steps of the run in a folder; None where there is no run."""
    if not any((out / name).is_file() for name in ("config.yaml", "state/state.json")):
        return None
    try:
        return int(yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["max_steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{out / 'config.yaml'} does not say the max_steps that the run began with ({type(error).__name__}); give "
            "--max_steps instead of minutes"
        ) from error


def fix_steps(trainer: Trainer, parsed: Namespace) -> str:
    """Turns `minutes` into max_steps in the trainer, its facts and `parsed`, and returns the sentence that says so.

    All processes get the same number. Raises ValueError where there is not time for a single step.
    """
    config = trainer.config
    steps, tokens_per_second = steps_in(60 * config.minutes, trainer)
    trainer.config = with_given(config, parsed, steps)
    training = trainer.facts.get("training", {})
    if "hyperparameters" in training:
        training["hyperparameters"]["max_steps"] = steps
        training["command"] = " ".join(with_steps(training["command"].split(" "), steps))
    return (
        f"time: {config.minutes:g} minutes hold {steps:,} steps at {tokens_per_second:,.0f} tokens/s, evaluations "
        f"included; max_steps is {steps}"
    )


def with_given(config: TrainConfig, parsed: Namespace, steps: int) -> TrainConfig:
    """As if `max_steps` had been given, and no time."""
    parsed.max_steps, parsed.minutes = steps, 0.0
    return replace(config, max_steps=steps, minutes=0.0)


def with_steps(words: list[str], steps: int) -> list[str]:
    """The words of a command with the number of steps instead of the minutes."""
    kept = [word for word in words if not word.startswith("--minutes=")]
    while "--minutes" in kept:
        at = kept.index("--minutes")
        del kept[at : at + 2]
    return [*kept, "--max_steps", str(steps)]


def steps_in(seconds: float, trainer: Trainer) -> tuple[int, float]:
    """The largest max_steps whose steps and evaluations fit, and the tokens per second of a step."""
    with nothing_changed(trainer) as restore:
        step, tokens = timed_step(trainer, restore)
        evaluation = timed_evaluation(trainer)
    left = KEPT * seconds - evaluation  # the first evaluation is before the first step
    interval = trainer.config.eval.interval
    rounds = max(0, int(left // (interval * step + evaluation)))
    left -= rounds * (interval * step + evaluation)
    steps = rounds * interval + max(0, int((left - evaluation) // step))  # the last step is followed by one, too
    if steps < 1:
        raise ValueError(
            f"minutes {seconds / 60:g} are too few: a step takes {step:.1f} s, an evaluation {evaluation:.1f} s; give "
            "more minutes, a smaller --batch_size or --model.size, or fewer --eval.max_windows"
        )
    return steps, tokens / step


@contextmanager
def nothing_changed(trainer: Trainer) -> Iterator[Callable[[], None]]:
    """Gives what puts back the state before the first step: weights, moments, counters; in the end, random states."""
    kept = [p.detach().clone() for p in trainer.trained]
    kept_progress = replace(trainer.progress)
    random, scaler = torch.get_rng_state(), trainer.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else {}

    @torch.no_grad()
    def restore() -> None:
        for p, value in zip(trainer.trained, kept, strict=True):
            p.copy_(value)
        trainer.optimizer.state.clear()
        trainer.progress, trainer.whole_now = replace(kept_progress), None

    try:
        yield restore
    finally:
        restore()
        if scaler is not None:
            scaler.load_state_dict(scale)
        torch.set_rng_state(random)


def timed_step(trainer: Trainer, restore: Callable[[], None]) -> tuple[float, float]:
    """Seconds and targets of a training step, the same on all processes."""

    def run(number: int) -> tuple[float, float]:
        restore()
        # Steps of text are alike, and a text that is still being tokenised has the first; rows differ in length.
        trainer.progress.step = 0 if trainer.config.data.format == "text" else number
        synchronize(trainer.device.type)
        start = time.perf_counter()
        n_targets = trainer.train_step()["n_targets"]
        synchronize(trainer.device.type)
        return time.perf_counter() - start, n_targets

    for number in range(WARM_UP):
        first, _ = run(number)
    at_least, at_most = TIMED_STEPS
    n = min(at_most, max(at_least, int(TIMED_SECONDS / agreed(trainer, first))))
    taken, targets = zip(*(run(WARM_UP + number) for number in range(n)), strict=True)
    return agreed(trainer, median(taken)), sum(targets) / n


@torch.no_grad()
def timed_evaluation(trainer: Trainer) -> float:
    """Seconds of an evaluation with its sample, the same on all processes."""
    gpt, (idx, targets) = trainer.gpt.eval(), trainer.data.val
    n = min(len(idx), max(1, BATCH_TOKENS // gpt.config.block_size))

    def part() -> None:
        trainer.val_loss(idx[:n], targets[:n])

    seconds = seconds_of(part) * math.ceil(len(idx) / n / trainer.world)
    whole, wanted = trainer.whole(), trainer.config.eval.sample_tokens
    if wanted and trainer.accelerator.is_main_process:
        few = min(wanted, SAMPLE_TOKENS)
        seconds += seconds_of(lambda: trainer.sampler.text(whole, few)) * wanted / few
    return agreed(trainer, seconds)


def seconds_of(work: Callable[[], object]) -> float:
    """Of the second time, for the first one takes memory."""
    for _ in range(2):
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    return seconds


def agreed(trainer: Trainer, seconds: float) -> float:
    """The mean over the processes, which all of them get."""
    return max(1e-6, float(trainer._sum(seconds)) / trainer.world)
