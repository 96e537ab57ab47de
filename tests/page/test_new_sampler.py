"""Adding a sampler is one field of SamplingConfig: in a copy of the tree with one more, everything knows it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, make_model

FIELD = """
    second_best: int | None = sampler(
        0, kind=int, neutral=0, least=0, most=1, label="Second best", help="1 always takes the runner-up",
        apply=lambda logits, on: logits.masked_fill(logits == logits.amax(-1, keepdim=True), -math.inf),
    )
"""
# What each place that offers samplers knows of this one, printed as JSON.
ASK = """
import inspect, json, subprocess, sys
from urllib.parse import parse_qs
from nanogpt_hub.page.layout import create_page
from nanogpt_hub.playground.api import Api
from nanogpt_hub.playground.links import link, read_link, snippet
from nanogpt_hub.playground.models import ModelStore
from nanogpt_hub.playground.session import Playground
from nanogpt_hub.playground.views import next_tokens_view
from nanogpt_hub.sampling import SamplingConfig

playground = Playground(ModelStore(sys.argv[1]))
place = playground.models.find()
blocks = create_page(playground)
(slider,) = [block for block in blocks.blocks.values() if block.elem_id == "second-best"]
settings = playground.settings(place, max_new_tokens=5, top_k=0, seed=1, second_best=1.0)
*_, made = playground.write(place, "To be", settings)
parameter = inspect.signature(Api(playground).generate).parameters["second_best"]
HELP = [sys.executable, "-m", "nanogpt_hub", "generate", "--help"]
asked, problems = read_link({"second_best": "1", "temperature": "warm"})
print(json.dumps({
    "widget": [slider.label, slider.info, slider.minimum, slider.maximum, slider.step],
    "api": [parameter.default, inspect.getdoc(Api(playground).generate)],
    "link": parse_qs(link(playground.models, made, "http://x/").partition("?")[2]),
    "asked": asked,
    "problems": problems,
    "snippet": snippet(made),
    "json": json.loads(made.as_json())["settings"]["second_best"],
    "stages": next_tokens_view(playground.next_tokens(place, "To be", settings))["columns"],
    "likeliest": [token.alternatives[0].id == token.id for token in made.tokens],
    "help": subprocess.run(HELP, capture_output=True, text=True).stdout,
}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What a copy of the tree with one more field answers."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "nanogpt_hub", copy / "nanogpt_hub", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "nanogpt_hub" / "sampling.py"
    source, mark = path.read_text(encoding="utf-8"), "    seed: int | None = None"
    assert source.count(mark) == 1
    path.write_text(source.replace(mark, FIELD.lstrip("\n") + mark), encoding="utf-8")
    folder = make_model(copy / "model")
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    asked = [sys.executable, "-c", ASK, str(folder)]
    done = subprocess.run(asked, cwd=copy, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_has_a_widget(answers):
    assert answers["widget"] == ["Second best", "1 always takes the runner-up", 0, 1, 1]


def test_the_api_has_a_parameter_and_explains_it(answers):
    default, text = answers["api"]
    assert default is None
    assert "second_best: 1 always takes the runner-up" in text


def test_links_carry_it_both_ways(answers):
    assert answers["link"]["second_best"] == ["1"]
    assert answers["asked"] == {"second_best": 1}
    (problem,) = answers["problems"]
    assert "temperature" in problem


def test_code_file_and_table_name_it(answers):
    assert "second_best=1" in answers["snippet"]
    assert answers["json"] == 1
    assert any("after second best" in column for column in answers["stages"])


def test_the_command_line_offers_it(answers):
    assert "--second-best" in answers["help"]
    assert "1 always takes the runner-up" in " ".join(answers["help"].split())


def test_the_text_follows_it(answers):
    assert answers["likeliest"] == [False] * 5, "the likeliest token is never drawn"
