"""Makes the notebook of each lesson from its README: text cells, commands as cells that run, the exercise as a cell.

    python -m lessons.notebooks [--check]

The notebooks hold no output, so that they change only when a lesson does; --check tells whether they are up to date. On
Colab and Kaggle the first cell fetches the repository and installs what is missing: torch stays the one that is there.
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
SETUP = """# Inside a checkout there is nothing to do. On Colab and Kaggle, give the address of the repository.
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
    missing = [line for line in lines if not line.startswith(("#", "torch", "numpy"))]  # those stay what they are
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing, "pytest"], check=True)
os.chdir(root)
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
os.environ["PYTHONPATH"] = str(root)"""


def cell(kind: str, source: str, number: int) -> dict:
    made = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}, "source": source.splitlines(keepends=True)}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def sources(lesson: Path) -> list[tuple[str, str]]:
    """(kind, source) of each cell."""
    text = (lesson / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\[([^]]+)\]\((?!http)[^)]+\)", r"`\1`", text)  # links within the repository lead nowhere from here
    cells = [("code", SETUP)]
    for i, part in enumerate(re.split(r"^```sh\n(.*?)^```\n", text, flags=re.MULTILINE | re.DOTALL)):
        if i % 2 == 0:
            cells += [("markdown", part.strip())] if part.strip() else []
        elif "pytest" in part:
            exercise = (lesson / "exercise.py").read_text(encoding="utf-8")
            cells += [
                ("code", f"%%writefile lessons/{lesson.name}/exercise.py\n{exercise}"),
                ("code", f"!{part.strip()}"),
            ]
        else:
            cells.append(("code", "\n".join(f"!{line}" for line in part.strip().splitlines())))
    return cells


def notebook(lesson: Path) -> str:
    """The notebook as JSON."""
    cells = [cell(kind, source, number) for number, (kind, source) in enumerate(sources(lesson))]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a notebook is out of date")
    args = parser.parse_args()
    stale = []
    for lesson in sorted(HERE.glob("[0-9][0-9]_*")):
        path, made = lesson / "lesson.ipynb", notebook(lesson)
        if not path.is_file() or path.read_text(encoding="utf-8") != made:
            stale.append(path)
            if not args.check:
                path.write_text(made, encoding="utf-8")
    for path in stale:
        print(f"{'out of date' if args.check else 'written'}: {path}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
