"""Notebooks, executed as Jupyter does: of lessons that train nothing, and the one that trains, looks and pushes."""

from pathlib import Path

import pytest

pytest.importorskip("nbclient")

from lessons.notebooks import HERE, TOUR, all_notebooks, execute, strict, text_of
from nanogpt_hub.hub.notebook import NOTEBOOK

SOLUTIONS = Path(__file__).parent / "solutions"


def test_the_notebooks_are_those_of_the_lessons():
    for path, made in all_notebooks().items():
        assert text_of(path) == made, "run python -m lessons.notebooks"


@pytest.mark.parametrize("lesson", ["01_pairs", "02_tokens"])
def test_the_notebook_of_a_lesson_runs_from_its_first_cell_to_its_last(lesson, tmp_path, monkeypatch):
    """The exercise is written in it, as a student would."""
    monkeypatch.setenv("LESSON_SOLUTIONS", "")
    said = execute(HERE / lesson / "lesson.ipynb", tmp_path, SOLUTIONS)
    assert "passed" in said
    assert "failed" not in said


def test_train_look_and_push(tmp_path, monkeypatch, hub):
    hub.add_user("alice", "hf_alice")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    smaller = {
        'NAME = ""': 'NAME = "alice/mine"', "STEPS = 200": "STEPS = 10", "size=1000000": "size=100000",
        "--eval.interval 50": "--eval.interval 10 --model.n_layer 2 --model.n_embd 32",
    }  # fmt: skip
    said = execute(TOUR.with_suffix(".ipynb"), tmp_path, replacing=smaller)
    assert "best validation loss" in said
    assert "alice/mine" in said
    files = hub.repo("alice/mine").files()
    assert {NOTEBOOK, "model.safetensors", "training/loss.png"} <= {*files}
    assert b"hf_alice" not in files[NOTEBOOK]


def test_a_command_that_fails_ends_an_execution():
    assert strict("!false", None) == "!false\nassert _exit_code == 0, 'this command failed'"
    assert strict("if x:\n    !a b", None).endswith("    !a b\n    assert _exit_code == 0, 'this command failed'")
