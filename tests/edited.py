"""Copies of the checkout with the edits that docs/change-the-architecture.md and docs/extend.md show."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

PAGE = ROOT / "docs" / "change-the-architecture.md"
EXTEND = ROOT / "docs" / "extend.md"
FENCED = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def section_of(heading: str, page: Path = PAGE) -> str:
    """The part of the page under a heading that begins so."""
    parts = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return next(part for part in parts if part.startswith(heading))


def blocks(text: str, language: str) -> list[str]:
    return [block for kind, block in FENCED.findall(text) if kind == language]


def commands(text: str) -> list[str]:
    return [line for block in blocks(text, "sh") for line in block.splitlines()]


def apply(source: str, diff: str) -> str:
    """`source` after a diff without line numbers, whose lines must be in it once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert source.count(before) == 1, f"the page shows lines that the file does not have:\n{before}"
    return source.replace(before, after)


def copy_package(folder: Path, heading: str = "") -> Path:
    """A checkout in `folder` with the edit of a section of the page, or unedited."""
    for name in ("nanogpt_hub", "train", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("app.py", "requirements.txt"):
        shutil.copyfile(ROOT / name, folder / name)
    model = folder / "nanogpt_hub" / "model.py"
    source = model.read_text(encoding="utf-8")
    for diff in blocks(section_of(heading), "diff") if heading else ():
        source = apply(source, diff)
    model.write_text(source, encoding="utf-8")
    return folder


def extend(checkout: Path, heading: str) -> None:
    """Makes the changes of a section of docs/extend.md in a copy of the checkout, and no others."""
    path, is_new = checkout, False
    for word, name, language, block in re.findall(
        r"^(In|New file) `([^`]+)`:$|^```(\w+)\n(.*?)^```", section_of(heading, EXTEND), re.MULTILINE | re.DOTALL
    ):
        if name:
            path, is_new = checkout / name, word == "New file"
        elif language == "diff":
            path.write_text(apply(path.read_text(encoding="utf-8"), block), encoding="utf-8")
        elif is_new:
            path.write_text(block, encoding="utf-8")


def python(checkout: Path, *args: str, status: int = 0, engine: str = "torch") -> str:
    """Runs Python in a checkout, with its package and not ours; returns what it prints, both streams."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", "NANOGPT_HUB_ENGINE": engine}
    done = subprocess.run(
        [sys.executable, *args],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


IN_ONE = """
import contextlib, importlib, io, json, sys
said = []
for module, *words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        assert not importlib.import_module({"nanogpt_hub": "nanogpt_hub.cli"}.get(module, module)).main(words)
    said.append(out.getvalue())
print(json.dumps(said))
"""


def in_one_process(checkout: Path, *commands: list[str]) -> list[str]:
    """What each command `python -m MODULE ...` prints, both streams; all in one process, which imports torch once."""
    words = [command[command.index("-m") + 1 :] for command in commands]
    return json.loads(python(checkout, "-c", IN_ONE, json.dumps(words)).splitlines()[-1])


if __name__ == "__main__":  # python tests/edited.py FOLDER HEADING
    print(copy_package(Path(sys.argv[1]), sys.argv[2]))
