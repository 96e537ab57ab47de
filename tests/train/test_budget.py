"""A run by the clock: how many steps it gets, that measuring leaves no trace, that a resume keeps the number."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from curves import losses

from train import budget, pretrain

TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(400))
TINY = (
    "--model.preset nanogpt --model.n_layer 2 --model.n_head 2 --model.n_embd 16 --model.block_size 16 "
    "--model.dropout 0.1 --data.tokenizer char --batch_size 8 --log_interval 1 --eval.interval 10 "
    "--eval.max_windows 8 --eval.sample_tokens 8 --save.interval 10 --optim.warmup_steps 2 --device cpu"
).split()
CLOCK = """
from train import budget
budget.median = lambda taken: 0.001  # seconds of a step, and of each half of an evaluation, on any machine
budget.seconds_of = lambda work: (work(), 0.001)[1]
"""
SAID = re.compile(r"time: [\d.]+ minutes hold ([\d,]+) steps at [\d,]+ tokens/s, evaluations included; max_steps is")


@pytest.fixture
def flags(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "fox.txt"
    text.write_text(TEXT, encoding="utf-8")
    return [*TINY, "--data.source", str(text)]


@pytest.fixture
def clock(monkeypatch) -> None:
    monkeypatch.setattr(budget, "median", lambda taken: 0.001)
    monkeypatch.setattr(budget, "seconds_of", lambda work: (work(), 0.001)[1])


def weights(out: Path) -> bytes:
    return (out / "last" / "model.safetensors").read_bytes()


def settings(out: Path) -> dict:
    return yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_minutes_fix_the_steps_as_if_they_had_been_given_and_change_nothing_else(
    flags, clock, tmp_path, optimizer, capsys
):
    flags += ["--optim.name", optimizer, "--optim.schedule", "cosine"]
    assert pretrain.main([*flags, "--minutes", "0.0005", "--out_dir", str(tmp_path / "timed")]) == 0
    steps = int(SAID.search(capsys.readouterr().out)[1].replace(",", ""))
    assert settings(tmp_path / "timed")["max_steps"] == steps == 21 == len(losses(tmp_path / "timed"))
    training = json.loads((tmp_path / "timed" / "run.json").read_text(encoding="utf-8"))["training"]
    assert training["hyperparameters"]["max_steps"] == steps
    assert training["command"].endswith(f"--max_steps {steps}")
    assert "minutes" not in training["command"]
    assert pretrain.main([*flags, "--max_steps", str(steps), "--out_dir", str(tmp_path / "counted")]) == 0
    assert weights(tmp_path / "timed") == weights(tmp_path / "counted")
    assert losses(tmp_path / "timed") == losses(tmp_path / "counted")
    assert settings(tmp_path / "timed") == settings(tmp_path / "counted")


KILLED = (
    CLOCK
    + """
import os, signal, sys
from train import pretrain, trainer
step = trainer.Trainer._train_step
def killed_at_13(self):
    if self.progress.step == 13:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self)
trainer.Trainer._train_step = killed_at_13
sys.exit(pretrain.main(sys.argv[1:]))
"""
)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that can be handled")
def test_a_resume_keeps_the_steps_that_the_minutes_were(flags, clock, tmp_path, capsys):
    flags += ["--minutes", "0.0005", "--out_dir", str(tmp_path / "run")]
    command = [sys.executable, "-c", KILLED, *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps = settings(tmp_path / "run")["max_steps"]
    assert steps == 21
    assert len(losses(tmp_path / "run")) == 14
    assert pretrain.main(flags) == 0  # the same command again
    assert f"time: the run keeps the {steps:,} steps that it began with" in capsys.readouterr().out
    assert settings(tmp_path / "run")["max_steps"] == steps == len(losses(tmp_path / "run"))
    training = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["training"]
    assert training["command"].endswith(f"--max_steps {steps}")
    assert "minutes" not in training["command"]
    flags[flags.index("--minutes") :] = ["--max_steps", str(steps), "--out_dir", str(tmp_path / "counted")]
    assert pretrain.main(flags) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "counted")


DISAGREEING = """
import os, sys
from train import budget, pretrain
budget.median = lambda taken: 0.001 * (1 + int(os.environ["RANK"]))  # 1.5 ms a step, on the average
budget.seconds_of = lambda work: 0.01  # an evaluation; on the main process a sample, too
sys.exit(pretrain.main(sys.argv[1:]))
"""


def test_processes_that_measure_different_times_take_the_same_number_of_steps(ranks, flags, tmp_path):
    script = tmp_path / "disagreeing.py"
    script.write_text(DISAGREEING, encoding="utf-8")
    done = ranks.run(str(script), *flags, "--minutes", "0.002", "--out_dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses(tmp_path / "two")) == settings(tmp_path / "two")["max_steps"] == 30


def test_steps_and_evaluations_fill_the_time(monkeypatch):
    class FakeTrainer:
        class config:
            class eval:
                interval = 100

    monkeypatch.setattr(budget, "nothing_changed", lambda trainer: contextlib.nullcontext())
    monkeypatch.setattr(budget, "timed_step", lambda trainer, restore: (0.01, 100.0))
    monkeypatch.setattr(budget, "timed_evaluation", lambda trainer: 0.5)
    for seconds in (3, 10, 10.4, 100):
        steps, speed = budget.steps_in(seconds, FakeTrainer)
        evaluations = 1 + -(-steps // 100)
        assert speed == 10_000
        assert seconds - 0.6 < (0.01 * steps + 0.5 * evaluations) / budget.KEPT <= seconds + 1e-9
    with pytest.raises(ValueError, match="are too few: a step takes"):
        budget.steps_in(0.9, FakeTrainer)


def test_a_flag_for_steps_wins_over_the_minutes_of_a_file_and_two_flags_are_refused(flags, tmp_path, capsys):
    config = tmp_path / "short.yaml"
    config.write_text("minutes: 5\n", encoding="utf-8")
    assert pretrain.main([str(config), *flags, "--max_steps", "3", "--out_dir", str(tmp_path / "run")]) == 0
    assert len(losses(tmp_path / "run")) == 3
    assert settings(tmp_path / "run")["minutes"] == 0
    with pytest.raises(SystemExit):
        pretrain.main([*flags, "--max_steps", "3", "--minutes", "1"])
    assert "give one of them" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pretrain.main([*flags, "--minutes", "-1"])
    assert "minutes is -1" in capsys.readouterr().err
