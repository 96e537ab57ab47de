"""Token shards and batches: exact text, one split, every token in every epoch, whoever reads which rows."""

import hashlib
import json
import math
import multiprocessing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt_hub.evaluate import token_lengths
from nanogpt_hub.model import IGNORE_INDEX
from nanogpt_hub.sources import open_source
from nanogpt_hub.tokenizer import Tokenizer, UnknownCharacterError, build_tokenizer
from train import shards
from train.data import Batches, EvalWindows, summary, unigram_loss
from train.shards import Corpus, TokenRange, prepare

TEXT = "one\r\n\n two é 日本語 🙂\t.\n" * 40


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    return open_source(str(path))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two\n", "é")), encoding="utf-8")
    return open_source(str(path))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("char", [TEXT])


class WideTokenizer:
    """Bytes, moved up by 70,000."""

    kind, vocab_size, eot_id, hash = "custom", 70_256, 5, "w" * 64

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[70_000 + byte for byte in text.encode()] for text in texts]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - 70_000]) if token_id >= 70_000 else b""


def stream(n: int, shard: int = 0) -> TokenRange:
    """The tokens 0..n-1, in shards of `shard` tokens."""
    ids = np.arange(n, dtype=np.uint16)
    return TokenRange(np.split(ids, range(shard, n, shard)) if shard else [ids], 0, n)


# ---- the corpus on disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:300"])
def test_tokens_decode_to_the_exact_file(source, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("nanogpt_hub.sources.PIECE_CHARS", 50)
    monkeypatch.setattr(shards, "BATCH_CHARS", 120)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 97)
    tokenizer = build_tokenizer(kind, [TEXT])
    corpus = prepare(source, tokenizer, tmp_path / "cache", quiet=True)
    ids = corpus.tokens().read(0, len(corpus)).tolist()
    assert tokenizer.decode(ids) == TEXT
    facts = corpus.manifest
    assert (facts["characters"], facts["bytes"], facts["documents"]) == (len(TEXT), len(TEXT.encode()), 1)
    assert facts["tokens"] == len(ids) == len(corpus)
    assert facts["max_id"] == max(ids)
    sizes = np.diff([0, *corpus.shards.ends]).tolist()
    assert sizes[:-1] == [shards.shard_tokens(index) for index in range(len(sizes) - 1)]
    assert facts["shards"] == len(sizes)
    assert facts["source"] == source.describe()


def test_end_of_text_stands_between_documents_alone(rows, tmp_path):
    tokenizer = build_tokenizer("char", list(rows.documents()))
    corpus = prepare(rows, tokenizer, tmp_path / "cache", quiet=True)
    eot = [tokenizer.eot_id]
    one, two, three = map(tokenizer.encode, rows.documents())
    assert corpus.tokens().read(0, len(corpus)).tolist() == one + eot + two + eot + three
    assert EvalWindows(corpus.tokens(), 9).bytes_per_token(token_lengths(tokenizer)) == (2 + 4 + 2) / 9  # no o
    tokenizer.eot_id = None  # nothing to put between them
    corpus = prepare(rows, tokenizer, tmp_path / "other", quiet=True)
    assert corpus.tokens().read(0, len(corpus)).tolist() == one + two + three


def test_another_end_of_text_is_another_corpus(rows, tmp_path):
    plain = build_tokenizer("byte", [])
    other = Tokenizer(plain._json, {**plain.config, "eos_token": "~"})  # as tokenizer_config.json may say it
    assert other.hash == plain.hash
    for tokenizer in (plain, other):
        corpus = prepare(rows, tokenizer, tmp_path / "cache", quiet=True)
        assert tokenizer.eot_id in corpus.tokens().read(0, len(corpus))
    key = hashlib.sha256(f"{shards.FORMAT} {rows.fingerprint} {plain.hash}".encode()).hexdigest()[:16]
    assert shards.corpus_folder(rows, plain, tmp_path).name == key  # what was prepared before stays valid


def test_the_dtype_follows_the_vocabulary(source, tokenizer, tmp_path):
    narrow = prepare(source, tokenizer, tmp_path, quiet=True)
    wide = prepare(source, WideTokenizer(), tmp_path, quiet=True)
    assert (narrow.manifest["dtype"], wide.manifest["dtype"]) == ("uint16", "uint32")
    assert bytes((wide.tokens().read(0, len(wide)) - 70_000).tolist()) == TEXT.encode()


def test_an_id_beyond_the_models_vocabulary_is_told(source, tokenizer, tmp_path):
    corpus = prepare(source, tokenizer, tmp_path, quiet=True)
    highest = corpus.manifest["max_id"]
    corpus.check_vocab(highest + 1)
    with pytest.raises(ValueError, match=f"up to id {highest}, but the model's vocab_size is {highest};"):
        corpus.check_vocab(highest)


def test_prepared_once_and_read_from_then_on(source, tokenizer, tmp_path, monkeypatch):
    first = prepare(source, tokenizer, tmp_path, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_corpus", lambda *args: pytest.fail("the cache was not used"))
        assert prepare(source, tokenizer, tmp_path, quiet=True).folder == first.folder
    others = {first.folder, prepare(source, build_tokenizer("byte", []), tmp_path, quiet=True).folder}
    Path(tmp_path / "a.txt").write_bytes(TEXT.encode() * 2)
    others.add(prepare(open_source(str(tmp_path / "a.txt")), tokenizer, tmp_path, quiet=True).folder)
    assert len(others) == 3  # another tokenizer and another text are entries of their own


def test_what_a_killed_run_left_is_gone_on_from(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 97)
    whole = prepare(source, tokenizer, tmp_path, quiet=True)
    before = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    lines = (whole.folder / "shards.jsonl").read_bytes().splitlines(keepends=True)
    (whole.folder / "manifest.json").unlink()
    (whole.folder / "shards.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:-9])  # killed while it wrote a line
    (whole.folder / "tokens-00004.bin").write_bytes(b"half")
    (whole.folder / "tokens-00002.bin").touch()
    written = []
    monkeypatch.setattr(shards._ShardWriter, "finish", _noting(written))
    corpus = prepare(source, tokenizer, tmp_path, quiet=True)
    assert written[0] == 3  # the first three are not written again
    assert {path.name: path.read_bytes() for path in corpus.folder.iterdir()} == before


def _noting(written: list[int]):
    finish = shards._ShardWriter.finish

    def noted(writer, end) -> None:
        written.append(len(writer.lines))
        finish(writer, end)

    return noted


def test_a_failure_leaves_what_was_ready(source, tmp_path):
    with pytest.raises(UnknownCharacterError):
        prepare(source, build_tokenizer("char", ["abc"]), tmp_path / "cache", quiet=True)
    corpus = next(path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert [path.name for path in corpus.iterdir()] == ["corpus.json"]


def _prepare_elsewhere(path: str, cache: str, queue) -> None:
    corpus = prepare(open_source(path), build_tokenizer("byte", []), cache, quiet=True)
    queue.put((len(corpus), corpus.folder.stat().st_ino))


def test_processes_that_prepare_at_once_share_one_result(source, tmp_path):
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    queue = context.Queue()
    arguments = (str(tmp_path / "a.txt"), str(tmp_path / "cache"), queue)
    workers = [context.Process(target=_prepare_elsewhere, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(results) == 1
    assert results.pop()[0] == len(TEXT.encode())


def test_another_tokenizer_is_refused_by_both_hashes(source, tokenizer, tmp_path):
    folder = prepare(source, tokenizer, tmp_path, quiet=True).folder
    other = build_tokenizer("byte", [])
    with pytest.raises(ValueError, match=f"char tokenizer with hash {tokenizer.hash}.* byte tokenizer .*{other.hash}"):
        Corpus(folder, other)


def test_a_damaged_shard_is_told(source, tokenizer, tmp_path):
    folder = prepare(source, tokenizer, tmp_path, quiet=True).folder
    shard = folder / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"delete the folder .* to tokenise anew"):
        prepare(source, tokenizer, tmp_path, quiet=True)


# ---- ranges and the split --------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 70), st.data())
def test_a_range_reads_across_shard_borders(n, shard, draw):
    start = draw.draw(st.integers(0, n - 1))
    stop = draw.draw(st.integers(start + 1, n))
    tokens = TokenRange(stream(n, shard).shards, start, stop)
    first = draw.draw(st.integers(0, len(tokens) - 1))
    length = draw.draw(st.integers(1, len(tokens) - first))
    assert tokens.read(first, length).tolist() == list(range(start + first, start + first + length))


def corpus_of(n: int, folder: Path) -> Corpus:
    """The tokens 1..n as a corpus."""
    path = folder / f"{n}.txt"
    path.write_bytes(bytes(range(1, n + 1)))
    corpus = prepare(open_source(str(path)), build_tokenizer("byte", []), folder, quiet=True)
    assert len(corpus) == n
    return corpus


def test_the_last_part_is_validation(tmp_path):
    train, val = corpus_of(105, tmp_path).split(0.1, 8)
    assert train.read(0, len(train)).tolist() == list(range(1, 95))  # as nanoGPT: int(n * 0.9)
    assert val.read(0, len(val)).tolist() == list(range(95, 106))


@pytest.mark.parametrize(
    ("n", "fraction", "message"),
    [
        (
            100,
            0.1,
            r"the validation split has 10 tokens, but block_size 16 needs at least 17: set block_size to 9 or less",
        ),
        (100, 0.1, r"or raise val_fraction \(0.1\), or give more text$"),
        (100, 0.9, r"the training split has 9 tokens, .* or lower val_fraction \(0.9\), or give more text$"),
        (5, 0.1, r"the training split has 4 tokens, .*: set block_size to 3 or less, or lower"),
        (20, 0.05, r"the validation split has 1 tokens, but block_size 16 needs at least 17: raise val_fraction"),
        (100, 0.0, r"val_fraction is 0.0; it must be between 0 and 1"),
        (100, 1.0, r"val_fraction is 1.0; it must be between 0 and 1"),
    ],
)
def test_a_split_that_is_too_short_is_told_with_the_way_out(n, fraction, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        corpus_of(n, tmp_path).split(fraction, 16)


@pytest.mark.parametrize("reader", [lambda tokens: Batches(tokens, 8, 1), lambda tokens: EvalWindows(tokens, 8)])
def test_a_lone_range_that_is_too_short_is_told(reader):
    reader(stream(9))
    with pytest.raises(ValueError, match=r"text has 8 tokens, but block_size 8 needs at least 9: set block_size to 7"):
        reader(stream(8))


def test_unigram_loss_is_the_entropy_of_the_counts():
    train = TokenRange([np.array([0] * 5 + [1] * 2, dtype=np.uint16)], 0, 7)  # with one more each: 6, 3, 1 of 10
    val = TokenRange([np.array([0, 0, 1, 2], dtype=np.uint16)], 0, 4)
    expected = -(2 * math.log(0.6) + math.log(0.3) + math.log(0.1)) / 4
    assert unigram_loss(train, val, 3) == pytest.approx(expected)


def test_counts_of_a_long_range_come_from_evenly_spread_samples(monkeypatch):
    tokens = TokenRange([np.repeat(np.arange(8, dtype=np.uint16), 1024)], 0, 8192)
    assert tokens.counts(8).tolist() == [1024] * 8
    monkeypatch.setattr(shards, "SAMPLE_TOKENS", 640)
    assert tokens.counts(9).sum() == 640
    assert tokens.counts(9).tolist()[:8] == pytest.approx([80] * 8, abs=10)


# ---- batches ---------------------------------------------------------------------------------------------------------


def epoch_of(batches: Batches, epoch: int) -> torch.Tensor:
    """All windows of an epoch, (count, T + 1)."""
    n = len(batches)
    idx, targets = batches.batch(epoch, n)
    assert idx.dtype == targets.dtype == torch.int64
    assert idx.shape == targets.shape == (n, batches.block_size)
    assert torch.equal(idx[:, 1:], targets[:, :-1])
    return torch.cat((idx, targets[:, -1:]), dim=1)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 120), st.integers(-3, 2**70), st.integers(0, 5))
@example(8, 8, 0, 0)
@example(8, 57, 0, 0)
def test_each_epoch_reads_every_token_as_input_and_target(block_size, extra, seed, epoch):
    n = block_size + extra
    windows = epoch_of(Batches(stream(n, 13), block_size, seed), epoch)
    assert (windows.diff(dim=1) == 1).all()  # neighbours in the text
    assert set(windows[:, :-1].flatten().tolist()) == set(range(n - 1))
    assert set(windows[:, 1:].flatten().tolist()) == set(range(1, n))
    assert windows[:, :-1].numel() < (n - 1) + 2 * block_size  # and little of it twice


def test_epochs_differ_in_order_and_borders():
    batches = Batches(stream(1000), 16, seed=3)
    starts = [epoch_of(batches, epoch)[:, 0].tolist() for epoch in range(4)]
    assert len({tuple(order) for order in starts}) == 4
    assert len({sorted(order)[1] % 16 for order in starts}) > 1
    assert starts[0] != sorted(starts[0])
    assert epoch_of(Batches(stream(1000), 16, seed=4), 0)[:, 0].tolist() != starts[0]


def test_a_batch_depends_on_seed_and_step_alone():
    going = Batches(stream(100, 13), 8, seed=7)
    steps = [going.batch(step, 5) for step in range(12)]  # 14 windows: borders of epochs lie within batches
    for step in (11, 0, 5, 2):  # resumed anywhere, in any order
        for part, whole in zip(Batches(stream(100), 8, seed=7).batch(step, 5), steps[step], strict=True):
            assert torch.equal(part, whole)
    sequence = torch.cat([idx for idx, _ in steps])
    assert torch.equal(sequence, Batches(stream(100), 8, seed=7).batch(0, 60)[0])  # whatever the batch size


@pytest.mark.parametrize("step", [0, 2, 9])
@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_parts_of_a_batch_are_the_whole(step, parts):
    B = 12
    whole = Batches(stream(90), 8, seed=7).batch(step, B)
    borders = [part * B // parts for part in range(parts + 1)]
    split = [Batches(stream(90), 8, seed=7).batch(step, B, slice(*pair)) for pair in pairwise(borders)]
    for got, expected in zip(map(torch.cat, zip(*split, strict=True)), whole, strict=True):
        assert torch.equal(got, expected)
    strided = Batches(stream(90), 8, seed=7).batch(step, B, slice(1, None, 2))
    assert torch.equal(strided[0], whole[0][1::2])


def test_epochs_are_counted_in_sequences():
    batches = Batches(stream(81), 8, seed=1)
    assert len(batches) == 11
    assert batches.epochs(0, 4) == 0
    assert batches.epochs(22, 4) == 8


# ---- evaluation windows ----------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 120))
def test_evaluation_counts_each_target_once(block_size, extra):
    n = block_size + extra
    idx, targets = EvalWindows(stream(n, 13), block_size).read()
    counted = targets != IGNORE_INDEX
    assert sorted(targets[counted].tolist()) == list(range(1, n))
    assert torch.equal(idx[counted] + 1, targets[counted])


def test_evaluation_of_some_windows_is_evenly_spread():
    windows = EvalWindows(stream(1001), 10, max_windows=5)
    idx, targets = windows.read()
    assert idx[:, 0].tolist() == [0, 250, 500, 740, 990]
    assert (targets == idx + 1).all()
    assert torch.equal(windows.read(slice(1, 3))[0], idx[1:3])
    assert len(EvalWindows(stream(31), 10, max_windows=5)) == 3


def test_bytes_per_token_are_those_of_the_targets_that_count():
    lengths = np.arange(25)  # token i has i bytes
    assert EvalWindows(stream(25), 10).bytes_per_token(lengths) == sum(range(1, 25)) / 24
    some = EvalWindows(stream(25), 10, max_windows=1)
    assert some.bytes_per_token(lengths) == sum(range(1, 11)) / 10


# ---- the summary -----------------------------------------------------------------------------------------------------


def test_summary_tells_what_there_is(rows, tmp_path):
    tokenizer = build_tokenizer("char", list(rows.documents()))
    corpus = prepare(rows, tokenizer, tmp_path / "cache", quiet=True)
    text = "\n".join(summary(corpus, *corpus.split(0.3, 2)))
    assert "rows.jsonl (file)" in text
    assert "8 characters, 9 bytes, documents: 3" in text
    assert f"tokens: 10 (char, {tokenizer.vocab_size} ids, 0.90 bytes per token)" in text
    assert "split: 7 to train, 3 to validate (30.0%)" in text
    assert "'one<|endoftext|>two'" in text
    assert str(tmp_path) not in text
