"""A lesson's notebook, executed as Jupyter does; its exercise is written in it, as a student would."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("lesson", ["01_pairs", "02_tokens"])
def test_a_notebook_runs_from_its_first_cell_to_its_last(lesson, tmp_path, monkeypatch):
    """Those whose lesson trains nothing: in a copy of the lessons, since the notebook writes the exercise's file."""
    for name in ("lessons", "nanogpt_hub", "train"):
        (tmp_path / name).symlink_to(ROOT / name) if name != "lessons" else copy_lessons(tmp_path / name, lesson)
    notebook = nbformat.read(ROOT / "lessons" / lesson / "lesson.ipynb", as_version=4)
    solution = (Path(__file__).parent / "solutions" / f"{lesson}.py").read_text(encoding="utf-8")
    for cell in notebook.cells:
        if cell.source.startswith("%%writefile"):
            cell.source = cell.source.splitlines()[0] + "\n" + solution
    monkeypatch.setitem(os.environ, "LESSON_SOLUTIONS", "")
    client = nbclient.NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "passed" in printed
    assert "failed" not in printed
    assert "Error" not in printed


def copy_lessons(folder: Path, lesson: str) -> None:
    (folder / lesson).mkdir(parents=True)
    for path in (ROOT / "lessons").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    for path in (ROOT / "lessons" / lesson).iterdir():
        if path.is_file():
            (folder / lesson / path.name).write_bytes(path.read_bytes())
