"""Nothing lost: damage shows, trouble with the disk is a sentence, one run a folder, sizes are checked in time."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from steps import at_step

from nanogpt_hub.model import GPTConfig
from nanogpt_hub.system.files import LEFTOVER, git_hash_of, remove_leftovers, replacing, sha256_of
from train import hardware, plan, pretrain, state, trainer
from train.config import TrainConfig
from train.data import TOKENS
from train.folder import RunLock, error_number
from train.plan import count_parameters
from train.report import read_metrics
from train.state import PREVIOUS, StateError, check_files, find_whole, read_facts, save_state, seal_fetched
from train.trainer import Trainer

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(60))
TINY = (
    "--model.preset nanogpt --model.n_layer 1 --model.n_head 2 --model.n_embd 8 --model.block_size 8 --max_steps 8 "
    "--data.tokenizer char --batch_size 4 --log_interval 3 --eval.interval 4 --eval.max_windows 4 --device cpu "
    "--eval.sample_tokens 4 --save.interval 2 --optim.warmup_steps 1 --optim.name adamw --optim.schedule constant"
).split()


@pytest.fixture(autouse=True)
def _cheap(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(trainer, "matmul_flops", lambda *_: 1e11)


def run(text: Path, out: Path, *flags: str) -> int:
    return pretrain.main([*TINY, "--data.source", str(text), "--out_dir", str(out), *flags])


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Path:
    """An uninterrupted run, to look at."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGPT_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert run(text, out) == 0
    return out


@pytest.fixture
def half(text, tmp_path, monkeypatch) -> Path:
    """A run that was asked to stop in its sixth step."""
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert run(text, tmp_path / "run") == 0
    return tmp_path / "run"


def measured(out: Path) -> list[dict]:
    timing = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in row.items() if k not in timing} for row in read_metrics(out / "metrics.jsonl")]


def weights(out: Path) -> bytes:
    return (out / "last" / "model.safetensors").read_bytes()


# ---- kills and damage ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_that_are_killed_and_files_that_are_damaged_at_random():
    command = [sys.executable, "-m", "tests.kill_harness", "kills", "damage", "--only", "adamw"]
    command += ["--every", "0", "--random", "5", "--damages", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures in" in done.stdout


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((300,), float(step))}


def test_a_state_knows_its_files_and_itself(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, {"step": step, "best_loss": 1.25}, tensors(step), tensors(step))
    assert read_facts(tmp_path, PREVIOUS)["step"] == 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert check_files(tmp_path, read_facts(tmp_path))
    model = tmp_path / "model-00000003.safetensors"
    data = bytearray(model.read_bytes())
    data[-5] ^= 1
    model.write_bytes(data)
    with pytest.raises(StateError, match="model-00000003"):
        check_files(tmp_path, read_facts(tmp_path))
    assert find_whole(tmp_path, "state.json") is None
    assert find_whole(tmp_path, PREVIOUS)["step"] == 2
    record = tmp_path / "state.json"
    record.write_text(record.read_text().replace("1.25", "1.24"))
    with pytest.raises(StateError, match=r"state\.json is damaged"):
        read_facts(tmp_path)
    seal_fetched(tmp_path)  # what came from the Hub was checked there
    assert read_facts(tmp_path)["best_loss"] == 1.24


def test_a_state_of_an_earlier_version_goes_on_and_says_what_is_not_checked(half, text, whole, capsys):
    record = half / "state" / "state.json"
    facts = json.loads(record.read_text())
    for name in ("sha256", "seal", "settings", "changes", "log", "recent"):
        del facts[name]
    del facts["fixed"][TOKENS]
    record.write_text(json.dumps(facts))
    (half / "state" / PREVIOUS).unlink()
    assert run(text, half) == 0
    said = capsys.readouterr().out
    assert "of an earlier version, without hashes" in said
    assert "which does not tell its text from another one of the same name and length" in said
    assert weights(half) == weights(whole)


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_tensors_of_another_model_are_refused_without_hashes_too(half, text, name, capsys):
    record = half / "state" / "state.json"
    facts = json.loads(record.read_text())
    del facts["sha256"], facts["seal"]
    record.write_text(json.dumps(facts))
    path = half / "state" / facts["files"][name]
    from safetensors.torch import save_file

    save_file({"foreign/step": torch.zeros(3)}, path)
    assert run(text, half) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_command_for_the_state_before_works(half, text, whole, capsys):
    files = read_facts(half / "state")["files"]
    (half / "state" / files["optimizer"]).write_bytes(b"")
    assert run(text, half) == 2
    err = capsys.readouterr().err
    assert files["optimizer"] in err
    assert "--resume previous" in err
    assert run(text, half, "--resume", "previous") == 0
    assert weights(half) == weights(whole)
    assert measured(half) == measured(whole)


def test_a_run_that_was_stopped_goes_on_to_the_same_metrics(half, text, whole):
    assert run(text, half) == 0
    assert measured(half) == measured(whole)
    assert [row["step"] for row in measured(half)] == [0, 3, 4, 6, 8]


@pytest.mark.parametrize("place", ["state", "last"])
def test_killed_before_the_first_state_stands_the_same_command_begins_again(place, text, tmp_path, monkeypatch, whole):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_state", killed) if place == "state" else None
        real = Trainer._save_folder
        patch.setattr(Trainer, "_save_folder", lambda self, name: killed() if name == place else real(self, name))
        with pytest.raises(Killed):
            run(text, out, "--save.interval", "6")
    assert (out / "best").is_dir()
    if place == "state":
        assert run(text, out, "--save.interval", "6", "--seed", "7") == 2  # another run would throw away this best/
    assert run(text, out, "--save.interval", "6") == 0
    assert weights(out) == weights(whole)


def test_a_finished_run_gets_its_last_model_back_and_loses_states_that_nothing_names(whole, text, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "last")
    shutil.copy(next((out / "state").glob("model-*")), out / "state" / "model-00000001.safetensors")
    assert run(text, out) == 0
    assert weights(out) == weights(whole)
    assert {path.name for path in (out / "state").iterdir()} == {path.name for path in (whole / "state").iterdir()}


def test_a_loss_curve_that_is_missing_is_drawn_when_the_run_goes_on(half, text):
    (half / "loss.png").unlink()
    assert run(text, half, "--eval.interval", "100") == 0
    assert (half / "loss.png").stat().st_size > 0


def test_best_is_not_silently_replaced_and_may_be_deleted(half, text, capsys):
    (half / "best" / "config.json").write_text("{")
    assert run(text, half) == 2
    assert "best is damaged" in capsys.readouterr().err
    shutil.rmtree(half / "best")
    assert run(text, half) == 0
    assert "best is missing; the next evaluation writes one" in capsys.readouterr().out
    assert (half / "best" / "model.safetensors").is_file()


# ---- the disk --------------------------------------------------------------------------------------------------------


def full(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(text, tmp_path, whole, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda _: patch.setattr(state, "save_file", full))
        assert run(text, out) == 1
    err = capsys.readouterr().err
    assert "the disk is full; a save needs" in err
    assert "training state of step 4: the same command goes on" in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert run(text, out) == 0
    assert weights(out) == weights(whole)
    assert measured(out) == measured(whole)
    assert not [path for path in out.rglob("*") if LEFTOVER.fullmatch(path.name)]


def test_no_room_for_a_first_save_is_refused_before_training(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "free_bytes", lambda _: 1000)
    assert run(text, tmp_path / "run") == 2
    assert "make room" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_vanishes_is_a_sentence(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    at_step(monkeypatch, 5, lambda _: shutil.rmtree(out))
    assert run(text, out) == 1
    err = capsys.readouterr().err
    assert f"the folder {out} has vanished" in err
    assert "Nothing of this run was saved" in err


def test_a_folder_that_may_not_be_written_is_a_sentence(half, text, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    real = os.open

    def forbidden(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(half)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", forbidden)
    assert run(text, half) == 2
    assert "Make it writable" in capsys.readouterr().err
    monkeypatch.undo()
    assert before == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}


def test_what_killed_runs_left_half_written_goes_at_the_next_start(half, text):
    left = [
        half / ".tmpAb12Cd",
        half / "state" / ".tmpAb12Cd",
        half / "best" / ".README.md.77.tmp",
        half / ".best.saving",
    ]
    for path in left:
        path.write_bytes(b"half")
    (half / "mine.tmp").write_bytes(b"a person's")
    assert run(text, half) == 0
    assert not any(path.exists() for path in left)
    assert (half / "mine.tmp").exists()


def test_files_are_replaced_whole_and_folders_appear_whole(tmp_path):
    with replacing(tmp_path / "folder") as aside:
        (aside / "inside").mkdir(parents=True)
        (aside / "inside" / "a").write_bytes(b"1")
    assert (tmp_path / "folder" / "inside" / "a").read_bytes() == b"1"
    with contextlib.suppress(RuntimeError), replacing(tmp_path / "b") as aside:
        aside.write_bytes(b"half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (tmp_path / ".b.1.tmp").write_bytes(b"")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_hashes_are_those_of_other_tools(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"hello\n")
    assert (
        sha256_of(path) == sha256_of(b"hello\n") == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    )
    assert git_hash_of(path) == git_hash_of(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert error_number(OSError(28, "full")) == error_number(SafetensorError("x (os error 28)")) == 28


# ---- one run at a time, and its end ----------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(half, text, capsys):
    with RunLock(half):
        assert run(text, half) == 2
        assert run(text, half, "--overwrite") == 2
    assert "another run is writing to" in capsys.readouterr().err
    assert run(text, half) == 0


def test_of_two_runs_that_make_the_same_folder_the_second_is_refused(tmp_path):
    with RunLock(tmp_path / "run") as first, RunLock(tmp_path / "run") as second:  # neither finds a folder yet
        first.claim()
        (tmp_path / "run" / "best").mkdir()
        with pytest.raises(ValueError, match="another run is writing"):
            second.claim()
    with RunLock(tmp_path / "new") as late:
        (tmp_path / "new" / "best").mkdir(parents=True)  # by a run that has ended meanwhile
        with pytest.raises(ValueError, match="another run has begun"):
            late.claim()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no terminals that hang up")
def test_a_closed_terminal_saves_and_ends(text, tmp_path, whole):
    import pty

    code = (
        "import os, sys, time\nfrom train import pretrain, trainer\nstep = trainer.Trainer._train_step\n"
        "def waiting(self):\n"
        "    if self.progress.step == 5:\n"
        "        print('HERE', flush=True)\n"
        "        while os.isatty(1): time.sleep(0.05)\n"
        "        time.sleep(0.5)\n"
        "    return step(self)\n"
        "trainer.Trainer._train_step = waiting\nsys.exit(pretrain.main(sys.argv[1:]))\n"
    )
    out = tmp_path / "run"
    command = [sys.executable, "-c", code, *TINY, "--data.source", str(text), "--out_dir", str(out)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe(command[0], command, {**os.environ, "OMP_NUM_THREADS": "1"})
    said = b""
    while b"HERE" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)  # the shell's window is closed
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read_facts(out / "state")["step"] == 6
    assert run(text, out) == 0
    assert weights(out) == weights(whole)


def test_a_second_signal_ends_at_once_in_a_sentence(text, tmp_path, monkeypatch, capsys):
    def twice(_):
        for _ in range(2):  # apart from each other: two at once may count as one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    at_step(monkeypatch, 5, twice)
    assert run(text, tmp_path / "run") == 130
    assert "stopped at once" in capsys.readouterr().err


def test_an_early_stop_stays_where_it_is(text, tmp_path, capsys):
    flags = "--optim.learning_rate 5 --optim.grad_clip 0 --eval.interval 1 --eval.patience 2".split()
    assert run(text, tmp_path / "run", *flags) == 0
    before, step = weights(tmp_path / "run"), read_facts(tmp_path / "run" / "state")["step"]
    assert step < 8
    assert run(text, tmp_path / "run", *flags) == 0
    assert "Raise --eval.patience" in capsys.readouterr().out
    assert (weights(tmp_path / "run"), read_facts(tmp_path / "run" / "state")["step"]) == (before, step)


# ---- said and done ---------------------------------------------------------------------------------------------------


def test_going_on_with_another_learning_rate_is_said_recorded_and_told(half, text, capsys):
    assert run(text, half, "--optim.learning_rate", "0.003") == 0
    said = capsys.readouterr().out
    assert "from step 6 on: optim.learning_rate 0.003 (before: 0.01)" in said
    rates = {row["step"]: row["learning_rate"] for row in measured(half) if "learning_rate" in row}
    assert rates == {3: 0.01, 4: 0.01, 6: 0.01, 8: 0.003}
    change = {"step": 6, "name": "optim.learning_rate", "from": 0.01, "to": 0.003}
    assert read_facts(half / "state")["changes"] == [change]
    card = (half / "last" / "README.md").read_text(encoding="utf-8")
    assert "optim.learning_rate was 0.01 before step 6, 0.003 after" in card
    assert (half / "config.yaml").read_text().startswith("# from step 6 on: optim.learning_rate 0.003 (before: 0.01)\n")
    assert run(text, half, "--optim.learning_rate", "0.003", "--max_steps", "10") == 0
    assert [c["name"] for c in read_facts(half / "state")["changes"]] == ["optim.learning_rate", "max_steps"]


def test_a_run_that_learned_nothing_does_not_end_with_a_best_model(text, tmp_path, capsys):
    assert run(text, tmp_path / "run", "--optim.learning_rate", "1e9") in (0, 1)
    out, err = capsys.readouterr()
    assert "nothing was learned" in out or "stopped; try a lower learning rate" in err
    assert "best model:" not in out
    assert "best validation loss" not in out


def test_absurd_sizes_are_refused_before_a_weight_is_made(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "GPT", None)
    for flags in (
        "--model.n_layer 100 --model.n_embd 8192 --model.n_head 64",
        "--model.n_embd 1000000000000 --model.n_head 2",
        "--model.n_layer 1000000000",
        "--model.block_size 100000000000",
        "--batch_size 100000000000000",
    ):
        assert run(text, tmp_path / "run", *flags.split()) == 2
        err = capsys.readouterr().err
        assert "choose a smaller" in err, err
        assert not (tmp_path / "run").exists()


def test_parameters_are_counted_without_a_model():
    for config in (
        GPTConfig(vocab_size=50, n_layer=3, n_embd=16, n_head=2),
        GPTConfig.preset("llama", "1m", vocab_size=9),
    ):
        from nanogpt_hub.model import GPT

        assert count_parameters(config) == GPT(config).num_params()


def test_limits_of_a_container_count(tmp_path):
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    for place, content in (("a/b", "max\n"), ("a", "5000000\n"), ("", "")):
        (tmp_path / "root" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / place / "memory.max").write_text(content)
    assert hardware.cgroup_limits(tmp_path / "cgroup", tmp_path / "root") == [5000000]
    (tmp_path / "cgroup").write_text("9:name=systemd:/\n4:memory:/gone\n")
    (tmp_path / "root" / "memory").mkdir()
    (tmp_path / "root" / "memory" / "memory.limit_in_bytes").write_text("77\n")
    assert hardware.cgroup_limits(tmp_path / "cgroup", tmp_path / "root") == [77]
    assert hardware.cgroup_limits(tmp_path / "none", tmp_path) == []


def test_a_batch_is_split_so_that_it_fits_the_memory(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "bytes_needed", lambda config, gpt, micro, *_: micro * 10)
    monkeypatch.setattr(plan, "memory_bytes", lambda _: 25)
    monkeypatch.setattr(pretrain, "check_fits", lambda *_: None)
    assert run(text, tmp_path / "run", "--max_steps", "1") == 0
    assert "(2 x 2 a process)" in capsys.readouterr().out


def test_several_gpus_take_what_fits_by_the_estimate(monkeypatch):
    monkeypatch.setattr(plan, "bytes_needed", lambda config, gpt, micro, *_: micro * 10)
    monkeypatch.setattr(plan, "memory_bytes", lambda _: 50)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    devices = [(1, "cuda"), (2, "cuda"), (2, "cpu")]
    config = TrainConfig(batch_size=16)
    assert [plan.micro_batch_size(config, None, world, "fp32", device) for world, device in devices] == [16, 4, 2]
    config = TrainConfig(batch_size=16, micro_batch_size=8)
    assert [plan.micro_batch_size(config, None, world, "fp32", device) for world, device in devices] == [8, 8, 8]
