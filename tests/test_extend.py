"""docs/extend.md: its sampler, tab, optimizer and source, made in a copy of the checkout, do what the page says."""

import shlex

import pytest
from edited import EXTEND, commands, copy_package, extend, in_one_process, python, section_of

TEXT = "".join(f"def line_{i}(x): return x * {i * i}\n" for i in range(300))
SMALL = (  # put behind the page's commands, so that each is a matter of a second
    "--data.tokenizer byte --model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.block_size 16 --max_steps 4 "
    "--batch_size 4 --eval.interval 4 --eval.max_windows 2 --eval.sample_tokens 8 --optim.warmup_steps 2 --device cpu"
)
TAB = """
import gradio as gr
from nanogpt_hub.page.layout import create_page
from nanogpt_hub.page.tokens import TokensTab
from nanogpt_hub.playground.models import ModelStore
from nanogpt_hub.playground.session import Playground

store = ModelStore("tiny")
blocks = create_page(Playground(store))
assert "Tokens" in [block.label for block in blocks.blocks.values() if isinstance(block, gr.Tab)]
with gr.Blocks():
    tab = TokensTab.__new__(TokensTab)
tab.models = store
rows = tab.cut(store.find(), "def")
assert "".join(token for token, _ in rows) == "def", rows
"""


@pytest.fixture
def checkout(tmp_path):
    copy = copy_package(tmp_path / "checkout")
    (copy / "text.py").write_text(TEXT, encoding="utf-8")
    return copy


def small(command: str) -> list[str]:
    """A training command of the page, made small."""
    words = shlex.split(f"{command} {SMALL}")
    return words if "--data.source" in words else [*words, "--data.source", "text.py"]


def test_a_sampler(checkout):
    extend(checkout, "A sampler")
    (command,) = commands(section_of("A sampler", EXTEND))
    few = [*shlex.split(command), "--max-new-tokens", "40"]
    _, sure, greedy, *_ = in_one_process(
        checkout,
        small("python -m train.pretrain configs/quickstart.yaml --out_dir out/quickstart"),
        [*few, "--epsilon", "1", "--seed", "2"],
        [*few, "--temperature", "0"],
        [*few, "--engine", "plain"],
        [*few, "--engine", "torch"],
    )
    assert sure.partition("[seed")[0] == greedy.partition("[seed")[0], "at least 1 is the likeliest token alone"
    code = "from nanogpt_hub.sampling import SAMPLERS; assert SAMPLERS['epsilon'].slider == (0, 0.1)"
    python(checkout, "-c", code)


def test_a_tab(checkout):
    extend(checkout, "A tab")
    python(checkout, "-c", TAB)


@pytest.mark.parametrize("section", ["An optimizer", "A source of text"])
def test_an_optimizer_and_a_source(checkout, section):
    extend(checkout, section)
    (command,) = commands(section_of(section, EXTEND))
    (said,) = in_one_process(checkout, small(command))
    assert "done after 4 steps" in said
