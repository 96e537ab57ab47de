"""What it teaches most to compare a model with: an earlier moment of its own, or what it was made from.

    name, revision = counterpart(models, place, models.revisions(place))    # the model itself where there is nothing

Never a model with another tokenizer: then token ids would not mean the same. That is checked before any weights are
fetched; what cannot be checked is not proposed.
"""

import filecmp
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanogpt_hub.checkpoint import WEIGHTS
from nanogpt_hub.hub.resolve import HubError, Resolved
from nanogpt_hub.playground.facts import run_facts
from nanogpt_hub.playground.models import TINY, ModelStore
from nanogpt_hub.runs import run_of

TRIED = 3  # kept steps: the Hub is asked for the tokenizer of each
MAX_CONFIG = 2**20  # bytes of a run's config.yaml that is read


def counterpart(
    models: ModelStore, place: Resolved, names: Sequence[str], token: str | None = None
) -> tuple[str, str]:  # fmt: skip
    """(name, revision) of the first of `candidates` with the same tokenizer.

    names: the repo's revisions. token: of a visitor who signed in.
    """
    tokenizer = models.load(place).tokenizer
    own = tokenizer and tokenizer.hash
    for name, revision in candidates(models, place, names):
        try:
            if models.tokenizer_hash(name, revision, token) == own:
                return name, revision
        except (HubError, ValueError, OSError):
            continue  # not there any more, not allowed, or damaged
    return models.name_of(place), place.revision


def candidates(models: ModelStore, place: Resolved, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The first kept step against the last; the model that it was fine-tuned from; its run's other weights, best or
    last; another model of the runs."""
    steps = sorted(name for name in names if name.startswith("step-"))
    if place.revision in steps[:1]:
        yield place.repo_id, "main" if "main" in names else steps[-1]
    yield from ((place.repo_id, step) for step in steps[:TRIED] if step != place.revision)
    own = models.name_of(place)
    if own in TINY:
        yield "tiny" if own == "tiny-early" else "tiny-early", ""
    yield from bases(place)
    beside = place.folder.parent / ("last" if place.folder.name == "best" else "best")
    if differ(place.folder / WEIGHTS, beside / WEIGHTS):
        yield models.name_of(Resolved(beside)), ""
    others = sorted(models.run_models(), key=lambda name: Path(name).name != "best")  # the newest first among the best
    yield from ((name, "") for name in others if Path(name).resolve() != place.folder.resolve())


def bases(place: Resolved) -> Iterator[tuple[str, str]]:
    """What a fine-tune started from, as its run tells: a name on the Hub, or a folder here."""
    base = run_facts(place).get("base_model", {})
    if isinstance(base.get("id"), str):
        yield base["id"], str(base.get("revision") or base.get("sha") or "")
    run = run_of(place.folder)
    config = run / "config.yaml" if run else None
    if config and config.is_file() and config.stat().st_size <= MAX_CONFIG:
        text = config.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^from: (['\"]?)(.+)\1$", text, re.MULTILINE)
        if found:
            yield found[2], ""


def differ(one: Path, other: Path) -> bool:
    """Whether both files are there and hold different bytes."""
    return one.is_file() and other.is_file() and not filecmp.cmp(one, other, shallow=False)
