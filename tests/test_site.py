"""The site of docs, course and reference: it builds, and no link of it is broken."""

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-d", str(folder)]  # not -q, which hides what strict counts
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_start_is_what_readme_begins_with(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    assert "The simplest way to train a GPT" in start
    assert "sdk_version" not in start
    assert (site / "app-tour.gif").is_file()
    assert 'src="app-tour.gif"' in start
    assert 'href="reference/nanogpt_hub.model.html"' in start


def test_every_page_has_its_place(site):
    for path in (ROOT / "docs").glob("*.md"):
        assert (site / path.with_suffix(".html").name).is_file(), path.name
    course = (site / "lessons" / "index.html").read_text(encoding="utf-8")
    for path in ROOT.glob("lessons/*/README.md"):
        assert f'href="{path.parent.name}/index.html"' in course


def test_the_reference_is_made_of_docstrings(site):
    model = (site / "reference" / "nanogpt_hub.model.html").read_text(encoding="utf-8")
    assert "GPTConfig" in model
    assert "rope_theta" in model
    trainer = (site / "reference" / "train.trainer.html").read_text(encoding="utf-8")
    assert 'class="doc doc-heading"' in trainer or "doc-heading" in trainer


def test_nothing_of_it_asks_another_machine(site):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text, page.name
        assert 'rel="stylesheet" href="http' not in text, page.name
