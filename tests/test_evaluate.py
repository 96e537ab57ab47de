"""Evaluation: the streamed windows against a plain loop over all tokens, and against the trainer's own."""

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_hub.engine.select import open_engine
from nanogpt_hub.evaluate import evaluate, token_lengths, token_stream, windows
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.sources import open_source
from nanogpt_hub.tokenizer import build_tokenizer
from train.data import EvalWindows
from train.shards import prepare

TEXT = "Fair is foul, and foul is fair: hover through the fog and filthy air – çà et là.\n" * 5


def make_model(vocab_size: int, block_size: int = 16) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2", "1m", n_layer=2, n_embd=32, vocab_size=vocab_size, block_size=block_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # a fresh model guesses evenly, which hides mistakes
    return model


@pytest.fixture
def documents(tmp_path):
    """A source of three documents, one of them short."""
    path = tmp_path / "documents.jsonl"
    rows = [json.dumps({"text": text}) for text in (TEXT, "foul", "fog")]
    path.write_text("\n".join(rows), encoding="utf-8")
    return open_source(str(path))


def plain_losses(model: GPT, ids: list[int]) -> list[float]:
    """The loss of each id but the first, window after window, one prediction at a time."""
    T, losses = model.config.block_size, []
    for target in range(1, len(ids)):
        start = (target - 1) // T * T
        if len(ids) - 1 - start < T:  # the last window is filled up from before
            start = max(0, len(ids) - 1 - T)
        logits, _ = model(torch.tensor([ids[start:target]]))
        losses.append(-logits[0, -1].log_softmax(-1)[ids[target]].item())
    return losses


@pytest.mark.parametrize("spec", ["byte", "char", "bpe:300"])
def test_each_token_but_the_first_counts_once(documents, spec):
    tokenizer = build_tokenizer(spec, documents.texts)
    model = make_model(tokenizer.vocab_size).eval()
    ids = [i for part in token_stream(documents, tokenizer) for i in part]
    result = evaluate(model, tokenizer, documents, quiet=True)
    assert result.tokens == len(ids) - 1
    assert result.loss == pytest.approx(np.mean(plain_losses(model, ids)), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    size = sum(len(text.encode()) for text in documents.documents())
    assert result.bytes == size - len(tokenizer.token_bytes(ids[0]))
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / math.log(2) / result.bytes)


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
@pytest.mark.parametrize("block_size", [7, 16, 100])
def test_it_is_the_trainers_measure(documents, tmp_path, spec, block_size):
    tokenizer = build_tokenizer(spec, documents.texts)
    model = make_model(tokenizer.vocab_size, block_size).eval()
    corpus = prepare(documents, tokenizer, tmp_path / "cache", quiet=True)
    val = EvalWindows(corpus.tokens(), block_size)
    _, loss = model(*val.read())
    result = evaluate(model, tokenizer, documents, quiet=True)
    assert result.loss == pytest.approx(loss.item(), abs=1e-5)
    assert result.bytes / result.tokens == pytest.approx(val.bytes_per_token(token_lengths(tokenizer)))


@pytest.mark.parametrize("spec", ["byte", "char", "bpe:300"])
def test_end_of_text_stands_between_documents(documents, spec):
    tokenizer = build_tokenizer(spec, documents.texts)
    ids = [i for part in token_stream(documents, tokenizer) for i in part]
    assert tokenizer.decode(ids).split(tokenizer.decode([tokenizer.eot_id])) == [*documents.documents()]


@given(parts=st.lists(st.integers(0, 40)), block_size=st.integers(1, 12))
def test_windows_cover_a_stream_whatever_its_pieces(parts, block_size):
    starts = np.cumsum([0, *parts]).tolist()
    stream = [[*range(start, start + size)] for start, size in zip(starts, parts, strict=False)]
    found = list(windows(stream, block_size))
    total = sum(parts)
    assert [i for ids, n in found for i in ids[-n:]] == [*range(1, total)]
    for ids, n in found:
        assert ids == [*range(ids[0], ids[-1] + 1)]
        assert len(ids) == min(block_size + 1, total)
        assert 1 <= n < len(ids)
    assert all(n == block_size for _, n in found[:-1])


def test_the_first_windows_alone(documents):
    tokenizer = build_tokenizer("byte", [])
    model = make_model(tokenizer.vocab_size).eval()
    ids = [i for part in token_stream(documents, tokenizer) for i in part]
    result = evaluate(model, tokenizer, documents, max_windows=3, quiet=True)
    assert result.tokens == 3 * 16
    assert result.loss == pytest.approx(np.mean(plain_losses(model, ids)[:48]), abs=1e-5)


def test_batches_change_nothing(documents, monkeypatch):
    tokenizer = build_tokenizer("byte", [])
    model = make_model(tokenizer.vocab_size)
    model.train()
    whole = evaluate(model, tokenizer, documents, quiet=True)
    assert model.training
    monkeypatch.setattr("nanogpt_hub.evaluate.BATCH_TOKENS", 1)
    alone = evaluate(model, tokenizer, documents, quiet=True)
    assert (alone.tokens, alone.bytes) == (whole.tokens, whole.bytes)
    assert alone.loss == pytest.approx(whole.loss, abs=1e-5)


def test_a_text_of_one_token(tmp_path):
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    tokenizer = build_tokenizer("byte", [])
    with pytest.raises(ValueError, match=r"a\.txt has fewer than two tokens"):
        evaluate(make_model(tokenizer.vocab_size), tokenizer, open_source(str(tmp_path / "a.txt")), quiet=True)


def test_memory_stays_flat(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 20_000, encoding="utf-8")  # 8 MB
    tokenizer = build_tokenizer("byte", [])
    tracemalloc.start()
    try:
        n = sum(len(ids) for ids, _ in windows(token_stream(open_source(str(path)), tokenizer), 64))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n > path.stat().st_size
    assert peak < 40 * 2**20  # the ids alone take eight bytes each


def test_each_engine_measures_the_same(documents, every_engine):
    tokenizer = build_tokenizer("byte", [])
    model = make_model(tokenizer.vocab_size)
    expected = evaluate(model, tokenizer, documents)
    engine = open_engine(every_engine)
    assert engine.name == every_engine
    got = evaluate(model, tokenizer, documents, engine=engine)
    assert (got.tokens, got.bytes) == (expected.tokens, expected.bytes)
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    assert got.engine == every_engine


def test_the_engine_that_is_named_is_the_one_that_computed(documents, every_engine):
    tokenizer = build_tokenizer("byte", [])
    model = GPT(GPTConfig(tokenizer.vocab_size, 16, n_layer=1, n_head=1, n_embd=16, n_expert=2))  # none knows these
    assert evaluate(model, tokenizer, documents, engine=open_engine(every_engine)).engine == "plain"
