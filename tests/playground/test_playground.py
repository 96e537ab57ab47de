"""What the app's tabs do, tested without the app: rules, the models in memory, records, links, logs."""

import base64
import json
import pickle
import re
import threading
import time
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from helpers import HOSTILE, files_of, make_model

from nanogpt_hub.checkpoint import CheckpointError, save_model
from nanogpt_hub.engine import select
from nanogpt_hub.engine.int8 import quantize_int8
from nanogpt_hub.generate import generate, stream_tokens
from nanogpt_hub.hub.resolve import HubError, Resolved
from nanogpt_hub.lens import Inside
from nanogpt_hub.playground import facts
from nanogpt_hub.playground.continuation import Tree
from nanogpt_hub.playground.links import link, pack, read_link, snippet, unpack
from nanogpt_hub.playground.models import LimitError, Limits, ModelCache, ModelStore, from_address
from nanogpt_hub.playground.session import Playground, toast, user_message, whole_words
from nanogpt_hub.playground.tiny import make_tiny
from nanogpt_hub.playground.views import (
    MOST_STEPS,
    attention_view,
    card_html,
    experts_view,
    head_view,
    kept_steps,
    lens_view,
    next_tokens_view,
    pieces_view,
    training_view,
)
from nanogpt_hub.runs import MAX_POINTS, attention_file, attention_json, find_runs, read_run, run_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "best")


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
        lambda: playground.models.find("a/" + "b" * 600),
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
    models = ModelStore(str(folder), tmp_path / "runs")
    assert models.find(str(run)).folder == run
    assert models.find("").folder == folder
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "secret" / "model")
    for name in (
        str(tmp_path / "secret" / "model"),
        "secret/model",
        str(tmp_path / "runs" / ".." / "secret" / "model"),
    ):
        with pytest.raises((LimitError, HubError)):
            models.find(name)
    assert ModelStore(str(folder), any_folder=True).find("secret/model").folder.name == "model"


def test_names_are_allowed_by_pattern(folder, hub):
    hub.add_repo("alice/tiny", files_of(folder))
    hub.add_repo("bob/tiny", files_of(folder))
    models = ModelStore("bob/tiny", allowed=["alice/*"])
    assert models.find("alice/tiny").sha == hub.repo("alice/tiny").branches["main"]
    assert models.find().repo_id == "bob/tiny", "the default is always allowed"
    with pytest.raises(LimitError, match="not among the models allowed"):
        models.find("carol/tiny")


def test_a_revision_is_a_commit_and_the_hub_is_asked_once_a_minute(folder, hub):
    repo = hub.add_repo("alice/tiny", files_of(folder))
    first = repo.branches["main"]
    repo.tags["step-000500"] = first
    repo.put({"README.md": b"# new"})
    models = ModelStore("alice/tiny")
    assert models.find("alice/tiny", "step-000500").sha == models.find("alice/tiny@step-000500").sha == first
    assert models.find().sha == repo.branches["main"] != first
    asked = len(hub.requests)
    models.find()
    assert len(hub.requests) == asked
    assert models.revisions(models.find()) == ["main", "step-000500"]


def test_what_is_private_is_for_its_owner_alone(folder, hub, monkeypatch):
    hub.add_user("alice", "hf_alice")
    hub.add_user("bob", "hf_bob")
    hub.add_repo("alice/diary", files_of(folder), private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")  # the Space's owner is signed in; visitors must not profit
    models = ModelStore(str(folder), on_space=True)
    mine = models.find("alice/diary", token="hf_alice")
    assert models.load(mine).place == mine
    for token in (None, "hf_bob"):
        with pytest.raises(HubError) as caught:
            models.find("alice/diary", token=token)
        assert "no such model" in user_message(caught.value, models)
    hub.fail("GET", "alice/diary", times=9, status=503)
    with pytest.raises(HubError):
        models.find("alice/diary")  # the Hub is down: what alice fetched must not come out of a cache


def test_the_owner_of_a_space_may_show_a_private_model(folder, hub, monkeypatch):
    hub.add_user("alice", "hf_alice")
    for name in ("shown", "other"):
        hub.add_repo(f"alice/{name}", files_of(folder), private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    models = ModelStore("alice/shown@main", on_space=True)
    assert models.revisions(models.find()) == ["main"]
    with pytest.raises(HubError):
        models.find("alice/other")


def test_repos_that_are_no_models_of_ours(folder, hub):
    files = files_of(folder)
    hub.add_repo("a/gated", files, gated=True)
    hub.add_repo("a/data", {"data.csv": b"1"})
    hub.add_repo("a/pickle", {"config.json": files["config.json"], "pytorch_model.bin": b"x"})
    hub.add_repo("a/large", {**files, "model.safetensors": bytes(3000)})
    models = ModelStore(str(folder), on_space=True, limits=Limits(model_bytes=20_000))
    for name, sentence in (
        ("a/gated", "gated"), ("a/data", "no config.json"), ("a/pickle", "never read"), ("a/none", "no such model"),
        ("no name!", "name on the Hub"), ("a/large", "no complete|announces|safetensors"),
    ):  # fmt: skip
        with pytest.raises((HubError, CheckpointError)) as caught:
            models.load(models.find(name))
        assert any(part in user_message(caught.value, models) for part in sentence.split("|")), caught.value
    small = ModelStore(str(folder), limits=Limits(model_bytes=100))
    with pytest.raises(HubError, match="at most 100 are fetched"):
        small.find("a/large")
    assert not hub.asked("GET", "/cdn/") or "large" not in hub.asked("GET", "/cdn/")[0].path


# ---- models in memory ----


def test_cache_forgets_the_model_used_longest_ago(tmp_path, playground):
    folders = [make_model(tmp_path / str(n), seed=n) for n in range(3)]
    n_bytes = playground.models.load(playground.models.find()).n_bytes
    models = ModelStore(str(folders[0]), any_folder=True, limits=Limits(cache_bytes=int(2.5 * n_bytes)))
    a, b, c = (models.find(str(folder)) for folder in folders)
    first = models.load(a)
    models.load(b)
    assert models.load(a) is first
    models.load(c)
    assert models.load(a) is first, "b was used longer ago"
    assert len(models.cache) == 2
    assert models.cache.n_bytes <= models.limits.cache_bytes
    save_model(folders[0], first.model, first.tokenizer)
    assert models.load(a) is not first, "a run wrote the folder again"


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
    models = ModelStore(str(folders[0]), any_folder=True)
    a, b = (models.find(str(folder)) for folder in folders)
    other, loaded = models.load(a), models.load(b)
    plain = loaded.n_bytes
    models.cache.max_bytes = models.cache.n_bytes + 100
    threads = [threading.Thread(target=lambda: copies.append(models.load_int8(b))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [loaded.model]
    assert len(set(map(id, copies))) == 1
    assert plain < loaded.n_bytes < plain * 1.5
    assert models.cache.n_bytes == loaded.n_bytes, "the other model made room"
    assert models.load(b) is loaded
    assert models.load(a) is not other


def test_a_load_that_fails_leaves_the_others(playground, place, tmp_path):
    loaded = playground.models.load(place)
    broken = make_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError):
        playground.models.load(Resolved(broken))
    assert playground.models.load(place) is loaded


# ---- writing ----


def test_writing_is_what_generate_gives(playground, place):
    last = write(playground, place)[-1]
    loaded = playground.models.load(place)
    same = generate(loaded.model, loaded.tokenizer, "To be", playground.settings(place, max_new_tokens=20, seed=3))
    assert last.text == same.text
    assert last.finish == "length"
    view = last.view()
    assert "".join(text for text, *_ in view["tokens"]) == last.text
    assert "".join(text for text, _ in view["prompt"]) == "To be"
    assert all(0 <= p <= 1 for _, _, p, _ in view["tokens"])
    assert all(len(token.alternatives) == 8 for token in last.tokens)
    assert json.loads(last.as_json())["text"] == last.text


def test_weights_of_8_bits_write_what_generate_gives(playground, place):
    loaded, config = playground.models.load(place), playground.settings(place, max_new_tokens=20, seed=3)
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
    elsewhere = Playground(ModelStore(str(folder), device="meta"), gpu=lambda function: pytest.fail)
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
    hurried = Playground(ModelStore(str(folder), limits=Limits(seconds=1e-9)))
    assert write(hurried, hurried.models.find(), max_new_tokens=50)[-1].finish == "time"


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


def test_no_visitor_waits_for_a_compiler(playground, place, monkeypatch):
    monkeypatch.setenv(select.VARIABLE, "numba")
    monkeypatch.setattr(select, "preparation", busy := select.Preparation())
    monkeypatch.setattr(busy, "poll", lambda: None)
    monkeypatch.setattr(busy, "wait", None)
    assert write(playground, place)[-1].engine == "torch"


@pytest.mark.parametrize("int8", [False, True])
def test_link_and_snippet_give_the_same_again(playground, place, int8):
    config = playground.settings(place, max_new_tokens=20, top_k=5, top_p=0.9, stop="zz\nqq", seed=11)
    *_, written = playground.write(place, "be or\nnot", config, int8)
    query = {
        name: values[0]
        for name, values in parse_qs(urlsplit(link(playground.models, written, "http://x/")).query).items()
    }
    assert query.pop("repo") == place.folder.as_posix()
    prompt, stop = query.pop("prompt"), query.pop("stop")
    assert query.pop("int8", None) == ("1" if int8 else None)
    asked, problems = read_link(query)
    assert problems == []
    engine = asked.pop("engine")
    assert engine == written.engine == "torch"
    *_, same = playground.write(place, prompt, playground.settings(place, stop=stop, **asked), int8, engine=engine)
    assert same.tokens == written.tokens
    namespace: dict = {}
    exec(snippet(written), namespace)
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

    borrower = Playground(ModelStore(str(folder)), gpu=borrow)
    assert write(borrower, borrower.models.find())[-1].text == write(playground, playground.models.find())[-1].text
    assert travelled


def test_example_is_made_once(playground, place):
    assert playground.example(place) is playground.example(place)


def test_comparison_marks_where_two_part(playground, place, tmp_path):
    other = Resolved(make_model(tmp_path / "other", seed=5))
    config = playground.settings(place, max_new_tokens=12, seed=1)
    *_, (one, two) = playground.compare(place, other, "To be", config)
    ids = [[token.id for token in writing.tokens] for writing in (one, two)]
    assert len(ids[0]) == len(ids[1]) == 12
    mark = playground.first_difference(one, two)
    assert ids[0][:mark] == ids[1][:mark]
    assert ids[0][mark] != ids[1][mark]
    *_, (one, two) = playground.compare(place, place, "To be", config)
    assert playground.first_difference(one, two) is None


# ---- branches ----


def test_a_branch_keeps_what_stands_before_and_its_link_repeats_it(playground, place):
    *_, first = write(playground, place, max_new_tokens=50)  # longer than the context of 32: windows move
    config = playground.settings(place, max_new_tokens=20, seed=8)
    chosen = first.tokens[9].alternatives[2].id
    *_, branch = playground.extend(first, config, keep=len(first.prompt_ids) + 9, chosen=chosen)
    assert branch.given == 10
    assert [token.id for token in branch.tokens[:10]] == [*(token.id for token in first.tokens[:9]), chosen]
    assert len(branch.tokens) == 30
    query = parse_qs(urlsplit(link(playground.models, branch)).query)
    asked, _ = read_link({name: values[0] for name, values in query.items()})
    *_, again = playground.write(place, "To be", config, given=asked["given"])
    assert [token.id for token in again.tokens] == [token.id for token in branch.tokens]
    for one, two in zip(again.tokens, branch.tokens, strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
        assert one.text == two.text
    namespace: dict = {}
    exec(snippet(branch), namespace)
    assert namespace["text"] == branch.prompt + branch.text


def test_the_prompt_branches_too(playground, place):
    *_, first = write(playground, place)
    config = playground.settings(place, max_new_tokens=5, seed=8)
    *_, branch = playground.extend(first, config, keep=2, chosen=5)
    assert branch.prompt == "To"
    assert branch.tokens[0].id == 5
    assert len(branch.tokens) == 6


def test_continue_goes_on_from_all_of_it(playground, place):
    *_, first = write(playground, place)
    *_, longer = playground.extend(first, playground.settings(place, max_new_tokens=7, seed=8))
    assert longer.text.startswith(first.text)
    assert len(longer.tokens) == 27
    assert [token.finish for token in longer.tokens if token.finish] == ["length"]


@pytest.mark.parametrize(("keep", "chosen"), [(0, 1), (-1, 1), (99, 1), (5, 10**6), (5, -1)])
def test_places_and_ids_that_are_not_there(playground, place, keep, chosen):
    *_, first = write(playground, place)
    with pytest.raises(ValueError, match=r"no such token|vocabulary"):
        list(playground.extend(first, playground.settings(place), keep=keep, chosen=chosen))


@pytest.mark.parametrize("ids", [[], [0], [127, 128, 50256], [2**31 - 1, 5]])
def test_ids_travel_in_an_address(ids):
    assert unpack(pack(ids)) == ids


@pytest.mark.parametrize("text", ["*", "gA", "_____w8", "é"])
def test_a_damaged_branch_leaves_the_rest_of_a_link(text):
    asked, (problem,) = read_link({"given": text, "prompt": "x", "top_k": "3"})
    assert asked == {"prompt": "x", "top_k": 3}
    assert "left out" in problem


def test_one_bad_value_in_a_link_leaves_the_rest():
    asked, problems = read_link({"temperature": "warm", "top_p": "7", "seed": "3", "min_p": "0.1", "engine": "rocket"})
    assert asked == {"seed": 3, "min_p": 0.1}
    assert ["temperature" in problems[0], "top_p" in problems[1]] == [True, True]


def test_a_tree_of_branches_can_be_walked_and_stays_small(playground, place):
    *_, made = write(playground, place)
    tree = Tree().grown(made, None)
    for _ in range(30):
        tree = tree.grown(made, 0)
    assert len(tree.branches) == Tree.MOST
    assert tree.view()["rows"][0]["number"] == 0, "what others grow from stays"
    assert tree.at(0).made is made
    with pytest.raises(ValueError, match="not there any more"):
        tree.at(1)


def test_updates_send_only_what_is_new(playground, place):
    *_, made = write(playground, place)
    view = made.view(since=15)
    assert (view["from"], len(view["tokens"])) == (15, 5)
    assert "prompt" not in view
    assert view["run"] == made.view()["run"]


def test_a_stopped_text_says_so(playground, place):
    first, *_ = write(playground, place)
    assert "generating" in first.status()
    stopped = first.stop()
    assert "stopped" in stopped.status()
    assert stopped.view()["done"]
    assert stopped.key == first.key


# ---- one position ----


def numbers(text, kind):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=kind)


def test_a_position_holds_what_the_whole_text_shows(playground, place):
    *_, made = write(playground, place)
    n = 15
    view = playground.position(made, n, playground.settings(place, top_k=5))
    loaded = playground.models.load(place)
    text = loaded.tokenizer.decode(list(made.ids[:n]))
    inside, lens, _ = playground.look(place, text)
    weights = numbers(view["attention"], torch.uint8).view(2, 2, n) / 255
    assert torch.allclose(weights, inside.attention[:, :, -1], atol=0.003)
    found = playground.next_tokens(place, text, playground.settings(place, top_k=5), n=8)
    probs = numbers(view["logits"], torch.float16).float().softmax(-1)
    for shown, token in zip(view["shown"], found.tokens, strict=False):
        assert shown[1] == token.text
        assert probs[token.id].item() == pytest.approx(token.probs[0], rel=0.01)
        assert shown[2] == pytest.approx(token.probs[-1], abs=1e-5)
    assert [row["top"][0][0] for row in view["depths"]] == [row[-1] for row in lens.top_tokens]
    assert view["depths"][-1]["p"] == pytest.approx(made.tokens[n - 5].prob, rel=1e-3)
    json.dumps(view, allow_nan=False)


def test_the_first_token_and_the_one_after_the_last(playground, place):
    *_, made = write(playground, place)
    assert playground.position(made, 0, made.settings)["first"]
    assert playground.position(made, len(made.ids), made.settings)["id"] is None
    for n in (-1, len(made.ids) + 1):
        with pytest.raises(ValueError, match="no such token"):
            playground.position(made, n, made.settings)


def test_a_text_of_one_token_is_shown(playground, place):
    figures, view = playground.surprise(playground.read(place, "T", playground.settings(place)))
    assert "One token" in figures
    assert [name for _, name in view["prompt"]] == ["T"]


# ---- messages ----


def test_pasted_addresses_are_names():
    assert from_address("https://huggingface.co/user/name", "") == ("user/name", "")
    assert from_address("https://huggingface.co/user/name/tree/step-000500/", "") == ("user/name", "step-000500")
    assert from_address("hf.co/user/name", "main") == ("user/name", "main")
    assert from_address("user/name", "x") == ("user/name", "x")


def test_visitors_see_no_folders_of_the_machine(folder, tmp_path):
    error = ValueError(f"{tmp_path}/secret/config.json is damaged; see user/name and https://huggingface.co/a/b")
    told = user_message(error, ModelStore(str(folder)))
    assert told == "config.json is damaged; see user/name and https://huggingface.co/a/b"
    assert str(tmp_path) in user_message(error, ModelStore(str(folder), any_folder=True))


def test_a_first_prompt_ends_with_a_word():
    assert whole_words("It was a bright cold day in April, and", 20) == "It was a bright cold"
    assert whole_words("short", 20) == "short"
    assert whole_words("x" * 30, 20) == "x" * 20


def test_a_text_as_another_model_reads_it(playground, place, tmp_path):
    other = Resolved(make_model(tmp_path / "other", seed=5))
    *_, made = write(playground, place)
    says, view = playground.reread(made, other)
    assert "bits per token" in says
    assert len(view["prompt"]) == len(made.ids)
    strange = Resolved(make_model(tmp_path / "strange", text="To be, another alphabet"))
    assert playground.reread(made, strange) is None


# ---- views ----


def test_views_hold_what_was_computed(playground, place):
    text = "To be, or not to be: that is the question.\n"
    inside, lens, end = playground.look(place, text)
    assert text.endswith(end)
    assert len(end) == 32, "as much as the model can look at"
    maps = attention_view(inside)
    assert len(maps["maps"]) == maps["layers"] == len(maps["maps"][0]) == maps["heads"] == 2
    assert len(lens_view(lens, inside)["rows"]) == 3
    figures, shown = playground.surprise(playground.read(place, text, playground.settings(place)))
    assert "".join(piece for piece, *_ in shown["prompt"]) == text
    assert shown["prompt"][0][2] is None
    assert "bits per character" in figures
    assert [piece["text"] for piece in pieces_view(playground.cut(place, "be\n"))["pieces"]] == ["b", "e", "\n"]
    found = next_tokens_view(playground.next_tokens(place, text, playground.settings(place, top_k=3), n=5))
    assert [row["cells"][-1].get("cut", False) for row in found["rows"]] == [False] * 3 + [True] * 2 + [False]
    json.dumps([maps, lens_view(lens, inside), found], allow_nan=False)


def test_experts_of_each_token_most_first():
    assert experts_view(inside_with(None)) is None
    shares = torch.tensor([[[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]])  # one layer, two tokens, three experts
    view = experts_view(inside_with(shares))
    assert view == {"tokens": ["a", "b"], "experts": 3,
                    "rows": [{"name": "layer 1", "cells": [[[3, 0.75], [2, 0.25]], [[1, 1.0]]]}]}  # fmt: skip


def inside_with(experts: torch.Tensor | None) -> Inside:
    return Inside((1, 2), ("a", "b"), torch.zeros(1, 1, 2, 2), torch.zeros(2, 2, 4), experts)


def test_cards_are_made_harmless():
    pictures = "![p](http://evil/x.png) ![p][r]\n\n[r]: http://evil/r.png"
    code = "`a<b`\n```\nif a < b:\n```\n"
    shown = card_html(f"---\nlicense: mit\n---\n# Title\n{HOSTILE} {pictures}\n{code}<!-- c -->\n|a|\n|-|\n|b|\n")
    assert "license" not in shown
    assert {*re.findall(r"</?(\w+)", shown)} <= {*"h1 p em code pre table thead tbody tr th td".split()}
    assert "<h1>Title</h1>" in shown
    assert "<code>a&lt;b</code>" in shown
    assert "if a &lt; b:" in shown
    assert "<em>p</em> <em>p</em>" in shown
    assert "evil" not in shown
    assert "<!--" not in shown


@pytest.mark.parametrize(
    "text",
    [
        r"\`<img src=x>`", "a ~~~<img src=x>~~~", "``a` <img src=x> `b``c", "<img\nsrc=x>", "    <img src=x>",
        "- <img src=x>", "<script>\n\n![a](http://evil/x.png)\n</script>", "a\n\n\n> b\n\n\n1. c\n\n   d",
        "<IMG SRC=x>", "[a](javascript:alert(1))", "[a](data:text/html,x)", "<javascript:alert(1)>",
        "<!-- --><img src=x>", "![a](http://evil/x.png", "<style>*{}</style>", "[a]: javascript:alert(1)\n\n[a]",
        '[a](http://b "<img src=x>")',
    ],
)  # fmt: skip
def test_no_card_brings_a_picture_or_a_program(text):
    made = card_html(text)
    assert "\n\n" not in re.sub(r"<pre>.*?</pre>", "pre", made, flags=re.DOTALL)
    shown = re.sub(r'<a href="http[^"<>]*"( title="[^"<>]*")?>', "<a>", made)
    tags = "p em code pre ul ol li a blockquote".split()
    assert {*re.findall(r"<[^>]*>", shown)} <= {f"<{slash}{tag}>" for slash in ("", "/") for tag in tags}


def test_model_tab(playground, place, folder):
    info = facts.info(playground.models, place)
    assert info["parameters"] == playground.models.load(place).model.num_params()
    assert ["context", "32 tokens"] in facts.chips(playground.models, place)
    assert {name for name, _ in facts.files(place)} == set(files_of(folder))
    assert sum(row["cells"][0]["v"] for row in facts.parts(playground.models, place)["rows"]) == pytest.approx(1)
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
    shown = training_view([found], kept_steps(found), {500})
    assert [(step["step"], step["text"], step["usable"]) for step in shown["steps"]] == [(500, "To be", True)]
    assert shown["live"]
    assert shown["runs"][0]["curves"]["train_loss"] == curve


@pytest.mark.parametrize(
    ("record", "floor"),
    [
        ('{"evaluation": {"floor_loss": 0.277}}', 0.277),
        ('{"evaluation": {"floor_loss": 1}}', 1.0),
        ('{"evaluation": {"floor_loss": 4.5}}', None),  # above the loss that the run began with
        ('{"evaluation": {"floor_loss": 0}}', None),
        ('{"evaluation": {"floor_loss": -1}}', None),
        ('{"evaluation": {"floor_loss": true}}', None),
        ('{"evaluation": {"floor_loss": NaN}}', None),
        ('{"evaluation": {"floor_loss": 1e999}}', None),
        ('{"evaluation": {"floor_loss": "<b>1</b>"}}', None),
        ('{"evaluation": {"floor_loss": [0.3]}}', None),
        ('{"evaluation": [0.3]}', None),
        ("[1]", None),
        ('{"evaluation"', None),
        ("[" * 100_000, None),
    ],
)
def test_the_entropy_of_a_text_is_drawn_where_the_record_holds_one(tmp_path, record, floor):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "val_loss": 4}\n{"step": 9, "val_loss": 1.5}\n', encoding="utf-8"
    )
    (tmp_path / "run.json").write_text(record, encoding="utf-8")
    (shown,) = training_view([read_run(tmp_path)], [], set())["runs"]
    assert shown["floor"] == floor


def test_runs_are_compared_in_numbers(folder, tmp_path):
    for n, loss in enumerate((2.0, 2.1, 1.0, 1.1)):
        run = tmp_path / "runs" / f"try-{n}<b>"
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text(json.dumps({"step": 9, "val_loss": loss}) + "\n", encoding="utf-8")
        text = f"seed: {n}\nmax_steps: 9\nmodel: {{activation: '![x](http://x) {'ab'[n // 2]}'}}\n"
        (run / "config.yaml").write_text(text, encoding="utf-8")
    playground = Playground(ModelStore(str(folder), runs=tmp_path / "runs"))
    place = playground.models.find(str(folder))
    names = sorted(name for name in playground.training_names(place) if "try" in name)
    said = playground.verdicts(place, names)
    assert "beyond noise" in said
    assert "model.activation" in said
    assert not re.search(r"[<!\[]", said)
    assert playground.verdicts(place, names[:1]) == ""
    (tmp_path / "runs" / "try-0<b>" / "config.yaml").unlink()
    assert "cannot be compared" in playground.verdicts(place, names)


def test_many_kept_steps_are_thinned(tmp_path):
    (tmp_path / "samples").mkdir()
    for n in range(500):
        (tmp_path / "samples" / f"step-{n:06d}.txt").write_text("x", encoding="utf-8")
    steps = kept_steps(read_run(tmp_path))
    assert len(steps) <= MOST_STEPS + 1
    assert (steps[0], steps[-1]) == (0, 499)


def test_steps_of_a_repo_are_its_tags(folder, hub):
    log = b'{"step": 0, "val_loss": 4}\n{"step": 500, "val_loss": 2}\n'
    samples = {f"training/samples/step-{n:06d}.txt": b"text" for n in (0, 500)}
    repo = hub.add_repo("alice/tiny", {**files_of(folder), "training/metrics.jsonl": log, **samples})
    repo.tags["step-000500"] = repo.branches["main"]
    playground = Playground(ModelStore("alice/tiny"))
    place = playground.models.find()
    (run,) = playground.training(place)
    names = playground.models.revisions(place)
    assert playground.model_at(place, run, 500, names) == ("alice/tiny", "step-000500")
    assert playground.model_at(place, run, 0, names) is None


def test_the_tiny_model_learns(tmp_path):
    run = read_run(make_tiny(tmp_path, steps=50))
    assert run.rows[-1]["train_loss"] < run.rows[0]["train_loss"] - 1
    assert list(run.samples) == [0, 50]
    playground = Playground(ModelStore(str(tmp_path / "last")))
    assert write(playground, playground.models.find(), "A")[-1].text


@pytest.mark.parametrize("error", [RuntimeError("/secret/path"), KeyError("hf_token")])
def test_unknown_errors_tell_nothing(playground, error):
    assert "secret" not in user_message(error, playground.models)
    assert "hf_" not in user_message(error, playground.models)


def test_a_toast_shows_what_was_written_and_nothing_runs():
    shown = toast(ValueError(f"{HOSTILE} is neither a folder here nor a name on the Hub"))
    assert "<" not in shown
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown
    assert len(toast("x" * 9999)) == 500


def test_a_visitor_hears_of_no_folder(tmp_path):
    folder = make_model(tmp_path / "cache" / "snapshots" / "abc")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-9])
    playground = Playground(ModelStore(str(folder)))
    with pytest.raises(CheckpointError) as caught:
        playground.models.load(playground.models.find())
    said = user_message(caught.value, playground.models)
    assert "fetch or save it again" in said
    assert str(tmp_path) not in said


def run_with_maps(folder, steps=(0, 10, 20), shape=(2, 3), T=4):
    """A run that kept attention maps; head (1, 2) changes most."""
    (folder / "samples").mkdir(parents=True)
    for n, step in enumerate(steps):
        maps = torch.full((*shape, T, T), 1 / T)
        maps[1, 2] += n / 10
        (folder / "samples" / f"step-{step:06d}.txt").write_text("x", encoding="utf-8")
        text = json.dumps(attention_json(list("abcd")[:T], maps))
        (folder / "samples" / attention_file(step)).write_text(text, encoding="utf-8")
    return read_run(folder)


def test_a_head_over_the_steps_of_a_run(tmp_path):
    run = run_with_maps(tmp_path)
    view = head_view(run, [0, 10, 20])
    assert (view["layer"], view["head"], view["heads"], view["tokens"]) == (1, 2, [2, 3], list("abcd"))
    assert view["changes"] == [0, 0, 0, 0, 0, 1]
    maps = {step: base64.b64decode(data) for step, data in view["steps"]}
    assert {step: data[0] for step, data in maps.items()} == {0: 64, 10: 89, 20: 115}
    assert head_view(run, [0, 10, 20], (0, 1))["layer"] == 0
    assert head_view(run, [0, 10, 20], (9, 9))["head"] == 2, "a head that is not there is not asked for"
    other = run_with_maps(tmp_path / "other", steps=(0,), T=3).samples[0].parent / attention_file(0)
    (tmp_path / "samples" / attention_file(10)).write_bytes(other.read_bytes())
    assert [step for step, _ in head_view(run, [0, 10, 20])["steps"]] == [0, 20], "another text is passed over"
    assert head_view(read_run(make_model(tmp_path / "plain")), []) is None


@pytest.mark.parametrize(
    "content",
    ["", "[]", "3", '{"tokens": ["a"], "layers": 1, "heads": 1, "maps": [["AAAAAAAA"]]}',
     '{"tokens": ["a"], "layers": 1, "heads": 1, "maps": [[7]]}',
     '{"tokens": ["a"], "layers": 1, "heads": 1, "maps": [7]}',
     '{"tokens": [7], "layers": 1, "heads": 1, "maps": [["AA=="]]}',
     '{"tokens": [], "layers": 0, "heads": 0, "maps": []}',
     '{"tokens": ["a"], "layers": 2, "heads": 1, "maps": [["AA=="]]}', "[" * 100_000],
)  # fmt: skip
def test_maps_that_make_no_sense_are_passed_over(tmp_path, content):
    run = run_with_maps(tmp_path)
    (tmp_path / "samples" / attention_file(10)).write_text(content, encoding="utf-8")
    assert run.attention(10) is None
    assert [step for step, _ in head_view(run, [0, 10, 20])["steps"]] == [0, 20]


def test_the_tiny_model_keeps_its_maps(tmp_path):
    run = read_run(make_tiny(tmp_path, steps=50))
    assert head_view(run, kept_steps(run))["heads"] == [2, 4]
