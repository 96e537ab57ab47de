"""Every config in the project parses, says what it is for, and builds its model."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanogpt_hub.families import family_of
from nanogpt_hub.model import GPT
from train import finetune
from train.config import as_settings, make_parser, parse

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")
LADDER = sorted((ROOT / "configs" / "ladder").glob("*.yaml"))


def read(path: Path):
    parser = make_parser("train.pretrain", "")
    if path.stem.startswith("finetune"):
        parser.set_defaults(finetune.DEFAULTS)
    return parse(parser, [str(path)])[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_parses_and_builds_its_model(path):
    config = read(path)
    assert config.out_dir == f"out/{path.stem}"
    if path.stem.startswith("finetune"):
        assert set(config.model.given()) <= finetune.CHANGEABLE
        return
    with torch.device("meta"):
        GPT(config.model.gpt_config(vocab_size=300 if config.data.tokenizer != "gpt2" else 50257))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_opens_with_what_it_is_for(path):
    head = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert head[0].startswith("# ")
    assert any("-m " in line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))


def test_there_is_a_config_for_each_promised_run():
    promised = {
        "quickstart", "shakespeare_char", "shakespeare_char_cpu", "shakespeare_bpe", "gpt2_124m_openwebtext",
        "gpt2_124m_fineweb_edu", "finetune_gpt2_shakespeare",
    }  # fmt: skip
    assert promised <= {path.stem for path in CONFIGS}


def test_each_rung_of_the_ladder_turns_one_thing_up_to_nanochat_and_the_last_has_experts():
    *up_to_muon, experts = LADDER
    settings = [as_settings(read(path)) for path in up_to_muon]
    shapes = [config["model"] for config in settings]
    for lower, upper in itertools.pairwise(shapes[:-1]):
        changed = {k for k in {*lower, *upper} if lower.get(k) != upper.get(k)}
        assert 1 <= len(changed) <= 3  # one idea may be spelled in a few fields
    assert shapes[-1] == shapes[-2]  # this rung changes the optimizer alone
    assert settings[-1]["optim"]["name"] == "muon"
    top = read(up_to_muon[-1]).model.gpt_config(66)
    assert family_of(top)[0] == "nanochat"
    config, below = read(experts), read(up_to_muon[-1])
    mixture = config.model.gpt_config(66)
    assert replace(config, model=below.model, out_dir=below.out_dir) == below
    assert replace(mixture, n_expert=0, n_inner=0) == top
    assert mixture.n_expert_per_tok * mixture.ffn_width == top.ffn_width  # a token goes through as many weights
