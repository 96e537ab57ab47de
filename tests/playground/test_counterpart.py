"""What a model is compared with at first: something that teaches, and never a model with another tokenizer."""

import json
from pathlib import Path

import pytest
from helpers import files_of, make_model

from nanogpt_hub.playground.counterpart import counterpart
from nanogpt_hub.playground.models import ModelStore

OTHER = "another alphabet"


def beside(default: Path | str, runs: Path | None = None, revision: str = "") -> tuple[str, str]:
    """The counterpart of a model of a store."""
    models = ModelStore(str(default), runs)
    place = models.find(str(default), revision)
    return counterpart(models, place, models.revisions(place))


def tuned(folder: Path, base: dict | None = None, config: str = "") -> Path:
    """The best model of a run that tells what it started from."""
    make_model(folder / "best", seed=1)
    (folder / "metrics.jsonl").write_text("")
    (folder / "run.json").write_text(json.dumps({"base_model": base or {}}))
    (folder / "config.yaml").write_text(config)
    return folder / "best"


def test_the_runs_other_weights_then_another_run(tmp_path):
    mine = make_model(tmp_path / "mine" / "best")
    make_model(tmp_path / "other" / "best", text=OTHER)
    assert beside(mine, tmp_path) == (mine.as_posix(), ""), "alone with its tokenizer, it is compared with itself"
    same = make_model(tmp_path / "third" / "best", seed=7)
    assert beside(mine, tmp_path) == (same.as_posix(), "")
    last = make_model(tmp_path / "mine" / "last", seed=3)
    assert beside(mine, tmp_path) == (last.as_posix(), "")
    assert beside(last, tmp_path) == (mine.as_posix(), "")


def test_a_fine_tune_and_its_base(tmp_path, hub):
    hub.add_repo("bob/base", files_of(make_model(tmp_path / "base", seed=2)))
    hub.add_repo("bob/strange", files_of(make_model(tmp_path / "strange", text=OTHER)))
    sha = hub.repo("bob/base").branches["main"]
    mine = tuned(tmp_path / "a" / "mine", {"id": "bob/base", "revision": sha})
    make_model(tmp_path / "a" / "mine" / "last", seed=9)
    assert beside(mine) == ("bob/base", sha)
    asked = [request.path for request in hub.requests]
    assert not any("safetensors" in path for path in asked), "no weights are fetched to look at a tokenizer"
    for base in ("bob/strange", "bob/gone", "no name!", "../secret"):
        strange = tuned(tmp_path / base.replace("/", "-"), {"id": base})
        last = make_model(strange.parent / "last", seed=9)
        assert beside(strange, strange.parents[1]) == (last.as_posix(), ""), base


@pytest.mark.parametrize("line", ["from: {}\n", "from: '{}'\n"])
def test_a_fine_tune_and_its_base_in_a_folder(tmp_path, line):
    base = make_model(tmp_path / "base" / "best", seed=2)
    mine = tuned(tmp_path / "mine", config="seed: 1\n" + line.format(base.as_posix()))
    make_model(tmp_path / "mine" / "last", seed=9)
    assert beside(mine, tmp_path) == (base.as_posix(), "")
    outside = ModelStore(str(mine))  # visitors may not open that folder
    assert counterpart(outside, outside.find(), []) == (mine.as_posix(), "")


def test_the_first_kept_step_against_the_last(tmp_path, hub):
    repo = hub.add_repo("alice/steps", files_of(make_model(tmp_path / "old", text=OTHER)))
    repo.tags["step-000100"] = repo.branches["main"]
    repo.put(files_of(make_model(tmp_path / "early", seed=3)))
    repo.tags["step-000200"] = repo.branches["main"]
    repo.put(files_of(make_model(tmp_path / "late", seed=4)))
    repo.tags["step-000300"] = repo.branches["main"]
    assert beside("alice/steps") == ("alice/steps", "step-000200"), "the first has another tokenizer"
    del repo.tags["step-000100"]
    assert beside("alice/steps") == ("alice/steps", "step-000200")
    assert beside("alice/steps", revision="step-000300") == ("alice/steps", "step-000200")
    assert beside("alice/steps", revision="step-000200") == ("alice/steps", "main")


def test_the_tiny_model_and_its_beginning():
    assert beside("tiny") == ("tiny-early", "")
    assert beside("tiny-early") == ("tiny", "")
