"""Training while the text is tokenised: shards that grow, batches that do not care, a process that may be killed."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import own_package
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt_hub import cli
from nanogpt_hub.sources import SourceError, open_source
from nanogpt_hub.tokenizer import build_tokenizer
from train import data, loading, pretrain, shards, tokenizing, trainer
from train import prepare as prepare_command
from train.data import LISTED, TOKENS, Order, Permutation, StreamBatches, content, text_bytes
from train.shards import HEADER, LINES, MANIFEST, Corpus, Position, _ShardWriter, prepare
from train.tokenizing import SourceChoice, Tokenizing, wait_for

LINE = "né {} the quick brown fox\n"


class CountingTokenizer:
    """Stands for a tokenizer of 100,000 ids where only its name counts."""

    kind, vocab_size, eot_id, hash = "custom", 100_000, None, "c" * 64


def write_tokens(folder: Path, n: int) -> Path:
    """A complete corpus of the tokens 0..n-1."""
    folder.mkdir()
    writer = _ShardWriter(folder, np.dtype("<u4"))
    writer.write(np.arange(n, dtype=np.uint32), Position())
    writer.finish(Position(batch=1))
    facts = {"tokenizer": {"hash": CountingTokenizer.hash}, "source": {"name": "x"}}
    for name in (HEADER, MANIFEST):
        (folder / name).write_text(json.dumps(facts))
    return folder


def cut(folder: Path, n_shards: int) -> None:
    """As the corpus was when so many shards were ready."""
    lines = (folder / LINES).read_bytes().splitlines(keepends=True)
    (folder / LINES).write_bytes(b"".join(lines[:n_shards]))
    (folder / MANIFEST).unlink(missing_ok=True)


@pytest.fixture
def small(monkeypatch):
    """Shards of 50 tokens, and later of 400; groups of 40 tokens, 80, 160, and so on up to 1,280."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 50)
    monkeypatch.setattr(data, "FIRST_GROUP", 40)


def stream_of(folder: Path, first: int = 13, block_size: int = 8, seed: int = 5) -> StreamBatches:
    return StreamBatches(Corpus(folder, CountingTokenizer()), first, block_size, seed)


# ---- the order of a stream -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [30, 53, 54, 94, 1000, 5001])
def test_the_first_epoch_has_each_token_as_a_target_once_and_the_later_ones_all_of_them(small, tmp_path, n):
    batches = stream_of(write_tokens(tmp_path / "c", n))
    idx, targets = batches.batch(0, len(batches))
    assert (targets == idx + 1).all()
    seen = sorted(targets.flatten().tolist())
    assert sorted(set(seen)) == list(range(14, n))
    assert len(seen) < n - 14 + 8  # the last window is pushed inside
    later = torch.cat([batches.batch(step, 1)[1] for step in range(len(batches), 2 * len(batches) + 1)])
    assert set(later.flatten().tolist()) == set(range(14, n))


def test_groups_come_one_after_the_other_and_each_is_shuffled(small, tmp_path):
    batches = stream_of(write_tokens(tmp_path / "c", 5000))
    starts = batches.batch(0, 15)[0][:, 0] - 13
    assert sorted(starts[:5].tolist()) == list(range(0, 40, 8))
    assert sorted(starts[5:].tolist()) == list(range(40, 120, 8))
    assert starts.tolist() != sorted(starts.tolist())
    assert not torch.equal(starts, stream_of(tmp_path / "c", seed=6).batch(0, 15)[0][:, 0] - 13)
    groups = [batches._group_of(place) for place in range(600)]
    assert [count for _, _, count in sorted(set(groups))][:8] == [5, 10, 20, 40, 80, 160, 160, 160]
    assert all(first <= place < first + count for place, (_, first, count) in enumerate(groups))


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_a_batch_is_the_same_however_much_is_ready(small, tmp_path, batch_size):
    folder = write_tokens(tmp_path / "c", 3000)
    whole = stream_of(folder)
    steps = range(len(whole) // batch_size + 3)
    expected = [whole.batch(step, batch_size) for step in steps]
    n_lines = len(whole.corpus.shards)
    for n_shards in reversed(range(n_lines + 1)):
        cut(folder, n_shards)
        growing = stream_of(folder)
        readable = [step for step in steps if growing.ready(step, batch_size)]
        assert readable == list(range(len(readable)))
        for step in readable:
            assert torch.equal(growing.batch(step, batch_size)[0], expected[step][0])
        if len(readable) < len(steps):
            with pytest.raises(RuntimeError, match="not ready"):
                growing.batch(len(readable), batch_size)
    assert not readable


def test_a_reader_takes_in_what_becomes_ready(small, tmp_path):
    folder = write_tokens(tmp_path / "c", 500)
    lines, manifest = (folder / LINES).read_bytes(), (folder / MANIFEST).read_bytes()
    cut(folder, 2)
    batches = stream_of(folder)
    assert batches.ready(0, 5)
    assert not batches.ready(1, 5)
    assert batches.epochs(1, 5) is None
    (folder / LINES).write_bytes(lines[:-20])  # the last line is only half there
    assert batches.ready(1, 5)
    assert len(batches.corpus) == 450
    (folder / LINES).write_bytes(lines)
    (folder / MANIFEST).write_bytes(manifest)
    assert batches.ready(10**6, 5)
    assert batches.epochs(len(batches), 1) == 1
    assert batches.epochs(len(batches) + len(batches._later_epochs()), 1) == 2


def test_parts_of_a_batch_are_the_whole(small, tmp_path):
    folder = write_tokens(tmp_path / "c", 700)
    for step in range(20):
        whole = stream_of(folder).batch(step, 12)[0]
        parts = [stream_of(folder).batch(step, 12, slice(part, part + 4))[0] for part in (0, 4, 8)]
        assert torch.equal(torch.cat(parts), whole)


def test_all_processes_know_from_the_step_alone_where_they_may_have_to_wait(small, tmp_path):
    batches = stream_of(write_tokens(tmp_path / "c", 5000))
    assert [step for step in range(40) if batches.needs_more(step, 4)] == [1, 3, 8, 18, 38]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@example(1, 0)
@example(2, 0)
def test_a_computed_permutation_is_one(count, key):
    permutation = Permutation(count, key)
    listed = [permutation[i] for i in range(count)]
    assert sorted(listed) == list(range(count))
    if count > 20:
        assert listed != sorted(listed)
        assert listed != [Permutation(count, key, 1)[i] for i in range(count)]


def test_a_long_order_takes_no_memory():
    order = Order(10**12, seed=1)
    assert isinstance(order.draw(0)[1], Permutation)
    windows = [order.example(place)[1] for place in range(2000)]
    assert len(set(windows)) == 2000
    assert abs(np.corrcoef(windows[:-1], windows[1:])[0, 1]) < 0.1
    assert abs(np.mean(windows) / 10**12 - 0.5) < 0.05
    assert not isinstance(Order(LISTED, seed=1).draw(0)[1], Permutation)


def test_few_shards_are_mapped_at_a_time(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_MAPPED", 3)
    corpus = Corpus(write_tokens(tmp_path / "c", 780), CountingTokenizer())
    tokens = corpus.tokens()
    for start in (0, 700, 30, 410, 0, 120):
        assert tokens.read(start, 60).tolist() == list(range(start, start + 60))
        assert len(corpus.shards._mapped) <= 3


# ---- tokenising, cut off anywhere ------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path) -> Path:
    """Rows of text, one in ten broken; a long one among them."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": LINE.format(i) * (40 if i == 7 else 1)}) for i in range(60)]
    lines[9::10] = ['{"text": 3}', '{"text"', '{"txt": "a"}', "[1]", '{"text": "\\ud800"}', "7"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr("nanogpt_hub.sources.PIECE_CHARS", 100)
    monkeypatch.setattr(shards, "BATCH_CHARS", 150)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tokenising_goes_on_from_any_shard_to_the_same_bytes(small, short_pieces, rows, tmp_path):
    source, tokenizer = open_source(str(rows), max_bad_rows=10), build_tokenizer("byte", [])
    corpus = prepare(source, tokenizer, tmp_path / "cache", quiet=True)
    expected, n = contents(corpus.folder), len(corpus.shards)
    assert corpus.manifest["bad_rows"] == 6
    assert "line 10: column 'text' holds int" in corpus.manifest["bad_examples"][0]
    for n_shards in range(n + 1):
        cut(corpus.folder, n_shards)
        with open(corpus.folder / LINES, "ab") as file:
            file.write(b'{"tokens": 50, "max')  # killed in the middle of a line
        assert prepare(source, tokenizer, tmp_path / "cache", quiet=True).complete
        assert contents(corpus.folder) == expected


def test_a_source_that_keeps_its_own_position_is_not_read_over(small, short_pieces, rows, tmp_path):
    plain, begun = open_source(str(rows), max_bad_rows=10), []
    texts = list(plain.documents())

    def read(reading):
        begun.append(reading.start)
        first = reading.start["next"] if reading.start else 0
        at = first
        reading.mark = lambda: {"next": at + 1}
        for at in range(first, len(texts)):
            yield texts[at], True

    source, tokenizer = replace(plain, read=read), build_tokenizer("byte", [])
    corpus = prepare(source, tokenizer, tmp_path / "cache", quiet=True)
    expected, n = contents(corpus.folder), len(corpus.shards)
    for n_shards in range(n + 1):
        cut(corpus.folder, n_shards)
        prepare(source, tokenizer, tmp_path / "cache", quiet=True)
        assert contents(corpus.folder) == expected
    assert begun[1] is None
    assert begun[-1]["next"] > 40
    other = prepare(plain, tokenizer, tmp_path / "other", quiet=True)
    assert other.tokens().read(0, len(other)).tolist() == corpus.tokens().read(0, len(corpus)).tolist()


def test_any_number_of_workers_writes_the_same_bytes(small, short_pieces, rows, tmp_path):
    source, tokenizer = open_source(str(rows), max_bad_rows=10), build_tokenizer("byte", [])
    one, three = (prepare(source, tokenizer, tmp_path / str(n), quiet=True, workers=n).folder for n in (1, 3))
    assert contents(one) == contents(three)


def test_a_source_that_lost_its_beginning_is_not_gone_on_from(small, short_pieces, rows, tmp_path):
    source, tokenizer = open_source(str(rows), max_bad_rows=10), build_tokenizer("byte", [])
    corpus = prepare(source, tokenizer, tmp_path / "cache", quiet=True)
    cut(corpus.folder, 20)
    rows.write_text(rows.read_text(encoding="utf-8")[:99], encoding="utf-8")
    with pytest.raises(ValueError, match="must not change"):
        prepare(source, tokenizer, tmp_path / "cache", quiet=True)


TOO_MANY = {
    0: "line 10: column 'text' holds int",
    4: r"line 50: .*\(5 rows cannot be read, and 4 may be left out\)",
}


@pytest.mark.parametrize("limit", TOO_MANY)
def test_one_bad_row_too_many_ends_it_by_name(rows, tmp_path, limit):
    source = open_source(str(rows), max_bad_rows=limit)
    with pytest.raises(SourceError, match=TOO_MANY[limit]):
        prepare(source, build_tokenizer("byte", []), tmp_path / "cache", quiet=True)
    with pytest.raises(SourceError, match=TOO_MANY[limit]):
        list(source.documents())


def test_more_bad_rows_than_good_ones_are_no_exception(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"line 2 has no column 'text'; it has txt \(1 of 2 rows are like that\)"):
        prepare(open_source(str(path), max_bad_rows=9), build_tokenizer("byte", []), tmp_path, quiet=True)


# ---- the process beside the training ---------------------------------------------------------------------------------


@pytest.fixture
def beside(monkeypatch):
    """Every text is tokenised by a process of its own."""
    monkeypatch.setattr(tokenizing, "IN_PROCESS_BYTES", 0)


def begin(path: Path, cache: Path, **options) -> Tokenizing:
    choice = SourceChoice(str(path), **options)
    return Tokenizing(choice, choice.open(), build_tokenizer("byte", []), cache)


def test_a_killed_process_is_started_again_and_its_work_is_whole(beside, rows, tmp_path):
    work = begin(rows, tmp_path / "cache", max_bad_rows=10)
    os.kill(work.process.pid, signal.SIGKILL)
    work.process.wait()
    work.folder.mkdir(parents=True, exist_ok=True)
    (work.folder / ".corpus.json.1.tmp").write_text("half of a fi")
    assert wait_for(lambda: work.complete, [work])
    work.close()
    expected = prepare(open_source(str(rows), max_bad_rows=10), build_tokenizer("byte", []), tmp_path / "b", quiet=True)
    assert contents(work.folder) == contents(expected.folder)


def test_what_cannot_be_used_is_told_by_the_process_that_waits(beside, rows, tmp_path):
    work = begin(rows, tmp_path / "cache", max_bad_rows=1)
    with pytest.raises(ValueError, match=r"line 20: not valid JSON .*\(2 rows cannot be read"):
        wait_for(lambda: work.complete, [work])
    work.close()


def test_a_process_that_is_killed_over_and_over_is_given_up(beside, rows, tmp_path, monkeypatch):
    work = begin(rows, tmp_path / "cache", max_bad_rows=10)
    monkeypatch.setattr(work, "_start", lambda: None)
    work.process.kill()
    work.process.wait()
    with pytest.raises(ValueError, match=r"ended 4 times \(exit status -9\) without another shard"):
        wait_for(lambda: False, [work], interval=0)


def test_a_killed_process_is_started_again_before_its_tokens_are_needed(beside, rows, tmp_path):
    work = begin(rows, tmp_path / "cache", max_bad_rows=1)
    work.process.kill()
    work.process.wait()
    killed = work.process.pid
    work.revive()
    assert work.process.pid != killed
    assert work.process.wait() == tokenizing.REFUSED
    for _ in range(2):
        work.revive()  # raises nothing: what is ready is trained on first
    for _ in range(2):
        with pytest.raises(ValueError, match="line 20: not valid JSON"):
            work.check()
    work.close()


def test_a_launcher_may_stand_between_the_processes(beside, rows, tmp_path, monkeypatch):
    """As in a virtual environment on Windows, whose python.exe starts the interpreter and waits for it."""
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit $?\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    work = begin(rows, tmp_path / "cache", max_bad_rows=10)
    assert wait_for(lambda: work.complete, [work])
    work.close()
    assert work.restarts == 0


ENDLESS = """
import sys, time
from pathlib import Path
from nanogpt_hub.tokenizer import build_tokenizer
from train.tokenizing import SourceChoice, Tokenizing
choice = SourceChoice("stories:level=1,size=1_000_000_000_000")
work = Tokenizing(choice, choice.open(), build_tokenizer("byte", []), Path(sys.argv[1]), int(sys.argv[2]))
print(work.folder, flush=True)
time.sleep(10**6)
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_process_and_its_workers_end_with_the_one_that_was_killed(tmp_path, workers):
    command, pipe = [sys.executable, "-c", ENDLESS, str(tmp_path), workers], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=own_package()) as trainer:
        folder = Path(trainer.stdout.readline().strip())
        while not (folder / shards.shard_name(0)).is_file():  # something is encoded
            assert trainer.poll() is None
            time.sleep(0.05)
        trainer.kill()
        trainer.communicate(timeout=120)  # until nobody has its standard error any more
    with FileLock(f"{folder}.lock", timeout=0):
        pass


def test_waiting_ends_when_it_is_asked_to():
    assert wait_for(lambda: True, [])
    assert not wait_for(lambda: False, [], stop=lambda: True)


TWO_PROCESSES = """
from accelerate import PartialState
from train.tokenizing import wait_for

class Broken:
    def check(self):
        raise ValueError("broken row")

rank, asked = PartialState(cpu=True).process_index, 0
def slow():  # the two are not ready at the same time
    global asked
    asked += 1
    return asked > 3 + 3 * rank
assert wait_for(slow, []) and asked == 7
assert not wait_for(lambda: False, [], stop=lambda: rank == 1)
def damaged():
    raise ValueError("broken shard")
for what, ready, tokenizing in (("row", lambda: False, [Broken()]), ("shard", damaged, [])):
    try:
        wait_for(ready, tokenizing) if rank == 0 else wait_for(lambda: True, [])
    except ValueError as error:
        assert str(error) == f"broken {what}"
    else:
        raise AssertionError("nobody was told")
"""


def test_processes_wait_stop_and_fail_together(ranks, tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(TWO_PROCESSES)
    done = ranks.run(str(script))
    assert done.returncode == 0, done.stderr[-2000:]


# ---- a run -----------------------------------------------------------------------------------------------------------

TINY = (
    "--model.preset nanogpt --model.n_layer 1 --model.n_head 1 --model.n_embd 8 --model.block_size 8 --device cpu "
    "--data.tokenizer byte --data.val_tokens 60 --max_steps 24 --batch_size 4 --eval.interval 12 --eval.max_windows 4 "
    "--eval.sample_tokens 0 --log_interval 1"
).split()


class Growing:
    """Makes one shard more of a prepared corpus ready each time that somebody waits."""

    def __init__(self, folder: Path, fail_at: int = 10**6):
        self.folder, self.fail_at = folder, fail_at
        self.lines, self.manifest = (folder / LINES).read_bytes().splitlines(keepends=True), folder / MANIFEST
        self.facts, self.n_ready = self.manifest.read_bytes(), 0
        cut(folder, 0)

    def check(self) -> None:
        if self.n_ready == self.fail_at:
            raise ValueError("line 99 is broken")
        with open(self.folder / LINES, "ab") as file:
            file.writelines(self.lines[self.n_ready : self.n_ready + 1])
        self.n_ready += 1
        if self.n_ready == len(self.lines):
            self.close()

    def revive(self) -> None:
        pass

    def close(self) -> None:
        (self.folder / LINES).write_bytes(b"".join(self.lines))
        self.manifest.write_bytes(self.facts)


@pytest.fixture
def short_stream(small, tmp_path, monkeypatch):
    """A text of 1,000 tokens that is trained on as a stream; its corpus, prepared."""
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "SMALL_TOKENS", 100)
    monkeypatch.setattr(loading, "FIRST_GROUP", 40)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i} the quick brown fox\n" for i in range(40)))
    return prepare(open_source(str(path)), build_tokenizer("byte", []), quiet=True).folder


def run(folder: Path, *flags: str) -> int:
    return pretrain.main([*TINY, "--data.source", str(folder.parent / "a.txt"), "--out_dir", str(folder), *flags])


def weights(out: Path) -> bytes:
    return (out / "last" / "model.safetensors").read_bytes()


def everything(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_beside_the_tokenising_is_the_run_after_it(short_stream, tmp_path, monkeypatch, capsys):
    assert run(tmp_path / "after") == 0
    assert "60 to validate" in capsys.readouterr().out
    growing = Growing(short_stream)
    monkeypatch.setattr(loading, "start_tokenizing", lambda *args: [growing])
    assert run(tmp_path / "beside") == 0
    said = capsys.readouterr().out
    assert "150 ready (byte, 257 ids), the rest is tokenised beside the training" in said
    assert "epochs not known yet" in said
    assert 4 <= growing.n_ready < len(growing.lines) + 1
    assert weights(tmp_path / "beside") == weights(tmp_path / "after")
    facts = json.loads((tmp_path / "after" / "run.json").read_text())
    assert facts["data"]["train_tokens"] == len(Corpus(short_stream, build_tokenizer("byte", []))) - 60


def test_a_process_that_waits_for_tokens_is_alive(short_stream, tmp_path, monkeypatch):
    growing, beats = Growing(short_stream), []
    check, beat = growing.check, trainer.Watchdog.beat
    monkeypatch.setattr(growing, "check", lambda: beats.append("look") or check())
    monkeypatch.setattr(trainer.Watchdog, "beat", lambda dog: beats.append("beat") or beat(dog))
    monkeypatch.setattr(loading, "start_tokenizing", lambda *args: [growing])
    assert run(tmp_path / "out") == 0
    waited = beats[beats.index("beat") - 1 :]  # before it there is no watchdog
    assert waited.count("look") > 3
    assert waited == ["look", "beat"] * waited.count("look")


KILLED_IN_A_WAIT = """
import os, signal, sys
from train import data, loading, pretrain, shards, trainer
shards.SHARD_TOKENS, data.FIRST_GROUP, loading.FIRST_GROUP, loading.SMALL_TOKENS = 50, 40, 40, 100
wait_for, looks = trainer.wait_for, []
def waiting(ready, *others):
    def look():
        looks.append(ready())
        if len(looks) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return len(looks) > 9 and ready()
    return wait_for(look, *others)
trainer.wait_for = waiting
sys.exit(pretrain.main(sys.argv[1:]))
"""


def test_a_process_that_ends_while_all_wait_for_tokens_ends_the_others(ranks, short_stream, tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(KILLED_IN_A_WAIT)
    done = ranks.run(str(script), *TINY, "--data.source", str(tmp_path / "a.txt"), "--out_dir", str(tmp_path / "out"))
    assert done.returncode != 0
    assert done.stderr.count("error: another process of this run has ended") == 1, done.stderr


def test_a_run_that_had_to_stop_for_its_text_goes_on_exactly(short_stream, tmp_path, monkeypatch, capsys):
    assert run(tmp_path / "whole") == 0
    growing = Growing(short_stream, fail_at=5)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "start_tokenizing", lambda *args: [growing])
        assert run(tmp_path / "parts") == 1
    step = json.loads((tmp_path / "parts" / "state" / "state.json").read_text())["step"]
    assert 0 < step < 24
    assert f"error: line 99 is broken. Safe is the training state of step {step}: the" in capsys.readouterr().err
    kept = everything(tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "start_tokenizing", lambda *args: [Growing(short_stream, fail_at=4)])
        assert run(tmp_path / "parts", "--max_steps", "23") == 2  # it waits in vain for what comes before that step
    assert everything(tmp_path / "parts") == kept
    assert run(tmp_path / "parts") == 0
    assert f"resuming at step {step}" in capsys.readouterr().out
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.parametrize("small_tokens", [100, 2**24])
def test_another_text_of_the_same_name_and_length_is_refused(short_stream, tmp_path, monkeypatch, capsys, small_tokens):
    monkeypatch.setattr(loading, "SMALL_TOKENS", small_tokens)
    text, out = tmp_path / "a.txt", tmp_path / "run"
    good = text.read_text()
    assert run(out) == 0
    for old, new in {"1 the": "1 one", "4 the": "4 one"}.items():  # in the validation part of a stream, in its training
        text.write_text(good.replace(old, new, 1))
        assert run(out, "--max_steps", "26") == 2
        assert re.search(r"other settings \(\{'tokens_sha256': '\w+'\}, now", capsys.readouterr().err)
    text.write_text(good)
    assert run(out, "--max_steps", "26") == 0
    assert "data.bytes" not in capsys.readouterr().out


def test_a_stream_that_was_mended_further_on_is_gone_on_with_and_said(short_stream, tmp_path, capsys):
    text, out = tmp_path / "a.txt", tmp_path / "run"
    assert run(out) == 0
    size = text.stat().st_size
    text.write_text(text.read_text() + "more\n")
    assert run(out, "--max_steps", "26") == 0
    assert f"from step 24 on: data.bytes {size + 5} (before: {size})" in capsys.readouterr().out


def test_what_tells_data_from_other_data():
    source = {"kind": "hub", "name": "a/b", "config": "en", "split": "train", "revision": "1f", "license": "mit"}
    chosen = {"data": "a/b", "config": "en", "split": "train", "revision": "1f"}
    assert content(source, "count", "77") == {**chosen, TOKENS: "77"}
    mixed = {"kind": "mix", "name": "50% a/b + 50% c.txt", "sources": [source, {"name": "c.txt", "bytes": 5}]}
    told = content(mixed, "drop", "77")
    assert told["sources"] == [chosen, {"data": "c.txt"}]
    assert told["duplicates"] == "drop"
    assert text_bytes(mixed) == 5


def test_prepare_does_it_ahead_and_says_what_there_is(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    flags = ["--data.source", str(rows), "--data.tokenizer", "byte"]
    assert cli.main(["prepare", *flags, "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "documents: 54" in said
    assert "left out: 6 rows that cannot be read, such as " in said
    monkeypatch.setattr(shards, "_write_corpus", lambda *args: pytest.fail("it was not ahead"))
    assert prepare_command.main([*flags, "--data.max_bad_rows", "10"]) == 0  # the limit is not what is read
    assert prepare_command.main(["--data.format", "messages"]) == 2
    assert "only text is prepared" in capsys.readouterr().err


class KillsWorkers(ProcessPoolExecutor):
    """Whatever it is given, its process ends."""

    def submit(self, *_) -> Future:
        return super().submit(os._exit, 9)


@pytest.fixture
def no_room(monkeypatch):
    def sync(file) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_sync", sync)


def test_a_full_disk_is_named(no_room, rows, tmp_path, capsys):
    flags = ["--data.source", str(rows), "--data.tokenizer", "byte", "--data.cache_dir", str(tmp_path / "cache")]
    assert prepare_command.main(flags) == 2
    said = capsys.readouterr().err
    assert f"error: cannot write tokens to {tmp_path / 'cache'}" in said
    assert said.endswith(": No space left on device. Make room, or choose another --data.cache_dir\n")


def test_a_killed_worker_is_no_traceback(small, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "ProcessPoolExecutor", KillsWorkers)
    flags = ["--data.source", str(rows), "--data.tokenizer", "byte", "--data.cache_dir", str(tmp_path / "cache")]
    assert prepare_command.main([*flags, "--workers", "2"]) == 1
    said = capsys.readouterr().err
    assert "error: one of the processes that encode was killed" in said
    job = {"choice": {"source": str(rows), "max_bad_rows": 10}, "cache_dir": str(tmp_path / "cache"), "workers": 2}
    source, tokenizer = open_source(str(rows)), build_tokenizer("byte", [])
    job["tokenizer"], job["config"] = tokenizer.__reduce__()[1]
    job["folder"] = str(shards.corpus_folder(source, tokenizer, tmp_path / "cache").resolve())
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(job) + "\n"))
    monkeypatch.setattr(tokenizing, "end_after", lambda parent: None)
    assert tokenizing.main() == tokenizing.KILLED  # and the run starts it again
    assert capsys.readouterr().out == ""
