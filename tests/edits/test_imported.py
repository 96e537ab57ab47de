"""Code of one's own that model.py imports: it is an edit, its text goes along, and loading elsewhere says so."""

import sys

import pytest
import torch.nn as nn
from edited import copy_package, python

from nanogpt_hub.edits.core import SOURCE, running_core
from nanogpt_hub.edits.imported import own_modules
from nanogpt_hub.model import GPT, GPTConfig

NAME = "nanogpt_hub.model"


def test_the_verified_core_imports_nothing_of_ones_own():
    assert own_modules(SOURCE, NAME) == {}


def test_modules_are_found_wherever_they_are_imported_and_read_without_running(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import theirs_too\nraise SystemExit('executed')\n")
    (tmp_path / "theirs_too.py").write_text("import mine, json, numpy\n")
    (tmp_path / "late.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = "import math, torch, numpy as np, not_there\nfrom mine import swish\ndef f():\n    from late import x\n"
    found = own_modules(source, NAME)
    assert {*found} == {"mine", "theirs_too", "late"}
    assert found["late"] == "x = 1\n"
    assert "mine" not in sys.modules


@pytest.mark.parametrize(
    "line",
    [
        "from nanogpt_hub.sampling import draw",
        "from nanogpt_hub import sampling",
        "from .sampling import draw",
        "import nanogpt_hub.sampling as s",
    ],
)
def test_modules_of_the_package_are_found_by_every_kind_of_import(line):
    assert "nanogpt_hub.sampling" in own_modules(line, NAME)


def test_first_weights_are_no_edit_but_whatever_else_stands_in_their_file_is():
    assert own_modules("from nanogpt_hub.initialisation import init_weights", NAME) == {}
    assert "nanogpt_hub.initialisation" in own_modules("from nanogpt_hub.initialisation import swish", NAME)


def test_a_class_of_the_package_in_a_model_is_noticed():
    class Swish(nn.Module):
        __module__ = "nanogpt_hub.mine"

    model = GPT(GPTConfig(vocab_size=7, block_size=4, n_layer=1, n_head=1, n_embd=4))
    model.h[0].mlp.resid_dropout = Swish()
    assert running_core(model).changed == ("Swish at run time",)


SCRIPT = """
import sys
import torch
from nanogpt_hub.checkpoint import load_model, save_model
from nanogpt_hub.model import GPT, GPTConfig

if sys.argv[1] == "save":
    torch.manual_seed(1)
    save_model("out", GPT(GPTConfig(vocab_size=7, block_size=4, n_layer=1, n_head=1, n_embd=4, activation="gelu_tanh")))
try:
    load_model("out")
    print("loaded")
except ValueError as error:
    print(error)
"""


def test_an_import_goes_along_and_another_text_of_it_is_refused(tmp_path):
    checkout = copy_package(tmp_path)
    mine = checkout / "nanogpt_hub" / "mine.py"
    mine.write_text("import torch.nn.functional as F\n\n\ndef swish(x):\n    return F.silu(x)\n", encoding="utf-8")
    model = checkout / "nanogpt_hub" / "model.py"
    source = model.read_text(encoding="utf-8")
    source = source.replace("import math\n", "import math\nfrom nanogpt_hub.mine import swish\n", 1)
    gelu = 'F.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none")'
    source = source.replace(gelu, "swish(h)", 1)
    model.write_text(source, encoding="utf-8")
    assert python(checkout, "-c", SCRIPT, "save").strip() == "loaded"
    text = (checkout / "out" / "model.py.txt").read_text(encoding="utf-8")
    assert text.startswith(source)
    assert "# ---- nanogpt_hub.mine imported ----\nimport torch.nn.functional as F\n" in text
    said = python(checkout, "-m", "nanogpt_hub", "core", status=2)
    assert "nanogpt_hub.mine is imported: move it into model.py" in said

    mine.write_text("import torch\n\n\ndef swish(x):\n    return x * torch.tanh(x)\n", encoding="utf-8")
    said = python(checkout, "-c", SCRIPT, "load")
    assert "an edited model.py (MLP, imports, nanogpt_hub.mine imported; core" in said
    assert "make the modules anew that stand at the end of the model.py.txt" in said
