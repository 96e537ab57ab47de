"""The races: what a submission may set, that it is measured from its weights, and that the records hold."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nanogpt_hub import cli
from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.evaluate import evaluate
from nanogpt_hub.sources import open_source
from nanogpt_hub.system.installed import part
from train import speedrun
from train.speedrun import CPU, T4, TRACKS, Track, check_config, check_hardware, record_of, texts, verdict

ROOT = Path(__file__).parents[2]
TINY = {
    "data": {"tokenizer": "byte"}, "max_steps": 4, "batch_size": 8,
    "model": {"preset": "nanogpt", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
    "eval": {"interval": 4, "max_windows": 8, "sample_tokens": 0},
}  # fmt: skip
VAL = "stories:level=1,seed=9,size=2000"
DIGEST = hashlib.sha256("".join(open_source(VAL).texts()).encode()).hexdigest()
SMALL = Track("words", 9.0, CPU, "quickstart", "stories:level=1,size=20000", VAL, DIGEST)


def status(words: list[str]) -> int:
    """The exit status of the command."""
    try:
        return cli.main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(TRACKS, "words", SMALL)
    monkeypatch.setattr(speedrun, "cores", lambda: [0, 1])
    monkeypatch.setattr(speedrun.os, "sched_setaffinity", lambda *_: None, raising=False)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return path


def test_a_race_measures_the_weights_that_a_run_left(config, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["speedrun", "words", str(config), "--seeds", "5", "--out", str(out)]
    assert status(command) == 0
    said = capsys.readouterr().out
    assert "The goal was reached; a record needs the seeds 1, 2, 3." in said
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    found = evaluate(*load_model(out / "seed-5" / "last"), open_source(SMALL.val_source))
    assert [run["bits_per_byte"] for run in record["runs"]] == [found.bits_per_byte]
    assert record["settings"] == TINY
    assert record["runs"][0]["steps"] == 4
    assert record["hardware"]
    monkeypatch.setitem(TRACKS, "words", replace(SMALL, goal=0.1))
    assert status(command) == 1
    assert "was not reached with seed 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 3}, "sets seed, which the track sets"),
        ({"data": {"val_source": "x"}}, "sets data.val_source"),
        ({"minutes": 2}, "sets minutes"),
        ({"data": {"tokenizer": "mine/tokenizer.json"}}, "a track takes char, byte, gpt2 or bpe:N"),
    ],
)
def test_what_a_submission_may_not_set(change, sentence, config, capsys):
    config.write_text(yaml.safe_dump(TINY | change), encoding="utf-8")
    assert status(["speedrun", "words", str(config)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_config_that_is_none_a_text_that_is_another_and_hardware_that_is_not_there(config, tmp_path, capsys):
    assert status(["speedrun", "words", str(tmp_path / "none.yaml")]) == 2
    assert "there is no config" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("To be, or not to be.", encoding="utf-8")
    assert status(["speedrun", "shakespeare", "--text", str(other), "--out", str(tmp_path / "out")]) == 2
    assert "is another text than the track's" in capsys.readouterr().err
    with pytest.raises(ValueError, match="for one T4, and this machine has"):
        check_hardware(replace(SMALL, hardware=T4))


def test_the_text_of_a_track_is_cut_where_nanogpt_cuts_it(tinyshakespeare, tmp_path):
    train, val = texts(TRACKS["shakespeare"], tmp_path, str(tinyshakespeare))
    assert [len(Path(name).read_text(encoding="utf-8")) for name in (train, val)] == [1_003_854, 111_540]


@pytest.mark.parametrize("name", sorted(TRACKS))
def test_the_records_own_config_is_a_submission_and_its_record_reaches_the_goal(name):
    track = TRACKS[name]
    settings = check_config(part("configs") / f"{track.config}.yaml", track)
    if (record := record_of(name)) is None:
        pytest.skip("it has no record yet")
    assert record["settings"] == settings
    assert [run["seed"] for run in record["runs"]] == [1, 2, 3]
    assert "was reached with each seed" in verdict(track, record, record)
    assert "record's own config" in verdict(track, record, record)


def test_the_board_is_that_of_the_records(capsys):
    done = subprocess.run([sys.executable, "docs/board.py", "--check"], cwd=ROOT, check=False, timeout=100)
    assert done.returncode == 0
    assert status(["speedrun"]) == 0
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name in TRACKS)
