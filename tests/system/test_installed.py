"""What an installation says of itself: extras, what to type, where the code is from; and help that comes at once."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nanogpt_hub
from nanogpt_hub import cli
from nanogpt_hub.exporters.gguf import KINDS
from nanogpt_hub.hub.card import install_lines
from nanogpt_hub.model import PRESETS
from nanogpt_hub.system import installed

ADDRESS = "https://github.com/alice/nanogpt_hub"
# What Colab's machines bring, by their published list of August 2026.
COLAB = {
    "torch": "2.11.0", "numpy": "2.1.3", "safetensors": "0.8.0", "tokenizers": "0.22.2", "tiktoken": "0.14.0",
    "huggingface-hub": "1.27.0", "requests": "2.32.4", "filelock": "3.32.3", "jinja2": "3.1.6", "tqdm": "4.67.3",
    "numba": "0.61.2", "gradio": "6.24.0", "accelerate": "1.14.0", "datasets": "4.0.0", "pyarrow": "18.1.0",
    "matplotlib": "3.10.0",
}  # fmt: skip


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def by_name(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


# ---- extras ----


def test_requirements_are_all_extras_together(project):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    everything = sum(project["optional-dependencies"].values(), project["dependencies"])
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(everything)


def test_what_is_looked_for_is_what_the_extras_bring(project):
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    for extra, lines in extras.items():
        looked_for = {name.replace("_", "-") for name in installed.EXTRAS[extra]}
        assert looked_for == by_name(lines).keys() - {"filelock", "markdown-it-py"}, "they come with others"
    assert installed.missing("") == installed.missing("train") == []


def test_colab_keeps_what_it_has(project):
    for line in sum(project["optional-dependencies"].values(), project["dependencies"]):
        wanted = Requirement(line)
        if has := COLAB.get(canonicalize_name(wanted.name)):
            assert wanted.specifier.contains(has), line


def test_a_missing_extra_is_a_sentence_with_a_line_that_pip_reads(monkeypatch, capsys):
    find = installed.importlib.util.find_spec
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda n: None if n == "accelerate" else find(n))
    assert cli.main(["train", "quickstart"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    line = re.search(r"run `(.*)`$", said.strip())[1]
    assert line.endswith('-m pip install "accelerate>=1.10"')
    assert Requirement(line.split('"')[1])


# ---- what to type ----


def test_the_active_environment_is_called_by_short_names(monkeypatch, tmp_path):
    place = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(place))
    assert installed.python_command() in ("python", "python3")
    assert installed.command() in ("nanogpt-hub", f"{installed.python_command()} -m nanogpt_hub")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert installed.python_command() == installed.joined([sys.executable])
    assert installed.command() == f"{installed.joined([sys.executable])} -m nanogpt_hub"
    assert installed.shown(tmp_path / "a" / "b c") == installed.joined([str(Path("a", "b c"))])


# ---- where the code is from ----


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        (ADDRESS, ADDRESS), (f"{ADDRESS}.git", ADDRESS), ("git@github.com:alice/nanogpt_hub.git", ADDRESS),
        ("ssh://git@github.com/alice/nanogpt_hub", ADDRESS),
        ("https://alice:s3cret@github.com/alice/nanogpt_hub", ADDRESS),
        ("ssh://git@github.com:22/alice/nanogpt_hub.git", ADDRESS),
        ("https://gitlab.com/a/b/c", "https://gitlab.com/a/b/c"),
        ("https://git.corp.example/alice/nanogpt_hub", ""), ("/home/alice/nanogpt_hub", ""), ("", ""),
        ("https://github.com/alice/`x`", ""), ("https://github.com.evil.example/a/b", ""),
    ],
)  # fmt: skip
def test_only_public_hosts_are_named_and_no_secret(remote, address):
    assert installed.public_address(remote) == address


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A clone of a repository at ADDRESS, of which the package is taken to be; git finds that address on this disk."""
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{(tmp_path / 'public').as_uri()}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", ADDRESS)
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "alice")
        monkeypatch.setenv(f"{name}_EMAIL", "alice@example.com")
    (tmp_path / "public").mkdir()
    git(tmp_path / "public", "init", "-q")
    git(tmp_path / "public", "commit", "-q", "--allow-empty", "-m", "one")
    git(tmp_path, "clone", "-q", ADDRESS, "clone")
    (tmp_path / "clone" / "nanogpt_hub").mkdir()
    monkeypatch.setattr(installed, "PACKAGE", tmp_path / "clone" / "nanogpt_hub")
    installed._public_source.cache_clear()
    yield tmp_path / "clone"
    installed._public_source.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def test_a_public_remote_gives_a_line_with_the_commit(checkout):
    sha = git(checkout, "rev-parse", "HEAD")
    assert installed.commit() == sha
    assert installed.public_source() == f"git+{ADDRESS}@{sha}"


def test_a_commit_that_is_not_there_or_a_repository_that_does_not_answer_gives_none(checkout, monkeypatch):
    git(checkout, "commit", "-q", "--allow-empty", "-m", "not pushed")
    assert installed.public_source() == ""
    git(checkout, "reset", "-q", "--hard", "HEAD^")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "url.file:///nowhere/.insteadOf")
    installed._public_source.cache_clear()
    assert installed.public_source() == ""


def test_the_repository_around_an_installed_package_is_not_its_own(checkout, monkeypatch):
    monkeypatch.setattr(installed, "PACKAGE", checkout / "nanogpt_hub" / "site-packages" / "nanogpt_hub")
    installed.PACKAGE.mkdir(parents=True)
    assert installed.commit() == ""
    assert installed.public_source() == ""


def test_pips_record_tells_where_a_wheel_is_from(checkout, monkeypatch):
    sha = git(checkout, "rev-parse", "HEAD")

    class Found:
        def read_text(self, name):
            return json.dumps({"url": f"{ADDRESS}.git", "vcs_info": {"vcs": "git", "commit_id": sha}})

        def locate_file(self, name):
            return installed.PACKAGE

    (installed.PACKAGE / "train").mkdir()
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Found())
    assert installed.commit() == sha
    assert installed.public_source() == f"git+{ADDRESS}@{sha}"


def test_cards_never_install_by_a_bare_name():
    for source in ("", f"git+{ADDRESS}@{'0' * 40}"):
        for facts in ({"model": {"family": "gpt2"}}, {"model": {"family": "nanogpt_hub", "core": "post_norm"}}):
            text = "\n".join(install_lines(facts, source))
            assert not re.search(r"pip install .*nanogpt[-_]hub\b(?!.*@)", text)
            assert ("0" * 40 in text) == bool(source)


def test_nothing_says_to_install_the_bare_name():
    suffixes = (".py", ".md", ".yaml", ".html", ".js", ".ipynb", ".txt", ".toml")
    folders = ("nanogpt_hub", "train", "docs", "configs", "web", "lessons")
    files = [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    bare = re.compile(r"pip install (-\S+ )*[\"'`]?nanogpt[-_]hub(?!(\[[\w,]*\])? @)[^\w-]")
    assert bare.search("pip install nanogpt-hub\n")
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in suffixes}
    assert [path for path, text in texts.items() if bare.search(text)] == []


# ---- help at once ----

COMMANDS = ("generate", "sizes", "core", "eval", "info", "gguf", "push", "space")
LIGHT = [[], ["--help"], *([name, "--help"] for name in COMMANDS)]


def python(code: str) -> subprocess.CompletedProcess:
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=True)


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_help_imports_nothing_slow(words):
    code = (
        "import sys\nfrom nanogpt_hub.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "slow = {'torch', 'numpy', 'huggingface_hub', 'gradio', 'numba', 'tokenizers', 'requests'} & {*sys.modules}\n"
        "print('imported:', sorted(slow))"
    )
    done = python(code)
    assert done.stdout.endswith("imported: []\n")
    assert "usage: nanogpt-hub" in done.stdout + done.stderr


def test_names_that_help_shows_are_those_of_the_library():
    assert cli.PRESETS == tuple(PRESETS)
    assert cli.GGUF_KINDS == KINDS


def test_public_names_are_there_whatever_was_imported_before():
    code = (
        "import nanogpt_hub.lens, types\nimport nanogpt_hub\n"
        "assert isinstance(nanogpt_hub.generate, types.FunctionType)\n"
        "from nanogpt_hub import *\nassert generate is nanogpt_hub.generate\n"
        "from nanogpt_hub.generate import generate as same\nassert same is generate\n"
        "assert all(callable(getattr(nanogpt_hub, name)) for name in nanogpt_hub.__all__)"
    )
    python(code)
    assert set(nanogpt_hub.LATER) == set(nanogpt_hub.__all__)
