"""The trainer's norm and activation: the same numbers and gradients as PyTorch's, in the model and alone."""

import pytest
import torch
import torch.nn.functional as F

from nanogpt_hub.model import GPT, GPTConfig, relu2
from train.elementwise import rms_norm, squared_relu, use_fewer_passes
from train.loss import summed_loss


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])  # below eps, usual, large
def test_rms_norm_is_pytorchs(weighted, scale):
    torch.manual_seed(0)
    x = (scale * torch.randn(3, 5, 2, 24)).transpose(1, 2).requires_grad_()  # as a view of q, k and v together
    weight = torch.randn(24, requires_grad=True) if weighted else None
    dy = torch.randn(3, 2, 5, 24)
    taken = [x] if weight is None else [x, weight]
    ours, theirs = rms_norm(x, (24,), weight, 1e-6), F.rms_norm(x, (24,), weight, 1e-6)
    close(ours, theirs)
    for mine, its in zip(torch.autograd.grad(ours, taken, dy), torch.autograd.grad(theirs, taken, dy), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5 / scale)


def test_rms_norm_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, (8,), None, 1e-6).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_squared_relu_is_pytorchs():
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-20, 0.5, 3.0], requires_grad=True)
    ours, theirs = squared_relu(x), relu2(x)
    assert torch.equal(ours, theirs)
    dy = torch.randn(6)
    close(torch.autograd.grad(ours, x, dy)[0], torch.autograd.grad(theirs, x, dy)[0])


def test_what_does_not_fit_goes_to_pytorch():
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.equal(rms_norm(x, (8,), None, 1e-6), F.rms_norm(x, (8,), None, 1e-6))
    assert torch.autograd.gradcheck(lambda t: squared_relu(t) + rms_norm(t, (8,), None, 1e-6), x)


@pytest.mark.parametrize("preset", ["nanochat", "llama", "gpt2"])
def test_a_models_loss_and_gradients_stay(preset):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig.preset(preset, "1m", vocab_size=65, n_layer=2, n_embd=32, block_size=16, init="gpt2"))
    idx, targets = torch.randint(65, (2, 2, 16))
    plain = summed_loss(gpt, idx, targets)
    plain_grads = torch.autograd.grad(plain, [*gpt.parameters()])
    use_fewer_passes(gpt)
    fast = summed_loss(gpt, idx, targets)
    close(fast, plain)
    for mine, its in zip(torch.autograd.grad(fast, [*gpt.parameters()]), plain_grads, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
