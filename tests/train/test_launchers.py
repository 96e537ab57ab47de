"""Training in two processes by the launchers, typed as README and docs/scale.md type it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, own_package

TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(60))
TINY = (
    "--device cpu --model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.block_size 16 --data.tokenizer byte "
    "--max_steps 2 --batch_size 4 --micro_batch_size 1 --eval.interval 2 --eval.max_windows 2 --eval.sample_tokens 4"
).split()
TWO = "configs/accelerate/two_cpu_processes.yaml"
LINES = [  # where a launcher's line is, how it begins, and what this machine needs: a free port, and no GPU
    ("README.md", "torchrun ", "--rdzv_backend c10d --rdzv_endpoint 127.0.0.1:0"),
    ("README.md", "accelerate launch -m ", f"--config_file {TWO} --main_process_port 0"),
    ("docs/scale.md", f"accelerate launch --config_file {TWO} ", "--main_process_port 0"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")
@pytest.mark.parametrize(("page", "start", "flags"), LINES)
def test_two_processes_train_as_it_is_typed(page, start, flags, text, tmp_path):
    (line,) = {*re.findall(rf"({start}[^`\n]*)", (ROOT / page).read_text(encoding="utf-8"))}
    words = shlex.split(line.replace(" ...", ""))
    module = words.index("-m")
    run = [*TINY, "--data.source", text, "--data.cache_dir", tmp_path / "cache", "--out_dir", tmp_path / "out"]
    launcher = [Path(sys.executable).with_name(words[0]), *words[1:module], *flags.split()]
    done = subprocess.run(
        [*launcher, *words[module:], *run], cwd=ROOT, env=own_package(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout
    assert (tmp_path / "out" / "last" / "model.safetensors").is_file()
