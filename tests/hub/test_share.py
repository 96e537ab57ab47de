"""The whole chain over the loopback Hub: train and push, load elsewhere, fine-tune, continue, and a Hub that fails."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from nanogpt_hub import GPT, from_pretrained, generate
from nanogpt_hub.hub.background import Pusher
from nanogpt_hub.hub.resolve import resolve
from nanogpt_hub.hub.space import create_space
from train import finetune, pretrain, trainer
from train.report import read_metrics
from train.trainer import Trainer

TOKEN = "hf_AliceSecretToken0123456789"
REPO = "alice/fox"
TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(400))
TINY = (
    "--model.preset nanogpt --model.n_layer 2 --model.n_head 2 --model.n_embd 16 --model.block_size 16 "
    "--data.tokenizer char --max_steps 20 --batch_size 8 --eval.interval 10 --eval.max_windows 8 "
    "--eval.sample_tokens 8 --save.interval 10 --optim.warmup_steps 2 --device cpu --hub.minutes 0 "
    "--hub.license mit --hub.language en"
).split()


@pytest.fixture
def alice(hub, monkeypatch, tmp_path):
    hub.add_user("alice", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def train(text: Path, out: Path, *flags: str) -> int:
    return pretrain.main([*TINY, "--data.source", str(text), "--out_dir", str(out), *flags])


def weights(out: Path) -> bytes:
    return (out / "last" / "model.safetensors").read_bytes()


def test_train_push_load_finetune_and_a_space(alice, text, tmp_path, capsys, monkeypatch):
    assert train(text, tmp_path / "run", "--hub.repo_id", REPO, "--hub.push_steps", "true") == 0
    repo = alice.repo(REPO)
    files = repo.files()
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "training/metrics.jsonl"} <= set(files)
    assert {"training/config.yaml", "training/run.json", "training/samples/step-000010.txt"} <= set(files)
    assert {"step-000000", "step-000010", "step-000020"} <= set(repo.tags)
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.to_dict()["model-index"]
    best = min(
        (r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in r), key=lambda r: r["val_loss"]
    )
    assert f"{best['val_loss']:.4f}" in card.text  # main holds the best

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    model, tokenizer = from_pretrained(REPO)
    mine, _ = from_pretrained(str(tmp_path / "run" / "best"))
    idx = torch.arange(8)[None]
    assert torch.equal(model(idx)[0], mine(idx)[0])
    said = generate(model, tokenizer, "the ", seed=1, max_new_tokens=20).text
    assert said == generate(mine, tokenizer, "the ", seed=1, max_new_tokens=20).text
    check_in_transformers(resolve(REPO).folder, idx, model(idx)[0])

    early, _ = from_pretrained(f"{REPO}@step-000000")
    assert not torch.equal(early(idx)[0], model(idx)[0])

    flags = "--max_steps 4 --batch_size 8 --eval.interval 2 --eval.max_windows 8 --device cpu".split()
    flags += [
        "--from",
        REPO,
        "--data.source",
        str(text),
        "--out_dir",
        str(tmp_path / "tuned"),
        "--hub.repo_id",
        "alice/tuned",
    ]
    assert finetune.main(flags) == 0
    tuned = ModelCard(alice.repo("alice/tuned").files()["README.md"].decode())
    assert tuned.data.base_model == REPO
    assert tuned.data.to_dict()["base_model_relation"] == "finetune"

    space = create_space("alice/demo", REPO)
    assert "alice/demo" in space.url
    assert REPO in alice.repo("alice/demo", "spaces").files()["README.md"].decode()
    out, err = capsys.readouterr()
    assert TOKEN not in out + err + everything_below(tmp_path) + "".join(map(str, alice.repo(REPO).files().values()))


def test_a_run_brings_a_page_in_which_a_browser_runs_its_model(alice, text, tmp_path, capsys):
    out, flags = tmp_path / "run", ("--hub.repo_id", REPO, "--hub.page", "true", "--max_steps")
    for steps in ("10", "20"):  # the second goes on, and finds its page there
        assert train(text, out, *flags, steps) == 0
        assert f"{alice.url}/spaces/{REPO}" in capsys.readouterr().out
        space = alice.repo(REPO, "spaces")
        assert space.settings["sdk"] == "static"
        assert json.loads(space.files()["site.json"])["model"] == REPO
        assert {"index.html", "model.js", "page.js", "README.md"} <= space.files().keys()
        card = alice.repo(REPO).files()["README.md"].decode()
        assert f"**[Try it in your browser](https://huggingface.co/spaces/{REPO})**" in card


def check_in_transformers(folder: Path, idx: torch.Tensor, logits: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(idx).logits
    assert (theirs - logits).abs().max() <= 1e-4 * logits.abs().max()


def everything_below(folder: Path) -> str:
    return "".join(p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file())


def test_a_run_goes_on_from_the_hub_on_another_machine_bit_for_bit(alice, text, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    assert train(text, whole, "--model.dropout", "0.1") == 0
    flags = ("--model.dropout", "0.1", "--hub.repo_id", REPO, "--hub.push_state", "true")
    step = Trainer._train_step

    def interrupted(self):
        if self.progress.step == 12:
            os.kill(os.getpid(), 15)
        return step(self)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    assert train(text, tmp_path / "here", *flags) == 0
    monkeypatch.setattr(Trainer, "_train_step", step)
    there = tmp_path / "there"
    resume = ["--resume", REPO, "--data.source", str(text), "--out_dir", str(there)]
    assert pretrain.main([*resume, "--device", "cpu", "--eval.sample_tokens", "8"]) == 0
    assert weights(there) == weights(whole)


def test_preflight_stops_before_any_work(alice, text, tmp_path, capsys):
    assert train(text, tmp_path / "run", "--hub.repo_id", "bob/fox") == 2
    err = capsys.readouterr().err
    assert "alice" in err
    assert "bob" in err
    assert not (tmp_path / "run").exists()


FAULTS = {
    "500s": dict(method="POST", path="commit", status=500, times=3),
    "429": dict(method="POST", path="commit", status=429, times=2, headers={"Retry-After": "0"}),
    "dropped uploads": dict(method="PUT", path="lfs", drop=True, times=3),
    "lost answer, applied": dict(method="POST", path="commit", drop=True, applied=True, times=1),
    "lost answer, not applied": dict(method="POST", path="commit", drop=True, times=2),
    "hangs": dict(method="POST", path="commit", hang=1.5, times=2, applied=True),
    "rights lost": dict(method="POST", path="commit", status=403, times=1000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_hub_changes_nothing_about_the_training(alice, text, tmp_path, capsys, fault, monkeypatch):
    assert train(text, tmp_path / "alone") == 0
    quick = Pusher.__init__
    monkeypatch.setattr(
        Pusher, "__init__", lambda self, *a, **kw: quick(self, *a, **kw, backoff=0.01, longest_pause=0.1)
    )
    alice.fail(**FAULTS[fault])
    missing = 3 if fault == "rights lost" else 0  # the exit status where something is not on the Hub
    assert train(text, tmp_path / "run", "--hub.repo_id", REPO) == missing
    assert weights(tmp_path / "run") == weights(tmp_path / "alone")
    said = capsys.readouterr().out
    repo = alice.repo(REPO)
    if fault == "rights lost":
        assert f"nanogpt-hub push {tmp_path / 'run' / 'best'} {REPO}" in said
    else:
        assert repo.files()["model.safetensors"] == (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
        trees = [{name: file.blob_id for name, file in commit.tree.items()} for commit in repo.log()]
        assert all(one != next_one for one, next_one in itertools.pairwise(trees))  # nothing was committed twice


def test_a_folder_that_is_not_the_live_model_is_not_pushed(alice, text, tmp_path, capsys, monkeypatch):
    real = trainer.save_model

    def damaged(folder, model, tokenizer):
        real(folder, model, tokenizer)
        if Path(folder).name == "best":
            real(folder, GPT(model.config), tokenizer)

    monkeypatch.setattr(trainer, "save_model", damaged)
    assert train(text, tmp_path / "run", "--hub.repo_id", REPO) == 3
    assert "not pushed" in capsys.readouterr().out
    assert "model.safetensors" not in alice.repo(REPO).files()


def test_the_token_is_not_in_the_process_list_or_the_output_of_a_run(alice, text, tmp_path):
    command = [sys.executable, "-m", "train.pretrain", *TINY, "--data.source", str(text), "--hub.repo_id", REPO]
    env = {**os.environ, "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out_dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=200, env=env, check=True
    )
    assert TOKEN not in done.stdout + done.stderr + everything_below(tmp_path)


def test_a_tokenizer_may_come_from_the_hub(alice, text, tmp_path):
    assert train(text, tmp_path / "first", "--hub.repo_id", REPO) == 0
    assert train(text, tmp_path / "second", "--data.tokenizer", REPO) == 0
    assert weights(tmp_path / "second") == weights(tmp_path / "first")
