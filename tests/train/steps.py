"""Doing something in the middle of a run."""

from collections.abc import Callable

import pytest

from train.trainer import Trainer


def at_step(patch: pytest.MonkeyPatch, step: int, do: Callable[[Trainer], object]) -> None:
    """While `patch` holds, a run calls `do` before the step that follows `step` steps."""
    real = Trainer._train_step

    def stepping(self):
        if self.progress.step == step:
            do(self)
        return real(self)

    patch.setattr(Trainer, "_train_step", stepping)


def fail(error: BaseException) -> Callable[[Trainer], object]:
    """What raises an error at a step."""

    def do(trainer: Trainer) -> None:
        raise error

    return do
