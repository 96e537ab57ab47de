"""Which engine answers, and that nothing fast can take a text, a number or the process with it."""

import argparse
import dataclasses
import functools
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, make_gpt, make_model
from torch import nn

from nanogpt_hub import sampling
from nanogpt_hub.commands import common
from nanogpt_hub.engine import int8, prepare, select, torch_decoder
from nanogpt_hub.engine.int8 import Int8Linear, quantize_int8
from nanogpt_hub.engine.torch_decoder import SUPPORTED, PlainDecoder, TorchDecoder, known_structure
from nanogpt_hub.generate import generate_naive, stream_tokens
from nanogpt_hub.model import Block, CausalSelfAttention, GPTConfig, KVCache
from nanogpt_hub.sampling import SamplingConfig, sampler
from train.attention import use_short_attention

CONFIG = SamplingConfig(max_new_tokens=12, seed=0)


def written(model, engine: str, config: SamplingConfig = CONFIG) -> tuple[list[int], str]:
    """The ids that an engine gives, and which engine it was in the end."""
    tokens = list(stream_tokens(model, None, [[1, 2]], config, engine=engine))
    return [token.id for token in tokens], tokens[0].engine


@pytest.fixture
def truth():
    return lambda model, config=CONFIG: generate_naive(model, [1, 2], config)


@pytest.fixture(params=["torch", "numba"])
def fast(request) -> str:
    if request.param == "numba":
        request.getfixturevalue("compiled")
    return request.param


# ---- names ----


def test_each_engine_answers_by_its_name_and_gives_the_same(compiled, truth):
    model = make_gpt()
    for engine in ("plain", "torch", "numba"):
        assert written(model, engine) == (truth(model), engine)


def test_an_unknown_engine_is_refused_before_anything(monkeypatch):
    with pytest.raises(ValueError, match="engine is 'cuda'; it must be one of auto, plain, torch, numba"):
        stream_tokens(make_gpt(), None, [[1]], engine="cuda")
    monkeypatch.setenv(select.VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"engine is 'fast' \(from NANOGPT_HUB_ENGINE\)"):
        stream_tokens(make_gpt(), None, [[1]])


def test_auto_is_numba_where_it_is_prepared(compiled, monkeypatch):
    monkeypatch.setenv(select.VARIABLE, "auto")
    assert written(make_gpt(), None)[1] == "numba"
    assert written(make_gpt().double(), None)[1] == "torch"


def test_the_engine_of_a_text_is_settled_before_its_first_token(compiled, monkeypatch):
    monkeypatch.setattr(select, "preparation", ready := select.Preparation())
    monkeypatch.setattr(ready, "poll", lambda: None)
    stream = stream_tokens(make_gpt(), None, [[1]], CONFIG, engine="auto")
    first = next(stream)
    monkeypatch.setattr(ready, "poll", lambda: compiled)
    assert {first.engine, *(token.engine for token in stream)} == {"torch"}


# ---- what a fast engine does not know goes the plain way ----


def test_every_field_of_the_config_is_declared():
    assert SUPPORTED.keys() == {field.name for field in dataclasses.fields(GPTConfig)}


def test_a_field_or_a_value_that_is_not_declared(fast, monkeypatch, truth):
    model = make_gpt()
    monkeypatch.delitem(SUPPORTED, "qk_norm")
    assert written(model, fast) == (truth(model), "plain")
    monkeypatch.undo()
    monkeypatch.setitem(SUPPORTED, "activation", ("relu2",))
    assert written(model, fast)[1] == "plain"


@pytest.mark.parametrize("small", [False, True], ids=["float32", "int8"])
def test_a_mixture_of_experts(fast, truth, small):
    model = make_gpt("mixtral", n_expert=4)
    model = quantize_int8(model) if small else model
    assert written(model, fast) == (truth(model), "plain")


def test_hooks_and_replaced_functions(fast, monkeypatch, truth):
    model = make_gpt()
    handle = model.h[1].attn.register_forward_hook(lambda module, inputs, output: 0 * output)  # an ablated head
    assert written(model, fast) == (truth(model), "plain")
    handle.remove()
    assert written(model, fast)[1] == fast
    model.h[0].forward = lambda x, context: x
    assert written(model, fast) == (truth(model), "plain")
    del model.h[0].forward
    monkeypatch.setattr(Block, "forward", lambda self, x, context: x + self.mlp(self.ln_2(x)))
    assert written(model, fast) == (truth(model), "plain")


def test_a_subclass(fast, truth):
    class PostNorm(Block):
        def forward(self, x, context):
            x = self.ln_1(x + self.attn(x, context))
            return self.ln_2(x + self.mlp(x))

    model = make_gpt()
    for block in model.h:
        block.__class__ = PostNorm
    assert not known_structure(model)
    assert written(model, fast) == (truth(model), "plain")


def without_blocks(model):
    model.h = model.h[:2]


def narrowed(model):
    mlp = model.h[1].mlp
    for layer, name, dim in ((mlp.c_fc, "weight", 0), (mlp.c_fc, "bias", 0), (mlp.c_proj, "weight", 1)):
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach().narrow(dim, 0, 40).contiguous()))


def without_mlp(model):
    model.h[0].mlp = nn.Identity()


def parallel(model):
    model.h[0].parallel = True


def other_eps(model):
    model.ln_f.eps = 0.5


def windowed(model):
    """Eight tokens in sight: not to be seen in a comparison of three."""

    def attend(q, k, v, mask=None, is_causal=False, enable_gqa=False):
        (T, S), seen = (q.size(2), k.size(2)), torch.arange(k.size(2))
        here = torch.arange(S - T, S)[:, None]
        return F.scaled_dot_product_attention(q, k, v, (seen <= here) & (seen > here - 8), enable_gqa=enable_gqa)

    model.h[1].attn.attend = attend


CHANGES = [without_blocks, narrowed, without_mlp, parallel, other_eps, windowed]


@pytest.mark.parametrize("when", ["before the first text", "after it"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_not_what_its_config_says(change, when, fast, truth):
    model = make_gpt()
    if when == "after it":
        assert written(model, fast)[1] == fast
    change(model)
    assert written(model, fast) == (truth(model), "plain")


def test_attention_replaced_in_the_class(fast, truth, monkeypatch):
    model, other = make_gpt(), make_gpt()
    windowed(other)
    monkeypatch.setattr(CausalSelfAttention, "attend", staticmethod(other.h[1].attn.attend))
    assert written(model, fast) == (truth(model), "plain")


def test_the_trainers_attention_is_the_same(fast, truth):
    model = make_gpt()
    use_short_attention(model)
    assert written(model, fast) == (truth(model), fast)


def test_a_layer_that_is_replaced_after_the_first_text_is_compared_again(fast, truth, caplog):
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (x.dim() == 3)  # nothing for inputs as the decoder gives them

    model = make_gpt()
    assert written(model, fast)[1] == fast
    model.h[0].mlp.c_fc.__class__ = Odd
    assert written(model, fast) == (truth(model), "plain")
    assert "the torch engine does not compute what model.py computes" in caplog.text


def test_a_layer_in_8_bits_of_another_shape(fast):
    small = quantize_int8(make_gpt())
    small.h[1].mlp.c_fc, small.h[1].mlp.c_proj = (
        Int8Linear(nn.Linear(*shape), int8.exact_levels()) for shape in ((96, 40), (40, 96))
    )
    assert written(small, fast)[1] == "torch"  # which calls the layers, whatever their shape


def test_looking_at_a_model_draws_no_random_numbers():
    model, before = make_gpt(), torch.get_rng_state()
    torch_decoder.new_model.cache_clear()
    assert known_structure(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_decoder_that_computes_something_else_is_switched_off(fast, monkeypatch, truth, caplog, request):
    decoder = TorchDecoder if fast == "torch" else request.getfixturevalue("compiled").NumbaDecoder
    hidden = decoder.hidden
    monkeypatch.setattr(decoder, "hidden", lambda self, idx: hidden(self, idx) * 1.01)
    model = make_gpt()
    with caplog.at_level(logging.WARNING):
        ids, engine = written(model, fast)
        written(model, fast)
    assert ids == truth(model)
    assert engine == ("plain" if fast == "torch" else "torch") or "does not compute" in caplog.text
    told = [record.message for record in caplog.records if f"the {fast} engine does not compute" in record.message]
    assert len(told) == 1  # once for a model, not for each text
    assert "hidden states of pass" in told[0]


def test_in_8_bits_roundings_that_go_either_way_are_no_difference(compiled, caplog):
    """Twelve layers: what goes another way on the border of two levels moves borders in all layers after it."""
    model = quantize_int8(make_gpt("gpt2", n_layer=12, n_embd=256, n_inner=0, vocab_size=997))
    tokens = list(stream_tokens(model, None, [[1, 2]], CONFIG, engine="numba"))
    assert tokens[0].engine == "numba"
    assert not caplog.records


def test_in_8_bits_a_wrong_scale_is_noticed(compiled, caplog):
    model = quantize_int8(make_gpt("gpt2"))
    model.h[0].attn.c_attn.scale.mul_(1.02)  # which the compiled product reads, and PyTorch's kernel does not
    assert next(iter(stream_tokens(model, None, [[1, 2]], CONFIG, engine="numba"))).engine == "torch"
    assert "keys of pass 1 differ by" in caplog.text


def test_an_error_in_a_decoder_is_no_error_of_the_text(monkeypatch, truth, caplog):
    monkeypatch.setattr(TorchDecoder, "hidden", lambda self, idx: 1 / 0)
    model = make_gpt()
    assert written(model, "torch") == (truth(model), "plain")
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_short_contexts_are_compared_too(block_size, fast):
    model = make_gpt(block_size=block_size)
    assert written(model, fast)[1] == fast


@pytest.mark.parametrize("engine", ["auto", "torch", "numba"])
def test_an_edited_core_goes_the_plain_way_and_nothing_is_compiled(engine, monkeypatch, truth):
    monkeypatch.setattr(select, "core_is_known", lambda: False)
    monkeypatch.setattr(select, "preparation", None)
    model = make_gpt()
    assert written(model, engine) == (truth(model), "plain")


def test_a_new_sampler_works_in_every_engine(compiled, monkeypatch, truth):
    @dataclasses.dataclass(frozen=True)
    class Config(SamplingConfig):
        only_even: float = sampler(
            0.0, kind=float, neutral=0.0, least=0, most=1, label="Even", help="only tokens with an even id",
            apply=lambda logits, value: logits.index_fill(-1, torch.arange(1, logits.size(-1), 2), -torch.inf),
        )  # fmt: skip

    new = {f.name: sampling.declared_sampler(f) for f in dataclasses.fields(Config) if f.metadata}
    monkeypatch.setattr(sampling, "SAMPLERS", new)
    model, config = make_gpt(), Config(max_new_tokens=12, seed=0, only_even=1.0)
    expected = truth(model, config)
    assert all(id % 2 == 0 for id in expected)
    for engine in ("plain", "torch", "numba"):
        assert written(model, engine, config) == (expected, engine)


# ---- preparing ----


@pytest.fixture
def stamped(tmp_path, monkeypatch):
    """Sets what a folder's stamp says, and forgets what this process knows."""
    monkeypatch.setattr(prepare, "folder", lambda: tmp_path)
    monkeypatch.setattr(select, "preparation", select.Preparation())
    started = []
    monkeypatch.setattr(prepare, "start_child", lambda path: started.append(path))
    monkeypatch.setattr(select.Preparation, "_start", lambda self, path: started.append(path))

    def stamp(**facts):
        prepare.write_stamp(tmp_path, prepare.Stamp(**facts))
        return started

    return stamp


def test_a_failure_is_not_tried_again_for_a_day(stamped, caplog):
    started = stamped(status="failed", reason="status 1 (no such register)", attempts=2, when=time.time() - 3600)
    assert select.open_engine("auto").name == "torch"
    assert started == []
    assert "could not be prepared on this machine (status 1 (no such register))" in caplog.text
    stamped(status="failed", attempts=2, when=time.time() - 25 * 3600)
    select.preparation = select.Preparation()
    select.open_engine("auto")
    assert len(started) == 1


@pytest.fixture
def unloaded(monkeypatch):
    """threads.py, as if no code had been loaded yet."""
    pytest.importorskip("numba")
    from nanogpt_hub.engine import threads

    monkeypatch.setattr(threads, "entry_point", functools.cache(threads.entry_point.__wrapped__))
    return threads


def test_code_without_its_files_is_not_compiled_here(stamped, caplog, unloaded, tmp_path):
    started = stamped(status="ready", code=prepare.code_hash(tmp_path))
    assert written(make_gpt(), "auto")[1] == "torch"
    assert len(started) == 1  # a child makes them anew
    assert not caplog.records


def test_code_that_is_not_the_stamps_is_not_loaded(stamped, caplog, unloaded, monkeypatch):
    monkeypatch.setattr(unloaded, "entry_point", lambda work: None)  # what would load it
    started = stamped(status="ready", code="another one")
    assert written(make_gpt(), "auto")[1] == "torch"
    assert len(started) == 1
    assert not caplog.records


def test_damaged_code_is_made_anew_but_not_again_and_again(stamped, caplog, unloaded, monkeypatch, tmp_path):
    monkeypatch.setattr(unloaded, "entry_point", lambda work: pickle.loads(b""))
    good = dict(status="ready", code=prepare.code_hash(tmp_path), when=time.time())
    started = stamped(**good, attempts=1)
    assert select.open_engine("auto").name == "torch"
    assert len(started) == 1
    assert not caplog.records
    stamped(**good, attempts=2)
    assert select.open_engine("auto").name == "torch"
    assert len(started) == 1
    assert "its code was damaged again and again" in caplog.text


def test_a_child_begins_without_the_code_of_before(unloaded, monkeypatch, tmp_path):
    monkeypatch.setattr(unloaded, "entry_point", None)  # so that it ends soon
    (tmp_path / prepare.CODE).mkdir()
    (tmp_path / prepare.CODE / "half.nbi").write_bytes(b"half")
    assert prepare.run_child(tmp_path) == 1
    assert not list((tmp_path / prepare.CODE).glob("*"))
    assert prepare.read_stamp(tmp_path).status == "failed"


def test_a_child_says_what_is_wrong_with_its_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOGPT_HUB_ENGINE_SECONDS", "abc")
    assert prepare.run_child(tmp_path) == 1
    stamp = prepare.read_stamp(tmp_path)
    assert (stamp.status, stamp.attempts) == ("failed", 1)
    assert "NANOGPT_HUB_ENGINE_SECONDS is 'abc'; it must be a number of seconds" in stamp.reason


def test_a_child_that_died_before_its_first_stamp_is_counted(monkeypatch, tmp_path):
    (tmp_path / "log.txt").write_text("OSError: No space left on device\n")
    for attempts in (1, 2):
        stamp = prepare.record_end(tmp_path, 1, time.time())
        assert (stamp.status, stamp.attempts) == ("failed", attempts)
        assert stamp.reason == "the compiling process ended with status 1 (OSError: No space left on device)"
    assert not prepare.read_stamp(tmp_path).may_try
    monkeypatch.setattr(prepare, "write_stamp", lambda *_: os.listdir(os.devnull))  # an OSError, as of a full disk
    assert prepare.record_end(tmp_path, -9, time.time()).reason.startswith("the compiling process ended with signal 9")


def test_a_child_waits_for_those_who_only_look(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "compile_and_stamp", lambda path: 0)
    held = threading.Event()

    def look() -> None:
        with prepare.lock_of(tmp_path):
            held.set()
            time.sleep(0.2)

    thread = threading.Thread(target=look)
    thread.start()
    held.wait()
    assert prepare.run_child(tmp_path) == 0
    thread.join()
    monkeypatch.setattr(prepare, "PATIENCE", 0)
    with prepare.lock_of(tmp_path):
        assert prepare.run_child(tmp_path) == prepare.BUSY


def test_a_child_gets_no_ctrl_c_of_windows(monkeypatch, tmp_path):
    for name, value in (("CREATE_NEW_PROCESS_GROUP", 0x200), ("CREATE_NO_WINDOW", 0x8000000)):
        monkeypatch.setattr(subprocess, name, value, raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **options: options)
    assert prepare.start_child(tmp_path)["creationflags"] == 0x8000200


# ---- where code and stamp are ----

only_posix = pytest.mark.skipif(os.name != "posix", reason="not proved here: folders have no modes on Windows")


@pytest.fixture
def places(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The usual folder, and the one among the temporary files that stands in for it."""
    pytest.importorskip("numba")
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    mine = f"engine-{os.getuid()}" if os.name == "posix" else "engine"
    return tmp_path / "cache" / mine / prepare.key(), tmp_path / "tmp" / f"nanogpt-hub-{mine}" / prepare.key()


def found_folder() -> Path:
    return prepare.folder.__wrapped__()


def test_without_a_cache_the_code_is_kept_among_the_temporary_files(places, monkeypatch):
    assert found_folder() == places[0]
    monkeypatch.setenv("NANOGPT_HUB_CACHE", os.devnull + "/nowhere")
    assert found_folder() == found_folder() == places[1]
    monkeypatch.delenv("NANOGPT_HUB_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    assert found_folder() == places[1]


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def replaced_by_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


SPOILED = {
    "the folder": lambda path: path.chmod(0o770),
    "the one that holds it": lambda path: path.parent.chmod(0o707),
    "the cache": lambda path: path.parents[1].chmod(0o777),
    "a link": replaced_by_a_link,
}


@only_posix
@pytest.mark.parametrize("what", SPOILED)
def test_a_folder_that_others_can_write_to_is_not_used(what, places, monkeypatch):
    old = os.umask(0o002)  # a new folder is one's group's too
    assert found_folder() == places[0]
    os.umask(old)
    places[0].parents[1].chmod(0o1777)  # many may share a cache, if nobody can rename what others have in it
    assert found_folder() == places[0]
    SPOILED[what](places[0])
    with pytest.raises(PermissionError):
        prepare.run_child(places[0])
    assert found_folder() == places[1]
    SPOILED[what](places[1])
    with pytest.raises(PermissionError):
        found_folder()


@only_posix
def test_a_folder_of_somebody_else_is_not_used(places, monkeypatch):
    path, me = found_folder(), os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(PermissionError, match="this user alone"):
        prepare.check_private(path)


@only_posix
def test_stamped_code_is_not_loaded_where_others_can_write(stamped, caplog, tmp_path):
    started = stamped(status="ready")
    tmp_path.chmod(0o777)
    assert select.open_engine("auto").name == "torch"
    assert started == []
    assert "must be a folder of this user alone" in caplog.text


def test_a_stamp_that_is_damaged_counts_as_none(tmp_path):
    for text in ("", "{", "[]", '{"status": "ready", "surprise": 1}'):
        (tmp_path / "stamp.json").write_text(text)
        assert prepare.read_stamp(tmp_path).status == "none"


# ---- commands, with a package that is broken on purpose ----

STARTS = "    thread, threads = thread_id(p)\n"
BREAKS = {  # file, what stands there, what is put there instead
    "wrong number": ("numba_sampler.py", "reach, found = uniform * total,", "reach, found = f4(0.5) * total,"),
    "endless loop": ("numba_sampler.py", STARTS, f"{STARTS}    while p.R >= 0:\n        p.R += 0\n"),
    "abort": ("kernels.py", "import numpy as np\n", "import os\n\nimport numpy as np\n\nos.abort()\n"),
    "import error": ("kernels.py", "import numpy as np\n", "import numpy as np\nimport no_such_module\n"),
}


def command(folder: Path, package: Path, cache: Path, *flags: str, **env: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "nanogpt_hub", "generate", str(folder), "--prompt", "To be", "--seed", "1", *flags]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=280, cwd=cache,
        env={**os.environ, "PYTHONPATH": str(package), "NANOGPT_HUB_CACHE": str(cache), **env},
    )  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_kernel_costs_a_sentence(what, tmp_path):
    pytest.importorskip("numba")
    folder, file, (name, old, new) = make_model(tmp_path / "model"), tmp_path / "package", BREAKS[what]
    shutil.copytree(ROOT / "nanogpt_hub", file / "nanogpt_hub", ignore=shutil.ignore_patterns("__pycache__"))
    kernel = file / "nanogpt_hub" / "engine" / name
    text = kernel.read_text(encoding="utf-8")
    assert old in text
    kernel.write_text(text.replace(old, new), encoding="utf-8")
    seconds = {"NANOGPT_HUB_ENGINE_SECONDS": "40"} if what == "endless loop" else {}
    broken = command(folder, file, tmp_path, "--engine", "numba", **seconds)
    plain = command(folder, file, tmp_path, "--engine", "plain")
    assert (broken.returncode, broken.stdout) == (0, plain.stdout), broken.stderr
    assert broken.stderr.count("the compiled engine could not be prepared on this machine") == 1, broken.stderr
    assert "engine torch]" in broken.stderr
    assert "Traceback" not in broken.stderr


def test_a_command_does_not_wait_for_its_compiler_and_the_next_finds_the_code(compiled, tmp_path):
    folder = make_model(tmp_path / "model")
    first = command(folder, ROOT, tmp_path, "--engine", "auto", NANOGPT_HUB_ENGINE="")
    assert first.returncode == 0, first.stderr
    assert "engine torch]" in first.stderr
    (path,) = tmp_path.glob("engine*/*")
    stamp = prepare.read_stamp(path)
    assert stamp.status in ("started", "none")
    while prepare.read_stamp(path).status == "none":  # the child has yet to begin
        time.sleep(0.1)
    os.kill(prepare.read_stamp(path).pid, signal.SIGTERM)
    prepared = prepare.folder()  # of this process, which has it
    before = json.loads((prepared / "stamp.json").read_text())
    second = command(folder, ROOT, prepared.parents[1], "--engine", "auto", NANOGPT_HUB_ENGINE="")
    assert "engine numba]" in second.stderr, second.stderr
    assert second.stdout == first.stdout
    assert json.loads((prepared / "stamp.json").read_text()) == before


def test_without_numba_all_goes_on(tmp_path):
    folder, code = make_model(tmp_path / "model"), "raise ImportError('No module named numba')"
    (tmp_path / "numba.py").write_text(code)
    (tmp_path / "llvmlite.py").write_text(code)
    result = command(folder, Path(os.pathsep.join((str(tmp_path), str(ROOT)))), tmp_path, "--engine", "auto")
    assert result.returncode == 0, result.stderr
    assert "engine torch]" in result.stderr
    assert result.stderr.count("\n") == 1


def test_numba_asked_for_by_name_where_there_is_none(monkeypatch, caplog, capsys):
    def no_numba():
        raise ModuleNotFoundError("No module named 'numba'")

    monkeypatch.setattr(prepare, "folder", no_numba)
    monkeypatch.setattr(select, "preparation", select.Preparation())
    assert select.open_engine("auto").name == "torch"
    assert not caplog.records
    for _ in range(2):
        assert select.open_engine("numba").name == "torch"
    assert caplog.text.count("(Numba cannot be imported: No module named 'numba')") == 1
    assert prepare.main([]) == 1
    assert capsys.readouterr().err == "engine: failed: No module named 'numba'\n"


@pytest.mark.parametrize(
    ("device", "edited", "sentence"),
    [("cuda", False, "is for CPUs: on cuda PyTorch generates"), ("cpu", True, "model.py itself generates")],
)
def test_a_command_says_why_it_does_not_compile(device, edited, sentence, monkeypatch, capsys):
    monkeypatch.setattr(common, "core_is_known", lambda: not edited)
    monkeypatch.setattr(common, "preparation", None)
    common.prepare_engine(argparse.Namespace(engine="numba", device=device))
    assert sentence in capsys.readouterr().err


def test_plain_is_the_model_itself(monkeypatch):
    model = make_gpt()
    cache = KVCache(model.config, 1)
    assert type(select.open_engine("plain").decoder(model, cache)) is PlainDecoder
