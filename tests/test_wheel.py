"""An installed wheel, without the checkout: it has all its parts, and trains, generates, serves the app, makes a Space.

The wheel is built once. It is installed without its dependencies into an environment that finds those of this one, but
not this checkout; a second environment has the wheel and nothing else.
"""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from helpers import ROOT, make_model

from nanogpt_hub.hub import static
from nanogpt_hub.hub.space import collect_space
from nanogpt_hub.system.installed import EXTRAS, PARTS

pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the wheel")
BIN = "Scripts" if os.name == "nt" else "bin"
IN_SOURCE = ("nanogpt_hub", *PARTS, "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
TINY = (
    "--data.tokenizer byte --model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.block_size 16 --max_steps 4 "
    "--batch_size 8 --eval.interval 4 --eval.max_windows 8 --eval.sample_tokens 8 --optim.warmup_steps 2 --device cpu"
).split()
EACH = """
from nanogpt_hub import cli
def each(*commands):  # in one process, which imports torch once
    for words in commands:
        try:
            print("status", cli.main(words), flush=True)
        except SystemExit as stop:
            print("status", stop.code, flush=True)
"""
TEXT = "".join(f"line {i}: to be, or not to be\n" for i in range(300))


def pip(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    place = tmp_path_factory.mktemp("built")
    copy_files(place / "source")
    pip("wheel", place / "source", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", place)
    return next(place.glob("*.whl"))


def copy_files(target: Path) -> None:
    """The files that a build needs, without what earlier builds left in the checkout."""
    for name in IN_SOURCE:
        found = [ROOT / name] if (ROOT / name).is_file() else list((ROOT / name).rglob("*"))
        for path in found:
            if path.is_file() and "__pycache__" not in path.parts:
                to = target / path.relative_to(ROOT)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(path.read_bytes())


class Environment:
    """A virtual environment with the wheel, and a folder in which its commands are typed."""

    def __init__(self, folder: Path, wheel: Path, sees_packages: bool):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=100)
        self.bin, self.cwd = folder / "venv" / BIN, folder / "work"
        self.cwd.mkdir()
        if sees_packages:  # a folder named in a .pth is searched, but the .pth files in it are not read: no checkout
            paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
            site = next((folder / "venv").rglob("site-packages"))
            (site / "others.pth").write_text("\n".join(paths), encoding="utf-8")
        pip("--python", self.python, "install", "--no-deps", "--no-index", "-q", wheel)
        (self.cwd / "my.txt").write_text(TEXT, encoding="utf-8")

    @property
    def python(self) -> Path:
        return self.bin / f"python{'.exe' if os.name == 'nt' else ''}"

    @property
    def settings(self) -> dict[str, str]:
        """The environment as if it were active, with nothing of this checkout."""
        mine = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        path = os.pathsep.join([str(self.bin), mine.get("PATH", "")])
        return {**mine, "PATH": path, "OMP_NUM_THREADS": "1", "NANOGPT_HUB_CACHE": str(self.cwd / "cache")}

    def run(self, *words: str | Path, status: int = 0) -> str:
        """What a command prints, both streams."""
        command = [self.bin / words[0], *map(str, words[1:])]
        done = subprocess.run(
            command, cwd=self.cwd, env=self.settings, capture_output=True, text=True, encoding="utf-8", timeout=280
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def hub(self, *words: str | Path, status: int = 0) -> str:
        return self.run("nanogpt-hub", *words, status=status)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("installed"), wheel, sees_packages=True)


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("bare"), wheel, sees_packages=False)


# ---- what is in it ----


def test_it_has_the_parts_and_no_name_of_anybody_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} - {"nanogpt_hub"} == {wheel.name.split("-py3")[0] + ".dist-info"}
    assert not [name for name in names if "__pycache__" in name]
    for part in ("train", "configs", "web"):
        mine = {path for path in (ROOT / part).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        shipped = {name for name in names if name.startswith(f"nanogpt_hub/{part}/")}
        assert shipped == {f"nanogpt_hub/{path.relative_to(ROOT).as_posix()}" for path in mine}
    assert {"nanogpt_hub/app.py", "nanogpt_hub/requirements.txt", "nanogpt_hub/page/static/page.css"} <= {*names}


def test_its_description_is_text_and_its_extras_are_there(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        about = message_from_string(archive.read(name).decode())
    assert about.get_payload().lstrip().startswith("# nanogpt_hub\n")
    assert about["Description-Content-Type"] == "text/markdown"
    assert {*about.get_all("Provides-Extra")} == {extra for extra in EXTRAS if extra}
    assert not [line for line in about.get_all("Requires-Dist") if "gradio" in line and "extra" not in line]


def test_a_checkout_has_the_page():
    files = static.page_files("alice/tiny", "v1", "http://127.0.0.1:9")
    assert {"index.html", "page.js", "model.js", "kernels/kernels.js", "style.css", "site.json"} <= files.keys()
    assert b"connect-src 'self' http://localhost:9 http://127.0.0.1:9;" not in files["page.js"]
    assert b"connect-src 'self' http://localhost:9 http://127.0.0.1:9; base-uri" in files["index.html"]
    assert b"https://*.hf.co" in static.page_files(endpoint="https://huggingface.co")["index.html"]


def test_with_everything_there_nothing_else_is_installed(wheel, installed):
    """As on Colab, which brings torch, Transformers and gradio: none of them is replaced."""
    wanted = f"{wheel}[train,app,fast]"
    said = pip("--python", installed.python, "install", "--dry-run", "--no-index", wanted)
    assert "Would install" not in said


# ---- what it does ----


def test_it_is_not_the_checkout(installed):
    code = "import nanogpt_hub; print(nanogpt_hub.__file__); import importlib.util as u; print(u.find_spec('train'))"
    place, top_level = installed.run("python", "-c", code).split("\n")[:2]
    assert Path(place).is_relative_to(installed.bin.parent)
    assert top_level == "None"


def test_it_trains_on_a_text_and_generates(installed):
    said = installed.hub("train", "quickstart", "--data.source", "my.txt", "--out_dir", "out/my", *TINY)
    assert "sample from it: nanogpt-hub generate out" in said
    command = json.loads((installed.cwd / "out" / "my" / "run.json").read_text())["training"]["command"]
    assert command.startswith("nanogpt-hub train quickstart --data.source my.txt ")
    write = "generate out/my/best --prompt line --max-new-tokens 5 --seed 1".split()
    tune = "finetune --from out/my/best --data.source my.txt --max_steps 2 --device cpu --out_dir out/tuned".split()
    said = installed.run("python", "-c", f"{EACH}\neach({write}, {tune})")
    assert said.startswith("line")
    assert "best model: " in said or "nothing was learned" in said
    assert said.count("status 0") == 2


def test_its_processes_find_the_trainer(installed):
    """A text of unknown size is tokenised by a process beside the training, and that one has others encode."""
    stories = ["--data.source", "stories:level=1,size=20000", "--data.workers", "2"]
    said = installed.hub("train", *stories, *TINY, "--out_dir", "out/stories")
    assert "best model: " in said or "nothing was learned" in said
    said = installed.hub("prepare", "quickstart", *stories[:2], "--data.tokenizer", "byte", "--workers", "2")
    assert "1 shards in " in said


def test_its_app_serves(installed):
    make_model(installed.cwd / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["app", "--model", "model", "--port", str(port), "--engine", "torch"]
    with open(installed.cwd / "app.log", "w+", encoding="utf-8") as log:
        app = subprocess.Popen(
            [installed.bin / "nanogpt-hub", *words], cwd=installed.cwd, env=installed.settings, stdout=log, stderr=log
        )
        try:
            while app.poll() is None and not answers(f"http://127.0.0.1:{port}/config"):
                time.sleep(0.2)
            said = (installed.cwd / "app.log").read_text(encoding="utf-8")
            assert app.poll() is None, said
        finally:
            app.kill()
            app.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return b"components" in reply.read()
    except OSError:
        return False


def test_its_space_is_that_of_the_checkout(installed):
    code = """
import hashlib, json
from nanogpt_hub.hub.space import collect_space
from nanogpt_hub.hub.static import page_files
files = {**collect_space(None, "alice/tiny"), **{f"static/{n}": d for n, d in page_files("alice/tiny").items()}}
print(json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in files.items()}))
"""
    page = {f"static/{name}": data for name, data in static.page_files("alice/tiny").items()}
    here = {**collect_space(None, "alice/tiny"), **page}
    there = json.loads(installed.run("python", "-c", code))
    assert there == {name: hashlib.sha256(data).hexdigest() for name, data in here.items()}
    assert {"app.py", "requirements.txt", "README.md", "nanogpt_hub/page/layout.py"} <= there.keys()
    assert not [name for name in there if name.startswith(("nanogpt_hub/train", "nanogpt_hub/web", "nanogpt_hub/app"))]


def test_what_is_typed_wrongly_is_answered(installed):
    said = installed.run("python", "-c", f"{EACH}\neach(['train', 'quickstrat'], ['train', 'my.txt'])")
    assert "did you mean quickstart?" in said
    assert "shakespeare_char" in said
    assert "--data.source my.txt" in said
    assert said.count("status 2") == 2


# ---- an environment that lacks everything ----


def test_help_needs_no_package(bare):
    assert "generate" in bare.hub("--help")
    assert "--temperature" in bare.hub("generate", "--help")


@pytest.mark.parametrize("words", ["generate model", "train quickstart", "app", "sizes"])
def test_what_is_missing_is_a_sentence_with_a_line_to_type(bare, words):
    said = bare.hub(*words.split(), status=2).strip()
    assert "\n" not in said
    line = re.search(r"run `python -m pip install (.*)`$", said)[1]
    assert '"torch>=' in line
    assert ('"accelerate>=' in line) == words.startswith("train")
    assert ('"gradio>=' in line) == (words == "app")


@pytest.mark.parametrize("words", ["app.py", "-m train.pretrain configs/quickstart.yaml", "-m nanogpt_hub generate x"])
def test_a_python_without_the_packages_in_a_checkout(bare, words):
    """As when the environment is not active."""
    done = subprocess.run(
        [bare.python, *words.split()], cwd=ROOT, env=bare.settings, capture_output=True, text=True, timeout=100
    )
    said = done.stderr.strip()
    assert done.returncode in (1, 2)
    assert "\n" not in said
    assert re.search(r"torch.* (pip install|activate the environment first)", said)
