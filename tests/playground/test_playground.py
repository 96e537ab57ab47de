"""What the app's tabs do, tested without the app: rules, the models in memory, records, links, logs."""

import json
import pickle
import threading
import time
from urllib.parse import parse_qs, urlsplit

import pytest
from helpers import HOSTILE, files_of, make_model

from nanogpt_hub.checkpoint import CheckpointError, save_model
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.generate import generate, stream_tokens
from nanogpt_hub.hub.resolve import HubError, Resolved
from nanogpt_hub.playground.models import LimitError, Limits, ModelCache
from nanogpt_hub.playground.session import Playground, explain, toast
from nanogpt_hub.playground.tiny import make_tiny
from nanogpt_hub.playground.views import (
    attention_view,
    lens_view,
    next_tokens_view,
    pieces_view,
    safe_markdown,
    surprise_view,
)
from nanogpt_hub.runs import MAX_POINTS, find_runs, read_run, run_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "best")


@pytest.fixture
def playground(folder):
    return Playground(str(folder))


@pytest.fixture
def place(playground):
    return playground.find()


def write(playground, place, prompt="To be", **asked):
    asked = {"max_new_tokens": 20, "seed": 3, **asked}
    return list(playground.write(place, prompt, playground.settings(place, **asked)))


# ---- rules and finding ----


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": 501}, {"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"temperature": -1}, {"top_p": 2},
        {"temperature": float("nan")}, {"seed": -1}, {"stop": ["x"] * 9}, {"stop": ["x" * 500]}, {"stop": [3]},
    ],
)  # fmt: skip
def test_settings_past_the_limits_are_refused(playground, place, asked):
    with pytest.raises(ValueError, match=next(iter(asked))):
        playground.settings(place, **asked)


def test_limits_hold_for_every_text(playground, place):
    long = "a" * 9000
    for call in (
        lambda: write(playground, place, "T" * 2001),
        lambda: playground.next_tokens(place, long, playground.settings(place)),
        lambda: playground.next_tokens(place, "T", playground.settings(place), n=101),
        lambda: playground.look(place, long),
        lambda: playground.score(place, long),
        lambda: playground.cut(place, long),
        lambda: playground.divergence(place, place, "T" * 2001),
        lambda: playground.find("a/" + "b" * 600),
    ):
        with pytest.raises(LimitError, match="at most"):
            call()
    with pytest.raises(ValueError, match="at most 1,024"):
        playground.score(place, "T" * 2000)


def test_variables_set_limits(monkeypatch):
    monkeypatch.setenv("NANOGPT_MAX_NEW_TOKENS", "7")
    assert Limits.from_env().new_tokens == 7
    assert Limits.from_env(on_space=True).model_bytes < Limits.from_env().model_bytes
    monkeypatch.setenv("NANOGPT_MAX_SECONDS", "soon")
    with pytest.raises(ValueError, match="NANOGPT_MAX_SECONDS is 'soon'"):
        Limits.from_env()


def test_visitors_see_only_the_folders_they_may(folder, tmp_path, monkeypatch):
    run = make_model(tmp_path / "runs" / "mine" / "best")
    shelf = Playground(str(folder), tmp_path / "runs")
    assert shelf.find(str(run)).folder == run
    assert shelf.find("").folder == folder
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "secret" / "model")
    for name in (
        str(tmp_path / "secret" / "model"),
        "secret/model",
        str(tmp_path / "runs" / ".." / "secret" / "model"),
    ):
        with pytest.raises((LimitError, HubError)):
            shelf.find(name)
    assert Playground(str(folder), any_folder=True).find("secret/model").folder.name == "model"


def test_names_are_allowed_by_pattern(folder, hub):
    hub.add_repo("alice/tiny", files_of(folder))
    hub.add_repo("bob/tiny", files_of(folder))
    shelf = Playground("bob/tiny", allowed=["alice/*"])
    assert shelf.find("alice/tiny").sha == hub.repo("alice/tiny").branches["main"]
    assert shelf.find().repo_id == "bob/tiny", "the default is always allowed"
    with pytest.raises(LimitError, match="not among the models allowed"):
        shelf.find("carol/tiny")


def test_a_revision_is_a_commit_and_the_hub_is_asked_once_a_minute(folder, hub):
    repo = hub.add_repo("alice/tiny", files_of(folder))
    first = repo.branches["main"]
    repo.tags["step-000500"] = first
    repo.put({"README.md": b"# new"})
    shelf = Playground("alice/tiny")
    assert shelf.find("alice/tiny", "step-000500").sha == shelf.find("alice/tiny@step-000500").sha == first
    assert shelf.find().sha == repo.branches["main"] != first
    asked = len(hub.requests)
    shelf.find()
    assert len(hub.requests) == asked
    assert shelf.revisions(shelf.find()) == ["main", "step-000500"]


def test_what_is_private_is_for_its_owner_alone(folder, hub, monkeypatch):
    hub.add_user("alice", "hf_alice")
    hub.add_user("bob", "hf_bob")
    hub.add_repo("alice/diary", files_of(folder), private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")  # the Space's owner is signed in; visitors must not profit
    shelf = Playground(str(folder), on_space=True)
    mine = shelf.find("alice/diary", token="hf_alice")
    assert shelf.load(mine).place == mine
    for token in (None, "hf_bob"):
        with pytest.raises(HubError) as caught:
            shelf.find("alice/diary", token=token)
        assert "no such model" in explain(caught.value, shelf)
    hub.fail("GET", "alice/diary", times=9, status=503)
    with pytest.raises(HubError):
        shelf.find("alice/diary")  # the Hub is down: what alice fetched must not come out of a cache


def test_the_owner_of_a_space_may_show_a_private_model(folder, hub, monkeypatch):
    hub.add_user("alice", "hf_alice")
    for name in ("shown", "other"):
        hub.add_repo(f"alice/{name}", files_of(folder), private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    shelf = Playground("alice/shown@main", on_space=True)
    assert shelf.revisions(shelf.find()) == ["main"]
    with pytest.raises(HubError):
        shelf.find("alice/other")


def test_repos_that_are_no_models_of_ours(folder, hub):
    files = files_of(folder)
    hub.add_repo("a/gated", files, gated=True)
    hub.add_repo("a/data", {"data.csv": b"1"})
    hub.add_repo("a/pickle", {"config.json": files["config.json"], "pytorch_model.bin": b"x"})
    hub.add_repo("a/large", {**files, "model.safetensors": bytes(3000)})
    shelf = Playground(str(folder), on_space=True, limits=Limits(model_bytes=20_000))
    for name, sentence in (
        ("a/gated", "gated"), ("a/data", "no config.json"), ("a/pickle", "never read"), ("a/none", "no such model"),
        ("no name!", "name on the Hub"), ("a/large", "no complete|announces|safetensors"),
    ):  # fmt: skip
        with pytest.raises((HubError, CheckpointError)) as caught:
            shelf.load(shelf.find(name))
        assert any(part in explain(caught.value, shelf) for part in sentence.split("|")), caught.value
    small = Playground(str(folder), limits=Limits(model_bytes=100))
    with pytest.raises(HubError, match="at most 100 are fetched"):
        small.find("a/large")
    assert not hub.asked("GET", "/cdn/") or "large" not in hub.asked("GET", "/cdn/")[0].path


# ---- models in memory ----


def test_cache_forgets_the_model_used_longest_ago(tmp_path, playground):
    folders = [make_model(tmp_path / str(n), seed=n) for n in range(3)]
    n_bytes = playground.load(playground.find()).n_bytes
    shelf = Playground(str(folders[0]), any_folder=True, limits=Limits(cache_bytes=int(2.5 * n_bytes)))
    a, b, c = (shelf.find(str(folder)) for folder in folders)
    first = shelf.load(a)
    shelf.load(b)
    assert shelf.load(a) is first
    shelf.load(c)
    assert shelf.load(a) is first, "b was used longer ago"
    assert len(shelf.cache) == 2
    assert shelf.cache.n_bytes <= shelf.limits.cache_bytes
    save_model(folders[0], first.model, first.tokenizer)
    assert shelf.load(a) is not first, "a run wrote the folder again"


def test_all_who_wait_share_one_load():
    cache, loads, results = ModelCache(100), [], []

    def load():
        loads.append(1)
        time.sleep(0.1)
        return type("Model", (), {"n_bytes": 10})()

    threads = [threading.Thread(target=lambda: results.append(cache.get(("a",), 10, load))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len(set(map(id, results))) == 1


def test_the_copy_of_8_bits_is_made_once_and_counts(tmp_path, monkeypatch):
    made, copies = [], []

    def slowly(model):
        made.append(model)
        time.sleep(0.1)
        return quantize_int8(model)

    monkeypatch.setattr("nanogpt_hub.playground.models.quantize_int8", slowly)
    folders = [make_model(tmp_path / str(n), seed=n) for n in range(2)]
    shelf = Playground(str(folders[0]), any_folder=True)
    a, b = (shelf.find(str(folder)) for folder in folders)
    other, loaded = shelf.load(a), shelf.load(b)
    plain = loaded.n_bytes
    shelf.cache.max_bytes = shelf.cache.n_bytes + 100
    threads = [threading.Thread(target=lambda: copies.append(shelf.load_int8(b))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [loaded.model]
    assert len(set(map(id, copies))) == 1
    assert plain < loaded.n_bytes < plain * 1.5
    assert shelf.cache.n_bytes == loaded.n_bytes, "the other model made room"
    assert shelf.load(b) is loaded
    assert shelf.load(a) is not other


def test_a_load_that_fails_leaves_the_others(playground, place, tmp_path):
    loaded = playground.load(place)
    broken = make_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError):
        playground.load(Resolved(broken))
    assert playground.load(place) is loaded


# ---- writing ----


def test_writing_is_what_generate_gives(playground, place):
    last = write(playground, place)[-1]
    loaded = playground.load(place)
    same = generate(loaded.model, loaded.tokenizer, "To be", playground.settings(place, max_new_tokens=20, seed=3))
    assert last.text == same.text
    assert last.finish == "length"
    view = last.view()
    assert "".join(token["t"] for token in view["tokens"]) == last.text
    assert all(len(token["alts"]) == 8 and 0 <= token["p"] <= 1 for token in view["tokens"])
    assert json.loads(last.as_json())["text"] == last.text


def test_weights_of_8_bits_write_what_generate_gives(playground, place):
    loaded, config = playground.load(place), playground.settings(place, max_new_tokens=20, seed=3)
    *_, last = playground.write(place, "To be", config, int8=True)
    ids, small = loaded.tokenizer.encode("To be"), quantize_int8(loaded.model)
    assert last.tokens == tuple(stream_tokens(small, loaded.tokenizer, [ids], config, alternatives=8))
    assert json.loads(last.as_json())["int8"] is True
    *_, plain = playground.write(place, "To be", config)
    assert json.loads(plain.as_json())["int8"] is False
    assert last.view()["run"] != plain.view()["run"]


def test_weights_of_8_bits_stay_on_the_cpu(playground, place, folder, monkeypatch):
    """Whatever the device is, and though a GPU could be borrowed."""
    monkeypatch.setattr("nanogpt_hub.playground.session.SMALL_MODEL", 0)
    elsewhere = Playground(str(folder), device="meta", borrow=lambda function: pytest.fail)
    config = playground.settings(place, max_new_tokens=20, seed=3)
    *_, there = elsewhere.write(place, "To be", config, int8=True)
    *_, here = playground.write(place, "To be", config, int8=True)
    assert there.tokens == here.tokens


def test_updates_are_few_and_the_last_is_complete(playground, place, monkeypatch):
    monkeypatch.setattr("nanogpt_hub.playground.session.UPDATES_PER_SECOND", 1e-9)
    updates = write(playground, place)
    assert [len(update.tokens) for update in updates] == [1, 20]


def test_time_is_limited(playground, place, folder):
    assert playground.settings(place, max_seconds=1e9).max_seconds == 30
    hurried = Playground(str(folder), limits=Limits(seconds=1e-9))
    assert write(hurried, hurried.find(), max_new_tokens=50)[-1].finish == "time"


def test_closing_ends_the_work(playground, place, monkeypatch):
    steps = []

    def counted(*args, **kwargs):
        for token in stream_tokens(*args, **kwargs):
            steps.append(token)
            yield token

    monkeypatch.setattr("nanogpt_hub.playground.session.stream_tokens", counted)
    stream = playground.write(place, "To", playground.settings(place, max_new_tokens=500, seed=1))
    next(stream)
    stream.close()
    assert len(steps) == 1


@pytest.mark.parametrize("int8", [False, True])
def test_link_and_snippet_give_the_same_again(playground, place, int8):
    config = playground.settings(place, max_new_tokens=20, top_k=5, top_p=0.9, stop="zz\nqq", seed=11)
    *_, written = playground.write(place, "be or\nnot", config, int8)
    query = {
        name: values[0] for name, values in parse_qs(urlsplit(playground.link(written, "http://x/")).query).items()
    }
    assert query.pop("repo") == place.folder.as_posix()
    prompt, stop = query.pop("prompt"), query.pop("stop")
    assert query.pop("int8", None) == ("1" if int8 else None)
    again = playground.settings(place, stop=stop, **{name: float(value) for name, value in query.items()})
    *_, same = playground.write(place, prompt, again, int8)
    assert same.tokens == written.tokens
    namespace: dict = {}
    exec(playground.snippet(written), namespace)
    assert namespace["result"].text == written.text
    assert ("quantize_int8" in namespace) == int8


def test_a_large_model_writes_where_the_gpu_is(playground, folder, monkeypatch):
    """What goes to the process with the GPU, and what comes back, can travel."""
    monkeypatch.setattr("nanogpt_hub.playground.session.SMALL_MODEL", 0)
    travelled = []

    def borrow(function):
        assert function.__name__ == "_stream_on_gpu"

        def there(*args):
            for tokens in playground._stream(*pickle.loads(pickle.dumps(args))):
                travelled.append(tokens)
                yield pickle.loads(pickle.dumps(tokens))

        return there

    borrower = Playground(str(folder), borrow=borrow)
    assert write(borrower, borrower.find())[-1].text == write(playground, playground.find())[-1].text
    assert travelled


def test_example_is_made_once(playground, place):
    assert playground.example(place) is playground.example(place)


def test_comparison_marks_where_two_part(playground, place, tmp_path):
    other = Resolved(make_model(tmp_path / "other", seed=5))
    config = playground.settings(place, max_new_tokens=12, seed=1)
    *_, (one, two) = playground.compare(place, other, "To be", config)
    ids = [[token.id for token in writing.tokens] for writing in (one, two)]
    assert len(ids[0]) == len(ids[1]) == 12
    mark = playground.parting(one, two)
    assert ids[0][:mark] == ids[1][:mark]
    assert ids[0][mark] != ids[1][mark]
    *_, (one, two) = playground.compare(place, place, "To be", config)
    assert playground.parting(one, two) is None


# ---- views ----


def test_views_hold_what_was_computed(playground, place):
    text = "To be, or not to be: that is the question.\n"
    inside, lens, end = playground.look(place, text)
    assert text.endswith(end)
    assert len(end) == 32, "as much as the model can look at"
    maps = attention_view(inside)
    assert len(maps["maps"]) == maps["layers"] == len(maps["maps"][0]) == maps["heads"] == 2
    assert len(lens_view(lens, inside)["rows"]) == 3
    assert "".join(token["t"] for token in surprise_view(playground.score(place, text))["tokens"]) == text
    assert [piece["text"] for piece in pieces_view(playground.cut(place, "be\n"))["pieces"]] == ["b", "e", "\n"]
    found = next_tokens_view(playground.next_tokens(place, text, playground.settings(place, top_k=3), n=5))
    assert [row["cells"][-1].get("cut", False) for row in found["rows"]] == [False] * 3 + [True] * 2 + [False]
    json.dumps([maps, lens_view(lens, inside), found], allow_nan=False)


def test_cards_are_made_harmless():
    pictures = "![p](http://evil/x.png) ![p][r]"
    code = "`a<b`\n```\nif a < b:\n```\n"
    safe = safe_markdown(f"---\nlicense: mit\n---\n# Title\n{HOSTILE} {pictures}\n{code}<!-- c -->")
    assert "license" not in safe
    assert "<" not in safe.replace("`a<b`", "").replace("if a < b:", "")
    assert "![" not in safe
    assert "evil" not in safe


def test_model_tab(playground, place, folder):
    info = playground.info(place)
    assert info["parameters"] == playground.load(place).model.num_params()
    assert ["context", "32 tokens"] in playground.chips(place)
    assert {name for name, _ in playground.files(place)} == set(files_of(folder))
    assert sum(row["cells"][0]["v"] for row in playground.parts(place)["rows"]) == pytest.approx(1)
    json.dumps(info)


# ---- training ----


def test_runs_are_read_while_they_grow(tmp_path):
    run = tmp_path / "runs" / "mine"
    (run / "samples").mkdir(parents=True)
    rows = [{"step": step, "train_loss": 4 - step / 500} for step in range(1001)]
    lines = [json.dumps(row) for row in rows] + [
        '{"step": 5, "val_loss": NaN}',
        '["x"]',
        "null",
        '{"step": "x"}',
        '{"st',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (run / "config.yaml").write_text("out_dir: x\nmax_steps: 2000\n", encoding="utf-8")
    (run / "samples" / "step-000500.txt").write_text("To be", encoding="utf-8")
    (run / "samples" / "step-zero.txt").write_text("", encoding="utf-8")
    assert find_runs(tmp_path / "runs") == [run]
    assert run_of(run / "best") == run
    found = read_run(run)
    assert (found.last_step, found.max_steps, found.best_step) == (1000, 2000, None)
    curve = found.curve("train_loss")
    assert len(curve) <= MAX_POINTS + 1
    assert (curve[0][0], curve[-1][0]) == (0, 1000)
    assert found.at(500)["train_loss"] == 3
    assert (found.sample(500), found.sample(1)) == ("To be", "")
    assert found.going_on()
    assert not found.going_on(time.time() + 1000)


def test_steps_of_a_repo_are_its_tags(folder, hub):
    log = b'{"step": 0, "val_loss": 4}\n{"step": 500, "val_loss": 2}\n'
    samples = {f"training/samples/step-{n:06d}.txt": b"text" for n in (0, 500)}
    repo = hub.add_repo("alice/tiny", {**files_of(folder), "training/metrics.jsonl": log, **samples})
    repo.tags["step-000500"] = repo.branches["main"]
    playground = Playground("alice/tiny")
    place = playground.find()
    (run,) = playground.training(place)
    names = playground.revisions(place)
    assert playground.model_at(place, run, 500, names) == ("alice/tiny", "step-000500")
    assert playground.model_at(place, run, 0, names) is None
    assert playground.rival(place, names) == ("alice/tiny", "step-000500")


def test_the_tiny_model_learns(tmp_path):
    run = read_run(make_tiny(tmp_path, steps=50))
    assert run.rows[-1]["train_loss"] < run.rows[0]["train_loss"] - 1
    assert list(run.samples) == [0, 50]
    playground = Playground(str(tmp_path / "last"))
    assert write(playground, playground.find(), "A")[-1].text


@pytest.mark.parametrize("error", [RuntimeError("/secret/path"), KeyError("hf_token")])
def test_unknown_errors_tell_nothing(playground, error):
    assert "secret" not in explain(error, playground)
    assert "hf_" not in explain(error, playground)


def test_a_toast_shows_what_was_written_and_nothing_runs():
    shown = toast(ValueError(f"{HOSTILE} is neither a folder here nor a name on the Hub"))
    assert "<" not in shown
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown
    assert len(toast("x" * 9999)) == 500


def test_a_visitor_hears_of_no_folder(tmp_path):
    folder = make_model(tmp_path / "cache" / "snapshots" / "abc")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-9])
    playground = Playground(str(folder))
    with pytest.raises(CheckpointError) as caught:
        playground.load(playground.find())
    said = explain(caught.value, playground)
    assert "fetch or save it again" in said
    assert str(tmp_path) not in said
