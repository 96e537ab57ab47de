"""What is known of a model: its shape and size, its card, its files, and where it comes from.

info(models, place)["val_loss"], chips(models, place)       # models: a ModelStore, place: what its `find` gave
"""

from dataclasses import asdict
from pathlib import Path

from nanogpt_hub import lens
from nanogpt_hub.checkpoint import read_json
from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.playground.models import ModelStore
from nanogpt_hub.playground.views import card_html, parts_view
from nanogpt_hub.runs import run_record
from nanogpt_hub.system.readable import count, size

MOST_CARD = 2**17  # bytes of a card that are shown: a second's work, whatever is in it


def info(models: ModelStore, place: Resolved) -> dict:
    """What a model is, in plain JSON: name, commit, shape, size, tokenizer, training."""
    loaded = models.load(place)
    model, facts = loaded.model, run_facts(place)
    return {
        "model": models.name_of(place),
        "revision": place.revision,
        "sha": place.sha,
        "parameters": model.num_params(),
        "config": asdict(model.config),
        "tokenizer": {"kind": loaded.tokenizer.kind, "vocab_size": loaded.tokenizer.vocab_size},
        "defaults": asdict(loaded.defaults),
        "step": facts.get("evaluation", {}).get("step"),
        "val_loss": facts.get("evaluation", {}).get("val_loss"),
        "device": str(model.wte.weight.device),
    }


def chips(models: ModelStore, place: Resolved) -> list[list[str]]:
    """The line of facts above the tabs: (what, value) each."""
    about = info(models, place)
    config = about["config"]
    revision = f"{place.revision} ({place.sha[:7]})" if place.sha != place.revision else place.sha[:7]
    rows = [
        ("model", place.repo_id or "/".join(Path(about["model"]).parts[-2:])),
        ("revision", revision if place.sha else ""),
        ("parameters", count(about["parameters"])),
        ("layers × heads × width", f"{config['n_layer']} × {config['n_head']} × {config['n_embd']}"),
        ("context", f"{config['block_size']} tokens"),
        ("tokenizer", f"{about['tokenizer']['kind']}, {about['tokenizer']['vocab_size']:,} tokens"),
        ("trained", f"{about['step']:,} steps" if isinstance(about["step"], int) else ""),
        ("validation loss", f"{about['val_loss']:.3f}" if isinstance(about["val_loss"], float) else ""),
        ("runs on", about["device"]),
    ]
    return [[what, value] for what, value in rows if value]


def card(place: Resolved) -> str:
    """README.md as harmless HTML; a sentence where there is none."""
    path = place.folder / "README.md"
    if not path.is_file() or path.stat().st_size > MOST_CARD:
        return "<p><em>This model has no card.</em></p>"
    return card_html(path.read_text(encoding="utf-8", errors="replace"))


def files(place: Resolved) -> list[list[str]]:
    """(name, size) of each file of the model."""
    paths = [path for path in sorted(place.folder.rglob("*")) if path.is_file()]
    return [[path.relative_to(place.folder).as_posix(), size(path.stat().st_size)] for path in paths[:500]]


def provenance(place: Resolved) -> list[list[str]]:
    """(what, value): where the model comes from, as far as its run told."""
    facts = run_facts(place)
    data, training, base = (facts.get(name, {}) for name in ("data", "training", "base_model"))
    source = data.get("source") if isinstance(data.get("source"), dict) else {}
    rows = [
        ("repository", place.repo_id), ("commit", place.sha), ("trained on", source.get("name")),
        ("licence of the text", source.get("license")), ("tokenizer", data.get("tokenizer")),
        ("training tokens in the text", data.get("train_tokens")), ("tokens trained on", training.get("tokens")),
        ("steps", training.get("steps")), ("optimizer", training.get("optimizer")),
        ("precision", training.get("precision")), ("hardware", training.get("hardware")),
        ("seconds", training.get("seconds")), ("fine-tuned from", base.get("id")),
        ("code", training.get("commit")), ("command", training.get("command")),
    ]  # fmt: skip
    known = [[what, f"{value:,}" if type(value) is int else str(value)[:500]] for what, value in rows if value]
    return known or [["its run left no record", ""]]


def parts(models: ModelStore, place: Resolved) -> dict:
    """Bars: where the parameters are."""
    return parts_view(lens.parameters_by_part(models.load(place).model))


def config(place: Resolved) -> dict:
    """config.json as it is."""
    return read_json(place.folder / "config.json")


def run_facts(place: Resolved) -> dict:
    """What the run knew of itself (run.json), where it came along; empty where not."""
    return {key: value for key, value in run_record(place.folder).items() if isinstance(value, dict)}


def example_question(place: Resolved) -> tuple[str, str]:
    """(system text, message) that the model's run asked at each evaluation; two empty texts where it did not."""
    question = run_facts(place).get("sample", {}).get("question")
    found = [each for each in question if isinstance(each, dict)] if isinstance(question, list) else []
    texts = {str(each.get("role")): each.get("content") for each in found}
    system, user = (text if isinstance(text := texts.get(role), str) else "" for role in ("system", "user"))
    return system[:1000], user[:1000]
