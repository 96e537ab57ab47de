"""Hub datasets as a run reads them: one look-up for all processes, failures told from a missing network, no network."""

import json
import re

import datasets
import pytest
from huggingface_hub import constants

from nanogpt_hub.corpus.formats import Reading
from nanogpt_hub.sources import OfflineError, SourceError, hub_dataset, open_source
from train import prepare, pretrain
from train.commits import at_commits, commits_of, pinned
from train.config import DataConfig
from train.loading import text_choice, validation_choice
from train.rows import open_rows

TEXTS = [f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(40)]
TINY = (
    "--model.n_layer 1 --model.n_head 1 --model.n_embd 8 --model.block_size 8 --device cpu --data.source me/tiny "
    "--data.tokenizer byte --max_steps 2 --batch_size 4 --eval.interval 2 --eval.max_windows 2 --eval.sample_tokens 0"
).split()


def table(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def tiny(hub, tmp_path, monkeypatch):
    """The loopback Hub with the dataset me/tiny, which this process and those that it starts may read."""
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    hub.add_repo("me/tiny", {"train.jsonl": table(TEXTS), "README.md": b"---\nlicense: mit\n---\n"}, kind="datasets")
    return hub


def commit_of(hub) -> str:
    return hub.repo("me/tiny", "datasets").branches["main"]


def cut_off(hub, monkeypatch) -> None:
    """As HF_HUB_OFFLINE=1 does, for this process and for those that it starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.requests.clear()


# ---- the look-up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "words"), [(429, "slow down"), (500, "answers 500 when asked to look up the data")])
@pytest.mark.parametrize("opening", [open_source, lambda name: open_rows(name, ["text"])], ids=["text", "rows"])
def test_a_hub_that_fails_is_not_taken_for_no_network(tiny, status, words, opening):
    tiny.fail("GET", "/api/datasets/me/tiny", status=status, times=99)
    with pytest.raises(SourceError, match=words) as error:
        opening("me/tiny")
    assert not isinstance(error.value, OfflineError)
    assert not tiny.asked("GET", "/resolve/")


def test_a_look_up_that_fails_once_is_tried_again(tiny):
    tiny.fail("GET", "/api/datasets/me/tiny", status=503, times=1)
    assert open_source("me/tiny").facts["revision"] == commit_of(tiny)


def test_a_name_may_tell_the_revision():
    assert hub_dataset("me/tiny@refs/convert/parquet") == ("me/tiny", "refs/convert/parquet")
    assert hub_dataset("me/tiny@v1", "v1") == ("me/tiny", "v1")
    assert hub_dataset("tiny", "v1") == ("tiny", "v1")
    assert [hub_dataset(name) for name in ("python", "stories", "a.txt", "me@a.txt", "a b", "me/tiny@")] == [None] * 6
    with pytest.raises(SourceError, match="names a revision, and 'v2' is asked for too"):
        hub_dataset("me/tiny@v1", "v2")


# ---- the processes of a run, and its sittings ------------------------------------------------------------------------


def test_every_source_of_a_run_is_read_at_the_commit_that_one_process_found(tiny, tmp_path):
    sha, said = commit_of(tiny), []
    tiny.repo("me/tiny", "datasets").tags["v1"] = sha
    (tmp_path / "my.txt").write_text("text")
    d = DataConfig(source="me/tiny", revision="v1", mix={str(tmp_path / "my.txt"): 1.0}, val_source="me/tiny@main")
    fixed = pinned(d, tmp_path, said.append)
    assert (fixed.source, fixed.revision, fixed.val_source) == (f"me/tiny@{sha}", "", f"me/tiny@{sha}")
    assert (fixed.mix, said) == (d.mix, [])
    tiny.repo("me/tiny", "datasets").put({"train.jsonl": b""})
    for choice in (text_choice(fixed), validation_choice(fixed)):
        tiny.requests.clear()
        unread = choice.open(look=False)
        assert not tiny.requests  # what the other processes do
        looked = choice.open()
        assert (unread.fingerprint, unread.name) == (looked.fingerprint, looked.name)
    assert list(unread.documents()) == TEXTS


def test_each_process_keeps_its_own_paths_and_other_datasets_are_not_taken_for_the_same(tmp_path):
    sha = "a" * 40
    for name in ("mine.txt", "theirs.txt"):
        (tmp_path / name).write_text("text")
    mine = DataConfig(source=str(tmp_path / "mine.txt"), mix={"me/tiny": 2.0, "me/other": 1.0, "me/tiny@v2": 1.0})
    here = at_commits(mine, {("me/tiny", ""): sha})
    assert here.source == mine.source
    assert here.mix == {f"me/tiny@{sha}": 2.0, "me/other": 1.0, "me/tiny@v2": 1.0}
    theirs = DataConfig(source="me/tiny", revision="v1", val_source="me/tiny")
    found = at_commits(theirs, {("me/tiny", "v1"): sha})
    assert (found.source, found.revision, found.val_source) == (f"me/tiny@{sha}", "", f"me/tiny@{sha}")
    assert at_commits(theirs, {("me/tiny", ""): sha}) == theirs  # another revision than was asked for


@pytest.mark.parametrize("fixed", [None, 3, [], {"data": ["x"], "revision": 4}, {"sources": 7}, {"sources": [1, {}]}])
def test_a_state_that_makes_no_sense_tells_no_commits(fixed):
    assert commits_of({"fixed": fixed}) == {}
    assert commits_of({}) == {}


def test_two_processes_ask_once_and_read_the_same(tiny, ranks, tmp_path):
    out = ["--out_dir", str(tmp_path / "out")]
    done = ranks.run("-m", "train.pretrain", *TINY, *out, HF_DATASETS_OFFLINE="0", HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(tiny.asked("GET", "/revision/main")) == 1


def test_a_run_goes_on_at_the_commit_with_which_it_began(tiny, tmp_path, capsys):
    sha, out = commit_of(tiny), ["--out_dir", str(tmp_path / "out")]
    assert pretrain.main([*TINY, *out]) == 0
    tiny.repo("me/tiny", "datasets").put({"train.jsonl": table(TEXTS[::-1])})
    assert pretrain.main([*TINY, *out, "--max_steps", "4"]) == 0
    assert f"revision {sha}" in capsys.readouterr().out
    assert pretrain.main([*TINY, *out, "--max_steps", "6", "--data.revision", "main"]) == 2
    assert f"a run with other settings ({{'revision': '{sha}', 'tokens_sha256': " in capsys.readouterr().err


# ---- without a network -----------------------------------------------------------------------------------------------


def test_what_was_prepared_is_found_without_a_network(tiny, tmp_path, monkeypatch, capsys):
    sha = commit_of(tiny)
    assert prepare.main([*TINY]) == 0
    tiny.repo("me/tiny", "datasets").put({"train.jsonl": table(["another text"] * 40)})
    cut_off(tiny, monkeypatch)
    assert pretrain.main([*TINY, "--out_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"offline: me/tiny is read at commit {sha}, its main when the Hub was last asked\n" in said
    assert f"data: me/tiny (hub, split train, revision {sha}" in said
    assert pretrain.main([*TINY, "--data.revision", sha, "--out_dir", str(tmp_path / "pinned")]) == 0
    assert "offline:" not in capsys.readouterr().out
    assert pretrain.main([*TINY, "--data.tokenizer", "char", "--out_dir", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert f"the dataset me/tiny at commit {sha} is not complete in a cache here: run `nanogpt-hub prepare`" in error
    assert pretrain.main([*TINY, "--data.revision", "v2", "--out_dir", str(tmp_path / "other")]) == 2
    assert "no file or folder 'me/tiny' here, and the Hub cannot be reached" in capsys.readouterr().err
    assert not tiny.requests


def test_a_table_in_the_local_cache_serves_without_a_network_if_it_is_of_the_commit(tiny, monkeypatch):
    sha, half = commit_of(tiny), {"split": "train[:50%]"}
    online = open_source("me/tiny", revision=sha, **half)
    assert list(online.documents()) == TEXTS[:20]
    cut_off(tiny, monkeypatch)
    offline = open_source(f"me/tiny@{sha}", **half)
    assert offline.fingerprint == online.fingerprint
    assert [text for text, _ in offline.read(Reading(start={"rows": 15, "state": None}))] == TEXTS[15:20]
    other = open_source("me/tiny", revision="0" * 40, **half)
    with pytest.raises(OfflineError, match=f"at commit {'0' * 40} is not complete"):
        list(other.documents())


# ---- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["", "test"])
def test_a_validation_source_has_none_of_the_settings_of_the_training_source(split):
    d = DataConfig(source="a/b", config="en", split="train[:9%]", revision="v1", val_source="my.txt", val_split=split)
    apart = d.validation()
    assert (apart.source, apart.config, apart.split, apart.revision) == ("my.txt", "", split or "train", "")
    same = DataConfig(source="a/b", config="en", revision="v1", val_split="test", mix={"c": 1.0}).validation()
    assert (same.source, same.config, same.split, same.revision, same.mix) == ("a/b", "en", "test", "v1", {})
    assert DataConfig().validation() is None


def test_a_validation_file_beside_a_hub_dataset_at_a_revision(tiny, tmp_path, capsys):
    tiny.repo("me/tiny", "datasets").tags["v1"] = commit_of(tiny)
    (tmp_path / "my.txt").write_text("my own text")
    flags = ["--data.revision", "v1", "--data.config", "default", "--data.val_source", str(tmp_path / "my.txt")]
    assert prepare.main([*TINY, *flags]) == 0
    assert re.findall(r"^(\S+): 1 shards", capsys.readouterr().out, re.MULTILINE) == ["my.txt", "me/tiny"]
