"""The compiled loops give what the readable core gives, for every lineage, any rows and threads, and leave to PyTorch
what is not theirs."""

import builtins
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import VARIANTS

from nanogpt_hub.engine import numba_decoder as loops
from nanogpt_hub.engine import select as compiler
from nanogpt_hub.engine.int8 import Int8Linear, quantize_int8
from nanogpt_hub.engine.select import best_decoder
from nanogpt_hub.engine.torch_decoder import Decoder
from nanogpt_hub.generate import generate_naive, stream_tokens
from nanogpt_hub.model import GPT, GPTConfig, KVCache
from nanogpt_hub.sampling import SamplingConfig

SHAPE = dict(n_layer=3, n_head=4, n_embd=96, n_inner=75, block_size=48, vocab_size=51)
ALL = [*VARIANTS, ("gpt2", {"n_embd": 36}), ("pythia", {"activation": "relu2"})]


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n}threads")
def threads(request, monkeypatch):
    monkeypatch.setattr(loops, "PER_THREAD", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def make(name: str = "nanogpt", **overrides) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(name, **{**SHAPE, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("most", [loops.LANES, 6 * loops.LANES])
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize(("name", "overrides"), ALL, ids=str)
@torch.inference_mode()
def test_equals_the_core_in_pieces(name, overrides, rows, most, threads, monkeypatch):
    monkeypatch.setattr(loops, "MOST", most)
    model = make(name, **overrides)
    caches = [KVCache(model.config, rows) for _ in range(2)]
    decoder, idx = loops.Loops(model, caches[1]), torch.randint(51, (rows, 48))
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
def test_rows_of_different_length(name, overrides, threads):
    model, prompt, idx = make(name, **overrides), torch.randint(51, (7, 9)), torch.randint(51, (7, 4))
    caches = [KVCache(model.config, 7) for _ in range(2)]
    for cache in caches:
        model.hidden(prompt, cache)
        cache.lengths = [4, 9, 1, 2, 9, 8, 7]
    decoder = loops.Loops(model, caches[1])
    for piece in idx.split([1, 2, 1], dim=1):
        equal(decoder.hidden(piece), model.hidden(piece, caches[0]))
    assert caches[1].lengths == caches[0].lengths == [8, 13, 5, 6, 13, 12, 11]


def test_the_pieces_are_as_exact_as_float32():
    x = torch.linspace(-80, 80, 200_001)
    for kind, function in enumerate((F.gelu, lambda x: F.gelu(x, approximate="tanh"), lambda x: F.relu(x).square())):
        got = x.clone().numpy()
        loops.activate(got, kind)
        torch.testing.assert_close(torch.from_numpy(got).double(), function(x.double()), atol=6e-7, rtol=3e-7)
    got = torch.tensor([loops.exp(np.float32(value)) for value in x[::20]])
    torch.testing.assert_close(got.double(), x[::20].double().exp(), atol=0, rtol=3e-7)


@pytest.mark.parametrize("damaged", ["wte.weight", "h.0.attn.c_attn.weight", "h.2.mlp.c_fc.bias", "ln_f.weight"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_numbers_that_are_none_stay_so(damaged, rows, int8):
    model = make()
    small = quantize_int8(model) if int8 and loops.HAS_BYTES else None
    if small and damaged != "h.0.attn.c_attn.weight":  # what is not in 8 bits is shared
        model = small
    model.get_parameter(damaged).flatten()[0] = float("nan")
    decoder = loops.Loops(model, KVCache(model.config, rows))
    x = decoder.hidden(torch.zeros(rows, 1, dtype=torch.long))
    assert decoder.head(x[:, 0]).isnan().any()


@torch.inference_mode()
def test_what_many_rows_left_does_not_decay():
    """Numbers that shrink in an unused lane become denormal, and the passes that read them a hundred times slower."""
    model = make(block_size=512)
    decoder = loops.Loops(model, KVCache(model.config, 1))
    decoder.hidden(torch.zeros(1, 16, dtype=torch.long))
    for _ in range(200):
        decoder.hidden(torch.zeros(1, 2, dtype=torch.long))
    left = np.abs(np.concatenate([array for array in decoder.arrays.values() if array.dtype == np.float32]))
    assert left.max() < 1e4
    assert not ((left > 0) & (left < np.finfo(np.float32).tiny)).any()


@pytest.mark.parametrize("different", [False, True])
@torch.inference_mode()
def test_more_rows_than_a_pass_takes_are_left_to_pytorch(different):
    model, rows = make(), loops.MOST + 3
    caches = [KVCache(model.config, rows) for _ in range(2)]
    decoder, idx = loops.Loops(model, caches[1]), torch.randint(51, (rows, 9))
    for cache in caches:
        model.hidden(idx[:, :7], cache)
        cache.lengths = [7 - different * (row % 3) for row in range(rows)]
    for piece in idx[:, 7:].split(1, dim=1):
        expected = model.hidden(piece, caches[0])
        equal(decoder.hidden(piece), expected)
        equal(decoder.head(expected[:, -1]), model.head(expected[:, -1]))


@torch.inference_mode()
def test_more_tokens_than_fit_are_refused():
    model = make()
    decoder = loops.Loops(model, KVCache(model.config, 1))
    decoder.hidden(torch.zeros(1, 48, dtype=torch.long))
    with pytest.raises(ValueError, match="49 tokens do not fit"):
        decoder.hidden(torch.zeros(1, 1, dtype=torch.long))


def test_many_at_the_same_time(threads):
    model, config, texts = make(), SamplingConfig(30, seed=0), {}
    compiler.compiler.start().join()

    def write(start: int) -> None:
        texts[start] = [token.id for token in stream_tokens(model, None, [[start]], config)]

    writers = [threading.Thread(target=write, args=(start,)) for start in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert texts == {start: generate_naive(model, [start], config) for start in range(4)}


@pytest.mark.parametrize("what", ["half", "int8", "strided", "adapter"])
def test_what_is_not_theirs(what):
    model = make()
    cache = KVCache(model.config, 1)
    assert loops.suit(model, cache)
    if what == "half":
        model = model.bfloat16()
    elif what == "int8":  # of a CPU that rounds inputs to fewer levels
        model = quantize_int8(model)
        model.h[1].mlp.c_fc.input_levels = 63
    elif what == "strided":
        cache.k = cache.k[..., ::2]
    else:
        model.h[1].mlp.c_fc = torch.nn.Sequential(model.h[1].mlp.c_fc)
    assert not loops.suit(model, cache)


@pytest.mark.skipif(not loops.HAS_BYTES, reason="this CPU does not multiply bytes (AVX512-VNNI)")
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(("name", "overrides"), ALL, ids=str)
@torch.inference_mode()
def test_in_8_bits_equals_pytorchs_kernel(name, overrides, rows, threads):
    model = quantize_int8(make(name, **overrides))
    caches = [KVCache(model.config, rows) for _ in range(2)]
    assert loops.suit(model, caches[1])
    decoder, idx = loops.Loops(model, caches[1]), torch.randint(51, (rows, 30))
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


@pytest.mark.skipif(not loops.HAS_BYTES, reason="this CPU does not multiply bytes (AVX512-VNNI)")
@pytest.mark.parametrize("inputs", [1, 3, 64, 100, 3072])
@pytest.mark.parametrize("lanes", [1, loops.LANES])
@torch.inference_mode()
def test_a_layer_in_8_bits_is_exact(inputs, lanes):
    torch.manual_seed(0)
    layer = Int8Linear(torch.nn.Linear(inputs, 27))
    x = torch.randn(inputs, lanes) * torch.logspace(-3, 3, lanes)
    out = np.ones((27, lanes), np.float32)
    places = [t.data_ptr() for t in (layer.weight, layer.scale, layer.bias)]
    for lo, hi in ((0, 11), (11, 27)):
        loops.linear(*places, x.numpy(), out, lanes, lo, hi, True)
    expected = 1 + layer(x.T).T
    steps = x.abs().amax(0) / 127  # what a single input that is rounded otherwise changes, at most
    assert (torch.from_numpy(out) - expected).abs().amax(0).le(1e-5 * (1 + steps * 127 * inputs**0.5)).all()


# ---- how they come to be used ----


@pytest.fixture
def fresh(monkeypatch) -> compiler.Compiler:
    monkeypatch.setattr(compiler, "compiler", compiler.Compiler())
    monkeypatch.setattr(Decoder, "seconds", 0.0)
    return compiler.compiler


def test_a_process_that_writes_much_compiles_them(fresh, monkeypatch):
    monkeypatch.setattr(compiler, "PATIENCE", 0.0)
    model = make()
    ids = [token.id for token in stream_tokens(model, None, [[1]], max_new_tokens=5, seed=0)]
    assert fresh.thread is None
    assert Decoder.seconds > 0
    assert ids == [token.id for token in stream_tokens(model, None, [[1]], max_new_tokens=5, seed=0)]
    fresh.thread.join()
    assert type(best_decoder(model, KVCache(model.config, 1))) is loops.Loops
    assert type(best_decoder(model.double(), KVCache(model.config, 1))) is Decoder


def test_without_numba_all_goes_on(fresh, monkeypatch, recwarn):
    real = builtins.__import__

    def no_loops(name, *args, **kwargs):
        if name == "nanogpt_hub" and "loops" in (args[2] or ()):
            raise ImportError("No module named 'numba'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_loops)
    fresh.start().join()
    model = make()
    assert type(best_decoder(model, KVCache(model.config, 1))) is Decoder
    assert not recwarn.list


def test_a_compiler_that_fails_is_told_of(fresh, monkeypatch):
    def fail():
        raise RuntimeError("cannot cache function: no locator")

    monkeypatch.setattr(loops, "team", fail)
    with pytest.warns(RuntimeWarning, match="without compiled loops: cannot cache"):
        fresh.start().join()
    model = make()
    assert type(best_decoder(model, KVCache(model.config, 1))) is Decoder
