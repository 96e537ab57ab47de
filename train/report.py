"""What a run tells: metrics.jsonl, the loss curve, samples, and lines that say whether a loss is any good."""

import json
import math
from pathlib import Path

from nanogpt_hub.evaluate import bits_per_byte, perplexity
from nanogpt_hub.runs import read_rows
from nanogpt_hub.system.files import replacing, sha256_of, sync, write_atomic

EVEN, UNIGRAM = "guessing evenly", "knowing frequencies"  # the baselines
FLOOR = "entropy of the text, the best possible"  # where it is known


class MetricsFile:
    """One JSON object a line: step, tokens, seconds, and what was measured at that step."""

    def __init__(self, path: Path, keep_until: int = -1):
        """Opens the file for appending; lines of steps after `keep_until` belong to work that was lost and are cut."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] <= keep_until]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.path = path

    def write(self, row: dict) -> None:
        """Appends a row; numbers that are not finite, which JSON cannot hold, are left out."""
        clean = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(clean) + "\n")

    def mark(self) -> dict:
        """The file as it is now, put on the disk: its length and its hash, for `check_metrics`."""
        sync(self.path)
        data = self.path.read_bytes()
        return {"bytes": len(data), "sha256": sha256_of(data)}


def check_metrics(path: Path, mark: dict) -> None:
    """Raises ValueError where a metrics file does not begin with what it held when it was marked."""
    with path.open("rb") as file:
        if sha256_of(file.read(mark["bytes"])) == mark["sha256"]:
            return
    raise ValueError(
        f"{path} is damaged, or of another run: it does not begin with what the run had written; bring it back, or "
        "move it away: then a new one begins where the run goes on"
    )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole rows of a run's own log, however long it is."""
    return read_rows(path, max_bytes=math.inf)


def plot_loss(metrics: Path, out: Path, baselines: dict[str, float]) -> None:
    """Draws training and validation loss (nats per token) over the steps, with dashed baselines."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    from matplotlib import pyplot as plt

    rows = read_metrics(metrics)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for key, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.4, markersize=3.5)
    for label, value in baselines.items():
        axes.axhline(value, linestyle="--", linewidth=0.8, color="gray")
        axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with replacing(out) as aside:
            figure.savefig(aside, format="png")
    finally:
        plt.close(figure)


def describe_loss(loss: float, bytes_per_token: float) -> str:
    return f"perplexity {perplexity(loss):.4g}, {bits_per_byte(loss, bytes_per_token):.3f} bits per byte"


def baseline_lines(baselines: dict[str, float], bytes_per_token: float) -> list[str]:
    """What models that know nothing, or only how frequent each token is, would reach."""
    return [
        f"baseline: {name}, loss {loss:.4f} ({describe_loss(loss, bytes_per_token)})"
        for name, loss in baselines.items()
    ]


def size_warning(n_params: int, train_tokens: int) -> str | None:
    """A sentence when the model has far more parameters than there are tokens to learn from."""
    if n_params <= 20 * train_tokens:
        return None
    return (
        f"note: {n_params:,} parameters for {train_tokens:,} training tokens: it will memorise them; "
        "a smaller model.size, some model.dropout or more text will generalise better"
    )
