"""The page is found in a checkout and in an installed wheel."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT

from nanogpt_hub.hub import static

PARTS = ("nanogpt_hub", "web", "pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "README.md", "LICENSE")


def test_a_checkout_has_the_page():
    assert static.web_folder() == ROOT / "web"
    files = static.page_files("alice/tiny", "v1", "http://127.0.0.1:9")
    assert {"index.html", "page.js", "model.js", "kernels/kernels.js", "style.css", "site.json"} <= files.keys()
    assert b"connect-src 'self' http://localhost:9 http://127.0.0.1:9;" not in files["page.js"]
    assert b"connect-src 'self' http://localhost:9 http://127.0.0.1:9; base-uri" in files["index.html"]
    assert b"https://*.hf.co" in static.page_files(endpoint="https://huggingface.co")["index.html"]


def test_a_wheel_has_the_page(tmp_path, monkeypatch):
    pytest.importorskip("setuptools", minversion="77", reason="setuptools builds the wheel")
    source = tmp_path / "source"
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copyfile
        source.mkdir(exist_ok=True)
        copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-q", "-w", str(tmp_path)], check=True, timeout=250)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    package = tmp_path / "installed" / "nanogpt_hub"
    shipped = {path.relative_to(package / "web") for path in (package / "web").rglob("*") if path.is_file()}
    assert shipped == {path.relative_to(ROOT / "web") for path in (ROOT / "web").rglob("*") if path.is_file()}
    monkeypatch.setattr(static.nanogpt_hub, "__file__", str(package / "__init__.py"))
    assert static.web_folder() == package / "web"
