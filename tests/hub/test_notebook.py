"""The notebook beside a pushed model: it runs, tells nothing private, and gives way to one that somebody changed."""

import json
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from helpers import TEXT, make_chat_model, make_model

from nanogpt_hub import cli
from nanogpt_hub.checkpoint import save_model
from nanogpt_hub.hub import model_notebook as made
from nanogpt_hub.hub.background import Pusher
from nanogpt_hub.hub.notebook import NOTEBOOK, is_ours
from nanogpt_hub.hub.publish import push_to_hub
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.tokenizer import build_tokenizer

TOKEN, REPO = "hf_AliceSecretToken0123456789", "alice/fox"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def alice(hub, monkeypatch):
    hub.add_user("alice", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def pushed(hub, folder: Path, **options) -> str:
    push_to_hub(folder, REPO, **options)
    return hub.repo(REPO).files()[NOTEBOOK].decode()


def executed(text: str, folder: Path, without: str = r"!pip install") -> str:
    """Runs the notebook from its first cell to its last; what it prints."""
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    book.cells = [cell for cell in book.cells if not re.match(without, cell.source)]
    nbclient.NotebookClient(
        book, timeout=250, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [out for cell in book.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    return "".join(out.get("text", "") for out in outputs)


@pytest.mark.parametrize("preset", ["nanochat", "gpt2"])
def test_the_notebook_of_a_stock_family_runs_with_transformers_alone(preset, alice, tmp_path):
    tokenizer = build_tokenizer("byte", [TEXT])
    config = GPTConfig.preset(preset, "1m", vocab_size=tokenizer.vocab_size, n_layer=2, n_embd=32, block_size=64)
    folder = save_model(tmp_path / "fox", GPT(config), tokenizer)
    text = pushed(alice, folder)
    assert "nanogpt_hub import" not in text
    said = executed(text, tmp_path)
    assert "parameters, a context of 64 tokens" in said
    assert len(re.findall(r"^ *[\d.]+%  ", said, re.MULTILINE)) == 10
    assert f"[{NOTEBOOK}]({NOTEBOOK})" in alice.repo(REPO).files()["README.md"].decode()


def test_the_notebook_of_a_chat_model_talks(alice, tmp_path):
    text = pushed(alice, make_chat_model(tmp_path / "talks"))
    assert "apply_chat_template" in text
    assert "parameters" in executed(text, tmp_path)


def test_a_shape_of_our_own_needs_this_package_from_a_public_place(alice, tmp_path, monkeypatch):
    folder = make_model(tmp_path / "own", logit_softcap=5.0)
    push_to_hub(folder, REPO)
    assert NOTEBOOK not in alice.repo(REPO).files()
    monkeypatch.setattr(made, "public_source", lambda: "git+https://github.com/you/nanogpt_hub@abc")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = pushed(alice, folder)
    assert 'pip install -q \\"nanogpt-hub @ git+https://github.com/you/nanogpt_hub@abc\\"' in text
    assert "parameters, a context of 32 tokens" in executed(text, tmp_path)


def test_off_by_a_field_and_only_on_main(alice, tmp_path):
    folder = make_model(tmp_path / "fox")
    assert cli.main(["push", str(folder), REPO, "--no-notebook"]) == 0
    pusher = Pusher(REPO, notebook=False)
    pusher.submit(folder)
    pusher.submit(folder, tag="step-000001")
    assert pusher.close(60) == []
    assert NOTEBOOK not in {*alice.repo(REPO).files(), *alice.repo(REPO).files("steps")}
    push_to_hub(folder, REPO, branch="try")
    assert NOTEBOOK not in alice.repo(REPO).files("try")


def test_one_that_somebody_has_changed_stays(alice, tmp_path):
    folder = make_model(tmp_path / "fox")
    first = pushed(alice, folder, about={"title": "one"})
    assert is_ours(first)
    second = pushed(alice, folder, about={"title": "two"})
    assert "# two" in second
    content = json.loads(second)
    content["cells"][0]["source"] = ["Mine."]
    alice.repo(REPO).put({**alice.repo(REPO).files(), NOTEBOOK: json.dumps(content).encode()})
    assert "Mine." in pushed(alice, folder, about={"title": "three"})


def test_nothing_private_is_in_it(alice, tmp_path, monkeypatch):
    home = tmp_path / "houses" / "zoe"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery")
    prompt = f"{home}/notes {TOKEN} correct horse battery"
    text = pushed(alice, make_model(tmp_path / "fox"), facts={"sample": {"prompt": prompt, "text": "x"}})
    assert "notes (removed) (removed)" in text
    assert is_ours(text)
    for private in (TOKEN, "correct horse", str(home), str(tmp_path)):
        assert private not in text
