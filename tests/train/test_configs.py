"""Every config in the project parses, says what it is for, and builds its model."""

import itertools
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

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


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.mixed_precision == "no"  # precision is the run's own field
    assert (path.stem == "fsdp2") == (config.distributed_type == "FSDP")
    assert config.distributed_type != "MULTI_CPU"  # of which accelerate launch starts one process


def test_the_slurm_script_is_one_and_gives_on_what_it_is_given(tmp_path):
    script = ROOT / "configs" / "accelerate" / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    for name, text in (("scontrol", "echo node7; echo node8"), ("srun", 'shift; exec "$@"'), ("torchrun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1"}
    env = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script, "a b.yaml", "--x", "1"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "--nnodes 2 --node_rank 1 --nproc_per_node 8 --master_addr node7 --master_port 20041 -m train.pretrain "
        "a b.yaml --x 1\n"
    )


def test_there_is_a_config_for_each_promised_run():
    promised = {
        "quickstart", "shakespeare_char", "shakespeare_char_cpu", "shakespeare_bpe", "gpt2_124m_openwebtext",
        "gpt2_124m_fineweb_edu", "gpt2_1558m_openwebtext", "finetune_gpt2_shakespeare",
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
