"""The optimizer: which parameter goes where, Muon against torch's own, state that survives, and the schedule."""

import math

import pytest
import torch

from nanogpt_hub.model import GPT, GPTConfig
from train.config import OptimConfig
from train.optim import (
    build_optimizer,
    load_optimizer_tensors,
    lr_scale,
    newton_schulz,
    newton_schulz_by_gram,
    optimizer_tensors,
    orthogonalise,
    set_lr,
)


def tiny(**fields) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, **fields))


def one_step(model: GPT, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    idx = torch.randint(11, (16, 8))
    model(idx, idx.roll(-1, 1))[1].backward()
    optimizer.step()
    optimizer.zero_grad()


def test_every_parameter_is_in_exactly_one_group_and_norms_do_not_decay():
    model = tiny()
    groups = build_optimizer(model, OptimConfig(name="muon", weight_decay=0.1)).param_groups
    seen = [p for group in groups for p in group["params"]]
    assert len(seen) == len({id(p) for p in seen}) == len(list(model.parameters()))
    muon = {id(p) for group in groups if group["muon"] for p in group["params"]}
    assert muon == {id(p) for n, p in model.named_parameters() if n.startswith("h.") and p.ndim == 2}
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert undecayed == {id(p) for p in model.parameters() if p.ndim < 2}


def test_orthogonalise_brings_singular_values_near_one_for_every_shape_in_a_stack():
    torch.manual_seed(0)
    for shape in ((3, 8, 32), (3, 32, 8), (1, 16, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert 0.4 < values.min()  # of a square one, a singular value below 0.005
        assert values.max() < 1.16


@pytest.mark.parametrize("half", [False, True])
def test_orthogonalise_holds_a_matrix_that_is_almost_one_direction(half, monkeypatch):
    """In bfloat16, whose roundings can lift the lone singular value above the 1 that the quintics are fitted to."""
    monkeypatch.setattr("train.optim.has_fast_bf16", lambda device: half)
    torch.manual_seed(0)
    for noise in (0, 1e-3, 1e-2):
        lone = torch.randn(64, 16, 1) @ torch.randn(64, 1, 16) + noise * torch.randn(64, 16, 16)
        assert torch.linalg.matrix_norm(orthogonalise(lone), ord=2).max() < 1.16


def test_newton_schulz_in_both_forms():
    """Every singular value from 0.005 of the matrix's size on ends near 1, smaller ones below, none is blown up."""
    torch.manual_seed(0)
    values = torch.cat((torch.zeros(1), torch.logspace(-6, 0, 63)))
    u, v = (torch.linalg.qr(torch.randn(n, n))[0] for n in (64, 96))
    x = (u * values @ v[:64])[None]
    for form, precision in ((newton_schulz, 1e-4), (newton_schulz_by_gram, 1e-2)):
        result = (u.mT @ form(x)[0] @ v[:64].mT).diagonal()  # of the singular values, one by one
        assert (result[values >= 0.005] - 1).abs().max() < 0.15 + precision
        assert result.abs().max() < 1.15 + precision
        assert result[values < 1e-5].abs().max() < 0.05
    assert torch.allclose(newton_schulz(x), newton_schulz_by_gram(x), atol=0.01)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon from 2.9 on")
def test_muon_matches_torchs_muon_on_a_lone_matrix(monkeypatch):
    """With torch's coefficients; it computes in bfloat16, and the directions agree to that precision."""
    monkeypatch.setattr("train.optim.NS_COEFFICIENTS", ((3.4445, -4.7750, 2.0315),) * 5)
    monkeypatch.setattr("train.optim.BF16_MARGIN", 1.0)
    torch.manual_seed(0)
    ours, theirs = (GPT(tiny().config) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine = build_optimizer(ours, OptimConfig(name="muon", muon_learning_rate=0.02, weight_decay=0.1))
    matrices = [p for n, p in theirs.named_parameters() if n.endswith("mlp.c_fc.weight")]
    reference = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    before = ours.h[0].mlp.c_fc.weight.detach().clone()
    for seed in range(3):
        idx = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.data.copy_(p.data)
        for model in (ours, theirs):
            model(idx, idx.roll(-1, 1))[1].backward()
        before = ours.h[0].mlp.c_fc.weight.detach().clone()
        mine.step(), reference.step()
        step, expected = (m.h[0].mlp.c_fc.weight.detach() - before for m in (ours, theirs))
        assert torch.nn.functional.cosine_similarity(step.flatten(), expected.flatten(), dim=0) > 0.98
        assert step.norm() / expected.norm() == pytest.approx(1, abs=0.05)
        mine.zero_grad(), reference.zero_grad()


def test_query_key_and_value_are_orthogonalised_each_for_itself():
    model = tiny(n_kv_head=1)
    optimizer = build_optimizer(model, OptimConfig(name="muon", muon_learning_rate=1.0))
    weight = model.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    for part in (before - weight.detach()).split([16, 8, 8]):
        values = torch.linalg.svdvals(part) / max(1, part.size(0) / part.size(1)) ** 0.5
        assert 0.4 < values.min()  # of a square one, a singular value below 0.005
        assert values.max() < 1.3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_put_into_a_fresh_optimizer_goes_on_bit_for_bit(name):
    model, config = tiny(), OptimConfig(name=name, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    one_step(model, optimizer, 0)
    copy = tiny()
    copy.load_state_dict(model.state_dict())
    resumed = build_optimizer(copy, config)
    load_optimizer_tensors(copy, resumed, optimizer_tensors(model, optimizer).items())
    for seed in (1, 2):
        one_step(model, optimizer, seed), one_step(copy, resumed, seed)
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_of_another_model_is_refused_by_name():
    model = tiny()
    with pytest.raises(ValueError, match=r"h\.9\.x"):
        load_optimizer_tensors(model, build_optimizer(model, OptimConfig()), [("h.9.x/exp_avg", torch.zeros(1))])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_schedule_warms_up_stays_in_bounds_and_ends_low(schedule):
    config = OptimConfig(schedule=schedule, warmup_steps=10, decay_steps=30, final_lr_fraction=0.1)
    scales = [lr_scale(step, 100, config) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9] == 1.0
    assert all(0 < s <= 1 for s in scales)
    assert scales[50] == (
        1.0 if schedule != "cosine" else pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 40 / 90)))
    )
    assert scales[-1] == (1.0 if schedule == "constant" else pytest.approx(0.13, abs=0.03))


def test_an_embedding_that_is_not_the_head_may_have_a_rate_of_its_own():
    config = OptimConfig(name="adamw", learning_rate=0.01, embedding_learning_rate=0.1)
    for tied in (True, False):
        model = tiny(tie_word_embeddings=tied)
        rates = {id(p): group["lr"] for group in build_optimizer(model, config).param_groups for p in group["params"]}
        assert rates.pop(id(model.wte.weight)) == (0.01 if tied else 0.1)
        assert set(rates.values()) == {0.01}


def test_set_lr_scales_every_group_by_its_own_peak():
    optimizer = build_optimizer(tiny(), OptimConfig(name="muon", learning_rate=0.01, muon_learning_rate=0.02))
    set_lr(optimizer, 0.5)
    assert {round(group["lr"], 6) for group in optimizer.param_groups} == {0.005, 0.01}
