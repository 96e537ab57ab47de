"""Several processes, by gloo on this machine: a model cut over them, nodes without a common disk, lost peers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from curves import losses, val_losses
from helpers import own_package
from ranks import Ranks, free_port
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nanogpt_hub.checkpoint import load_model
from train import finetune, pretrain, processes
from train.config import make_parser, parse
from train.state import read_facts

pytestmark = pytest.mark.usefixtures("own_cache")

TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(400))
TINY = (
    "--model.n_layer 3 --model.n_head 2 --model.n_embd 16 --model.block_size 16 --data.tokenizer char --batch_size 8 "
    "--micro_batch_size 4 --log_interval 1 --eval.interval 10 --eval.max_windows 9 --eval.sample_tokens 8 "
    "--save.interval 10 --optim.warmup_steps 2 --optim.schedule constant --device cpu --precision fp32"
).split()
RUNS = {  # untied and tied, with and without learned positions, biases and weights of norms
    "muon": "--model.preset nanochat --model.n_kv_head 1 --max_steps 20",
    "adamw": "--model.preset gpt2 --optim.name adamw --max_steps 20 --activation_checkpointing true "
    "--micro_batch_size 2 --optim.weight_decay 0.1",
    "half": "--model.preset nanochat --model.n_kv_head 1 --max_steps 10",
    "experts": "--model.preset mixtral --model.n_kv_head 1 --model.n_expert 4 --model.n_inner 16 --max_steps 20 "
    "--eval.interval 5",
}
LORA = "--optim.name adamw --lora.rank 2 --max_steps 10 --eval.interval 10 --device cpu --precision fp32".split()
COMPILED = """
import functools, sys
import torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # traces, and leaves out the C++ compiler
from train import pretrain
sys.exit(pretrain.main(sys.argv[1:]))
"""
PRETRAIN, FINETUNE = ("-m", "train.pretrain"), ("-m", "train.finetune")
TOKEN = "hf_AliceSecretToken0123456789"


def torchrun(*words: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command = [*launch, "--rdzv_endpoint", "127.0.0.1:0", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=own_package())


@pytest.fixture(scope="module", autouse=True)
def _early(ranks) -> None:
    """The processes import while one process trains."""


def flags_of(name: str, text: Path, out: Path) -> list[str]:
    return [*TINY, "--data.source", str(text), *RUNS[name].split(), "--out_dir", str(out)]


def lora_flags(text: Path, base: Path, out: Path) -> list[str]:
    more = ["--save.interval", "5", "--batch_size", "8", "--log_interval", "1", "--eval.max_windows", "5"]
    return [*LORA, *more, "--from", str(base), "--data.source", str(text), "--out_dir", str(out)]


@pytest.fixture(scope="module")
def one(text, tmp_path_factory) -> Path:
    """The runs by one process, and a fine-tune of the first of them."""
    place = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGPT_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for name in RUNS:
            assert pretrain.main(flags_of(name, text, place / name)) == 0
        assert finetune.main(lora_flags(text, place / "muon" / "best", place / "lora")) == 0
    return place


@pytest.fixture(scope="module")
def sharded(ranks, one, text, tmp_path_factory) -> Path:
    """The same by two processes with the model cut over them; `taken` goes on from what one process began, and of
    `experts` one process makes the steps in the middle."""
    place = tmp_path_factory.mktemp("sharded")
    shutil.copytree(one / "half", place / "taken")
    script = place / "compiled.py"
    script.write_text(COMPILED)
    compiled = ["--max_steps", "6", "--activation_checkpointing", "true", "--compile", "always"]
    jobs = [(*PRETRAIN, *flags_of(name, text, place / name)) for name in ("muon", "adamw", "half")]
    jobs.append((*PRETRAIN, *flags_of("muon", text, place / "taken")))
    jobs.append((str(script), *flags_of("muon", text, place / "compiled"), *compiled))
    jobs.append((*FINETUNE, *lora_flags(text, one / "muon" / "best", place / "lora")))
    jobs += [(*PRETRAIN, *flags_of("experts", text, place / "experts"), "--max_steps", n) for n in ("5", "10", "20")]
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    for words in jobs:
        n = 1 if words[-1] == "10" else 2
        done = ranks.run(*words, *(["--parallel.shard", "true"] if n == 2 else []), n=n, NANOGPT_HUB_CACHE=cache)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert done.stdout.count("2 processes, the model cut over them") == n - 1
        assert done.stdout.count("compiling the model") == (words[0] == str(script))
        assert "does not work" not in done.stdout
    return place


@pytest.mark.parametrize("name", ["muon", "adamw", "experts"])
def test_twenty_steps_of_a_sharded_model_are_those_of_one_process(one, sharded, name):
    assert sorted(losses(sharded / name)) == list(range(1, 21))
    assert losses(sharded / name) == pytest.approx(losses(one / name), abs=1e-6)
    assert val_losses(sharded / name) == pytest.approx(val_losses(one / name), abs=1e-6)
    first = read_facts(one / name / "state"), read_facts(sharded / name / "state")
    for part in ("model", "optimizer"):
        mine, other = (load_file(place / name / "state" / facts["files"][part])
                       for place, facts in zip((one, sharded), first, strict=True))  # fmt: skip
        assert {key: (t.shape, t.dtype) for key, t in mine.items()} == {k: (t.shape, t.dtype) for k, t in other.items()}
        for key, tensor in mine.items():  # keys' biases have no gradient but rounding, which AdamW makes large
            if "c_attn.bias" not in key:
                torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=2e-5, msg=key)


def test_the_first_weights_are_those_of_an_unsharded_run(one, sharded):
    samples = [(place / "muon" / "samples" / "step-000000.txt").read_text() for place in (one, sharded)]
    assert samples[0] == samples[1]


def test_adapters_are_trained_alone(one, sharded):
    assert losses(sharded / "lora") == pytest.approx(losses(one / "lora"), abs=1e-6)
    weights = load_file(sharded / "lora" / "last" / "model.safetensors")
    assert weights.keys() == load_file(one / "muon" / "last" / "model.safetensors").keys()
    for name, tensor in load_file(one / "lora" / "last" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


def test_compiled_layers_compute_the_same(one, sharded):
    first = {step: loss for step, loss in losses(one / "muon").items() if step <= 6}
    assert losses(sharded / "compiled") == pytest.approx(first, abs=1e-6)


def test_a_run_of_one_process_goes_on_sharded(one, sharded):
    assert losses(sharded / "taken") == pytest.approx(losses(one / "muon"), abs=1e-6)


def test_a_sharded_run_goes_on_in_one_process(one, sharded, text, tmp_path, capsys):
    shutil.copytree(sharded / "half", tmp_path / "half")
    assert pretrain.main(flags_of("muon", text, tmp_path / "half")) == 0
    assert "resuming at step 10" in capsys.readouterr().out
    assert losses(tmp_path / "half") == pytest.approx(losses(one / "muon"), abs=1e-6)


def test_three_processes_began_what_two_go_on_with(ranks, text, tmp_path):
    """Where memory decides, a micro-batch of three processes, 8 of 24, need not divide the 12 of two."""
    flags = [*flags_of("adamw", text, tmp_path / "run"), "--batch_size", "24", "--micro_batch_size", "0"]
    flags += ["--parallel.shard", "true", "--parallel.timeout_minutes", "1", "--eval.interval", "3"]
    for n, steps, split in ((3, "3", "(1 x 8 a process)"), (2, "6", "(2 x 6 a process)")):
        done = ranks.run(*PRETRAIN, *flags, "--max_steps", steps, n=n)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert split in done.stdout
    assert pretrain.main([*flags, "--max_steps", "6", "--out_dir", str(tmp_path / "one")]) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)


@pytest.mark.parametrize("name", ["muon", "adamw", "experts"])
def test_transformers_loads_what_was_sharded(sharded, name):
    model, tokenizer = load_model(sharded / name / "best")
    assert bool(model.config.n_expert) == (name == "experts")
    plain = {"experts_implementation": "eager"} if name == "experts" else {}  # PyTorch 2.8 lacks the other one's kernel
    theirs = AutoModelForCausalLM.from_pretrained(sharded / name / "best", **plain).eval()
    assert (theirs.config.model_type == "mixtral") == (name == "experts")
    ids = torch.tensor([tokenizer.encode("the quick brown")])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids)[0], rtol=1e-4, atol=1e-5)


def test_bf16_and_the_launchers_fsdp_and_a_push(hub, ranks, text, tmp_path):
    hub.add_user("alice", TOKEN)
    flags = [*flags_of("adamw", text, tmp_path / "two"), "--precision", "bf16", "--max_steps", "10"]
    push = ["--hub.repo_id", "alice/fox", "--hub.push_steps", "true", "--hub.minutes", "0", "--hub.license", "mit"]
    launcher = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "HF_TOKEN": TOKEN}
    done = ranks.run(*PRETRAIN, *flags, *push, **launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the model cut over them; precision bf16" in done.stdout
    assert {"step-000000", "step-000010"} <= set(hub.repo("alice/fox").tags)
    assert "model.safetensors" in hub.repo("alice/fox").files()
    AcceleratorState._reset_state(True)  # Accelerate keeps one precision in a process
    try:
        assert pretrain.main([*flags, "--out_dir", str(tmp_path / "one")]) == 0
    finally:
        AcceleratorState._reset_state(True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


# ---- launchers -------------------------------------------------------------------------------------------------------


def config_of(*flags: str):
    return parse(make_parser("test", ""), list(flags))[0]


def test_what_the_launcher_asks_for(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        processes.from_launcher(config_of())
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ValueError, match="fsdp_offload_params"):
        processes.from_launcher(config_of())
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    config = processes.from_launcher(config_of())
    assert config.parallel.shard
    assert config.activation_checkpointing
    assert "ACCELERATE_USE_FSDP" not in os.environ


def test_what_does_nothing_is_said(monkeypatch):
    assert processes.launch_notes(config_of()) == []
    [note] = processes.launch_notes(config_of("--parallel.shard", "true"))
    assert "does nothing in a single process" in note
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    [note] = processes.launch_notes(config_of())
    assert "starts one process on a CPU" in note


def test_a_timeout_must_be_a_time(capsys):
    with pytest.raises(SystemExit):
        config_of("--parallel.timeout_minutes", "0")
    assert "parallel.timeout_minutes is 0" in capsys.readouterr().err


# ---- nodes and their ends --------------------------------------------------------------------------------------------

NODE = """
import os, signal, sys, time
from train import pretrain, trainer
step = trainer.Trainer._train_step
def failing(self):
    if self.progress.step == 13 and os.environ["RANK"] == "1":
        {what}
    return step(self)
trainer.Trainer._train_step = failing
sys.exit(pretrain.main(sys.argv[1:]))
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
HANGS = "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(10**6)"


def two_nodes(
    place: Path, words: list[str], flags: list[str], texts: list[Path], ranks: Ranks | None = None
) -> list[tuple[int, str, str]]:
    """Two nodes with folders of their own, each by a launcher or, where `ranks` are given, without one; returns how
    they ended."""
    disks = [place / f"node{rank}" for rank in range(2)]
    commands = [
        [*words, *flags, "--out_dir", str(disk / "run"), "--data.source", str(text)]
        for disk, text in zip(disks, texts, strict=True)
    ]
    envs = [{"NANOGPT_HUB_CACHE": str(disk / "cache"), "HF_HOME": str(disk / "hf")} for disk in disks]
    if ranks:
        own = [{**env, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} for env in envs]
        return [(one.returncode, one.stdout, one.stderr) for one in ranks.run_each(commands, own)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    nodes = [
        subprocess.Popen([*launch, "--node_rank", str(rank), *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env=own_package(**env))
        for rank, (command, env) in enumerate(zip(commands, envs, strict=True))
    ]  # fmt: skip
    try:
        ended = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, *said) for node, said in zip(nodes, ended, strict=True)]


@pytest.mark.parametrize("shard", ["false", "true"])
def test_nodes_without_a_common_disk_run_lose_one_and_go_on(ranks, one, text, tmp_path, shard):
    flags = [*TINY, *RUNS["muon"].split(), "--parallel.shard", shard]
    script = tmp_path / "node.py"
    script.write_text(NODE.format(what=KILLED))
    launched = shard == "true"
    first, second = two_nodes(tmp_path, [str(script)], flags, [text, text], None if launched else ranks)
    assert first[0] != 0
    assert second[0] != 0
    assert (first[2] + second[2]).count("error: another process of this run has ended") == 1
    assert "Safe is the training state of step 10: the same command goes on" in first[2]
    assert not (tmp_path / "node1" / "run").exists()
    first, second = two_nodes(tmp_path, [*PRETRAIN], flags, [text, text], ranks)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "resuming at step 10" in first[1]
    assert "resuming" not in second[1]
    assert losses(tmp_path / "node0" / "run") == pytest.approx(losses(one / "muon"), abs=1e-6)
    assert not (tmp_path / "node1" / "run").exists()


def test_a_process_that_hangs_ends_the_run_in_time_and_other_data_refuses_it(ranks, text, tmp_path):
    script, place = tmp_path / "node.py", tmp_path / "hang"
    script.write_text(NODE.format(what=HANGS))
    flags = [*TINY, *RUNS["half"].split(), "--max_steps", "20", "--parallel.timeout_minutes", "0.05"]
    done = torchrun(str(script), *flags, "--data.source", str(text), "--out_dir", str(place))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "has not answered for 0.05 minutes. " in done.stderr
    first_process = "Safe is the training state of step 10" in done.stderr
    assert first_process or "The same command goes on from what the first process has saved" in done.stderr
    other = tmp_path / "other" / text.name
    other.parent.mkdir()
    other.write_text(TEXT[::-1], encoding="utf-8")  # as many tokens as the text of the same name
    first, second = two_nodes(tmp_path, [*PRETRAIN], flags, [text, other], ranks)
    assert first[0] != 0
    assert second[0] != 0
    said = first[2] + second[2]
    assert said.count("error: ") == 1
    assert "process 1 has settings or data" in said


TOGETHER = """
import sys
import torch
from train import processes
from train.config import TrainConfig

state = processes.init_processes(TrainConfig(), "cpu")
rank = state.process_index
assert processes.shared(["main", "other"][rank]) == "main"
assert processes.on_main(lambda: rank) == 0
assert processes.least(5 - rank) == 4
try:
    processes.on_main(lambda: 1 / 0 if rank else (_ for _ in ()).throw(OSError("no disk")))
except OSError as error:
    assert rank == 0 and str(error) == "no disk"
except processes.OtherProcessError as error:
    assert rank == 1 and str(error) == "no disk"
given = {"a": torch.arange(3.0), "b": torch.tensor(7)} if rank == 0 else {}
got = dict(processes.from_main(given, state.device))
assert got["a"].tolist() == [0, 1, 2] and got["b"].item() == 7
said = torch.tensor([float(processes.first_to_say())])
torch.distributed.all_reduce(said)
assert said == 1
"""
WATCHED = """
import time
from train.processes import Watchdog
with Watchdog(2.0, lambda: print("nobody answers", flush=True)) as dog:
    for _ in range(30):
        time.sleep(0.1)
        dog.beat()
    print("alive", flush=True)
    time.sleep(10**6)
"""


def test_processes_agree_on_what_the_first_one_sees(ranks, tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    done = ranks.run(str(script))
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_watchdog_ends_a_process_that_waits_in_vain(ranks, tmp_path):
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    done = ranks.run(str(script), n=1)
    assert done.returncode == 1, done.stderr
    assert done.stdout == "alive\nnobody answers\n"
