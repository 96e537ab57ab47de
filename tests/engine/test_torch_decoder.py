"""The lean step of generation gives what the readable core gives, for every lineage and every way to feed a cache."""

import pytest
import torch
from helpers import DENSE

from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.engine.torch_decoder import TorchDecoder
from nanogpt_hub.model import GPT, GPTConfig, KVCache

SHAPE = dict(n_layer=3, n_head=4, n_embd=32, block_size=32, vocab_size=50)


def make(name: str, **overrides) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(name, **SHAPE, **overrides)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model.eval()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("name", "overrides"), DENSE, ids=str)
@torch.inference_mode()
def test_equals_the_core_in_pieces(name, overrides, rows):
    model = make(name, **overrides)
    caches = [KVCache(model.config, rows, dtype=torch.float64) for _ in range(2)]
    decoder, idx = TorchDecoder(model, caches[1]), torch.randint(50, (rows, 32))
    for piece in idx.split([5, 1, 1, 4, 1, 20], dim=1):
        torch.testing.assert_close(decoder.hidden(piece), model.hidden(piece, caches[0]))
        assert caches[0].lengths == caches[1].lengths
    for buffer in ("k", "v"):
        torch.testing.assert_close(getattr(caches[1], buffer), getattr(caches[0], buffer))


@pytest.mark.parametrize(("name", "overrides"), DENSE, ids=str)
@torch.inference_mode()
def test_rows_of_different_length(name, overrides):
    model, idx = make(name, **overrides), torch.randint(50, (9, 3))
    caches = [KVCache(model.config, 9, dtype=torch.float64) for _ in range(2)]
    for cache in caches:
        model.hidden(torch.randint(50, (9, 9), generator=torch.Generator().manual_seed(1)), cache)
        cache.lengths = [4, 9, 1, 2, 9, 8, 7, 6, 5]
    decoder = TorchDecoder(model, caches[1])
    for piece in idx.split(1, dim=1):
        expected, x = model.hidden(piece, caches[0]), decoder.hidden(piece)
        torch.testing.assert_close(x, expected)
        torch.testing.assert_close(decoder.head(x[:, 0]), model.head(expected[:, 0]))
    assert caches[1].lengths == caches[0].lengths == [7, 12, 4, 5, 12, 11, 10, 9, 8]


@torch.inference_mode()
def test_more_tokens_than_fit_are_refused():
    model = make("gpt2")
    cache = KVCache(model.config, 1, dtype=torch.float64)
    decoder = TorchDecoder(model, cache)
    decoder.hidden(torch.zeros(1, 32, dtype=torch.long))
    with pytest.raises(ValueError, match="33 tokens do not fit"):
        decoder.hidden(torch.zeros(1, 1, dtype=torch.long))


@torch.inference_mode()
def test_other_kinds_of_linear_layers():
    model = quantize_int8(make("gpt2").float())
    caches = [KVCache(model.config, 1) for _ in range(2)]
    decoder, idx = TorchDecoder(model, caches[1]), torch.randint(50, (1, 12))
    for piece in idx.split([8, 1, 3], dim=1):
        # What is rounded to 8 bits differs by a step here and there.
        torch.testing.assert_close(decoder.hidden(piece), model.hidden(piece, caches[0]), atol=0.05, rtol=0.05)
