"""The model card: complete, without placeholders, valid, and never at the price of what a person wrote."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from nanogpt_hub.checkpoint import save_model
from nanogpt_hub.hub import card as card_module
from nanogpt_hub.hub.card import RunFacts, make_card, write_card
from nanogpt_hub.hub.readme import CardError, Readme, merge_edits, update_readme, validate_readme
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.tokenizer import build_tokenizer

FACTS: RunFacts = {
    "license": "mit",
    "language": "en",
    "data": {
        "source": {
            "kind": "hub",
            "name": "alice/plays",
            "revision": "0123abc",
            "license": "cc0-1.0",
            "bytes": 1_115_394,
        },
        "tokenizer": "char",
        "train_tokens": 1_003_854,
        "val_tokens": 111_540,
        "epochs": 4.25,
    },
    "training": {
        "hyperparameters": {"batch_size": 12, "optim": {"learning_rate": 0.001}, "trackers": []},
        "optimizer": "Muon and AdamW",
        "steps": 2000,
        "tokens": 4_266_000,
        "precision": "bf16",
        "hardware": "a | b GPU",
        "seconds": 1234.5,
        "tokens_per_second": 3456.7,
        "versions": {"torch": "2.13.0"},
        "commit": "deadbeef",
        "seed": 1337,
        "command": "python -m train.pretrain configs/plays.yaml",
    },
    "evaluation": {"step": 1800, "val_loss": 1.4697, "bits_per_byte": 2.1204, "unigram_loss": 3.3431},
    "sample": {"prompt": "O", "text": " thou\n```\n<!-- nanogpt_hub: end -->", "settings": {"temperature": 0.8}},
}
BASE = {"base_model": {"id": "bob/base", "revision": "f00"}, "evaluation": {"val_loss": 2.0, "base_loss": 3.5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tokenizer = build_tokenizer("char", ["O thou\n"])
    config = GPTConfig.preset("nanogpt", "1m", vocab_size=tokenizer.vocab_size, n_layer=2, n_embd=32, block_size=16)
    return save_model(tmp_path_factory.mktemp("plays") / "best", GPT(config), tokenizer)


def test_a_full_card_tells_every_fact(folder):
    card = make_card(folder, FACTS, "alice/tiny", along=["training/loss.png"])
    for fact in (
        "# tiny", "alice/plays", "0123abc", "cc0-1.0", "1.1 MB", "char (", "1,003,854", "111,540", "4.25",
        "gpt_neox", "| layers | 2 |", "16 tokens", "- `batch_size`: 12", "- `optim.learning_rate`: 0.001",
        "Muon and AdamW",
        "2,000", "4,266,000", "bf16", "a \\| b GPU", "21 minutes", "3,457 tokens/s", "torch 2.13.0", "deadbeef", "1337",
        "| this model | 1.4697 | 4.348 | 2.1204 |", "| guessing by frequency | 3.3431 | 28.31 | 4.8232 |",
        "1,800", "O thou", "training/loss.png",
        'from_pretrained("alice/tiny")', "AutoModelForCausalLM", "nanogpt-hub space alice/demo --model alice/tiny",
        "Duplicate this Space", "python -m train.pretrain configs/plays.yaml", "## Limits",
    ):  # fmt: skip
        assert fact in card, fact


def test_a_card_says_what_installs_the_trainer(folder, monkeypatch):
    monkeypatch.setattr(card_module, "public_source", lambda: "git+https://github.com/alice/nanogpt_hub@0123abc")
    facts = {"data": {"source": {"kind": "file", "name": "my.txt"}}, "training": {"command": "nanogpt-hub train a"}}
    card = make_card(folder, facts, "alice/tiny")
    install = 'pip install "nanogpt-hub[train] @ git+https://github.com/alice/nanogpt_hub@0123abc"'
    assert f"{install}\nnanogpt-hub train a\n" in card
    assert "The text, `my.txt`, is not part of this repository" in card


def test_a_card_without_facts_has_no_holes(folder):
    card = make_card(folder, {})
    assert not re.search(r"\b(none|nan|todo|unknown)\b|more information", card, re.IGNORECASE)
    assert not re.search(r"^\| [a-z].*\| *\|$", card, re.MULTILINE)
    assert "## Training" not in card
    assert "## Evaluation" not in card
    assert "loss.png" not in card
    assert "parameters" in card


def test_metadata_is_what_the_hub_reads(folder):
    data = ModelCard(make_card(folder, {**FACTS, **BASE}, "alice/tiny")).data
    assert (data.license, data.language, data.library_name) == ("mit", "en", "transformers")
    assert data.pipeline_tag == "text-generation"
    assert "nanogpt_hub" in data.tags
    assert data.datasets == ["alice/plays"]
    assert (data.base_model, data.base_model_relation) == ("bob/base", "finetune")
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    assert measured == {"loss": 2.0, "perplexity": 7.3891}


def test_a_fine_tune_tells_its_base_and_the_change(folder):
    card = make_card(folder, {**FACTS, **BASE}, "alice/tiny")
    assert "fine-tuned from [bob/base]" in card
    assert "| its base model | 3.5000 | 33.12 |" in card
    assert "changed the loss by -1.5000" in card
    assert "| started from | bob/base, commit f00 |" in card


def test_a_shape_of_our_own_does_not_promise_transformers(tmp_path):
    config = GPTConfig.preset("nanogpt", "1m", vocab_size=7, n_layer=1, n_embd=32, logit_softcap=5.0)
    card = make_card(save_model(tmp_path / "own", GPT(config)), {}, "alice/own")
    assert "AutoModel" not in card
    assert ModelCard(card).data.library_name == "nanogpt_hub"


def test_a_sample_cannot_break_out_of_the_card(folder):
    parts = Readme.parse(make_card(folder, FACTS, "alice/tiny"))
    assert "````text" in parts.block
    assert parts.after == ""
    assert "## Limits" in parts.block


def test_writing_again_keeps_words_and_keys(folder):
    path = write_card(folder, FACTS, "alice/tiny")
    first = path.read_text(encoding="utf-8")
    edited = first.replace("license: mit", "license: mit\nthumbnail: me.png\ninference: false")
    edited = edited.replace("- nanogpt_hub\n", "- nanogpt_hub\n- mine\n")
    edited = edited.replace("\n---\n\n", "\n---\n\nAbove, by me.\n\n", 1) + "\n## My notes\n\nBelow, by me.\n"
    path.write_text(edited, encoding="utf-8", newline="\r\n")  # as an editor on Windows saves it
    again = write_card(folder, {**FACTS, "evaluation": {"val_loss": 1.2}}, "alice/tiny").read_text(encoding="utf-8")
    parts = Readme.parse(again)
    assert (parts.before, parts.after) == ("Above, by me.", "## My notes\n\nBelow, by me.")
    assert (parts.data["thumbnail"], parts.data["inference"]) == ("me.png", False)
    assert "mine" in parts.data["tags"]
    assert "| this model | 1.2000 |" in again
    assert "1.4697" not in again
    path.unlink()


@pytest.mark.parametrize("tags", ["one", {"a": 1}, [{"a": 1}, "one", None, ["x"]], 7])
def test_tags_that_are_none_are_left_out(tags):
    old = str(Readme({"tags": tags}, "words", "", "", ""))
    data = Readme.parse(update_readme(old, {"tags": ["nanogpt_hub"]}, "block")).data
    assert set(data["tags"]) - {"one"} == {"nanogpt_hub"}


def test_what_an_earlier_run_claimed_goes_away(folder):
    path = write_card(folder, {**FACTS, **BASE}, "alice/tiny")
    again = write_card(folder, {}, "alice/tiny").read_text(encoding="utf-8")
    assert "base_model" not in again
    assert "model-index" not in again
    path.unlink()


LOCAL, HUB = "local words", "words on the Hub"


@pytest.mark.parametrize(
    ("local", "hub", "expected", "conflict"),
    [
        ("", "", "", False),
        (LOCAL, "", LOCAL, False),
        ("", HUB, HUB, False),
        (LOCAL, HUB, HUB, True),
        (HUB, HUB, HUB, False),
    ],
)
def test_words_of_the_hub_and_of_the_folder_meet(local, hub, expected, conflict):
    pushed = update_readme("", {"license": "mit"}, "old block")
    ours = update_readme(pushed + local, {"license": "mit"}, "new block")
    for _ in range(3):  # what was pushed is there next time, and changes no more
        theirs = pushed + hub
        merged, both = merge_edits(ours, theirs)
        parts = Readme.parse(merged)
        assert (parts.after, parts.block, both) == (expected, "new block", conflict)
        assert merge_edits(ours, merged) == (merged, conflict)


def test_words_of_a_readme_that_is_not_ours_are_kept():
    merged, _ = merge_edits(update_readme("", {"license": "mit"}, "block"), "---\ntitle: x\n---\n# Hand made")
    parts = Readme.parse(merged)
    assert (parts.block, parts.after) == ("block", "# Hand made")
    assert parts.data == {"license": "mit", "title": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\nlicense: [mit\n---\n", "not valid YAML"),
        ("---\n- a\n---\n", "key: value"),
        ("---\nlanguage: English\n---\n", "ISO 639"),
        ("---\nlicense: My License\n---\n", "such as mit"),
        ("---\nbase_model: a/b/c\n---\n", "not valid"),
        ("---\nmodel-index:\n- name: x\n  results:\n  - task: 1\n---\n", "not valid"),
    ],
)
def test_metadata_that_the_hub_would_refuse(text, message):
    with pytest.raises(CardError, match=message) as caught:
        validate_readme(text)
    assert "\n" not in str(caught.value)
