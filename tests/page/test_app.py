"""The app, launched as a Space would, asked by programs: what the API gives, what it refuses, and in which words."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from helpers import files_of, import_app, make_model

from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.generate import generate
from nanogpt_hub.hub.space import collect_space
from nanogpt_hub.page.layout import create_page, serve
from nanogpt_hub.playground.links import client_snippet
from nanogpt_hub.playground.models import Limits, ModelStore
from nanogpt_hub.playground.session import Playground


@pytest.fixture(scope="module")
def app():
    return import_app()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("app") / "best")


@pytest.fixture(scope="module")
def served(app, folder):
    """A playground and the address at which it is served."""
    playground = Playground(ModelStore(str(folder), on_space=True, limits=Limits(queue=40, seconds=20)))
    blocks = create_page(playground)
    _, url, _ = serve(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield playground, url
    blocks.close()


@pytest.fixture(scope="module")
def client(served):
    return Client(served[1], verbose=False)


def oracle(folder, prompt, **asked):
    return generate(*load_model(folder), prompt, **asked).text


def test_only_what_is_meant_for_programs_is_listed(client):
    listed = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(listed) == {"/generate", "/next_tokens", "/score", "/info"}
    names = [parameter["parameter_name"] for parameter in listed["/generate"]["parameters"]]
    assert names[:3] == ["prompt", "model", "revision"]
    assert names[-1] == "int8"


def test_generate_streams_what_generate_gives(client, folder):
    job = client.submit(prompt="To be", seed=3, max_new_tokens=150, temperature=0.7, top_k=5, api_name="/generate")
    updates = list(job)
    assert updates[-1]["text"] == oracle(folder, "To be", seed=3, max_new_tokens=150, temperature=0.7, top_k=5)
    assert updates[-1]["finish"] == "length"
    assert all(updates[-1]["text"].startswith(update["text"]) for update in updates)


def test_generate_with_weights_of_8_bits(client, folder):
    model, tokenizer = load_model(folder)
    asked = dict(seed=3, max_new_tokens=150, temperature=0.7, top_k=5)
    got = client.predict(prompt="To be", int8=True, **asked, api_name="/generate")
    assert got["text"] == generate(quantize_int8(model), tokenizer, "To be", **asked).text


@pytest.mark.parametrize("int8", [False, True])
def test_the_client_snippet_gives_the_same_again(served, client, int8):
    playground, url = served
    place = playground.models.find()
    *_, writing = playground.write(place, "To be\n", playground.settings(place, seed=5, stop="zz"), int8)
    namespace: dict = {}
    snippet = client_snippet(playground.models, writing, url)
    exec(snippet, namespace)
    assert namespace["result"]["text"] == writing.text
    assert ("int8=True" in snippet) == int8


def test_weights_of_8_bits_are_offered_where_models_run_on_a_cpu(app, folder):
    for device, offered in (("cpu", True), ("cuda", False)):
        blocks = create_page(Playground(ModelStore(str(folder), device=device)))
        (box,) = [block for block in blocks.blocks.values() if block.elem_id == "int8"]
        assert (box.visible, box.value) == (offered, False)


def test_other_endpoints(client, folder):
    assert client.predict(api_name="/info")["parameters"] == load_model(folder)[0].num_params()
    scored = client.predict(text="To be, or not", api_name="/score")
    assert scored["tokens"][0]["bits"] is None
    assert sum(token["bits"] for token in scored["tokens"][1:]) == pytest.approx(scored["total_bits"])
    found = client.predict(text="To", top_k=3, n=4, api_name="/next_tokens")
    assert found["stages"] == ["model", "top_k"]
    assert [token["cut_by"] for token in found["tokens"]] == [None, None, None, "top_k"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (dict(prompt="T" * 2001), "the prompt has 2,001 characters; at most 2,000"),
        (dict(max_new_tokens=501), "max_new_tokens has 501; at most 500"),
        (dict(temperature=-1.0), "temperature is -1"),
        (dict(prompt="Ω"), "character 'Ω'"),
        (dict(model="nobody/none"), "there is no such model"),
        (dict(model="../../etc"), "neither a folder here nor a name on the Hub"),
        (dict(model="a/gated"), "gated"),
        (dict(model="a/data"), "no config.json"),
        (dict(model="a/tiny", revision="step-000001"), "no branch, tag or commit"),
    ],
)
def test_refusals_are_sentences_and_leave_everything_as_it_was(client, folder, hub, asked, sentence):
    hub.add_repo("a/gated", files_of(folder), gated=True)
    hub.add_repo("a/data", {"data.csv": b"1"})
    hub.add_repo("a/tiny", files_of(folder))
    with pytest.raises(AppError) as caught:
        client.predict(**{"prompt": "To", **asked}, api_name="/generate")
    assert sentence in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert client.predict(prompt="To", seed=1, max_new_tokens=3, api_name="/generate")["finish"] == "length"


def test_what_the_page_hides_gives_programs_nothing(served):
    """Private endpoints can be called by who knows their names, but not with a model or a text of one's own."""
    url = f"{served[1]}gradio_api/call/run"
    data = {"data": [None, "T" * 3000, False, 10**6, 1, 0, 1, 0, 1, None, ""]}
    request = urllib.request.Request(url, json.dumps(data).encode(), {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    answer = urllib.request.urlopen(f"{url}/{event}").read().decode()
    assert "error" in answer
    assert "TTTT" not in answer


def test_a_model_from_the_hub_at_a_revision(client, folder, hub, tmp_path):
    other = make_model(tmp_path / "other", seed=9)
    repo = hub.add_repo("a/steps", files_of(other))
    repo.tags["step-000500"] = repo.branches["main"]
    repo.put(files_of(folder))
    asked = dict(seed=1, max_new_tokens=30, temperature=1.0, top_k=0)
    for revision, expected in (("step-000500", other), ("", folder)):
        got = client.predict(prompt="To", model="a/steps", revision=revision, **asked, api_name="/generate")
        assert got["text"] == oracle(expected, "To", **asked)
    assert got["sha"] == repo.branches["main"]


def test_a_cancelled_client_ends_the_work(served, client, monkeypatch):
    drawn = []

    def slowly(stream, *args, **kwargs):
        for tokens in stream(*args, **kwargs):
            drawn.append(tokens)
            time.sleep(0.05)
            yield tokens

    original = Playground._stream
    monkeypatch.setattr(Playground, "_stream", lambda *args: slowly(original, *args))
    monkeypatch.setattr("nanogpt_hub.playground.session.UPDATES_PER_SECOND", 1e9)
    job = client.submit(prompt="To", max_new_tokens=500, api_name="/generate")
    next(iter(job))
    job.cancel()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        before = len(drawn)
        time.sleep(0.5)
        if len(drawn) == before:
            break
    assert len(drawn) < 400


def test_many_at_once_are_not_mixed_up(served, folder):
    """Each of ten clients gets its own text."""
    results = {}

    def ask(seed):
        asked = dict(seed=seed, max_new_tokens=40, temperature=1.0)
        results[seed] = Client(served[1], verbose=False).predict(prompt="To be", **asked, api_name="/generate")["text"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {
        seed: oracle(folder, "To be", seed=seed, max_new_tokens=40, temperature=1.0) for seed in range(10)
    }


def test_on_zerogpu_generation_is_decorated(app, folder, monkeypatch):
    durations = []
    spaces = ModuleType("spaces")
    spaces.__spec__ = ModuleSpec("spaces", None)
    spaces.GPU = lambda duration: lambda function: (durations.append(duration), function)[1]
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    assert app.zero_gpu() is None
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    playground = app.make_playground(app.parse(["--model", str(folder)]))
    assert playground.models.device == "cpu"
    (seconds,) = durations
    place = playground.models.find()
    assert 10 <= seconds(place, [1], playground.settings(place, max_new_tokens=200)) <= 60


def test_the_folder_of_a_space_runs_and_generates(folder, tmp_path):
    """What is uploaded is all that it needs: nothing of the checkout, nor what only training installs."""
    for name, data in collect_space(None, "user/name").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    blocked = "accelerate datasets jsonargparse matplotlib train".split()
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\n")
    variables = {"PYTHONPATH": str(tmp_path / "block"), "PYTHONUNBUFFERED": "1", "SPACE_ID": "user/demo"}
    command = [sys.executable, str(tmp_path / "app.py"), "--model", str(folder)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True
    )
    try:
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://[\w.]+:\d+", line)))
        client = Client(url, verbose=False)
        assert client.predict(prompt="To", seed=1, max_new_tokens=9, api_name="/generate")["tokens"] == 9
    finally:
        process.terminate()
        process.wait()


def test_arguments_and_variables_choose_the_model(app, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert app.make_playground(app.parse([])).models.default == "tiny"
    assert app.make_playground(app.parse(["--model", str(folder)])).models.default == str(folder)
    assert app.make_playground(app.parse(["--runs", str(folder.parent)])).models.default == folder.as_posix()
    monkeypatch.setenv("NANOGPT_REPO", "user/name")
    monkeypatch.setenv("NANOGPT_REVISION", "step-000500")
    assert app.make_playground(app.parse([])).models.default == "user/name@step-000500"
    assert app.make_playground(app.parse([])).models.any_folder
    assert not app.make_playground(app.parse(["--host", "0.0.0.0"])).models.any_folder
    monkeypatch.setenv("SPACE_ID", "user/space")
    assert not app.make_playground(app.parse([])).models.any_folder
