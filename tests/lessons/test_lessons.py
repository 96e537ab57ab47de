"""The course: exercises fail with a sentence until they are solved, commands can be typed, figures belong to runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lessons.figures import as_table, band, commands
from train import finetune
from train.config import make_parser, parse

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*"))
EACH = pytest.mark.parametrize("lesson", LESSONS, ids=lambda folder: folder.name)


def solve(*arguments: str, solutions: Path | None = None) -> subprocess.CompletedProcess:
    """The lessons' own tests, as a student runs them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "LESSON_SOLUTIONS": str(solutions or "")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def unsolved() -> str:
    return solve("lessons").stdout


@EACH
def test_an_exercise_fails_with_a_sentence_until_it_is_solved(lesson, unsolved):
    todo = re.findall(
        r'NotImplementedError\(\s*"(write .+?)"\s*\)', (lesson / "exercise.py").read_text(encoding="utf-8")
    )
    assert todo
    for sentence in todo:
        assert f"{lesson.name}/exercise.py: {sentence}" in unsolved
    assert f"FAILED lessons/{lesson.name}/" in unsolved
    assert "Traceback" not in unsolved


def test_solved_exercises_are_green():
    done = solve("lessons", solutions=Path(__file__).parent / "solutions")
    assert done.returncode == 0, done.stdout


@EACH
def test_a_lesson_has_all_its_parts(lesson):
    text = (lesson / "README.md").read_text(encoding="utf-8")
    for part in ("What you will see.", "Predict first.", "Run it", "What came out", "Why.", "Exercise.", "Read next."):
        assert f"**{part}" in text or part in text, part
    assert f"python -m pytest lessons/{lesson.name} -q" in text
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (lesson / link).exists(), link


@EACH
def test_the_commands_of_a_lesson_can_be_typed(lesson):
    for command in commands((lesson / "README.md").read_text(encoding="utf-8")):
        words = shlex.split(command)[1:]
        if words[0] == "-m":
            parser = make_parser(words[1], "")
            if words[1] == "train.finetune":
                parser.set_defaults(finetune.DEFAULTS)
                parser.add_argument("--from")
            config, _ = parse(parser, words[2:])
            assert config.max_steps <= 400
        else:
            assert (ROOT / words[0]).is_file()


@EACH
def test_the_figures_of_a_lesson_are_those_of_its_commands(lesson):
    text = (lesson / "README.md").read_text(encoding="utf-8")
    if not (lesson / "figures.json").is_file():
        pytest.skip(f"its figures are not made yet: run python -m lessons.figures {lesson.name[:2]}")
    made = json.loads((lesson / "figures.json").read_text(encoding="utf-8"))
    assert list(made["figures"]) == commands(text)
    assert len(made["seeds"]) >= 3
    assert as_table(made["figures"]) in text


def test_a_band_is_from_the_lowest_to_the_highest():
    assert band([0.5, 0.25, 0.3]) == "0.250 to 0.500"
    assert band([100, 97.2, 99]) == "97 to 100"
    assert band([3.0, 3.0]) == "3"
