"""Makes a notebook of each lesson's README, and of train_look_push.md: text, commands as cells that run, the exercise.

    python -m lessons.notebooks [--check]             # made anew; --check tells whether they are up to date
    python -m lessons.notebooks --run [03 04 ...]     # executed as Jupyter does it, in a copy of the checkout

The notebooks hold no output, so that they change only when a lesson does. On Colab and Kaggle the first cell fetches
the repository and installs what is missing: torch stays the one that is there. --run writes the solutions of the folder
--solutions into the exercises, and stops at the first cell that fails.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from nanogpt_hub.hub.notebook import notebook

HERE = Path(__file__).parent
TOUR = HERE / "train_look_push.md"  # a page whose python cells are those of a notebook of its own
SETUP = """# In a checkout there is nothing to do. On Colab and Kaggle write the https address of the repository here.
# (On Kaggle switch the internet on first, in the settings at the right.)
REPOSITORY = ""

import os, pathlib, subprocess, sys

here = pathlib.Path.cwd()
root = next((p for p in (here, *here.parents, here / "nanogpt_hub") if (p / "lessons" / "conftest.py").is_file()), None)
if root is None and not REPOSITORY:
    raise SystemExit("This notebook is not in a checkout: write the address into REPOSITORY, and run again.")
if root is None:
    root = here / "nanogpt_hub"
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, str(root)], check=True)
    lines = (root / "requirements.txt").read_text().splitlines()
    kept = ("#", "torch", "numpy", "gradio", "numba")  # what is there stays what it is, and the page is not needed
    missing = [line for line in lines if line and not line.startswith(kept)]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing, "pytest"], check=True)
os.chdir(root)
sys.path.insert(0, str(root))
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
os.environ["PYTHONPATH"] = str(root)"""
FIRST_GPT = """# The model of lesson 3, trained here if it is not there yet.
if not os.path.isdir("out/first_gpt/best"):
    !python -m train.pretrain lessons/03_first_gpt/first_gpt.yaml"""
PICTURE = """from IPython.display import Image, display

for picture in ({}):
    display(Image(picture))"""
COPIED = ("lessons", "configs")  # written into by a notebook; the rest of a checkout is linked
LINKED = ("nanogpt_hub", "train", "requirements.txt", "web", "app.py")

Cell = tuple[str, str]  # kind and source


# ---- making them -----------------------------------------------------------------------------------------------------


def lesson_cells(lesson: Path) -> list[Cell]:
    """The cells of a lesson's notebook."""
    text = readable((lesson / "README.md").read_text(encoding="utf-8"))
    needs_model = "out/first_gpt/best" in text and not lesson.name.startswith("03")
    cells = [("code", SETUP)]
    for i, part in enumerate(re.split(r"^```sh\n(.*?)^```\n", text, flags=re.MULTILINE | re.DOTALL)):
        if i % 2 == 0:
            cells += [("markdown", part.strip())] if part.strip() else []
        elif "pytest" in part:
            exercise = (lesson / "exercise.py").read_text(encoding="utf-8")
            cells += [("code", f"%%writefile lessons/{lesson.name}/exercise.py\n{exercise}"), ("code", shell(part))]
        else:
            cells += [("code", FIRST_GPT)] if needs_model else []
            cells += [("code", shell(part)), *pictures(part)]
            needs_model = False
    return cells


def readable(text: str) -> str:
    """A README without what means nothing in a notebook: links within the repository, marks of what is generated."""
    text = re.sub(r"\[([^]]+)\]\((?!http)[^)]+\)", r"`\1`", text)
    return re.sub(r"^<!-- .* -->\n", "", text, flags=re.MULTILINE)


def shell(commands: str) -> str:
    """Lines for a shell as lines of a cell. `nanogpt-hub` is a module there: it may not be installed."""
    lines = [re.sub(r"^nanogpt-hub ", "python -m nanogpt_hub ", line) for line in commands.strip().splitlines()]
    return "\n".join(f"!{line}" for line in lines)


def pictures(commands: str) -> list[Cell]:
    """A cell that shows the loss curves of the runs that the commands before it made."""
    found = []
    for line in re.findall(r"^python -m train\.\w+ .*", commands, re.MULTILINE):
        out = re.search(r"--out_dir (\S+)", line)
        found.append(f'"{out[1] if out else "out/" + Path(line.split()[3]).stem}/loss.png"')
    names = ", ".join(found) + ("," if len(found) == 1 else "")
    return [("code", PICTURE.format(names))] if found else []


def tour_cells(page: Path = TOUR) -> list[Cell]:
    """The cells of the notebook that trains, looks and pushes: the page's text and its python blocks."""
    parts = re.split(r"^```python\n(.*?)^```\n", readable(page.read_text(encoding="utf-8")), flags=re.M | re.S)
    kinds = ("markdown", "code")
    cells = [(kinds[i % 2], part.strip()) for i, part in enumerate(parts) if part.strip()]
    return [cells[0], ("code", SETUP), *cells[1:]]


def all_notebooks() -> dict[Path, str]:
    """Each notebook and what it has to hold."""
    lessons = sorted(HERE.glob("[0-9][0-9]_*"))
    made = {lesson / "lesson.ipynb": notebook(lesson_cells(lesson)) for lesson in lessons}
    return {**made, TOUR.with_suffix(".ipynb"): notebook(tour_cells())}


def write(check: bool) -> int:
    """Writes those that are out of date, or with `check` only names them; how many they were."""
    stale = {path: made for path, made in all_notebooks().items() if not path.is_file() or text_of(path) != made}
    for path, made in stale.items():
        if not check:
            path.write_text(made, encoding="utf-8")
        print(f"{'out of date' if check else 'written'}: {path}")
    return len(stale)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# ---- executing them --------------------------------------------------------------------------------------------------


def execute(path: Path, folder: Path, solutions: Path | None = None, replacing: dict[str, str] | None = None) -> str:
    """Runs all cells of a notebook in a copy of the checkout in `folder`; returns what they printed.

    A cell fails where its code or a command in it does. replacing: text of cells, and what to run instead. Raises
    nbclient's CellExecutionError.
    """
    import nbclient
    import nbformat

    book: Any = nbformat.read(path, as_version=4)
    copy_checkout(folder)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = strict(cell.source, solutions)
            for old, new in (replacing or {}).items():
                cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [out for cell in book.cells for out in cell.get("outputs", [])]
    return "".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in outputs)


def strict(source: str, solutions: Path | None) -> str:
    """A cell that ends the notebook where a command in it fails, with the exercise solved."""
    exercise = re.match(r"%%writefile lessons/(\w+)/exercise.py\n", source)
    if exercise:
        return exercise[0] + text_of(solutions / f"{exercise[1]}.py") if solutions else source
    return re.sub(r"^( *)!(.+)$", r"\1!\2\n\1assert _exit_code == 0, 'this command failed'", source, flags=re.MULTILINE)


def copy_checkout(folder: Path) -> None:
    for name in COPIED:
        if not (folder / name).exists():
            shutil.copytree(HERE.parent / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LINKED:
        if not (folder / name).exists():
            (folder / name).symlink_to(HERE.parent / name)


def run(numbers: list[str], solutions: Path) -> None:
    """Executes notebooks in one copy of the checkout, so that later ones find the models of earlier ones."""
    os.environ["LESSON_SOLUTIONS"] = ""
    with tempfile.TemporaryDirectory() as folder:
        for path in all_notebooks():
            if not numbers or path.parent.name[:2] in numbers or path.stem in numbers:
                print(f"{path.relative_to(HERE)} ...", end=" ", flush=True)
                execute(path, Path(folder), solutions)
                print("runs", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a notebook is out of date")
    parser.add_argument("--run", nargs="*", metavar="NN", help="execute these (default: all) instead of writing any")
    solutions = HERE.parent / "tests" / "lessons" / "solutions"
    parser.add_argument("--solutions", type=Path, default=solutions, help="folder of the exercises' solutions")
    args = parser.parse_args()
    if args.run is None:
        return int(bool(write(args.check)) and args.check)
    run(args.run, args.solutions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
