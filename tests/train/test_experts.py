"""Mixtures of experts in training: the balance loss, what the log says of the experts' use, and whole runs."""

import math
from pathlib import Path

import pytest
import torch
from curves import losses
from steps import at_step, fail
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.edits.core import watch_routers
from nanogpt_hub.model import GPT, GPTConfig
from train import finetune, pretrain, trainer
from train.experts import ExpertUse, balance_loss, describe_use, training_loss
from train.hardware import flops_per_token, idle_parameters
from train.lora import without_adapters
from train.loss import recompute_blocks, summed_loss
from train.report import read_metrics

CONFIG = GPTConfig.preset("mixtral", "1m", vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32, n_inner=24)
pytestmark = pytest.mark.usefixtures("own_cache")
TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(400))
TINY = (
    "--model.preset mixtral --model.n_expert 4 --model.n_layer 2 --model.n_head 2 --model.n_embd 16 "
    "--model.n_inner 16 --model.block_size 16 --data.tokenizer char --max_steps 20 --batch_size 8 --log_interval 1 "
    "--eval.interval 10 --eval.max_windows 8 --eval.sample_tokens 8 --save.interval 10 --optim.warmup_steps 2 "
    "--device cpu"
).split()


def run(text: Path, out: Path, *flags: str) -> int:
    return pretrain.main([*TINY, "--data.source", str(text), "--out_dir", str(out), *flags])


def logits(seed: int, N: int = 50, E: int = 6) -> torch.Tensor:
    return 2 * torch.randn(N, E, generator=torch.Generator().manual_seed(seed))


# ---- the loss ----


@pytest.mark.parametrize("k", [1, 2])
def test_of_one_layer_it_is_the_loss_of_transformers(k):
    torch.testing.assert_close(balance_loss([logits(0)], k), load_balancing_loss_func((logits(0),), 6, k))


def test_it_is_k_for_even_use_more_for_uneven_and_the_mean_of_the_layers():
    even = torch.eye(6).repeat(5, 1) * 50
    assert balance_loss([even], 1).item() == pytest.approx(1)
    same = torch.tensor([50.0, 0, 0, 0, 0, 0]).repeat(30, 1)
    assert balance_loss([same], 1).item() == pytest.approx(6)
    assert balance_loss([even, same], 1).item() == pytest.approx(3.5)  # no layer makes up for another


@pytest.mark.parametrize("recompute", [False, True])
def test_the_value_is_cross_entropy_and_the_gradient_has_both(recompute):
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    idx, targets = torch.randint(61, (2, 3, 16))
    targets[0, :10] = -100
    with watch_routers(gpt) as routed:
        plain = summed_loss(gpt, idx, targets)
    whole = plain + CONFIG.router_aux_loss_coef * (3 * 16 - 10) * balance_loss(routed, 2)
    expected = torch.autograd.grad(whole, gpt.h[0].mlp.router.weight)[0]
    if recompute:
        recompute_blocks(gpt)
    loss = training_loss(gpt, idx, targets)
    assert loss.item() == plain.item()
    loss.backward()
    torch.testing.assert_close(gpt.h[0].mlp.router.weight.grad, expected)
    assert not gpt.h[0].mlp.router._forward_hooks


def test_what_a_token_does_not_take_costs_no_operations():
    gpt = GPT(CONFIG)
    used = sum(p.numel() for name, p in gpt.named_parameters() if ".experts." not in name and "wte" not in name)
    used += 2 * 2 * 3 * 32 * 24  # two layers, two experts, three matrices
    assert gpt.num_params(embeddings=False) - idle_parameters(CONFIG) == used
    per_token = flops_per_token(CONFIG, gpt.num_params(embeddings=False))
    assert per_token == 6 * used + 12 * 2 * 32 * 16


# ---- the use ----


def test_use_is_counted_by_layer():
    use = ExpertUse(CONFIG)
    even = torch.eye(8) + torch.eye(8).roll(1, 0)
    first = torch.tensor([9.0, 8, 0, 0, 0, 0, 0, 0]).repeat(8, 1)
    use.add([even, first])
    row = use.row()
    assert row["busiest_expert"] == 0.5  # of the second layer's choices
    assert row["expert_evenness"] == pytest.approx((1 + math.log(2) / math.log(8)) / 2)
    assert "the busiest gets 50% of its layer's choices (even: 12%)" in describe_use(row, CONFIG)
    assert ExpertUse(GPTConfig()).row() == {}
    assert describe_use({}, GPTConfig()) == ""


# ---- runs ----


@pytest.fixture(scope="module")
def mixture(text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mixture") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGPT_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert run(text, out) == 0
    return out


def test_a_run_learns_says_how_its_experts_are_used_and_leaves_a_stock_folder(mixture, text, tmp_path, capsys):
    assert run(text, tmp_path / "run", "--max_steps", "10") == 0
    said = capsys.readouterr().out
    assert "for each token); 2 layers, 2 heads, width 16, 2 of 4 experts, context 16; saved as mixtral" in said
    assert said.count("  experts: evenness ") == 2
    rows = [row for row in read_metrics(mixture / "metrics.jsonl") if "val_loss" in row]
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert all(1 / 4 <= row["busiest_expert"] <= 1 / 2 and 0 < row["expert_evenness"] <= 1 for row in rows)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    model, _ = load_model(mixture / "best")
    assert (model.config.n_expert, model.config.n_expert_per_tok) == (4, 2)
    assert "| experts | 4, of which a token takes 2 |" in (mixture / "best" / "README.md").read_text(encoding="utf-8")


def test_the_balance_loss_evens_the_use_out(text, tmp_path):
    evenness = []
    for coef in ("0", "1"):
        out = tmp_path / coef
        assert run(text, out, "--model.router_aux_loss_coef", coef, "--optim.name", "adamw") == 0
        evenness.append([r for r in read_metrics(out / "metrics.jsonl") if "val_loss" in r][-1]["expert_evenness"])
    assert evenness[0] < evenness[1]


def test_a_stopped_run_goes_on_bit_for_bit(mixture, text, tmp_path, monkeypatch):
    at_step(monkeypatch, 13, fail(trainer.TrainingError("stopped")))
    assert run(text, tmp_path / "run") == 1
    monkeypatch.undo()
    assert run(text, tmp_path / "run") == 0
    ours, theirs = (out / "last" / "model.safetensors" for out in (tmp_path / "run", mixture))
    assert ours.read_bytes() == theirs.read_bytes()


def test_two_processes_share_experts_that_one_of_them_does_not_use(ranks, text, tmp_path):
    flags = [*TINY, "--data.source", str(text), "--model.n_expert", "16", "--model.n_expert_per_tok", "1"]
    flags += ["--batch_size", "2", "--micro_batch_size", "1", "--model.block_size", "8", "--max_steps", "4"]
    flags += ["--model.router_aux_loss_coef", "0", "--optim.name", "adamw"]
    assert pretrain.main([*flags, "--out_dir", str(tmp_path / "one")]) == 0
    done = ranks.run("-m", "train.pretrain", *flags, "--out_dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    used = [[r["expert_evenness"] for r in read_metrics(tmp_path / n / "metrics.jsonl") if "val_loss" in r]
            for n in ("one", "two")]  # fmt: skip
    assert used[0] == pytest.approx(used[1], abs=1e-6)


def test_adapters_reach_the_experts_and_are_merged(mixture, text, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    merged = []

    def keeping(gpt):
        merged.append(gpt)
        return without_adapters(gpt)

    monkeypatch.setattr(trainer, "without_adapters", keeping)
    flags = ["--max_steps", "4", "--batch_size", "4", "--device", "cpu", "--eval.sample_tokens", "0"]
    command = ["--from", str(mixture / "best"), "--data.source", str(text), "--lora.rank", "2", *flags]
    assert finetune.main([*command, "--out_dir", str(tmp_path / "tuned")]) == 0
    tuned, _ = load_model(tmp_path / "tuned" / "last")
    base, _ = load_model(mixture / "best")
    idx = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(tuned(idx)[0], merged[-1].eval()(idx)[0], rtol=1e-4, atol=1e-4)
    differ = {name for name, p in tuned.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert any(".experts." in name for name in differ)
    assert not any("router" in name for name in differ)
