"""A run looks through a text of its user's own before it trains, and tells in the card what it found."""

import json
from pathlib import Path

import pytest

from nanogpt_hub.hub.readme import Readme
from train import pretrain

pytestmark = pytest.mark.usefixtures("own_cache")
TEXT = "".join(f"Line {i}: the quick brown fox counts {i * i} lazy dogs.\n\n" for i in range(300))
TINY = (
    "--model.preset nanogpt --model.n_layer 2 --model.n_head 2 --model.n_embd 16 --model.block_size 64 --batch_size 8 "
    "--data.tokenizer byte --max_steps 4 --eval.interval 2 --eval.max_windows 8 --eval.sample_tokens 60 --device cpu"
).split()


def run(folder: Path, text: str, *flags: str) -> Path:
    path = folder / "fox.txt"
    path.write_text(text, encoding="utf-8")
    out = folder / "out"
    assert pretrain.main([*TINY, "--data.source", str(path), "--out_dir", str(out), *flags]) == 0
    return out


def test_what_is_found_is_told_before_training_and_in_the_card_without_the_find(tmp_path, capsys):
    out = run(
        tmp_path, f"{TEXT}Write to jane.roe@mail.net, or to\n\nLine 7: the quick brown fox counts 49 lazy dogs.\n"
    )
    said = capsys.readouterr().out
    assert said.index("1 personal data: e-mail addresses") < said.index("step      0")
    assert "jane.roe" not in said
    card = Readme.parse((out / "best" / "README.md").read_text(encoding="utf-8")).block
    assert "1 exact duplicates" in card
    assert "1 personal data: e-mail addresses" in card
    assert "personal data, which it may repeat" in card
    assert "jan" not in card.partition("## Data")[2].partition("## Model")[0]
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert facts["audit"]["findings"]["personal data: e-mail addresses"] == 1
    assert facts["sample"]["verbatim"] == {"share": 0.0, "longest": 0}
    assert "No 50 bytes of it in a row stand in the training text" in card


def test_a_text_learned_by_heart_shows_in_the_card(tmp_path):
    rhyme = "The fox that counts the dogs that sleep beside the barn is quick and brown and very, very lazy. "
    out = run(tmp_path, rhyme * 200, "--max_steps", "150", "--eval.interval", "150", "--model.n_embd", "64",
              "--eval.prompt", "The fox", "--eval.temperature", "0.1", "--eval.sample_tokens", "160")  # fmt: skip
    verbatim = json.loads((out / "run.json").read_text(encoding="utf-8"))["sample"]["verbatim"]
    assert verbatim["share"] > 0.9
    assert verbatim["longest"] >= 50
    assert "stands word for word in the training text" in (out / "best" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("flags", [["--data.audit", "never"], ["--data.source", "stories:level=1,size=20000"]])
def test_nothing_is_said_where_nothing_was_looked_through(flags, tmp_path, capsys):
    out = run(tmp_path, TEXT, *flags)
    assert "audit:" not in capsys.readouterr().out
    assert "audit" not in json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert "looked through" not in (out / "best" / "README.md").read_text(encoding="utf-8")


def test_always_looks_through_other_sources_too(tmp_path, capsys):
    run(tmp_path, TEXT, "--data.source", "stories:level=4,size=20000", "--data.audit", "always")
    assert "audit: nothing found" in capsys.readouterr().out
