"""Attention over short contexts on a CPU is PyTorch's: outputs, gradients, and whatever it is not made for."""

import pytest
import torch
import torch.nn.functional as F

from nanogpt_hub.model import GPT, GPTConfig
from train import attention
from train.attention import SHORT, attend, use_short_attention


def heads(T: int, H: int = 4, G: int = 4, D: int = 8, B: int = 3) -> list[torch.Tensor]:
    """q, k and v as the model has them: side by side in memory, seen head by head."""
    qkv = torch.randn(B, T, H + 2 * G, D, generator=torch.Generator().manual_seed(T)).requires_grad_()
    return [qkv, *(t.transpose(1, 2) for t in qkv.split((H, G, G), dim=2))]


def output_and_gradient(function, T: int, **shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    qkv, q, k, v = heads(T, **shape)
    y = function(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return y.detach(), torch.autograd.grad(y.square().sum() + y[..., 0].sum(), qkv)[0]


@pytest.fixture
def calls(monkeypatch) -> list[torch.dtype]:
    """What attention.py computes itself, rather than leave it to PyTorch: the dtype of each time."""
    seen, apply = [], attention._CausalAttention.apply

    def noted(q, k, v):
        seen.append(q.dtype)
        return apply(q, k, v)

    monkeypatch.setattr(attention._CausalAttention, "apply", noted)
    return seen


@pytest.mark.parametrize("shape", [{}, {"G": 2}, {"G": 1}, {"H": 1, "G": 1}, {"D": 5, "B": 1}], ids=str)
@pytest.mark.parametrize("T", [2, 3, 17, 64, 128])
def test_outputs_and_gradients_are_pytorchs(T, shape, calls):
    mine = output_and_gradient(attend, T, **shape)
    assert calls == [torch.float32]
    for got, expected in zip(mine, output_and_gradient(F.scaled_dot_product_attention, T, **shape), strict=True):
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [2, 64, 512])
def test_in_bfloat16_they_are_as_near_as_its_digits_allow(T, calls):
    exact = output_and_gradient(F.scaled_dot_product_attention, T)
    with torch.autocast("cpu", torch.bfloat16):
        mine = output_and_gradient(attend, T)
        theirs = output_and_gradient(F.scaled_dot_product_attention, T)
    assert calls == [torch.bfloat16]
    for got, other, expected in zip(mine, theirs, exact, strict=True):
        assert (got - expected).norm() < 0.01 * expected.norm()
        assert (got - expected).norm() < 3 * (other - expected).norm()


def test_a_token_sees_no_later_one():
    qkv, q, k, v = heads(T=9)
    gradient = torch.autograd.grad(attend(q, k, v, is_causal=True)[:, :, 4].sum(), qkv)[0]
    assert gradient[:, :5].abs().sum() > 0
    assert not gradient[:, 5:].any()


def test_the_rest_is_left_to_pytorch(calls):
    _, q, k, v = heads(T=SHORT[torch.float32] + 1)
    assert torch.equal(attend(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    _, q, k, v = heads(T=5)
    mask = torch.rand(5, 5) < 0.8
    mask.fill_diagonal_(True)
    assert torch.equal(attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))
    assert torch.equal(attend(q[:, :, -1:], k, v), F.scaled_dot_product_attention(q[:, :, -1:], k, v))
    assert torch.equal(
        attend(q.double(), k.double(), v.double(), is_causal=True),
        F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True),
    )
    assert calls == []


@pytest.mark.parametrize("name", ["gpt2", "nanogpt", "pythia", "llama", "nanochat"])
def test_a_model_computes_the_same(name, calls):
    torch.manual_seed(0)
    config = GPTConfig.preset(name, "1m", vocab_size=11, n_layer=2, n_kv_head=2, init="gpt2")
    plain, short = GPT(config), GPT(config)
    short.load_state_dict(plain.state_dict())
    use_short_attention(short)
    idx = torch.randint(11, (3, 64))
    losses = [gpt(idx, idx.roll(-1, 1))[1] for gpt in (plain, short)]
    assert len(calls) == 2
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    for p, q in zip(plain.parameters(), short.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6)
    assert plain.state_dict().keys() == short.state_dict().keys()
