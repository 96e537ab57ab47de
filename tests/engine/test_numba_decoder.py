"""The compiled loops give what the readable core gives, for every lineage, any rows and threads, and leave to PyTorch
what is not theirs."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DENSE, make_gpt

from nanogpt_hub.engine.int8 import Int8Linear, quantize_int8
from nanogpt_hub.generate import generate_naive, stream_tokens
from nanogpt_hub.model import KVCache
from nanogpt_hub.sampling import SamplingConfig

tuning = pytest.importorskip(
    "nanogpt_hub.engine.tuning", reason="Numba is not installed: the compiled engine is not tested"
)
pytestmark = pytest.mark.usefixtures("compiled")
ALL = [*DENSE, ("gpt2", {"n_embd": 36}), ("pythia", {"activation": "relu2"})]


@pytest.fixture
def kernels(compiled):
    from nanogpt_hub.engine import kernels

    return kernels


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}threads")
def threads(request, monkeypatch, compiled):
    monkeypatch.setattr(compiled, "PER_THREAD_BYTES", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize(("name", "overrides"), ALL, ids=str)
@torch.inference_mode()
def test_equals_the_core_in_pieces(name, overrides, rows, threads, compiled):
    model = make_gpt(name, **overrides)
    caches = [KVCache(model.config, rows) for _ in range(2)]
    decoder, idx = compiled.NumbaDecoder(model, caches[1]), torch.randint(51, (rows, 48))
    assert decoder.threads == threads
    for piece in idx.split([5, 1, 1, 3, 1, 17, 1, 16, 2, 1], dim=1):
        expected = model.hidden(piece, caches[0])
        equal(decoder.hidden(piece), expected)
        equal(decoder.head(expected[:, -1]), model.head(expected[:, -1]))
        assert caches[0].lengths == caches[1].lengths
    for buffer in ("k", "v"):
        equal(getattr(caches[1], buffer), getattr(caches[0], buffer))


@pytest.mark.parametrize(("name", "overrides"), ALL, ids=str)
@torch.inference_mode()
def test_rows_of_different_length(name, overrides, threads, compiled):
    model, prompt, idx = make_gpt(name, **overrides), torch.randint(51, (7, 9)), torch.randint(51, (7, 4))
    caches = [KVCache(model.config, 7) for _ in range(2)]
    for cache in caches:
        model.hidden(prompt, cache)
        cache.lengths = [4, 9, 1, 2, 9, 8, 7]
    decoder = compiled.NumbaDecoder(model, caches[1])
    for piece in idx.split([1, 2, 1], dim=1):
        equal(decoder.hidden(piece), model.hidden(piece, caches[0]))
    assert caches[1].lengths == caches[0].lengths == [8, 13, 5, 6, 13, 12, 11]


def test_the_pieces_are_as_exact_as_float32(kernels):
    x = torch.linspace(-80, 80, 200_001)
    for kind, function in enumerate((F.gelu, lambda x: F.gelu(x, approximate="tanh"), lambda x: F.relu(x).square())):
        got = x.clone().numpy()
        kernels.activate(got, kind)
        torch.testing.assert_close(torch.from_numpy(got).double(), function(x.double()), atol=6e-7, rtol=3e-7)
    got = torch.tensor([kernels.exp(np.float32(value)) for value in x[::20]])
    torch.testing.assert_close(got.double(), x[::20].double().exp(), atol=0, rtol=3e-7)


@pytest.mark.parametrize("damaged", ["wte.weight", "h.0.attn.c_attn.weight", "h.2.mlp.c_fc.bias", "ln_f.weight"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_numbers_that_are_none_stay_so(damaged, rows, int8, compiled):
    model = make_gpt()
    small = quantize_int8(model) if int8 else None
    if small and damaged != "h.0.attn.c_attn.weight":  # what is not in 8 bits is shared
        model = small
    model.get_parameter(damaged).flatten()[0] = float("nan")
    decoder = compiled.NumbaDecoder(model, KVCache(model.config, rows))
    x = decoder.hidden(torch.zeros(rows, 1, dtype=torch.long))
    assert decoder.head(x[:, 0]).isnan().any()


@torch.inference_mode()
def test_what_many_rows_left_does_not_decay(compiled):
    """Numbers that shrink in an unused lane become denormal, and the passes that read them a hundred times slower."""
    model = make_gpt(block_size=512)
    decoder = compiled.NumbaDecoder(model, KVCache(model.config, 1))
    decoder.hidden(torch.zeros(1, 16, dtype=torch.long))
    for _ in range(200):
        decoder.hidden(torch.zeros(1, 2, dtype=torch.long))
    left = np.abs(np.concatenate([array for array in decoder.arrays.values() if array.dtype == np.float32]))
    assert left.max() < 1e4
    assert not ((left > 0) & (left < np.finfo(np.float32).tiny)).any()


@pytest.mark.parametrize("different", [False, True])
@torch.inference_mode()
def test_more_rows_than_a_pass_takes_are_left_to_pytorch(different, compiled):
    model, rows = make_gpt(), tuning.MAX_ROWS + 3
    caches = [KVCache(model.config, rows) for _ in range(2)]
    decoder, idx = compiled.NumbaDecoder(model, caches[1]), torch.randint(51, (rows, 9))
    for cache in caches:
        model.hidden(idx[:, :7], cache)
        cache.lengths = [7 - different * (row % 3) for row in range(rows)]
    for piece in idx[:, 7:].split(1, dim=1):
        expected = model.hidden(piece, caches[0])
        equal(decoder.hidden(piece), expected)
        equal(decoder.head(expected[:, -1]), model.head(expected[:, -1]))


@torch.inference_mode()
def test_more_tokens_than_fit_are_refused(compiled):
    model = make_gpt()
    decoder = compiled.NumbaDecoder(model, KVCache(model.config, 1))
    decoder.hidden(torch.zeros(1, 48, dtype=torch.long))
    with pytest.raises(ValueError, match="49 tokens do not fit"):
        decoder.hidden(torch.zeros(1, 1, dtype=torch.long))


def test_many_at_the_same_time(threads):
    model, config, texts = make_gpt(), SamplingConfig(30, seed=0), {}

    def write(start: int) -> None:
        texts[start] = [token.id for token in stream_tokens(model, None, [[start]], config, engine="numba")]

    writers = [threading.Thread(target=write, args=(start,)) for start in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert texts == {start: generate_naive(model, [start], config) for start in range(4)}


@pytest.mark.parametrize("what", ["half", "int8", "strided", "adapter"])
def test_what_is_not_theirs(what, compiled):
    model = make_gpt()
    cache = KVCache(model.config, 1)
    assert compiled.supports(model, cache)
    if what == "half":
        model = model.bfloat16()
    elif what == "int8":  # layers that round their inputs differently
        model = quantize_int8(model)
        model.h[1].mlp.c_fc.input_levels -= 1
    elif what == "strided":
        cache.k = cache.k[..., ::2]
    else:
        model.h[1].mlp.c_fc = torch.nn.Sequential(model.h[1].mlp.c_fc)
    assert not compiled.supports(model, cache)


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(("name", "overrides"), ALL, ids=str)
@torch.inference_mode()
def test_in_8_bits_equals_pytorchs_kernel(name, overrides, rows, threads, compiled):
    model = quantize_int8(make_gpt(name, **overrides))
    caches = [KVCache(model.config, rows) for _ in range(2)]
    assert compiled.supports(model, caches[1])
    decoder, idx = compiled.NumbaDecoder(model, caches[1]), torch.randint(51, (rows, 30))
    assert decoder.threads == threads
    for piece in idx.split([5, 1, 1, 3, 1, 17, 1, 1], dim=1):
        expected = model.hidden(piece, caches[0])
        nearly(decoder.hidden(piece), expected)
        nearly(decoder.head(expected[:, -1]), model.head(expected[:, -1]))
        caches[1].k.copy_(caches[0].k)  # so that what was rounded otherwise does not add up
        caches[1].v.copy_(caches[0].v)


def nearly(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for few inputs on the border between two roundings."""
    assert (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("inputs", [1, 3, 64, 100, 3072])
@pytest.mark.parametrize("lanes", [1, tuning.LANES])
@pytest.mark.parametrize("levels", [127, 63])
@torch.inference_mode()
def test_a_layer_in_8_bits_is_exact(inputs, lanes, levels, kernels):
    torch.manual_seed(0)
    layer = Int8Linear(torch.nn.Linear(inputs, 27), levels)
    x = torch.randn(inputs, lanes) * torch.logspace(-3, 3, lanes)
    out = np.ones((27, lanes), np.float32)
    places = [t.data_ptr() for t in (layer.weight, layer.scale, layer.bias)]
    for lo, hi in ((0, 11), (11, 27)):
        kernels.linear(*places, x.numpy(), out, lanes, lo, hi, True, layer.input_levels)
    peak = x.abs().amax(0)
    rounded = (x / peak * levels).round().double()  # by hand: PyTorch's kernel overflows on some CPUs
    weights = layer.weight[:, :inputs].double() - 128
    expected = 1 + layer.bias[:, None] + weights @ rounded * layer.scale[:, None] * (peak / levels)
    off = (torch.from_numpy(out) - expected).abs().amax(0)
    assert off.le(1e-5 * (1 + peak * inputs**0.5)).all()
