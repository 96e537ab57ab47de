"""Model folders: what wraps a model does not show, a kill leaves a whole model, a hostile folder is refused."""

import json
import os
import signal
import struct
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanogpt_hub.checkpoint import (
    CheckpointError,
    load_model,
    read_config,
    save_model,
    unwrap,
)
from nanogpt_hub.families import expected_tensors
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.system.files import write_atomic
from nanogpt_hub.tokenizer import build_tokenizer

CONFIG = GPTConfig(vocab_size=40, block_size=8, n_layer=2, n_head=2, n_embd=16)
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


def filled(value: float, config: GPTConfig = CONFIG) -> GPT:
    """A model all of whose parameters are `value`: any mixture of two of them shows."""
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def values_of(model: GPT) -> set[float]:
    return {x for p in model.parameters() for x in p.unique().tolist()}


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model", GPT(CONFIG))


@pytest.fixture
def ddp(tmp_path):
    """DistributedDataParallel over this one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


# What is written


def test_a_folder_holds_the_stock_files_and_leaves_others_alone(tmp_path):
    tokenizer = build_tokenizer("char", ["hello world"])
    config = GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16)
    folder = tmp_path / "deep" / "model"
    assert save_model(folder, GPT(config)) == folder
    (folder / "README.md").write_text("mine")
    save_model(str(folder), GPT(config), tokenizer)
    stock = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert stock | {"README.md"} == set(os.listdir(folder))
    assert (folder / "README.md").read_text() == "mine"
    assert len({os.stat(folder / name).st_mode for name in stock}) == 1  # the umask rules all of them
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["top_k"] == tokenizer.vocab_size < 200
    assert generation["eos_token_id"] == json.loads((folder / "config.json").read_text())["eos_token_id"]
    assert os.listdir(folder.parent) == ["model"]
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == config.block_size
    _, again = load_model(folder)
    assert again.hash == tokenizer.hash


def test_generation_defaults_and_dtype_are_the_callers_to_choose(tmp_path):
    save_model(tmp_path, GPT(CONFIG), generation_config=dict(temperature=1.0, eos_token_id=3), dtype=torch.bfloat16)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 1.0
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["eos_token_id"], content["dtype"]) == (3, "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_a_tied_head_is_tied_again_and_copied_for_the_converters_of_gpt_neox(folder):
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors.pop("embed_out.weight"), tensors["gpt_neox.embed_in.weight"])
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_tensors(CONFIG)
    model, _ = load_model(folder)
    assert model.lm_head.weight is model.wte.weight
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_a_loaded_model_trains_and_leaves_its_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load_model(folder)
    idx = torch.arange(8)[None]
    model(idx, idx)[1].backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= p.grad
    assert (folder / "model.safetensors").read_bytes() == before


WRAPS = {
    "bare": lambda model, ddp: model,
    "compile": lambda model, ddp: torch.compile(model),
    "ddp": lambda model, ddp: ddp(model),
    "compile(ddp)": lambda model, ddp: torch.compile(ddp(model)),
    "ddp(compile)": lambda model, ddp: ddp(torch.compile(model)),
    "compile(ddp(compile))": lambda model, ddp: torch.compile(ddp(torch.compile(model))),
}


@pytest.mark.parametrize("blocks", [False, True], ids=["", "with compiled blocks"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_wraps_a_model_does_not_show(wrap, tied, blocks, tmp_path, ddp):
    model = GPT(GPTConfig(vocab_size=40, block_size=8, n_layer=2, n_head=2, n_embd=16, tie_word_embeddings=tied))
    plain = save_model(tmp_path / "plain", model)
    if blocks:
        model.h[1] = torch.compile(model.h[1])
    wrapped = WRAPS[wrap](model, ddp)
    assert unwrap(wrapped) is model
    save_model(tmp_path / "wrapped", wrapped)
    names = ("config.json", "model.safetensors")
    assert all((plain / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes() for name in names)


def test_what_holds_no_gpt_is_refused():
    with pytest.raises(TypeError, match="a Linear holds no GPT"):
        unwrap(torch.nn.Linear(2, 2))


def test_old_shards_go_and_a_failed_save_changes_nothing(tmp_path, monkeypatch):
    save_model(tmp_path, filled(1))
    for stale in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / stale).write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("not ours")
    killed = tmp_path.with_name(f".{tmp_path.name}.saving")  # what a run that was killed leaves
    killed.mkdir()
    (killed / "tokenizer.json").write_text("of another run")
    save_model(tmp_path, filled(2))
    assert not (tmp_path / "tokenizer.json").exists()
    assert {n for n in os.listdir(tmp_path) if "safetensors" in n} == {"model.safetensors", "adapter_model.safetensors"}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanogpt_hub.checkpoint.save_file", full_disk)
    for path in (tmp_path, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            save_model(path, filled(3))
    assert values_of(load_model(tmp_path)[0]) == {2}
    assert not [path for path in (*tmp_path.iterdir(), *tmp_path.parent.iterdir()) if "saving" in path.name]


def test_write_atomic_replaces_whole_files(tmp_path):
    write_atomic(tmp_path / "a.json", "ü\n")
    assert write_atomic(tmp_path / "a.json", b"new").read_bytes() == b"new"
    write_atomic(tmp_path / "a.json", "ü\n")
    assert (tmp_path / "a.json").read_bytes() == "ü\n".encode()
    assert os.listdir(tmp_path) == ["a.json"]


# Kills


def die_before(step: int) -> None:
    """Kills this process just before its `step`-th call that changes what a reader of the disk sees."""
    calls = 0

    def deadly(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in ("open", "mkdir", "fsync", "replace", "rename", "rmdir", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


def in_child(work) -> int:
    """Runs `work` in a forked process and returns the signal that ended it, 0 for none."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@forks
@pytest.mark.parametrize("exists", [True, False], ids=["updating", "creating"])
def test_a_kill_at_any_step_of_saving_leaves_a_whole_model_or_none(exists, tmp_path):
    path = tmp_path / "model"
    for step in range(1, 200):
        if exists:
            save_model(path, filled(1))
        code = in_child(lambda step=step: (die_before(step), save_model(path, filled(2))))
        assert path.exists() or not exists
        if path.exists():
            assert values_of(load_model(path)[0]) in ([{1}, {2}] if exists else [{2}])
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert step > 8
    assert values_of(load_model(path)[0]) == {2}
    assert os.listdir(tmp_path) == ["model"]  # what the kills left is gone


@forks
def test_a_kill_at_any_time_of_repeated_saving_leaves_a_whole_model(tmp_path):
    save_model(tmp_path / "model", filled(0))
    for attempt in range(8):
        pid = os.fork()
        if pid == 0:
            for value in range(1, 10_000):
                save_model(tmp_path / "model", filled(value))
            os._exit(0)
        time.sleep(0.03 + 0.0137 * attempt)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        model, _ = load_model(tmp_path / "model")
        assert len(values_of(model)) == 1


# What is refused


def edit_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def write_header(folder, header: str | dict, data: bytes = b"", length: int | None = None):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(prefix + text + data)


def truncate(folder, cut: int):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:cut])


def write_index(folder, weight_map):
    os.rename(folder / "model.safetensors", folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def only_pickle(folder):
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")


def set_nan(tensors):
    tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][3] = float("nan")


WTE = "gpt_neox.embed_in.weight"
ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HOSTILE = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "pickled weights": (only_pickle, r"pickled.*save_pretrained"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{,}"), "config.json is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "a JSON object belongs"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not valid"),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not valid JSON"),
    "config has NaN": (lambda f: edit_config(f, hidden_dropout=float("nan")), "NaN is not a number"),
    "config has a key twice": (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "a key is there twice"),
    "config is huge": (lambda f: (f / "config.json").write_text(" " * 2**24 + "{}"), "at most"),
    "config asks for terabytes": (lambda f: edit_config(f, vocab_size=10**7, hidden_size=65536), "has shape"),
    "config asks for a huge width": (lambda f: edit_config(f, hidden_size=10**12), "hidden_size is 1000000000000"),
    "config asks for depth": (lambda f: edit_config(f, num_hidden_layers=200), "is missing"),
    "config asks for more context": (lambda f: edit_config(f, max_position_embeddings=10**9), "max_position_embedd"),
    "config is of another shape": (lambda f: edit_config(f, intermediate_size=63), r"has shape \[.*asks for \[16, 63"),
    "config is of another family": (lambda f: edit_config(f, model_type="mamba"), "model_type is 'mamba'"),
    "tensor missing": (lambda f: edit_tensors(f, lambda t: t.pop(WTE)), f"'{WTE}' is missing"),
    "tensor unknown": (lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))), "not part of the model"),
    "tensor named as a path": (
        lambda f: edit_tensors(f, lambda t: t.update({"../../x": torch.ones(1)})), "not part of the model"),
    "tensor twice by two names": (
        lambda f: edit_tensors(f, lambda t: t.update({"embed_in.weight": t[WTE].clone()})), "there twice"),
    "tensor not finite": (lambda f: edit_tensors(f, set_nan), "dense_4h_to_h.bias' holds values that are not finite"),
    "tensor of 64 bits": (lambda f: edit_tensors(f, lambda t: t.update({WTE: t[WTE].double()})), "'F64'; F32"),
    "tensor of integers": (lambda f: edit_tensors(f, lambda t: t.update({WTE: t[WTE].int()})), "'I32'; F32"),
    "weights empty": (lambda f: truncate(f, 0), "no complete safetensors"),
    "weights cut in the length": (lambda f: truncate(f, 5), "no complete safetensors"),
    "weights cut in the header": (lambda f: truncate(f, 100), "no complete safetensors"),
    "weights cut in the data": (lambda f: truncate(f, -1), "header announces"),
    "header is huge": (lambda f: write_header(f, "{}", b" " * 2**25, 2**25), "no complete safetensors"),
    "header beyond all files": (lambda f: write_header(f, "{}", length=2**63), "no complete safetensors"),
    "header names a tensor twice": (
        lambda f: write_header(f, f'{{"a": {ENTRY}, "a": {ENTRY}}}', b"\0" * 4), "a key is there twice"),
    "header with a name without end": (
        lambda f: edit_tensors(f, lambda t: t.update({"x" * 10**6: torch.ones(1)})), "not part of the model"),
    "header with a malformed entry": (lambda f: write_header(f, {"a": [1]}), "malformed entry"),
    "header with a negative shape": (
        lambda f: write_header(f, {"a": dict(dtype="F32", shape=[-1], data_offsets=[0, 4])}), "malformed entry"),
    "header with a huge shape": (
        lambda f: write_header(f, {"a": dict(dtype="F32", shape=[0, 2**62], data_offsets=[0, 0])}), "malformed entry"),
    "index leads out of the folder": (lambda f: write_index(f, {WTE: "../model.safetensors"}), "own folder"),
    "index leads to the root": (lambda f: write_index(f, {WTE: "/etc/passwd"}), "own folder"),
    "index names no file": (lambda f: write_index(f, {WTE: ["part.safetensors"]}), "own folder"),
    "index is empty": (lambda f: write_index(f, {}), "own folder"),
    "index names a missing shard": (lambda f: write_index(f, {WTE: "gone.safetensors"}), "gone.safetensors is missing"),
    "weights are a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()), "not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused_in_one_sentence_with_flat_memory(case, folder):
    spoil, message = HOSTILE[case]
    spoil(folder)
    before = peak_memory()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert peak_memory() - before < 100 * 2**20


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    if sys.platform != "linux":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_holes_and_overlaps_are_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    a, b = "gpt_neox.layers.0.mlp.dense_4h_to_h.bias", "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    header[a]["data_offsets"] = header[b]["data_offsets"]
    write_header(folder, header, data[8 + length :])
    with pytest.raises(CheckpointError, match="cannot load"):
        load_model(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "b.safetensors")
    write_index(folder, {WTE: "part.safetensors", "x": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"is in part.safetensors and in another file"):
        load_model(folder)


def test_a_tokenizer_and_a_model_that_do_not_belong_together_are_refused(tmp_path):
    tokenizer = build_tokenizer("byte", ["x"])
    message = rf"tokenizer \(byte\) has {tokenizer.vocab_size} ids, but the model's vocab_size is 40"
    with pytest.raises(CheckpointError, match=message):
        save_model(tmp_path, GPT(CONFIG), tokenizer)
    save_model(tmp_path, GPT(CONFIG))
    tokenizer.save(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_the_shape_can_be_read_without_the_weights(folder):
    (folder / "model.safetensors").unlink()
    assert read_config(folder) == CONFIG


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_to_regular_files_are_followed_as_in_the_hubs_cache(folder, tmp_path):
    os.rename(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert load_model(folder)[0].config == CONFIG
    (tmp_path / "blob").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_model(folder)
