"""The compiled choice of a token is the one that the samplers make, for any settings, rows and threads."""

import math

import pytest
import torch
from helpers import make_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_hub.model import KVCache
from nanogpt_hub.sampling import Drawn, SamplingConfig, draw, draw_by_stages, usable_logits

BEFORE_ONE = 1 - 2**-24  # the largest random number


@pytest.fixture(autouse=True, params=[1, 3], ids=lambda n: f"{n}threads")
def threads(request, compiled):
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


def random_logits(rows: int, V: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def sampler_for(logits, samplers):
    """As a decoder's `sampler`; the compiled one has to be there."""
    from nanogpt_hub.engine.numba_sampler import SAMPLERS, choose

    assert set(samplers) <= SAMPLERS
    return choose


def fast_draw(logits: torch.Tensor, vocab_size: int, config: SamplingConfig, uniform: torch.Tensor, n: int = 0) -> list:
    return draw(logits, vocab_size, config, [[0]] * len(logits), uniform, n, sampler_for)


def both(logits: torch.Tensor, uniform: torch.Tensor, config: SamplingConfig, vocab_size: int, n: int) -> None:
    """Compares the two ways."""
    n = min(n, vocab_size)
    mine = fast_draw(logits, vocab_size, config, uniform, n)
    exact = usable_logits(logits, vocab_size).double()
    probs = exact[:, :vocab_size].float().softmax(-1)
    distinct = probs.unique().numel() == probs.numel()
    plain = draw_by_stages(exact, config, [[0]] * len(logits), uniform, n)
    for got, (id, logprob, prob, likely) in zip(mine, plain, strict=True):
        assert got.id == id
        close([got.logprob, got.sampled_prob], [logprob, prob])
        close([each.prob for each in got.alternatives], [share for _, share, _ in likely])
        if distinct:  # where tokens tie, their order is open
            close([each.sampled_prob for each in got.alternatives], [drawn for _, _, drawn in likely])
            assert [each.id for each in got.alternatives] == [id for id, _, _ in likely]


def close(got: list[float], expected: list[float]) -> None:
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("V", [1, 7, 65, 300, 5000])
@pytest.mark.parametrize("temperature", [0, 1e-6, 0.01, 0.8, 1, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 2, 20, 200, 4999, 2**63 - 1])
def test_same_choice_for_every_row(V, temperature, top_k):
    config, rows = SamplingConfig(temperature=temperature, top_k=top_k), 33
    uniform = torch.rand(rows, 1, generator=torch.Generator().manual_seed(1))
    for vocab_size in {V, max(1, V - 3)}:
        both(random_logits(rows, V), uniform, config, vocab_size, n=5)
        both(random_logits(1, V, seed=2), uniform[:1], config, vocab_size, n=0)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_same_choice_whatever_the_logits(data):
    V, rows = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 4))
    numbers = st.sampled_from([-math.inf, -1e30, -5.0, 0.0, 1.0, 1.5, 3.0, 20.0, math.inf])
    logits = torch.tensor([[data.draw(numbers) for _ in range(V)] for _ in range(rows)])  # many tie
    config = SamplingConfig(
        temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        top_k=data.draw(st.sampled_from([0, 1, 3, V - 1, V, V + 1])),
        min_p=data.draw(st.sampled_from([0.0, 0.1, 1.0])),
    )
    uniform = torch.tensor([[data.draw(st.sampled_from([0.0, 0.3, 0.7, BEFORE_ONE]))] for _ in range(rows)])
    both(logits, uniform, config, data.draw(st.integers(1, V)), n=data.draw(st.integers(0, 4)))


@pytest.mark.parametrize(
    "config", [SamplingConfig(), SamplingConfig(top_k=3, temperature=1.5), SamplingConfig(min_p=0.2)]
)
def test_tokens_come_as_often_as_they_should(config):
    logits, n = random_logits(1, 12), 20_000
    uniform = torch.rand(n, 1, generator=torch.Generator().manual_seed(3))
    drawn = fast_draw(logits.expand(n, 12), 12, config, uniform)
    expected = fast_draw(logits, 12, config, uniform[:1], 12)[0].alternatives
    for token in expected:
        assert sum(d.id == token.id for d in drawn) / n == pytest.approx(token.sampled_prob, abs=0.012)


@pytest.mark.parametrize("uniform", [0.0, BEFORE_ONE])
def test_what_was_cut_is_never_drawn(uniform):
    logits = torch.tensor([[-math.inf, 5.0, 1.0, 4.0, -math.inf, 0.0]])
    (drawn,) = fast_draw(logits, 6, SamplingConfig(top_k=2), torch.tensor([[uniform]]))
    assert drawn.id == (3 if uniform else 1)


@pytest.mark.parametrize("place", [0, 40, 63])
@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(top_k=5), SamplingConfig(temperature=0)])
def test_nan_is_an_error(place, config):
    logits = random_logits(2, 64)
    logits[1, place] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        fast_draw(logits, 64, config, torch.rand(2, 1))


def test_half_precision_and_rows_that_lie_apart():
    logits = random_logits(65, 8).T.bfloat16()  # (8, 65)
    both(logits, torch.rand(8, 1), SamplingConfig(top_k=9), 65, n=2)


def test_other_samplers_are_not_its_business(compiled):
    model = make_gpt()
    decoder = compiled.NumbaDecoder(model, KVCache(model.config, 1))
    logits = random_logits(1, 9)
    assert decoder.sampler(logits, SamplingConfig().samplers())
    for config in (SamplingConfig(top_p=0.9), SamplingConfig(repetition_penalty=1.2)):
        assert decoder.sampler(logits, config.samplers()) is None
        drawn = draw(logits, 9, config, [[0]], torch.rand(1, 1), sampler_for=decoder.sampler)
        assert isinstance(drawn[0], Drawn)
