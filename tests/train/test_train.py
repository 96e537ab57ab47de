"""Training runs from their entry points: exactness, interruption, refusals, and what a run leaves behind."""

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from curves import losses, val_losses
from safetensors.torch import load_file

from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.corpus import stories
from nanogpt_hub.lens import attention_maps
from nanogpt_hub.runs import read_run
from train import pretrain, trainer
from train.config import make_parser, parse
from train.hardware import choose_precision
from train.report import read_metrics
from train.state import load_tensors, read_facts, save_state
from train.trainer import LossOnly, Trainer

pytestmark = pytest.mark.usefixtures("own_cache")
TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(400))
TINY = (  # a run of a second
    "--model.preset nanogpt --model.n_layer 2 --model.n_head 2 --model.n_embd 16 --model.block_size 16 "
    "--data.tokenizer char --max_steps 20 --batch_size 8 --log_interval 1 --eval.interval 10 --eval.max_windows 8 "
    "--eval.sample_tokens 8 --save.interval 10 --optim.warmup_steps 2 --device cpu"
).split()


def run(text: Path, out: Path, *flags: str) -> int:
    return pretrain.main([*TINY, "--data.source", str(text), "--out_dir", str(out), *flags])


def weights(out: Path) -> bytes:
    return (out / "last" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory) -> Path:
    """An uninterrupted run of 20 steps with dropout."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert run(text, out, "--model.dropout", "0.1") == 0
    return out


# ---- what a run leaves behind ----------------------------------------------------------------------------------------


def test_a_run_leaves_models_state_metrics_curve_samples_config_and_facts(plain):
    model, tokenizer = load_model(plain / "best")
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    assert model.config.n_embd == 16
    rows = read_metrics(plain / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(21))
    assert {"step", "tokens", "seconds", "train_loss", "val_loss", "learning_rate", "tokens_per_second"} <= set(
        rows[10]
    )
    assert rows[20]["tokens"] == 20 * 8 * 16
    assert rows[20]["val_loss"] < rows[0]["val_loss"]
    assert (plain / "loss.png").read_bytes().startswith(b"\x89PNG")
    kept = [f"step-{s:06d}{what}" for s in (0, 10, 20) for what in ("-attention.json", ".txt")]
    assert sorted(path.name for path in (plain / "samples").iterdir()) == kept
    maps = read_run(plain).attention(20)
    assert (maps["layers"], maps["heads"], len(maps["tokens"])) == (2, 2, 16)
    expected = attention_maps(load_model(plain / "last")[0], tokenizer.encode("".join(maps["tokens"])))
    read = np.frombuffer(base64.b64decode(maps["maps"][1][0]), np.uint8).reshape(16, 16)
    assert np.abs(read / 255 - expected[1, 0].numpy()).max() < 0.5 / 255 + 1e-3
    assert "n_layer: 2" in (plain / "config.yaml").read_text(encoding="utf-8")
    facts = json.loads((plain / "run.json").read_text(encoding="utf-8"))
    assert facts["training"]["steps"] == 20
    assert facts["evaluation"]["val_loss"] == pytest.approx(rows[20]["val_loss"])
    card = (plain / "best" / "README.md").read_text(encoding="utf-8")
    assert "fox.txt" in card
    assert str(plain.parent) not in card  # where somebody keeps files is nobody else's business


def test_the_stored_config_starts_the_same_run_again(plain, text, tmp_path):
    assert pretrain.main([str(plain / "config.yaml"), "--out_dir", str(tmp_path / "again")]) == 0
    assert weights(tmp_path / "again") == weights(plain)


def test_best_is_the_best_evaluation_and_patience_ends_the_run(text, tmp_path, capsys):
    flags = "--optim.name adamw --optim.learning_rate 1 --eval.interval 2 --eval.patience 2 --optim.grad_clip 0".split()
    assert run(text, tmp_path / "run", *flags) == 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in row]
    best = min(rows, key=lambda row: row["val_loss"])
    assert rows[-1]["step"] == best["step"] + 4 < 20
    assert "early stop" in capsys.readouterr().out
    best_weights = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert any(
        not torch.equal(best_weights[k], v)
        for k, v in load_file(tmp_path / "run" / "last" / "model.safetensors").items()
    )


# ---- exactness -------------------------------------------------------------------------------------------------------


def test_any_split_into_micro_batches_gives_the_same_losses(text, tmp_path):
    curves = []
    for size in (8, 4, 1):
        assert run(text, tmp_path / str(size), "--micro_batch_size", str(size), "--optim.name", "adamw") == 0
        curves.append(losses(tmp_path / str(size)))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-5)


def test_two_processes_give_the_same_losses_as_one(ranks, text, tmp_path):
    flags = [*TINY, "--data.source", str(text), "--optim.name", "adamw", "--micro_batch_size", "2"]
    assert pretrain.main([*flags, "--out_dir", str(tmp_path / "one")]) == 0
    done = ranks.run("-m", "train.pretrain", *flags, "--out_dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes" in done.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


KILLED = """
import os, signal, sys
from train import pretrain, trainer
step = trainer.Trainer._train_step
def killed_at_13(self):
    if self.progress.step == 13:
        os.kill(os.getpid(), {signal})
    return step(self)
trainer.Trainer._train_step = killed_at_13
sys.exit(pretrain.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_twenty_steps_are_ten_a_kill_and_ten_more_bit_for_bit(plain, text, tmp_path, number, capsys):
    out = tmp_path / "run"
    flags = [*TINY, "--model.dropout", "0.1", "--data.source", str(text), "--out_dir", str(out)]
    command = [sys.executable, "-c", KILLED.format(signal=int(number)), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0), done.stderr[-2000:]
    assert read_facts(out / "state")["step"] == (10 if number == signal.SIGKILL else 14)
    assert pretrain.main(flags) == 0  # the same command again
    assert "resuming at step" in capsys.readouterr().out
    assert weights(out) == weights(plain)
    assert losses(out) == losses(plain)


def test_a_finished_run_is_left_alone_and_can_be_extended(plain, text, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ("--model.dropout", "0.1", "--optim.schedule", "constant")
    assert run(text, out, *flags, "--max_steps", "4") == 0
    before = weights(out)
    assert run(text, out, *flags, "--max_steps", "4") == 0
    assert "finished" in capsys.readouterr().out
    assert weights(out) == before
    assert run(text, out, *flags, "--max_steps", "8", "--resume") == 0
    assert sorted(losses(out)) == list(range(1, 9))


def test_a_save_that_dies_at_any_rename_leaves_a_whole_state(tmp_path, monkeypatch):
    class Died(BaseException):
        pass

    def tensors(step):
        return {"w": torch.full((3,), float(step))}

    save_state(tmp_path, {"step": 1}, tensors(1), tensors(1))
    real, seen = os.replace, []
    for dies_at in range(3):
        calls = iter(range(10))

        def dying(source, target, calls=calls, dies_at=dies_at):
            if next(calls) == dies_at:
                raise Died
            real(source, target)

        monkeypatch.setattr(os, "replace", dying)
        monkeypatch.setattr(Path, "replace", lambda self, target: os.replace(self, target))
        with pytest.raises(Died):
            save_state(tmp_path, {"step": 2}, tensors(2), tensors(2))
        facts = read_facts(tmp_path)
        model, optimizer = load_tensors(tmp_path, facts)
        assert model["w"][0] == optimizer["w"][0] == facts["step"]
        seen.append(facts["step"])
    assert seen == [1, 1, 1]
    monkeypatch.undo()
    save_state(tmp_path, {"step": 3}, tensors(3), tensors(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00000001.safetensors", "model-00000003.safetensors", "optimizer-00000001.safetensors",
        "optimizer-00000003.safetensors", "previous.json", "state.json",
    ]  # fmt: skip


# ---- trouble ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_update_and_keeps_the_last_good_weights(
    text, tmp_path, monkeypatch, capsys
):
    step = Trainer._train_step

    def poisoned(self):
        if self.progress.step == 15:
            self.gpt.ln_f.weight.data.fill_(float("nan"))
        return step(self)

    monkeypatch.setattr(Trainer, "_train_step", poisoned)
    assert run(text, tmp_path / "run") == 1
    assert "step 15" in capsys.readouterr().err
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "run" / "last" / "model.safetensors").values())


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(text, tmp_path, monkeypatch, capsys):
    assert run(text, tmp_path / "roomy", "--optim.name", "adamw") == 0
    forward = LossOnly.forward

    def cramped(self, idx, targets):
        if len(idx) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, targets)

    monkeypatch.setattr(LossOnly, "forward", cramped)
    assert run(text, tmp_path / "cramped", "--optim.name", "adamw") == 0
    assert "micro_batch_size 2, 4 times per step" in capsys.readouterr().out
    assert losses(tmp_path / "cramped") == pytest.approx(losses(tmp_path / "roomy"), abs=1e-5)
    monkeypatch.setattr(LossOnly, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    assert run(text, tmp_path / "tiny") == 1
    assert "micro_batch_size 1:" in capsys.readouterr().err


def test_evaluation_takes_so_many_tokens_at_a_time_whatever_the_batch(text, tmp_path, monkeypatch):
    assert run(text, tmp_path / "usual") == 0
    seen, loss_of = [], trainer.summed_loss

    def noting(gpt, idx, targets):
        if not torch.is_grad_enabled():
            seen.append(idx.numel())
        return loss_of(gpt, idx, targets)

    monkeypatch.setattr(trainer, "summed_loss", noting)
    monkeypatch.setattr(trainer, "BATCH_TOKENS", 3 * 16 + 1)
    assert run(text, tmp_path / "small") == 0
    assert seen == [48, 48, 32] * 3  # three evaluations of 8 windows
    assert val_losses(tmp_path / "small") == pytest.approx(val_losses(tmp_path / "usual"), abs=1e-6)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


BAD = {
    "empty file": (lambda d: [write(d / "a.txt", "")], "empty"),
    "too little text": (lambda d: [write(d / "a.txt", "abc")], "block_size"),
    "binary file": (lambda d: [write(d / "a.txt", b"\x00\x01\x02" * 100)], "NUL"),
    "missing file": (lambda d: [d / "no.txt"], "no.txt"),
    "misspelt column": (lambda d: [write(d / "a.jsonl", '{"text": "abc"}\n'), "--data.text_column", "txet"], "txet"),
    "wrong tokenizer": (lambda d: [write(d / "a.txt", TEXT), "--data.tokenizer", "bpm:300"], "bpm"),
    "odd heads": (lambda d: [write(d / "a.txt", TEXT), "--model.n_head", "3"], "n_head 3"),
    "batch over processes": (lambda d: [write(d / "a.txt", TEXT), "--micro_batch_size", "3"], "micro_batch_size"),
    "fp16 on a CPU": (lambda d: [write(d / "a.txt", TEXT), "--precision", "fp16"], "fp16"),
    "nothing to resume": (lambda d: [write(d / "a.txt", TEXT), "--resume"], "no training state"),
    "tracker not there": (lambda d: [write(d / "a.txt", TEXT), "--trackers", "[wandb]"], "wandb"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_training(case, tmp_path, capsys):
    make, expected = BAD[case]
    source, *flags = make(tmp_path)
    assert run(source, tmp_path / "run", *map(str, flags)) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert expected in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag", ["--optim.learning_rat=1", "--model.n_layer=many", "--max_steps=0", "--optim.beta1=1.5"]
)
def test_flags_that_mean_nothing_are_refused(flag, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(text, tmp_path / "run", flag)
    assert ended.value.code == 2
    assert flag.partition("=")[0].lstrip("-").split(".")[-1] in capsys.readouterr().err


def test_unknown_keys_in_a_yaml_are_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain.main([str(write(tmp_path / "x.yaml", "optim:\n  betas: 3\n"))])
    assert "betas" in capsys.readouterr().err


def test_another_runs_folder_is_not_overwritten_by_accident(plain, text, capsys):
    before = weights(plain)
    assert run(text, plain, "--model.dropout", "0.1", "--seed", "2") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert weights(plain) == before


AMX = {"cpu_name": "Intel(R) Xeon(R)", "avx512_bf16": True, "amx_bf16": True}
NO_AMX = {**AMX, "amx_bf16": False}
ZEN_4 = {"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}


@pytest.mark.parametrize(
    ("cpu", "n_embd", "precision"),
    [
        (AMX, 64, "fp32"), (AMX, 128, "bf16"), (ZEN_4, 64, "fp32"), (ZEN_4, 128, "bf16"), (NO_AMX, 768, "fp32"),
        ({}, 768, "fp32"),
    ],
)  # fmt: skip
def test_a_cpu_computes_in_bf16_where_that_is_faster(cpu, n_embd, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert choose_precision("auto", "cpu", n_embd)[0] == precision
    assert choose_precision("fp32", "cpu", n_embd)[0] == "fp32"


# ---- a text whose entropy is known -----------------------------------------------------------------------------------


def test_a_run_on_stories_tells_how_far_it_is_from_the_best_possible_loss(tmp_path, capsys):
    assert run("stories:level=2,size=20000", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    evaluation = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["evaluation"]
    floor = evaluation["floor_loss"]
    known = stories.entropy(2)
    assert floor == pytest.approx(known.nats_per_token(known.characters + 1), rel=0.02)  # and an end-of-text each
    assert f"baseline: entropy of the text, the best possible, loss {floor:.4f}" in printed
    assert f"{evaluation['val_loss'] - floor:.4f} above the entropy of the text" in printed
    card = (tmp_path / "run" / "best" / "README.md").read_text(encoding="utf-8")
    assert f"| the entropy of the text: no model can do better | {floor:.4f} |" in card
    assert "stories of level 2" in card


def test_the_folder_of_a_run_on_stories_has_a_name_that_every_system_takes():
    config, _ = parse(make_parser("train.pretrain", ""), ["--data.source", "stories:level=2,seed=3"])
    assert config.out_dir == "out/stories-level-2-seed-3"
