"""The ladder: a row is printed when its rung has ended, it needs no network, and it says how it is used."""

import sys

import pytest

from benchmarks import ladder

TINY = "--max_steps 4 --eval.interval 2 --eval.max_windows 4 --eval.sample_tokens 0 --model.n_embd 16 --device cpu"


def test_two_rungs_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ladder, "OUT", tmp_path / "ladder")
    monkeypatch.setattr(ladder, "RUNGS", ladder.RUNGS[:2])
    monkeypatch.setattr(sys, "argv", ["ladder", "--data.source", "stories:level=1,size=20000", *TINY.split()])
    printed = []  # what stands on the screen before each rung
    climb = ladder.climb
    monkeypatch.setattr(ladder, "climb", lambda *given: printed.append(capsys.readouterr().out) or climb(*given))
    ladder.main()
    assert printed[0] == ""
    assert printed[1].startswith("| rung | loss after 4 steps |")
    assert "| 0 learned positions | " in printed[1]
    assert "| 1 rotary | " in capsys.readouterr().out
    assert (tmp_path / "ladder" / "ladder.json").is_file()


def test_help_and_a_source_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ladder", "--help"])
    with pytest.raises(SystemExit):
        ladder.main()
    assert "without a network" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["ladder", "--data.source", "not/there.txt"])
    with pytest.raises(SystemExit, match=r"--data\.source stories and --data\.source python need no network"):
        ladder.main()
