"""Training runs side by side: what differs in their settings, their losses at equal steps, tokens and time, and whether
the differences are beyond noise.

    comparison = compare([read_experiment(folder) for folder in ("out/a-1", "out/a-2", "out/b-1", "out/b-2")])
    comparison.groups          # runs that differ in nothing but the seed are one group
    comparison.verdicts        # each group against the first one: Welch's t-test of the losses at the last common step

Losses are in nats per token; in bits per byte where the runs have different tokenizers, because nats are then of
different tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev, variance

from nanogpt_hub.checkpoint import read_config, read_json
from nanogpt_hub.hub.plain_yaml import read_mapping
from nanogpt_hub.runs import Run, is_small, read_run
from nanogpt_hub.system.readable import flatten

LEVEL = 0.05  # a difference is beyond noise where chance alone makes one as large less often than this
IGNORED = ("seed", "out_dir", "hub", "trackers", "log_interval", "save")  # settings that are no part of the experiment
AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds"}


@dataclass(frozen=True)
class Experiment:
    """A run and the settings that it was made with."""

    run: Run
    settings: dict[str, str]  # dotted names
    seed: str
    bits_per_byte: float | None  # per nat of loss; None where the run does not tell
    shape: dict[str, str]  # the model's fields, as model.NAME, those too that the config leaves to the preset

    def value(self, key: str) -> str:
        return self.settings.get(key) or self.shape.get(key, "")


@dataclass(frozen=True)
class Group:
    """Runs with the same settings, one a seed."""

    name: str
    members: tuple[Experiment, ...]

    def losses(self, axis: str, place: float, in_bits: bool = False) -> list[float]:
        """The validation loss of each run at a step, a number of tokens or of seconds."""
        losses = [loss_at(member.run, axis, place) for member in self.members]
        if not in_bits:
            return losses
        factors = [member.bits_per_byte for member in self.members if member.bits_per_byte is not None]
        return [loss * factor for loss, factor in zip(losses, factors, strict=True)]


@dataclass(frozen=True)
class Verdict:
    """A group against the first one."""

    name: str
    difference: float  # of the means; below 0 is better
    p: float | None  # how often chance alone makes as large a difference; None with fewer than two seeds in a group

    @property
    def text(self) -> str:
        if self.p is None:
            return f"{self.name}: {self.difference:+.4f}; with one seed nobody can say whether that is noise"
        word = "beyond noise" if self.p < LEVEL else "within noise"
        return f"{self.name}: {self.difference:+.4f}, {word} (p = {self.p:.2g})"


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds."""

    groups: tuple[Group, ...]
    differing: dict[str, list[str]]  # setting -> its value in each group
    ends: dict[str, float]  # step, tokens, seconds: the last place that all runs reached
    in_bits: bool
    verdicts: tuple[Verdict, ...]

    @property
    def unit(self) -> str:
        return "bits per byte" if self.in_bits else "nats per token"


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_experiment(folder: str | Path, name: str = "") -> Experiment:
    """A run's folder. name: what it is called, instead of the folder's name.

    Raises ValueError where it holds no log with evaluations, or no config.
    """
    folder = Path(folder)
    run = read_run(folder, name)
    if not any("val_loss" in row for row in run.rows):
        raise ValueError(f"{folder} is no run that was evaluated: it has no metrics.jsonl with a val_loss")
    path = folder / "config.yaml"
    if not is_small(path):
        raise ValueError(f"{folder} has no config.yaml, so nobody can say what was different; give a run's folder")
    written = read_mapping(path.read_text(encoding="utf-8"), "config.yaml")
    settings = {key: str(value) for key, value in flatten(written).items()}
    kept = {key: text for key, text in settings.items() if key.partition(".")[0] not in IGNORED}
    facts = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    return Experiment(run, kept, settings.get("seed", ""), bits_per_nat(facts.get("evaluation")), shape_of(folder))


def shape_of(folder: Path) -> dict[str, str]:
    """The fields of a run's model; none where it has left no folder that can be read."""
    try:
        config = read_config(folder / "best", any_core=True)
    except (ValueError, OSError):
        return {}
    return {f"model.{key}": str(value) for key, value in asdict(config).items()}


def bits_per_nat(evaluation: object) -> float | None:
    """Bits per byte of text for each nat per token, from what a run measured."""
    if not isinstance(evaluation, dict):
        return None
    loss, bits = evaluation.get("val_loss"), evaluation.get("bits_per_byte")
    return bits / loss if isinstance(loss, (int, float)) and isinstance(bits, (int, float)) and loss else None


def loss_at(run: Run, axis: str, place: float) -> float:
    """The validation loss at a place on an axis (step, tokens or seconds), between evaluations on the straight line.

    NaN where the log does not tell the axis.
    """
    points = [(row[axis], row["val_loss"]) for row in run.rows if "val_loss" in row and axis in row]
    if not points:
        return math.nan
    before = [point for point in points if point[0] <= place] or points[:1]
    after = [point for point in points if point[0] >= place] or points[-1:]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (place - x0) / (x1 - x0)


# ---- comparing -------------------------------------------------------------------------------------------------------


def compare(experiments: Sequence[Experiment]) -> Comparison:
    """Puts runs that differ in the seed alone together, and compares each group with the first.

    Raises ValueError for fewer than two runs, and for runs with different tokenizers that do not tell bits per byte.
    """
    if len(experiments) < 2:
        raise ValueError(f"{len(experiments)} run given; name two or more, as in: nanogpt-hub compare out/a out/b")
    groups = grouped(experiments)
    in_bits = len({e.settings.get("data.tokenizer") for e in experiments}) > 1
    if in_bits and (silent := [e.run.name for e in experiments if e.bits_per_byte is None]):
        raise ValueError(f"the runs have different tokenizers, and {silent[0]} does not tell its bits per byte")
    keys = sorted({key for group in groups for key in group.members[0].settings})
    values = {key: [group.members[0].value(key) for group in groups] for key in keys}
    ends = {axis: min(last(e.run, axis) for e in experiments) for axis in AXES}
    first = groups[0].losses("step", ends["step"], in_bits)
    verdicts = [verdict(group.name, first, group.losses("step", ends["step"], in_bits)) for group in groups[1:]]
    differing = {key: texts for key, texts in values.items() if len(set(texts)) > 1}
    return Comparison(groups, differing, ends, in_bits, tuple(verdicts))


def grouped(experiments: Sequence[Experiment]) -> tuple[Group, ...]:
    """Runs that differ in nothing but the seed, in the order of their first members; named by that one."""
    groups: dict[tuple, list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault(tuple(sorted(experiment.settings.items())), []).append(experiment)
    return tuple(Group(members[0].run.name, tuple(members)) for members in groups.values())


def last(run: Run, axis: str) -> float:
    """Where the last evaluation was."""
    return max((row[axis] for row in run.rows if "val_loss" in row and axis in row), default=0.0)


def verdict(name: str, before: list[float], after: list[float]) -> Verdict:
    return Verdict(name, mean(after) - mean(before), welch(before, after))


# ---- statistics ------------------------------------------------------------------------------------------------------


def welch(a: list[float], b: list[float]) -> float | None:
    """The p-value of Welch's t-test (two-sided, variances may differ); None with fewer than two values in a sample."""
    if min(len(a), len(b)) < 2:
        return None
    va, vb = variance(a) / len(a), variance(b) / len(b)
    if va + vb == 0:
        return 1.0 if mean(a) == mean(b) else 0.0
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return two_sided((mean(a) - mean(b)) / math.sqrt(va + vb), freedom)


def two_sided(t: float, freedom: float) -> float:
    """How often |T| is above |t| for Student's t.

    Its density, in the angle whose tangent is t / sqrt(freedom), is a power of the cosine (Simpson's rule).
    """
    freedom = min(freedom, 1e4)  # where it is as good as normal, and Simpson's steps are still fine enough
    total = math.sqrt(math.pi) * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    edge, n = math.atan(abs(t) / math.sqrt(freedom)), 1000
    h = (math.pi / 2 - edge) / n
    heights = [max(math.cos(edge + i * h), 0.0) ** (freedom - 1) for i in range(n + 1)]
    area = h / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    return min(1.0, 2 * area / total)


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % interval of the mean; None for one value."""
    if len(values) < 2:
        return None
    low, high = 0.0, 1000.0
    for _ in range(60):  # the t beyond which 5 % lie
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, len(values) - 1) > LEVEL else (low, middle)
    return low * stdev(values) / math.sqrt(len(values))


# ---- showing ---------------------------------------------------------------------------------------------------------


def tables(comparison: Comparison) -> list[str]:
    """The comparison as Markdown: settings, losses, verdicts."""
    names = [group.name for group in comparison.groups]
    settings = [[key, *texts] for key, texts in comparison.differing.items()]
    heads = [f"{comparison.ends[axis]:,.4g} {word}" for axis, word in AXES.items()]
    losses = []
    for group in comparison.groups:
        cells = [cell(group.losses(axis, comparison.ends[axis], comparison.in_bits)) for axis in AXES]
        losses.append([group.name, str(len(group.members)), *cells])
    return [
        markdown(["setting", *names], settings) if settings else "The runs differ in the seed alone.",
        markdown([f"validation loss, {comparison.unit}, after", "seeds", *heads], losses),
        "\n".join(f"against {names[0]}, after {heads[0]}: {verdict.text}" for verdict in comparison.verdicts),
    ]


def cell(losses: list[float]) -> str:
    if any(map(math.isnan, losses)):
        return ""
    half = interval(losses)
    return f"{mean(losses):.4f}" + (f" ± {half:.4f}" if half is not None else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(text.replace('|', ' ') for text in line)} |" for line in lines)


def plot(comparison: Comparison, out: Path) -> None:
    """Draws the groups' validation losses over the steps: the mean, and between the lowest and the highest seed."""
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for group in comparison.groups:
        steps = sorted({row["step"] for row in group.members[0].run.rows if "val_loss" in row})
        losses = [group.losses("step", step, comparison.in_bits) for step in steps]
        line = axes.plot(steps, [mean(each) for each in losses], "o-", label=group.name, linewidth=1.4, markersize=3.5)
        axes.fill_between(steps, [*map(min, losses)], [*map(max, losses)], color=line[0].get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel=f"validation loss ({comparison.unit})")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(out, format="png")
    plt.close(figure)
