"""What a CUDA GPU must do as a CPU does it; skipped, in one sentence, where there is none."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from curves import losses, val_losses
from safetensors.torch import load_file
from steps import at_step, fail

from nanogpt_hub import cli
from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.generate import generate
from train import finetune, pretrain
from train.report import read_metrics

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: training on one is unproved"),
    pytest.mark.usefixtures("own_cache"),
]

TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(400))
TINY = (
    "--model.preset nanogpt --model.n_layer 2 --model.n_head 2 --model.n_embd 64 --model.block_size 32 "
    "--data.tokenizer char --max_steps 20 --batch_size 8 --log_interval 5 --eval.interval 10 --eval.max_windows 8 "
    "--eval.sample_tokens 8 --save.interval 10 --optim.warmup_steps 2 --optim.name adamw"
).split()
EAGER = ["--compile", "never"]


@pytest.fixture(autouse=True)
def _another_device() -> Iterator[None]:
    """Accelerate keeps one device and one precision in a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(text: Path, out: Path, *flags: str) -> int:
    return pretrain.main([*TINY, "--data.source", str(text), "--out_dir", str(out), *flags])


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory, own_cache) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    assert run(text, out, *EAGER, "--precision", "fp32") == 0
    AcceleratorState._reset_state(True)
    return out


def test_the_losses_are_those_of_a_cpu(plain, text, tmp_path):
    assert run(text, tmp_path / "cpu", "--device", "cpu", "--precision", "fp32") == 0
    assert losses(plain) == pytest.approx(losses(tmp_path / "cpu"), abs=2e-3)  # a GPU's float32 products are TF32's


@pytest.mark.parametrize("flags", [
    "", "--compile never", "--precision fp16 --compile never", "--optim.name muon --compile never",
    "--activation_checkpointing true", "--micro_batch_size 2 --compile never", "--model.dropout 0.1",
])  # fmt: skip
def test_every_precision_and_way_learns(plain, text, tmp_path, flags):
    assert run(text, tmp_path / "run", *flags.split()) == 0
    curve = val_losses(tmp_path / "run")
    assert curve[-1] < curve[0] - 0.2
    if "muon" not in flags and "dropout" not in flags:
        assert curve == pytest.approx(val_losses(plain), abs=0.03)


def test_experts_and_adapters(text, tmp_path):
    flags = ["--model.preset", "mixtral", "--model.n_expert", "4"]
    assert run(text, tmp_path / "experts", *flags) == 0
    assert val_losses(tmp_path / "experts")[-1] < val_losses(tmp_path / "experts")[0]
    AcceleratorState._reset_state(True)
    lora = "--optim.name adamw --lora.rank 2 --max_steps 10 --eval.interval 5 --batch_size 4 --compile never".split()
    given = [str(tmp_path / "experts" / "best"), "--data.source", str(text), "--out_dir", str(tmp_path / "tuned")]
    assert finetune.main(["--from", *given, *lora]) == 0


def test_a_stopped_run_goes_on(plain, text, tmp_path, monkeypatch):
    flags = [*EAGER, "--precision", "fp32"]
    with monkeypatch.context() as patch:
        at_step(patch, 13, fail(KeyboardInterrupt()))
        assert run(text, tmp_path / "run", *flags) == 130
    assert run(text, tmp_path / "run", *flags) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), abs=1e-5)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train_loss" in row]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    for name, weights in load_file(plain / "last" / "model.safetensors").items():
        got = load_file(tmp_path / "run" / "last" / "model.safetensors")[name]
        torch.testing.assert_close(got, weights, atol=1e-4, rtol=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run(text, tmp_path, capsys):
    flags = ["--optim.learning_rate", "1e30", "--eval.interval", "20", "--save.interval", "0", "--log_interval", "4"]
    assert run(text, tmp_path / "run", *flags, *EAGER) == 1
    said = capsys.readouterr().err
    assert "at step 1: stopped" in said or "at step 2: stopped" in said
    weights = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert all(math.isfinite(float(tensor.float().sum())) for tensor in weights.values())


def test_less_memory_than_a_batch_needs(text, tmp_path, capsys):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2.2e9) / total)
    wide = "--batch_size 4096 --micro_batch_size 4096 --model.n_embd 256 --max_steps 1 --eval.sample_tokens 0".split()
    try:
        assert run(text, tmp_path / "run", *wide, *EAGER) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: going on with micro_batch_size" in capsys.readouterr().out


def test_the_folder_writes_the_same_text_as_on_a_cpu(plain, capsys):
    texts = []
    for device in ("cuda", "cpu"):
        model, tokenizer = load_model(plain / "best", device=device)
        texts.append(generate(model, tokenizer, "line 1", temperature=0.0, max_new_tokens=40, seed=1).text)
    assert texts[0] == texts[1]
    for flags in ("", "--dtype bfloat16", "--speculate ngram", "--num-samples 3"):
        assert cli.main(["generate", str(plain / "best"), "--seed", "1", *flags.split()]) == 0
        assert "engine torch" in capsys.readouterr().err
