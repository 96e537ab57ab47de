"""The losses that a run has written down."""

from pathlib import Path

from train.report import read_metrics


def losses(out: Path) -> dict[int, float]:
    """Step -> training loss."""
    return {row["step"]: row["train_loss"] for row in read_metrics(out / "metrics.jsonl") if "train_loss" in row}


def val_losses(out: Path) -> list[float]:
    """The validation losses, first to last."""
    return [row["val_loss"] for row in read_metrics(out / "metrics.jsonl") if "val_loss" in row]
