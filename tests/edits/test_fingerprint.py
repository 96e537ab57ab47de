"""The fingerprint of model.py: what counts as an edit, on every Python, and what is noticed at run time."""

import functools
import glob
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanogpt_hub import model as model_module
from nanogpt_hub.checkpoint import CoreError, load_model, save_model, saved_as
from nanogpt_hub.edits import core as core_module
from nanogpt_hub.edits.core import CORE_FILE, faults, running_core
from nanogpt_hub.edits.fingerprint import VERIFIED, parts, total, verified_table
from nanogpt_hub.hub.card import make_card
from nanogpt_hub.model import GPT, MLP, Block, GPTConfig, KVCache

SOURCE = (ROOT / "nanogpt_hub" / "model.py").read_text(encoding="utf-8")
RENEW = (
    "model.py computes something else than the core that the stock families were verified with. If the families keep "
    "up with it, run `python tests/renew_core.py`: it compares them with Transformers and writes the new fingerprint"
)


def tiny(**fields) -> GPT:
    return GPT(GPTConfig.preset("gpt2", "1m", **{**dict(vocab_size=31, n_layer=2, n_embd=16, block_size=8), **fields}))


def test_the_verified_core_is_the_one_here():
    assert parts(SOURCE) == VERIFIED, RENEW
    assert running_core().changed == ()
    assert running_core(tiny()).changed == ()
    assert saved_as(tiny()) == ("gpt2", "")


def edited(old: str, new: str) -> str:
    assert SOURCE.count(old) >= 1
    return SOURCE.replace(old, new)


def changed(source: str) -> set[str]:
    found = parts(source)
    return {name for name in found.keys() | VERIFIED.keys() if found.get(name) != VERIFIED.get(name)}


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("x = x + self.attn(self.ln_1(x), context)", "x = self.ln_1(x + self.attn(x, context))", {"Block"}),
        ("F.relu(h).square()", "F.silu(h)", {"MLP"}),
        ("F.rms_norm(x, x.shape[-1:], self.weight, self.eps)", "F.rms_norm(x, x.shape[-1:], self.weight)", {"Norm"}),
        ("norm_eps: float = 1e-5", "norm_eps: float = 1e-6", {"GPTConfig"}),
        ('"relu2", "swiglu"] =', '"relu2", "swiglu", "silu"] =', {"GPTConfig"}),
        ("turning * cos + turning.roll", "turning * cos - turning.roll", {"rotate"}),
        ("1.0 / config.rope_theta", "2.0 / config.rope_theta", {"rotary_angles"}),
        ("<= self.positions[:, :, None]", "< self.positions[:, :, None]", {"Context"}),
        ("cap * torch.tanh(logits / cap) if cap else logits", "logits", {"GPT"}),
        ("return self.k[layer][:, :, :end], self.v", "return self.k[layer][:, :, 1:end], self.v", {"KVCache"}),
        ("import torch.nn.functional as F", "import mine as F", {"imports"}),
        ("class Norm(nn.Module):", "SCALE = 2\n\n\nclass Norm(nn.Module):", {"SCALE"}),
    ],
)
def test_what_changes_the_numbers_is_an_edit_and_is_named(old, new, named):
    assert changed(edited(old, new)) == named


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# (B, T, C)", "# (batch, tokens, width)"),
        ('"""Token ids in, logits for the next token out."""', '"""Mine."""'),
        ('    """Layer or RMS norm over the last dimension, with the learned parts that the config asks for."""\n', ""),
        ("        h = self.c_fc(x)\n", "        h = (\n            self.c_fc(x)\n        )\n\n"),
        ("def head(self, x: Tensor) -> Tensor:", "def head(self, x):"),
        ("from nanogpt_hub.initialisation import init_weights\n", "def init_weights(model):\n    pass\n"),
        ('"nanogpt": {},', '"nanogpt": dict(activation="relu2"),'),
        ("n_layer=4, n_head=4, n_embd=128", "n_layer=8, n_head=4, n_embd=128"),
        ('Literal["gpt2", "neox", "nanochat"]', 'Literal["gpt2", "neox", "nanochat", "mine"]'),
        ("n if embeddings else n - sum", "n if embeddings else 2 * n - sum"),
    ],
)
def test_what_does_not_is_none(old, new):
    assert changed(edited(old, new)) == set()


PYTHONS = sorted(
    path
    for minor in (10, 11, 12, 13, 14)
    for path in [shutil.which(f"python3.{minor}"), *glob.glob(f"{Path.home()}/.pyenv/versions/3.{minor}.*/bin/python")]
    if path and "shims" not in path  # pyenv's, which start only a version that is chosen
)


@pytest.mark.parametrize("python", [sys.executable, *PYTHONS])
def test_it_is_the_same_on_every_python(python):
    code = (
        "import runpy; found = runpy.run_path('nanogpt_hub/edits/fingerprint.py'); "
        "text = open('nanogpt_hub/model.py', encoding='utf-8').read(); print(found['total'](found['parts'](text)))"
    )
    command = [python, "-I", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == total(VERIFIED), done.stderr


def test_syntax_of_newer_pythons_counts_too():
    base = parts("def f(x):\n    return f'{x!r:>{10}} {x + 1}'\n")
    assert base == parts('def f(x: int) -> str:\n    "Text."\n    return f"{x!r:>{10}} {x+1}"\n')
    assert base != parts("def f(x):\n    return f'{x!r:>{11}} {x + 1}'\n")
    assert parts("x = True") != parts("x = 1") != parts("x = 1.0")
    assert parts("def f(): return None") != parts("def f(): return 'None'")
    assert parts("def f(a, b=None): pass") != parts("def f(a=None, b=None): pass")


def test_the_table_of_another_copy_is_read_without_running_it():
    text = (ROOT / "nanogpt_hub" / "edits" / "fingerprint.py").read_text(encoding="utf-8")
    assert verified_table(text) == VERIFIED
    assert verified_table("raise SystemExit\n") is None
    with pytest.raises(ValueError, match="malformed"):
        verified_table("VERIFIED = open('x')")


# ---- at run time ----


def post_norm(self, x, context):
    x = self.ln_1(x + self.attn(x, context))
    return self.ln_2(x + self.mlp(x))


class Shifted(GPT):
    def head(self, x):
        return super().head(x) + 1


class Mine(nn.Module):
    def forward(self, x):
        return x


def test_a_replaced_method_is_noticed_and_the_folder_loads_where_it_is_replaced(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Block, "forward", post_norm)
        model = tiny().eval()
        assert running_core().changed == ("Block.forward at run time",)
        assert saved_as(model) == ("nanogpt_hub", "model.py is edited (Block.forward at run time)")
        save_model(tmp_path / "m", model)
        again, _ = load_model(tmp_path / "m")
        idx = torch.arange(8)[None]
        assert torch.equal(again(idx)[0], model(idx)[0])
        assert "self.ln_2(x + self.mlp(x))" in (tmp_path / "m" / CORE_FILE).read_text(encoding="utf-8")
        patch.setattr(Block, "forward", lambda self, x, context: x)
        with pytest.raises(CoreError, match="make the same changes again"):
            load_model(tmp_path / "m")
    with pytest.raises(CoreError, match=r"edited model.py \(Block.forward at run time; .* the one here is unedited"):
        load_model(tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m", any_core=True)[0].wte.weight, model.wte.weight)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda patch: patch.setattr(model_module, "rotate", lambda x, cos, sin: x), "rotate at run time"),
        (
            lambda patch: patch.setattr(GPTConfig, "kv_heads", property(lambda self: 1)),
            "GPTConfig.kv_heads at run time",
        ),
        (lambda patch: patch.setattr(model_module, "MLP", Mine), "MLP.forward at run time"),
        (lambda patch: patch.delattr(KVCache, "update"), "KVCache.update at run time"),
    ],
)
def test_replaced_functions_properties_and_classes(change, named, monkeypatch):
    with monkeypatch.context() as patch:
        change(patch)
        assert named in running_core().changed
    assert running_core().changed == ()


def test_what_differs_in_one_model(tmp_path):
    base = tiny()
    save_model(tmp_path / "shifted", Shifted(base.config))
    assert "model.py is edited (Shifted at run time; core" in make_card(tmp_path / "shifted", {})
    with pytest.raises(CoreError, match=r"edited model.py \(Shifted at run time"):
        load_model(tmp_path / "shifted")
    assert running_core(Shifted(base.config)).changed == ("Shifted at run time",)
    base.h[0].mlp.resid_dropout = Mine()
    assert running_core(base).changed == ("Mine at run time",)
    other = tiny()
    other.h[1].forward = functools.partial(post_norm, other.h[1])
    assert running_core(other).changed == ("forward of a Block at run time",)
    assert saved_as(other)[0] == "nanogpt_hub"
    without = tiny()
    without.h[0].ln_1 = nn.Identity()  # a module of PyTorch: the missing weights tell
    save_model(tmp_path / "without", without)
    with pytest.raises(CoreError, match="parameters at run time"):
        load_model(tmp_path / "without")


def test_what_the_trainer_does_to_a_model_is_no_edit():
    model = tiny()
    for block in model.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        block.attn.attend = lambda *args, **options: None
    model.h[0].compile()
    assert running_core(model).changed == ()


def test_a_text_without_source_is_still_told_from_others(monkeypatch):
    namespace: dict = {}
    exec("def forward(self, x): return x", namespace)
    first = {}
    for body in ("return x", "return 2 * x"):
        exec(f"def forward(self, x): {body}", namespace)
        with monkeypatch.context() as patch:
            patch.setattr(MLP, "forward", namespace["forward"])
            first[body] = running_core().fingerprint
    assert len({*first.values(), running_core().fingerprint}) == 3


def test_the_file_counts_as_it_was_at_the_start():
    assert core_module.SOURCE == SOURCE


# ---- what a core must keep ----


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "sentence"),
    [
        (GPT, "forward", lambda self, idx, targets=None, kv_cache=None: (2 * self.head(self.hidden(idx)), None),
         "GPT.forward gives other logits"),
        (Block, "forward", lambda self, x, context: x + x.mean(1, keepdim=True), "tokens that come after it"),
        (Block, "forward", lambda self, x, context: x + x.cumsum(1), "the tokens one by one, with a KVCache"),
    ],
)  # fmt: skip
def test_a_core_that_breaks_what_others_count_on_is_told_so(owner, name, wrong, sentence, monkeypatch):
    assert faults(tiny().config) == []
    monkeypatch.setattr(owner, name, wrong)
    assert any(sentence in fault for fault in faults(tiny().config))


def test_trying_a_core_leaves_the_random_numbers_alone():
    config = tiny().config
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    faults(config)
    assert torch.equal(torch.rand(2), expected)


def test_many_threads_at_once():
    """Python's own parser is not safe in threads: the first visitors of a page may all ask at once."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: parts(SOURCE), range(64)))
    assert all(each == found[0] for each in found)
