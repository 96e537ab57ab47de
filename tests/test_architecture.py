"""docs/change-the-architecture.md, done as it says to copies of the package: what an edited core does, and where to."""

import functools
import inspect
import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from edited import commands, copy_package, python, section_of
from helpers import make_model

import nanogpt_hub
from nanogpt_hub.checkpoint import CoreError, load_model, read_config
from nanogpt_hub.engine import select
from nanogpt_hub.hub.resolve import HubError, from_pretrained, resolve
from nanogpt_hub.hub.space import collect_space, create_space
from nanogpt_hub.model import PRESETS
from train import pretrain

TOKEN = "hf_AliceSecretToken0123456789"
TEXT = "".join(f"def line_{i}(x): return x * {i * i}\n" for i in range(300))
SMALL = (  # put behind the page's commands, so that each is a matter of a second
    "--data.source text.py --data.tokenizer byte --model.n_layer 2 --model.n_head 2 --model.n_embd 16 "
    "--model.block_size 16 --max_steps 4 --batch_size 8 --eval.interval 4 --eval.max_windows 8 "
    "--eval.sample_tokens 8 --save.interval 2 --optim.warmup_steps 2 --device cpu"
).split()
# Runs commands in one process, then compares what is shown and generated with model.py itself, in float32.
SCRIPT = """
import json, sys
import torch, torch.nn.functional as F
from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.cli import main as hub
from nanogpt_hub.evaluate import evaluate
from nanogpt_hub.generate import generate, generate_naive, stream_tokens
from nanogpt_hub.lens import logit_lens, look_inside, next_tokens, surprise
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.sources import open_source
from train import finetune, pretrain

MAINS = {"nanogpt_hub": hub, "train.pretrain": pretrain.main, "train.finetune": finetune.main}

def run(commands):
    for module, argv, status in commands:
        print("$", module, *argv, flush=True)
        assert MAINS[module](argv) == status, argv

@torch.no_grad()
def compare(folder):
    model, tokenizer = load_model(folder)
    for parameter in model.parameters():  # so that everything counts
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    text = "def line_1(x): "
    ids = torch.tensor([tokenizer.encode(text)])
    logits = model(ids)[0][0, :, : tokenizer.vocab_size]
    lens = logit_lens(model, tokenizer, inside := look_inside(model, tokenizer, text))
    shown = next_tokens(model, tokenizer, text).tokens[0]
    open("short.txt", "w").write(text)
    loss = evaluate(model, tokenizer, open_source("short.txt"), quiet=True).loss
    expected = F.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:]).item()
    assert abs(loss - expected) < 1e-5
    assert abs(surprise(model, tokenizer, text).tokens[1].bits * 0.6931471805599453
               - F.cross_entropy(logits[:1], ids[0, 1:2]).item()) < 1e-4
    torch.testing.assert_close(lens.top_probs[-1], logits.softmax(-1).amax(-1), rtol=1e-3, atol=1e-5)
    assert (shown.id, abs(shown.probs[0] - logits[-1].softmax(-1).max()) < 1e-4) == (logits[-1].argmax(), True)
    assert (inside.attention.sum(-1) - 1).abs().max() < 1e-5 and not inside.attention.triu(1).any()
    sampling = SamplingConfig(40, temperature=1.0, top_k=None, seed=5, stop_tokens=())  # past block_size
    prompts = [ids[0].tolist(), ids[0, :3].tolist()]
    rows = [[], []]
    for token in stream_tokens(model, tokenizer, prompts, sampling):
        rows[token.row].append(token.id)
    from dataclasses import replace
    naive = [generate_naive(model, prompt, replace(sampling, seed=5 + row), tokenizer.vocab_size)
             for row, prompt in enumerate(prompts)]
    return {"generated": rows, "model.py": naive}
"""


def nanogpt_files(folder: Path) -> None:
    """A ckpt.pt and a meta.pkl as nanoGPT writes them, of a small random model."""
    tokens, C, T, wide = sorted(set(TEXT)), 16, 24, dict(c_attn=(48, 16), c_proj=(16, 16))
    shapes = {"wte": (len(tokens), C), "wpe": (T, C), "h.0.ln_1": (C,), "h.0.ln_2": (C,), "ln_f": (C,)}
    shapes |= {f"h.0.attn.{name}": shape for name, shape in wide.items()}
    shapes |= {"h.0.mlp.c_fc": (64, 16), "h.0.mlp.c_proj": (16, 64)}
    weights = {f"transformer.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    args = dict(n_layer=1, n_head=2, n_embd=C, block_size=T, bias=False, vocab_size=len(tokens), dropout=0.0)
    torch.save({"model": weights, "model_args": args}, folder / "ckpt.pt")
    meta = {"vocab_size": len(tokens), "itos": dict(enumerate(tokens)), "stoi": {c: i for i, c in enumerate(tokens)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


class Checkout:
    """A copy of the package with an edit of the page, in which commands are run."""

    def __init__(self, folder: Path, heading: str, engine: str):
        self.folder, self.heading, self.engine = copy_package(folder, heading), heading, engine
        (folder / "text.py").write_text(TEXT, encoding="utf-8")

    def run(self, lines: list[tuple[str, list[str], int]], then: str = "") -> str:
        """Output of commands (module, arguments, exit status) in one process, and of code after them."""
        return python(self.folder, "-c", f"{SCRIPT}\nrun({lines!r})\n{then}", engine=self.engine)

    def page(self) -> list[tuple[str, list[str], int]]:
        """The commands of the page's section, the trainings made small."""
        found = []
        for line in commands(section_of(self.heading)):
            command, dash_m, module, *argv = shlex.split(line)
            assert (command, dash_m) == ("python", "-m")
            found.append((module, [*argv, *(SMALL if module.startswith("train.") else ())], 0))
        return found


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGPT_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


TUNE = "--data.source text.py --max_steps 2 --device cpu --eval.max_windows 4 --eval.sample_tokens 4".split()
MORE = [  # what else is done with post-norm: (module, arguments, exit status)
    ("train.pretrain", ["configs/quickstart.yaml", *SMALL, "--max_steps", "6", "--out_dir", "out/postnorm"], 0),
    ("train.finetune", [*TUNE, "--from", "out/postnorm/best", "--out_dir", "out/tuned"], 0),
    ("nanogpt_hub", ["generate", "stock", "--prompt", "def "], 2),
    ("nanogpt_hub", ["eval", "stock", "--data", "text.py", "--max-windows", "1", "--any-core"], 0),
    ("train.finetune", [*TUNE, "--from", "stock", "--out_dir", "out/refused"], 2),
    ("train.finetune", [*TUNE, "--from", "stock", "--out_dir", "out/stock", "--any_core"], 0),
    ("nanogpt_hub", ["info", "out/stock/best"], 0),
    ("nanogpt_hub", ["import", "ckpt.pt", "imported", "--meta", "meta.pkl"], 2),
    ("nanogpt_hub", ["import", "ckpt.pt", "imported", "--meta", "meta.pkl", "--any-core"], 0),
]
EDITS = {  # heading, edited parts, the engine that is asked for
    "silu": ("An activation", ("GPTConfig", "MLP"), "auto"),
    "postnorm": ("A norm placement", ("Block",), "numba"),
    "alibi": ("A position scheme", ("Context", "GPTConfig"), "torch"),
}


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory) -> Callable[[str], Checkout]:
    """Name in EDITS -> its checkout, after all commands of the page and, for post-norm, of MORE."""

    @functools.cache
    def make(name: str) -> Checkout:
        checkout = Checkout(tmp_path_factory.mktemp(name), EDITS[name][0], EDITS[name][2])
        more = MORE if name == "postnorm" else []
        if more:
            make_model(checkout.folder / "stock", text=TEXT, position="learned", activation="gelu_tanh")
            nanogpt_files(checkout.folder)
        last = f"print(json.dumps(compare('out/{name}/best')))"
        checkout.output = checkout.run([*checkout.page(), *more], last)
        return checkout

    return make


@pytest.fixture(params=EDITS)
def done(request, checkouts) -> tuple[str, Checkout, str]:
    """A name of EDITS, its checkout, and the output of all commands; a comparison is its last line."""
    checkout = checkouts(request.param)
    return request.param, checkout, checkout.output


def test_the_page_is_run_said_before_training_and_agrees_with_model_py(done):
    name, checkout, output = done
    edited = ", ".join(EDITS[name][1])
    assert f"model.py     edited: {edited}\n" in output
    assert output.count("keeps what generation, training and lens count on") == len(PRESETS)
    assert f"saved as nanogpt_hub\nnote: model.py is edited ({edited}): the folder holds it as model.py.txt" in output
    assert output.index("note: model.py is edited") < output.index("step      0")
    assert "off by up to" not in output
    best = checkout.folder / "out" / name / "best"
    assert (best / "model.py.txt").read_bytes() == (checkout.folder / "nanogpt_hub" / "model.py").read_bytes()
    card = (best / "README.md").read_text(encoding="utf-8")
    assert f"nanogpt_hub's own: model.py is edited ({edited}; core " in card
    assert "this model's `model.py.txt`" in card
    assert "With Transformers" not in card
    if name == "alibi":
        assert "| positions | alibi |" in card


def test_generation_agrees_with_model_py(done):
    result = json.loads([line for line in done[2].splitlines() if line.startswith("{")][-1])
    assert result["generated"] == result["model.py"]
    assert "the compiled engine could not be prepared" not in done[2]
    assert not list(Path(os.environ["NANOGPT_HUB_CACHE"]).glob("engine*")), "something was compiled"


UNTRAINED = """
import torch
from nanogpt_hub.generate import generate_naive, stream_tokens
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.sampling import SamplingConfig

model = GPT(GPTConfig.preset("nanochat", "1m", vocab_size=61, n_layer=2, n_embd=32, block_size=24)).eval()
sampling = SamplingConfig(12, temperature=1.0, top_k=None, seed=5, stop_tokens=())
list(stream_tokens(model, None, [[1, 2, 3]], sampling))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_(0, 0.4)
ids = [token.id for token in stream_tokens(model, None, [[1, 2, 3]], sampling)]
print(ids == generate_naive(model, [1, 2, 3], sampling))
"""


def test_an_edit_that_does_not_show_before_training_is_not_forgotten(tmp_path):
    """A nanochat begins with projections of zero, which hide its activation: the sample of step 0 proves nothing."""
    if "running_core" not in inspect.getsource(select.core_is_known):
        pytest.skip("engine/select.py does not ask core.py yet whether model.py is edited")
    checkout = copy_package(tmp_path)
    model = checkout / "nanogpt_hub" / "model.py"
    model.write_text(model.read_text(encoding="utf-8").replace("h = F.relu(h).square()", "h = F.silu(h)"))
    assert python(checkout, "-c", UNTRAINED, engine="auto").endswith("True\n")


def test_elsewhere_the_folder_is_refused_by_name(done):
    name, checkout, _ = done
    best, edited = checkout.folder / "out" / name / "best", ", ".join(EDITS[name][1])
    with pytest.raises(CoreError) as error:
        load_model(best)
    for part in (f"edited model.py ({edited}; core ", "the one here is unedited: put the model.py.txt beside the "
                 "weights in the place of nanogpt_hub/model.py, after reading it", "--any-core"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(CoreError):
        read_config(best)
    with pytest.raises(ValueError, match="nanogpt_hub"):
        transformers.AutoModelForCausalLM.from_pretrained(best)
    with pytest.raises(ValueError, match="nanogpt_hub"):
        transformers.AutoModelForCausalLM.from_pretrained(best, trust_remote_code=True)  # there is no code to trust
    assert len(transformers.AutoTokenizer.from_pretrained(best)) > 1


def test_weights_are_taken_on_purpose(done):
    name, checkout, _ = done
    best = checkout.folder / "out" / name / "best"
    if name == "postnorm":
        assert load_model(best, any_core=True)[0].config.n_embd == 16
    else:
        with pytest.raises(ValueError, match=r"silu|alibi"):
            load_model(best, any_core=True)  # a value that is not known here


# ---- one edit, and all that is done with a model ----


@pytest.fixture
def post(checkouts) -> Checkout:
    return checkouts("postnorm")


def test_a_run_goes_on_and_is_fine_tuned_with_the_same_core(post):
    assert "resuming at step 4" in post.output
    for run in ("postnorm", "tuned", "stock"):
        assert json.loads((post.folder / "out" / run / "best" / "config.json").read_text())["core"]["changed"] == [
            "Block"
        ]


def test_stock_weights_are_refused_by_an_edited_core_unless_asked_for(post):
    refusal = (
        "its weights belong to the unedited model.py, and the one here is edited (Block): use an unedited copy, or, "
    )
    assert post.output.count(f"cannot load stock: {refusal}") == 2
    assert "to fine-tune them with the edit, say, take them as they are by --any-core" in post.output
    assert not (post.folder / "out" / "refused").exists()
    assert "model.py     edited (Block), see model.py.txt; core " in post.output


def test_a_run_does_not_go_on_with_another_core(post, monkeypatch, capsys):
    monkeypatch.chdir(post.folder)
    assert pretrain.main(["configs/quickstart.yaml", *SMALL, "--max_steps", "8", "--out_dir", "out/postnorm"]) == 2
    assert "a run with other settings ({'model.py': 'edited (Block), core " in capsys.readouterr().err


def test_an_unedited_save_takes_the_old_core_away(post, tmp_path):
    model, tokenizer = load_model(post.folder / "out" / "postnorm" / "best", any_core=True)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.py.txt").write_text("old")
    nanogpt_hub.save_model(tmp_path / "m", model, tokenizer)
    assert not (tmp_path / "m" / "model.py.txt").exists()
    assert "core" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_it_is_pushed_and_only_a_space_with_its_core_is_made(post, hub, monkeypatch):
    hub.add_user("alice", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    make = "from nanogpt_hub.hub.space import create_space; print(create_space('alice/space', 'alice/post').url)"
    out = post.run([("nanogpt_hub", ["push", "out/postnorm/best", "alice/post"], 0)], make)
    files = hub.repo("alice/post").files()
    assert files["model.py.txt"] == (post.folder / "nanogpt_hub" / "model.py").read_bytes()
    assert "alice/space" in out
    assert hub.repo("alice/space", "spaces").files()["nanogpt_hub/model.py"] == files["model.py.txt"]

    with pytest.raises(CoreError, match=r"cannot load alice/post@.*edited model.py \(Block; core"):
        from_pretrained("alice/post")
    assert (resolve("alice/post").folder / "model.py.txt").is_file()  # the file that the sentence speaks of
    assert from_pretrained("alice/post", any_core=True)[0].config.n_embd == 16
    with pytest.raises(HubError, match=r"could not load alice/post: its weights belong to an edited model.py \(Block"):
        create_space("alice/other", "alice/post")
    # From an installed wheel, which has no app.py, a checkout is named; the wheel's own core does not matter.
    assert "alice/wheel" in create_space("alice/wheel", "alice/post", app_folder=post.folder).url
    assert hub.repo("alice/wheel", "spaces").files()["nanogpt_hub/model.py"] == files["model.py.txt"]


def test_a_stock_model_gets_no_space_with_an_edited_core(post, hub, monkeypatch, tmp_path):
    hub.add_user("alice", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    nanogpt_hub.push_to_hub(make_model(tmp_path / "stock"), "alice/stock")
    with pytest.raises(HubError, match=r"belong to the unedited model.py, and the one here is edited \(Block\)"):
        create_space("alice/demo", "alice/stock", app_folder=post.folder)
    assert collect_space(None, "alice/stock")["nanogpt_hub/model.py"] == Path(nanogpt_hub.model.__file__).read_bytes()


def test_a_model_of_nanogpt_is_imported_by_an_edited_core_only_on_purpose(post):
    assert "cannot import ckpt.pt: its weights belong to the unedited model.py" in post.output
    assert json.loads((post.folder / "imported" / "config.json").read_text())["core"]["changed"] == ["Block"]


# ---- folders of before, and folders of others ----


def test_own_folders_from_before_edits_were_recorded_still_load(tmp_path):
    folder = make_model(tmp_path / "m", n_kv_head=1)
    content = json.loads((folder / "config.json").read_text())
    assert content["model_type"] == "nanogpt_hub"
    assert "core" not in content
    assert not (folder / "model.py.txt").exists()
    assert load_model(folder)[0].config.kv_heads == 1


@pytest.mark.parametrize(
    "core",
    ["x", [], {}, {"fingerprint": 1, "changed": []}, {"fingerprint": "a", "changed": "b"},
     {"fingerprint": "\x1b[31m", "changed": []}, {"fingerprint": "a", "changed": ["<b>"]}],
)  # fmt: skip
def test_a_record_that_makes_no_sense_is_refused(core, tmp_path):
    folder = make_model(tmp_path / "m", n_kv_head=1)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"core": core}))
    with pytest.raises(ValueError, match=r"core is .* it must be the fingerprint"):
        load_model(folder)


def test_the_text_of_a_foreign_core_is_not_executed(tmp_path):
    folder = make_model(tmp_path / "m", n_kv_head=1)
    (folder / "model.py.txt").write_text("raise SystemExit('executed')\n")
    assert load_model(folder)[0].config.kv_heads == 1


def test_renewing_keeps_the_old_table_where_parity_fails(tmp_path):
    checkout = copy_package(tmp_path, "A norm placement")
    tests = Path(__file__).parent
    (checkout / "tests").mkdir()
    for name in ("renew_core.py", "test_families.py", "conftest.py", "hub_server.py"):
        (checkout / "tests" / name).write_bytes((tests / name).read_bytes())
    (checkout / "tests" / "test_model.py").write_text("def test_nothing():\n    pass\n")
    fingerprint = checkout / "nanogpt_hub" / "edits" / "fingerprint.py"
    before = fingerprint.read_text(encoding="utf-8")
    env = {**os.environ, "PYTEST_ADDOPTS": "-x -k what_we_save_is_the_same_model", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "tests/renew_core.py"]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the parity tests failed: fingerprint.py is as it was" in done.stdout
    assert fingerprint.read_text(encoding="utf-8") == before
