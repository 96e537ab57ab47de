"""Which engine answers, and that nothing fast can take a text, a number or the process with it."""

import dataclasses
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, make_gpt, make_model

from nanogpt_hub import sampling
from nanogpt_hub.engine import prepare, select
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.engine.torch_decoder import SUPPORTED, PlainDecoder, TorchDecoder, known_structure
from nanogpt_hub.generate import generate_naive, stream_tokens
from nanogpt_hub.model import Block, GPTConfig, KVCache
from nanogpt_hub.sampling import SamplingConfig, sampler

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


@pytest.mark.usefixtures("int8_kernel")
def test_in_8_bits_roundings_that_go_either_way_are_no_difference(compiled, caplog):
    """Twelve layers: what goes another way on the border of two levels moves borders in all layers after it."""
    model = quantize_int8(make_gpt("gpt2", n_layer=12, n_embd=256, n_inner=0, vocab_size=997))
    tokens = list(stream_tokens(model, None, [[1, 2]], CONFIG, engine="numba"))
    assert tokens[0].engine == "numba"
    assert not caplog.records


@pytest.mark.usefixtures("int8_kernel")
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


def test_an_edited_core_goes_the_plain_way(fast, monkeypatch, truth):
    monkeypatch.setattr(select, "core_is_known", lambda: False)
    model = make_gpt()
    assert written(model, fast) == (truth(model), "plain")


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


def test_code_without_its_files_is_not_compiled_here(stamped, caplog, monkeypatch):
    pytest.importorskip("numba")
    from nanogpt_hub.engine import threads

    monkeypatch.setattr(threads, "entry_point", functools.cache(threads.entry_point.__wrapped__))  # nothing loaded yet
    started = stamped(status="ready")
    assert written(make_gpt(), "auto")[1] == "torch"
    assert len(started) == 1  # a child makes them anew
    assert not caplog.records


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setenv("NANOGPT_HUB_CACHE", os.devnull + "/nowhere")
    path = prepare.folder.__wrapped__()
    assert path.is_dir()
    assert path.stat().st_mode & 0o077 == 0 or os.name == "nt"


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
    (path,) = (tmp_path / "engine").iterdir()
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


def test_plain_is_the_model_itself(monkeypatch):
    model = make_gpt()
    cache = KVCache(model.config, 1)
    assert type(select.open_engine("plain").decoder(model, cache)) is PlainDecoder
