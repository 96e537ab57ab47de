"""Weights in 8 bits: close to float32, the same for a token whatever its batch, never saved."""

import warnings

import pytest
import torch
from torch import nn

from nanogpt_hub.checkpoint import save_model
from nanogpt_hub.engine import int8 as quantize
from nanogpt_hub.engine.int8 import Int8Linear, exact_levels, quantize_int8
from nanogpt_hub.generate import stream_tokens
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.playground.tiny import CONFIG, TEXT, train_tiny
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.speculate import Speculator
from nanogpt_hub.tokenizer import build_tokenizer

FAMILIES = ["nanogpt", "gpt2", "pythia", "llama", "mixtral", "nanochat"]


def no_kernel(*args):
    raise RuntimeError("no kernel for this CPU")


@pytest.fixture(params=["as it is", "without a kernel"], autouse=True)
def machine(request, monkeypatch) -> None:
    """This machine, and one for which PyTorch has no product of 8-bit weights, as on Arm: it refuses when called."""
    if request.param == "without a kernel":
        monkeypatch.setattr(quantize, "int8_product", no_kernel)


def tiny_model(preset: str = "gpt2", **overrides) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, "1m", n_layer=2, n_embd=64, vocab_size=96, block_size=32, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def rounded(x: torch.Tensor, levels: int) -> torch.Tensor:
    """x with each row rounded to `levels` steps of either sign."""
    peak = x.abs().amax(-1, keepdim=True).clamp(min=1e-20)
    return (x / peak * levels).round() / levels * peak


@pytest.mark.parametrize("fewer", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64), (2, 5, 64)])
def test_layer_equals_rounding_by_hand(shape, bias, fewer):
    levels = 63 if fewer else exact_levels()  # more than these overflow on CPUs without VNNI
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    with torch.no_grad():
        linear.weight[0] = 0
        linear.weight[1] *= 1000
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    expected = nn.functional.linear(rounded(x, levels), rounded(linear.weight, 127), linear.bias)
    with torch.inference_mode():
        torch.testing.assert_close(Int8Linear(linear, levels)(x), expected, rtol=1e-4, atol=1e-3)


def test_a_token_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(64, 48), exact_levels()), torch.randn(7, 64)
    x[3] *= 1e4  # an outlier takes nothing from the others
    with torch.inference_mode():
        assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))
        assert layer(torch.zeros(1, 64)).isfinite().all()
        assert layer(torch.full((1, 64), torch.nan)).isnan().all()


@pytest.mark.parametrize("preset", FAMILIES)
def test_families_come_close(preset):
    model = tiny_model(preset)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = quantize_int8(model)
    plain = [name for name, module in small.named_modules() if type(module) is nn.Linear]
    assert plain == (["h.0.mlp.router", "h.1.mlp.router"] if preset == "mixtral" else [])
    idx = torch.randint(96, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits, expected = small(idx)[0], model(idx)[0]
    off = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)  # of each token
    assert 0 < off.median() < 0.05
    if preset != "mixtral":  # in which a token may stand between two experts
        assert (logits - expected).norm() / expected.norm() < 0.05
    assert small.wte.weight is model.wte.weight  # shared, and the old model is as it was
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.lm_head) is nn.Linear


def test_loss_of_a_trained_model_within_one_percent():
    tokenizer = build_tokenizer("char", [TEXT])
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **CONFIG))
    data = torch.tensor(tokenizer.encode(TEXT))
    train_tiny(model, data, 120, lambda step, loss, rate: None)
    windows = data[: len(data) // 48 * 48].view(-1, 48)
    with torch.inference_mode():
        loss, int8_loss = (m(windows[:, :-1], windows[:, 1:])[1].item() for m in (model.eval(), quantize_int8(model)))
    assert loss < 2.5  # it has learned something
    assert int8_loss == pytest.approx(loss, rel=0.01)
    assert int8_loss != loss


def test_batches_and_guesses_change_nothing():
    model, config = quantize_int8(tiny_model()), SamplingConfig(max_new_tokens=40, seed=0, temperature=0.5)
    plain = [token.id for token in stream_tokens(model, None, [[1, 2, 3]], config)]
    batch = [token.id for token in stream_tokens(model, None, [[1, 2, 3], [4]], config) if token.row == 0]
    ahead = [token.id for token in stream_tokens(model, None, [[1, 2, 3]], config, draft=Speculator())]
    assert plain == batch == ahead


def test_int8_is_never_saved(tmp_path):
    with pytest.raises(ValueError, match="save the model that it was made of"):
        save_model(tmp_path / "model", quantize_int8(tiny_model()))
    assert not (tmp_path / "model").exists()


def test_only_float32_on_the_cpu():
    with pytest.raises(ValueError, match="this one is bfloat16 on cpu"):
        quantize_int8(tiny_model().bfloat16())


def test_a_kernel_that_overflows_gets_smaller_inputs(monkeypatch):
    def overflows(x, packed, levels):
        return torch.full((len(x), 16), 2000.0)

    monkeypatch.setattr(quantize, "int8_product", overflows)
    monkeypatch.setattr(quantize, "pack", lambda values, scale: "PyTorch's")
    assert exact_levels() == 63


def test_without_a_kernel_sums_are_exact_integers(monkeypatch):
    """Longer rows than float32 can add up at once: each part is exact, in whatever order it is added."""
    monkeypatch.setattr(quantize, "int8_product", no_kernel)
    torch.manual_seed(0)
    linear = nn.Linear(3000, 8, bias=False)
    layer, x = Int8Linear(linear, exact_levels()), torch.rand(5, 3000)
    assert layer.input_levels == 127
    with torch.inference_mode():
        peak = x.amax(-1, keepdim=True)
        expected = (x / peak * 127).round().long() @ layer.packed.values.long().T  # (5, 8)
        torch.testing.assert_close(layer(x), expected / 127 * layer.scale * peak, rtol=1e-6, atol=1e-6)
        assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


def test_no_warning_where_it_works():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_int8(tiny_model())
