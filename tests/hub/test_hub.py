"""Sharing and loading, by the real huggingface_hub client over real HTTP, against the Hub in hub_server.py."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import nanogpt_hub.hub.space
from nanogpt_hub.checkpoint import CheckpointError, load_model, save_model
from nanogpt_hub.generate import generate
from nanogpt_hub.hub.background import Pusher
from nanogpt_hub.hub.card import write_card
from nanogpt_hub.hub.publish import STATE_BRANCH, fetch_state, preflight, push_to_hub, state_files
from nanogpt_hub.hub.readme import Readme
from nanogpt_hub.hub.resolve import HubError, from_pretrained, resolve, split_name
from nanogpt_hub.hub.space import collect_space, create_space
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.tokenizer import build_tokenizer

TOKEN = "hf_AliceSecretToken0123456789"
REPO = "alice/tiny"
TOKENIZER = build_tokenizer("char", ["To be, or not to be\n"])
CONFIG = GPTConfig.preset("nanogpt", "1m", vocab_size=TOKENIZER.vocab_size, n_layer=2, n_embd=32, block_size=32)


def make_model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(CONFIG).eval()


@pytest.fixture
def alice(hub, monkeypatch):
    """The Hub with alice, who is signed in, and bob, who is not."""
    hub.add_user("alice", TOKEN, orgs=("club",))
    hub.add_user("bob", "hf_bob")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder as the trainer leaves it; returns its best/."""
    out = tmp_path / "out" / "plays"
    save_model(out / "best", make_model(), TOKENIZER)
    (out / "samples").mkdir()
    (out / "samples" / "step-000500.txt").write_text("To be\n", encoding="utf-8")
    (out / "metrics.jsonl").write_text('{"step": 500, "val_loss": 1.5}\n', encoding="utf-8")
    (out / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    (out / "loss.png").write_bytes(b"\x89PNG")
    (out / "run.json").write_text('{"license": "mit", "evaluation": {"val_loss": 1.5, "step": 500}}', encoding="utf-8")
    (out / "state").mkdir()
    (out / "state" / "state.json").write_text('{"format": 1}', encoding="utf-8")
    (out / "state" / "optimizer-00000500.safetensors").write_bytes(os.urandom(100))
    return out / "best"


@pytest.fixture
def pusher(alice):
    """A Pusher that waits for hundredths of seconds only."""
    preflight(REPO)
    said: list[str] = []
    made = Pusher(REPO, say=said.append, request_timeout=0.4, backoff=0.02, longest_pause=0.1)
    made.said = said
    yield made
    made.close(timeout=10)


def weights_of(folder_or_bytes) -> bytes:
    return (folder_or_bytes / "model.safetensors").read_bytes()


def sentence_of(error: pytest.ExceptionInfo) -> str:
    """The message, which must be one sentence for a person, without the token."""
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert TOKEN not in text
    return text


# --- share, and load elsewhere ----------------------------------------------------------------------------------------
def test_what_is_pushed_is_what_others_get(alice, run, tmp_path):
    place = push_to_hub(run, REPO)
    elsewhere = resolve(REPO, cache_dir=tmp_path / "cache")
    assert (elsewhere.sha, elsewhere.revision, str(elsewhere)) == (place.sha, "main", f"{REPO}@{place.sha[:7]}")
    model, tokenizer = load_model(elsewhere)
    here = generate(make_model(), TOKENIZER, "To be", seed=1, max_new_tokens=20).text
    assert generate(model, tokenizer, "To be", seed=1, max_new_tokens=20).text == here
    assert set(alice.repo(REPO).files()) == {
        ".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors", "notebook.ipynb",
        "tokenizer.json", "tokenizer_config.json", "training/metrics.jsonl", "training/config.yaml",
        "training/loss.png", "training/run.json", "training/samples/step-000500.txt",
    }  # fmt: skip
    assert (elsewhere.folder / "training" / "metrics.jsonl").read_text(encoding="utf-8").startswith('{"step": 500')
    assert "training/loss.png" in (elsewhere.folder / "README.md").read_text(encoding="utf-8")


def test_transformers_loads_it_by_name(alice, run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    push_to_hub(run, REPO)
    ids = torch.tensor([TOKENIZER.encode("To be, or")])
    theirs = AutoModelForCausalLM.from_pretrained(REPO)
    torch.testing.assert_close(theirs(ids).logits, make_model()(ids)[0], atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(REPO)("To be, or")["input_ids"] == ids[0].tolist()


def test_large_files_go_to_the_store_without_the_token(alice, run):
    push_to_hub(run, REPO)
    from_pretrained(REPO)
    stored = [r for r in alice.requests if r.host == "localhost"]
    assert {r.method for r in stored} == {"PUT", "GET"}
    assert not any("authorization" in r.headers for r in stored)


def test_a_push_is_one_commit_and_the_same_again_is_none(alice, run):
    first = push_to_hub(run, REPO)
    assert alice.repo(REPO).titles() == ["Step 500: validation loss 1.5000", "initial commit"]
    assert push_to_hub(run, REPO).sha == first.sha
    assert len(alice.repo(REPO).titles()) == 2


def test_a_push_replaces_our_files_and_leaves_those_of_people(alice, run):
    push_to_hub(run, REPO)
    alice.repo(REPO).put({"model-00001-of-00002.safetensors": b"old", "notes/idea.txt": b"mine", "cat.png": b"meow"})
    save_model(run, make_model(1), TOKENIZER)
    push_to_hub(run, REPO, message="Better", private=False)
    files = alice.repo(REPO).files()
    assert files["model.safetensors"] == weights_of(run)
    assert "model-00001-of-00002.safetensors" not in files
    assert files["notes/idea.txt"] == b"mine"
    assert alice.repo(REPO).titles()[0] == "Better"


@pytest.mark.parametrize("revision", ["main", "v1", "sha"])
def test_every_kind_of_revision(alice, run, tmp_path, revision):
    sha = push_to_hub(run, REPO, tags=("v1",)).sha
    revision = sha if revision == "sha" else revision
    assert resolve(f"{REPO}@{revision}", cache_dir=tmp_path / "a").sha == sha
    assert resolve(REPO, revision, cache_dir=tmp_path / "b").sha == sha


def test_a_folder_wins_over_a_name(alice, run, tmp_path, monkeypatch):
    push_to_hub(run, REPO)
    monkeypatch.chdir(tmp_path)
    save_model(REPO, make_model(7), TOKENIZER)
    place = resolve(REPO)
    assert (place.repo_id, Path(place)) == ("", Path(REPO))
    with pytest.raises(HubError, match="no revision 'v1'"):
        resolve(REPO, "v1")


def test_private_models_are_loaded_with_the_users_token(alice, run, monkeypatch):
    push_to_hub(run, "alice/secret", private=True)
    assert alice.repo("alice/secret").private
    assert resolve("alice/secret").sha
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="sign in"):
        resolve("alice/secret")
    assert resolve("alice/secret", token=TOKEN).sha


def test_words_written_on_the_hub_survive_the_next_push(alice, run):
    push_to_hub(run, REPO)
    card = alice.repo(REPO).files()["README.md"].decode()
    assert "| this model | 1.5000 |" in card
    alice.repo(REPO).put(
        {"README.md": (card + "\nI like it.\n").replace("license: mit", "license: mit\nnew: 1").encode()}
    )
    (run.parent / "run.json").write_text('{"license": "mit", "evaluation": {"val_loss": 1.25}}', encoding="utf-8")
    push_to_hub(run, REPO)
    parts = Readme.parse(alice.repo(REPO).files()["README.md"].decode())
    assert parts.after == "I like it."
    assert parts.data["new"] == 1
    assert "| this model | 1.2500 |" in parts.block


def test_a_fine_tune_names_its_base(alice, run):
    base = push_to_hub(run, REPO)
    facts = {"base_model": {"id": REPO, "revision": base.sha}, "evaluation": {"val_loss": 1.0, "base_loss": 1.5}}
    push_to_hub(run, "alice/tuned", facts=facts, extra_files={})
    data = Readme.parse(alice.repo("alice/tuned").files()["README.md"].decode()).data
    assert (data["base_model"], data["base_model_relation"]) == (REPO, "finetune")
    assert json.loads(alice.repo("alice/tuned").files()["training/run.json"])["base_model"]["revision"] == base.sha


def test_sizes_are_told_before_the_upload(alice, run):
    said: list[str] = []
    alice.fail("POST", "/preupload/", status=403)
    with pytest.raises(HubError):
        push_to_hub(run, REPO, say=said.append)
    assert re.fullmatch(r"pushing 12 files, [\d.]+ kB, to alice/tiny \(main\); it is public: .*", said[0])


def test_the_push_is_refused_when_the_folder_is_another_model(alice, run):
    with pytest.raises(HubError, match="another model") as error:
        push_to_hub(run, REPO, model=make_model(1))
    sentence_of(error)
    assert alice.asked("POST", "/api/repos/create") == []
    assert push_to_hub(run, REPO, model=make_model()).sha


# --- preflight --------------------------------------------------------------------------------------------------------
def test_preflight_creates_the_repo_and_completes_the_name(alice):
    place = preflight("tiny", private=True)
    assert (place.repo_id, place.user) == (REPO, "alice")
    assert alice.repo(REPO).private
    assert preflight("club/shared").repo_id == "club/shared"


@pytest.mark.parametrize(
    ("change", "repo_id", "about", "message"),
    [
        ("", "a/b/c", {}, "neither a folder here nor a name"),
        ("", "bob/tiny", {}, "signed in as alice and cannot write to bob: use one of alice, club"),
        ("", REPO, {"facts": {"license": "All rights"}}, "such as mit"),
        ("no token", REPO, {}, "hf auth login"),
        ("bad token", REPO, {}, "does not accept your token"),
        ("read", REPO, {}, "only reads"),
        ("public", REPO, {"private": True}, "exists and is public"),
        ("no rights", REPO, {}, "may not write to alice/tiny: make one with write access"),
        ("down", REPO, {}, "answers 503"),
        ("hang up", REPO, {}, "does not answer"),
    ],
)
def test_preflight_stops_at_once_and_says_what_to_do(alice, monkeypatch, change, repo_id, about, message):
    if change == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif change == "bad token":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    elif change == "read":
        alice.users[TOKEN].role = "read"
    elif change == "public":
        alice.add_repo(REPO, {})
    elif change == "no rights":
        alice.fail("GET", "/auth-check/write", status=403)
    elif change in ("down", "hang up"):
        alice.fail("GET", "/whoami", status=503, drop=change == "hang up")
    with pytest.raises((HubError, ValueError), match=message) as error:
        preflight(repo_id, **about)
    sentence_of(error)


# --- in the background ------------------------------------------------------------------------------------------------
def test_best_steps_and_state_go_to_places_of_their_own(alice, pusher, run):
    for step, seed in ((500, 1), (1000, 2)):
        save_model(run, make_model(seed), TOKENIZER)
        facts = {"evaluation": {"step": step, "val_loss": 2.0 - step / 1000}}
        pusher.submit(run, facts=facts, tag=f"step-{step:06d}", model=make_model(seed))
        pusher.submit(run, facts=facts, model=make_model(seed))
    pusher.submit_state(run.parent)
    assert pusher.close(timeout=20) == []
    repo = alice.repo(REPO)
    assert repo.titles()[0] == "Step 1000: validation loss 1.0000"
    assert set(repo.tags) == {"step-000500", "step-001000"}
    logits = {name: from_pretrained(f"{REPO}@{name}")[0](torch.tensor([[1, 2]]))[0] for name in [*repo.tags, "main"]}
    for name, seed in (("step-000500", 1), ("step-001000", 2), ("main", 2)):
        assert torch.equal(logits[name], make_model(seed)(torch.tensor([[1, 2]]))[0]), name
    assert "| this model | 1.5000 |" in repo.files("step-000500")["README.md"].decode()
    assert set(repo.branches) == {"main", "steps", STATE_BRANCH}
    assert not (run.parent / ".push").exists()


def test_newer_replaces_what_waits(alice, pusher, run):
    pusher.request_timeout = 10.0
    alice.fail("GET", "/revision/main", hang=1.0, status=500)
    for seed in range(1, 6):
        save_model(run, make_model(seed), TOKENIZER)
        pusher.submit(run, message=f"best {seed}")
    assert pusher.close(timeout=20) == []
    assert alice.repo(REPO).titles() == ["best 5", "initial commit"]
    assert alice.repo(REPO).files()["model.safetensors"] == weights_of(run)


def test_the_folder_may_change_after_it_was_submitted(alice, pusher, run):
    then = weights_of(run)
    alice.fail("GET", "/revision/main", hang=0.1, status=500)
    pusher.submit(run)
    save_model(run, make_model(1), TOKENIZER)
    (run.parent / "metrics.jsonl").write_text("later", encoding="utf-8")
    assert pusher.close(timeout=20) == []
    assert alice.repo(REPO).files()["model.safetensors"] == then
    assert alice.repo(REPO).files()["training/metrics.jsonl"] != b"later"


def test_another_model_is_not_pushed_and_training_goes_on(alice, pusher, run):
    assert not pusher.submit(run, model=make_model(1))
    (left,) = pusher.close()
    assert "another model" in left.sentence
    assert alice.repo(REPO).titles() == ["initial commit"]


COMMIT, HEAD, PUT, TAG = ("POST", "/commit/"), ("GET", "/revision/"), ("PUT", "/lfs/"), ("POST", "/tag/")


@pytest.mark.parametrize(
    ("request_kind", "fault"),
    [
        (COMMIT, dict(status=500, times=3)),
        (COMMIT, dict(status=429, headers={"Retry-After": "1"})),
        (COMMIT, dict(status=504)),
        (COMMIT, dict(status=504, applied=True)),
        (COMMIT, dict(drop=True, times=2)),
        (COMMIT, dict(drop=True, applied=True)),
        (COMMIT, dict(hang=0.8, drop=True)),
        (COMMIT, dict(hang=0.8, applied=True)),
        (HEAD, dict(status=503, times=3)),
        (HEAD, dict(drop=True)),
        (PUT, dict(drop=True)),
        (PUT, dict(status=500)),
        (TAG, dict(status=500)),
        (TAG, dict(drop=True, applied=True)),
    ],
    ids=lambda value: "-".join(map(str, value.items() if isinstance(value, dict) else value)),
)
def test_every_commit_is_there_once_whatever_fails(alice, pusher, run, request_kind, fault):
    alice.fail(*request_kind, **fault)
    save_model(run, make_model(1), TOKENIZER)
    pusher.submit(run, tag="step-000500", message="step")
    pusher.submit(run, message="best")
    assert pusher.close(timeout=30) == []
    time.sleep(fault.get("hang", 0))  # the server comes to what was given up long ago
    repo = alice.repo(REPO)
    assert repo.titles("main") == ["best", "initial commit"]
    assert repo.titles("steps")[0] == "step"
    assert repo.titles("steps").count("step") == 1
    assert repo.tags == {"step-000500": repo.branches["steps"]}
    assert repo.files()["model.safetensors"] == weights_of(run)


def test_rights_lost_in_mid_run(alice, pusher, run):
    pusher.submit(run, message="first")
    wait_for(lambda: "first" in alice.repo(REPO).titles())
    alice.users[TOKEN].role = "read"
    save_model(run, make_model(1), TOKENIZER)
    pusher.submit(run, message="second")
    (left,) = pusher.close(timeout=20)
    assert "may not write to alice/tiny" in left.sentence
    assert left.sentence.endswith(f"finish with: nanogpt-hub push {run.as_posix()} {REPO}")
    assert alice.repo(REPO).titles()[0] == "first"
    alice.users[TOKEN].role = "write"
    push_to_hub(run, REPO)  # what that command does
    assert alice.repo(REPO).files()["model.safetensors"] == weights_of(run)


def test_rights_that_came_back_are_used_at_the_end(alice, pusher, run):
    alice.users[TOKEN].role = "read"
    pusher.submit(run, message="best")
    wait_for(lambda: any("not pushed" in line for line in pusher.said))
    alice.users[TOKEN].role = "write"
    assert pusher.close(timeout=20) == []
    assert alice.repo(REPO).titles()[0] == "best"


@pytest.mark.parametrize("fault", [dict(status=500), dict(drop=True), dict(hang=1.5)], ids=str)
def test_a_hub_that_never_works_costs_nothing_but_a_sentence(alice, pusher, run, fault):
    alice.fail("GET", "/revision/", times=10**6, **fault)
    started = time.monotonic()
    assert pusher.submit(run)
    assert pusher.submit(run, tag="step-000500")
    assert time.monotonic() - started < 1.0
    left = {item.what: item for item in pusher.close(timeout=0.7)}
    assert set(left) == {"alice/tiny (main)", "step-000500"}
    command = left["step-000500"].command
    assert re.fullmatch(r"nanogpt-hub push (\S+) alice/tiny --branch steps --tag step-000500", command)
    staged = command.split()[2]
    alice.faults.clear()
    push_to_hub(staged, REPO, branch="steps", tags=("step-000500",))  # what that command does
    assert alice.repo(REPO).files("step-000500")["model.safetensors"] == weights_of(run)


def test_a_step_of_an_earlier_run_is_moved(alice, pusher, run):
    alice.repo(REPO).tags["step-000500"] = alice.repo(REPO).branches["main"]
    pusher.submit(run, tag="step-000500")
    assert pusher.close(timeout=20) == []
    assert alice.repo(REPO).files("step-000500")["model.safetensors"] == weights_of(run)


def test_the_state_comes_back_bit_for_bit(alice, pusher, run, tmp_path):
    out = run.parent
    pusher.submit(run)
    pusher.submit_state(out)
    wait_for(
        lambda: STATE_BRANCH in alice.repo(REPO).branches and "Training state" in alice.repo(REPO).titles(STATE_BRANCH)
    )
    (out / "state" / "optimizer-00000500.safetensors").rename(out / "state" / "optimizer-00000900.safetensors")
    pusher.submit_state(out, "Training state at step 900")
    assert pusher.close(timeout=20) == []
    fetch_state(REPO, tmp_path / "elsewhere")
    for path in [p for p in out.rglob("*") if p.is_file()]:
        assert (tmp_path / "elsewhere" / path.relative_to(out)).read_bytes() == path.read_bytes(), path
    assert "state/optimizer-00000500.safetensors" not in alice.repo(REPO).files(STATE_BRANCH)
    assert not any(name.startswith("state/") for name in alice.repo(REPO).files())
    with pytest.raises(HubError, match="holds something already"):
        fetch_state(REPO, tmp_path / "elsewhere")
    with pytest.raises(HubError, match="no training state"):
        fetch_state(f"{REPO}@main", tmp_path / "third")


def test_a_state_is_listed_while_an_earlier_push_clears_up(run, monkeypatch):
    gone = run.parent / ".push" / "state-before"
    gone.mkdir(parents=True)
    scandir = os.scandir

    def scan(path="."):
        if Path(path) == gone and gone.is_dir():
            gone.rmdir()  # the pusher's thread does it between two calls
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert "state/state.json" in state_files(run.parent)
    assert not gone.exists()


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.01)


# --- load: what can go wrong ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def good_files(tmp_path_factory) -> dict[str, bytes]:
    folder = save_model(tmp_path_factory.mktemp("good") / "model", make_model(), TOKENIZER)
    write_card(folder, {})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alice/missing", "there is no alice/missing"),
        ("bob/hidden", "there is no bob/hidden here, and none on the Hub that you may read"),
        ("bob/gated", "gated: ask for access"),
        ("bob/good@v9", "no branch, tag or commit 'v9'"),
        ("./missing", "neither a folder here nor a name on the Hub"),
        ("no/such/folder", "neither a folder here nor a name on the Hub"),
        ("a b", "neither a folder here nor a name on the Hub"),
        ("bob/good@a", "asked for too"),
    ],
)
def test_what_cannot_be_found_is_one_sentence(alice, good_files, tmp_path, name, message):
    alice.add_repo("bob/good", good_files)
    alice.add_repo("bob/hidden", good_files, private=True)
    alice.add_repo("bob/gated", good_files, gated=True)
    with pytest.raises(HubError, match=message) as error:
        resolve(name, "b" if name.endswith("@a") else None, cache_dir=tmp_path)
    sentence_of(error)


def test_too_large_is_refused_before_any_of_it_is_fetched(alice, good_files, tmp_path):
    alice.add_repo("bob/good", good_files)
    with pytest.raises(HubError, match="at most 1,000 are fetched") as error:
        resolve("bob/good", max_bytes=1000, cache_dir=tmp_path)
    sentence_of(error)
    assert alice.asked("GET", "/resolve/") == []


def test_bytes_that_change_on_the_way_are_noticed_and_not_kept(alice, good_files, tmp_path):
    alice.add_repo("bob/good", good_files)
    alice.corrupt.add("model.safetensors")
    with pytest.raises(HubError, match="arrived damaged") as error:
        resolve("bob/good", cache_dir=tmp_path)
    sentence_of(error)
    alice.corrupt.clear()
    assert weights_of(resolve("bob/good", cache_dir=tmp_path).folder) == good_files["model.safetensors"]


@pytest.mark.parametrize("fault", [dict(status=503), dict(drop=True)], ids=str)
def test_the_cache_serves_while_the_hub_does_not(alice, good_files, tmp_path, fault):
    repo = alice.add_repo("bob/good", good_files)
    sha = resolve("bob/good", cache_dir=tmp_path).sha
    repo.put({"README.md": b"newer"})
    alice.fail("GET", "/api/models/", times=10**6, **fault)
    assert resolve("bob/good", cache_dir=tmp_path).sha == sha
    with pytest.raises(HubError, match="not in the cache") as error:
        resolve("bob/other", cache_dir=tmp_path)
    sentence_of(error)


@pytest.mark.parametrize("place", ["/api/models/bob/good/revision", "/api/models/bob/good/tree", "/cdn/"])
def test_a_moment_of_failure_is_passed_over(alice, good_files, tmp_path, place):
    alice.add_repo("bob/good", good_files)
    alice.fail("GET", place, drop=True)
    assert weights_of(resolve("bob/good", cache_dir=tmp_path).folder) == good_files["model.safetensors"]


CONFIG_JSON = json.dumps(
    {"model_type": "gpt_neox", "vocab_size": 10**9, "hidden_size": 10**6, "num_hidden_layers": 9**5}
)


def twice(config: bytes) -> bytes:
    return config.replace(b"{", b'{"vocab_size": 3, "vocab_size": 4, ', 1)


def header(shape: list[int], size: int) -> bytes:
    text = json.dumps(
        {"gpt_neox.embed_in.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    ).encode()
    return len(text).to_bytes(8, "little") + text


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


HOSTILE = {
    "no config": lambda f: f.pop("config.json"),
    "pickled weights": lambda f: f.update({"pytorch_model.bin": f.pop("model.safetensors")}),
    "no weights": lambda f: f.pop("model.safetensors"),
    "another architecture": lambda f: f.update({"config.json": b'{"model_type": "bert"}'}),
    "terabytes": lambda f: f.update({"config.json": CONFIG_JSON.encode()}),
    "a key twice": lambda f: f.update({"config.json": twice(f["config.json"])}),
    "no JSON": lambda f: f.update({"config.json": b"[" * 10**5}),
    "truncated": lambda f: f.update({"model.safetensors": f["model.safetensors"][:-9]}),
    "wrong shapes": lambda f: f.update({"model.safetensors": header([3, 3], 36) + bytes(36)}),
    "endless shapes": lambda f: f.update({"model.safetensors": header([2**31, 2**31], 36) + bytes(36)}),
    "a symlink": lambda f: f.update({"model.safetensors": b"../../../../etc/passwd"}),
    "an index that leads out": lambda f: f.update({
        "model.safetensors.index.json": b'{"weight_map": {"x": "../../../../etc/model.safetensors"}}',
        "model-00001-of-00001.safetensors": f.pop("model.safetensors"),
    }),
    "a broken tokenizer": lambda f: f.update({"tokenizer.json": b"{}"}),
    "remote code": lambda f: f.update({"config.json": b'{"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}}'}),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_repo_is_refused_in_one_sentence(alice, good_files, tmp_path, kind):
    import pickle

    resource = pytest.importorskip("resource")
    trap = tmp_path / "executed"
    files = {**good_files, "evil.py": b"raise SystemExit", "optimizer.pt": pickle.dumps(Bomb(trap)),
             "../../outside.json": b"{}", "training/../../outside.json": b"{}", "a/config.json": b"{}"}  # fmt: skip
    HOSTILE[kind](files)
    alice.add_repo("bob/evil", files)
    cache = tmp_path / "deep" / "cache"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((HubError, CheckpointError)) as error:
        load_model(resolve("bob/evil", cache_dir=cache))
    sentence_of(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB
    assert not trap.exists()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and cache not in path.parents] == []
    fetched = {path.name for path in cache.rglob("*") if "snapshots" in path.parts}
    assert fetched.isdisjoint({"evil.py", "optimizer.pt", "outside.json", "pytorch_model.bin", "a"})


def test_names():
    assert split_name("a/b@v1") == ("a/b", "v1")
    assert split_name("gpt2") == ("gpt2", "main")
    assert split_name("a/b", "dev") == ("a/b", "dev")


# --- a Space ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def app_folder(tmp_path) -> Path:
    """A checkout with an app."""
    source, folder = Path(nanogpt_hub.hub.space.__file__).parents[2], tmp_path / "checkout"
    shutil.copytree(source / "nanogpt_hub", folder / "nanogpt_hub")
    shutil.copy(source / "requirements.txt", folder)
    (folder / "app.py").write_text("print('app')\n", encoding="utf-8")
    (folder / "nanogpt_hub" / "data.bin").write_bytes(b"x")
    (folder / ".env").write_text(TOKEN, encoding="utf-8")
    return folder


def test_a_space_has_what_the_app_needs_and_nothing_else(app_folder):
    files = collect_space(app_folder, REPO, preload="0" * 40)
    library = [
        path
        for path in (app_folder / "nanogpt_hub").rglob("*")
        if path.is_file() and path.suffix not in (".bin", ".typed")
    ]
    names = {path.relative_to(app_folder).as_posix() for path in library if "__pycache__" not in path.parts}
    assert set(files) == {"app.py", "requirements.txt", "README.md", *names}
    needed = files["requirements.txt"].decode().split()
    assert any(line.startswith("torch>=") for line in needed)
    assert not any(line.startswith(("gradio", "accelerate", "datasets")) for line in needed)
    head = Readme.parse(files["README.md"].decode()).data
    assert head["sdk"] == "gradio"
    assert re.fullmatch(r"6\.\d+\.\d+", head["sdk_version"])
    assert head["app_file"] == "app.py"
    assert head["models"] == [REPO]
    assert head["preload_from_hub"] == [f"{REPO} config.json,model.safetensors,tokenizer.json {'0' * 40}"]
    assert yaml.safe_dump(head["python_version"]).startswith("3.12")


def test_the_spaces_library_works_by_itself_and_offline(alice, run, app_folder, tmp_path):
    push_to_hub(run, REPO)
    sha = resolve(REPO).sha
    for name, data in collect_space(app_folder, REPO).items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(data)
    code = f"""if True:
        import sys, nanogpt_hub.generate
        from nanogpt_hub.hub.resolve import resolve
        print(nanogpt_hub.__file__, resolve({REPO!r}).sha, *sys.modules)
        resolve("bob/missing")"""
    done = run_python(code, cwd=tmp_path / "space", HF_HUB_OFFLINE="1")
    where, found, *modules = done.stdout.split()
    assert Path(where).parent == tmp_path / "space" / "nanogpt_hub"
    assert found == sha
    assert {"accelerate", "datasets", "jsonargparse", "matplotlib", "gradio", "train"}.isdisjoint(modules)
    assert "HubError: bob/missing at 'main' is not in the cache, and the Hub cannot be reached" in done.stderr


def run_python(code: str, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_a_space_is_created_and_then_updated_by_one_commit(alice, run, app_folder):
    push_to_hub(run, REPO)
    made = create_space("demo", REPO, app_folder=app_folder)
    space = alice.repo("alice/demo", "spaces")
    assert (made.space_id, made.model_id) == ("alice/demo", REPO)
    assert "Duplicate this Space" in made.how_to_duplicate
    assert space.settings == {
        "sdk": "gradio", "hardware": "zero-a10g", "secrets": {},
        "variables": {"NANOGPT_REPO": REPO, "NANOGPT_REVISION": "main"},
    }  # fmt: skip
    assert space.titles() == [f"Playground for {REPO}", "initial commit"]
    space.put({"picture.png": b"mine"}, "by hand")
    (app_folder / "app.py").write_text("print('new')\n", encoding="utf-8")
    (app_folder / "nanogpt_hub" / "lens.py").unlink(missing_ok=True)
    (app_folder / "nanogpt_hub" / "cli.py").unlink()
    create_space("alice/demo", f"{REPO}@main", app_folder=app_folder, hardware="cpu-upgrade", secrets={"HF_TOKEN": "s"})
    assert space.titles() == [f"Playground for {REPO}", "by hand", f"Playground for {REPO}", "initial commit"]
    assert space.files()["app.py"] == b"print('new')\n"
    assert space.files()["picture.png"] == b"mine"
    assert "nanogpt_hub/cli.py" not in space.files()
    assert (space.settings["hardware"], space.settings["secrets"]) == ("cpu-upgrade", {"HF_TOKEN": "s"})
    create_space("alice/demo", REPO, app_folder=app_folder)
    assert len(space.titles()) == 4


@pytest.mark.parametrize(
    ("space_id", "model", "message"),
    [
        ("bob/demo", REPO, "cannot write to bob"),
        ("demo", "alice/missing", "there is no alice/missing"),
        ("demo", f"{REPO}@v9", "no branch, tag or commit 'v9'"),
        ("demo", REPO, "has no app.py"),
    ],
)
def test_a_space_that_cannot_be_is_refused_at_once(alice, run, tmp_path, space_id, model, message):
    push_to_hub(run, REPO)
    with pytest.raises(HubError, match=message) as error:
        create_space(space_id, model, app_folder=tmp_path)
    sentence_of(error)
    assert ("spaces", "alice/demo") not in alice.repos


# --- the token --------------------------------------------------------------------------------------------------------
CHILD = """
import logging, sys, traceback
logging.basicConfig(level=logging.DEBUG)
from nanogpt_hub.hub.resolve import from_pretrained
from nanogpt_hub.hub.publish import preflight, push_to_hub
from nanogpt_hub.hub.background import Pusher
folder, repo = sys.argv[1:]
preflight(repo)
pusher = Pusher(repo, say=print, backoff=0.01)
pusher.submit(folder)
pusher.submit_state(folder + "/..")
print([left.sentence for left in pusher.close(5)])
from_pretrained(repo)
for work, *given in ((push_to_hub, folder, "bob/x"), (from_pretrained, "bob/missing"), (push_to_hub, folder, repo)):
    try:
        work(*given)
    except OSError:
        traceback.print_exc()
print(open("/proc/self/cmdline").read() if sys.platform == "linux" else "")
"""


def test_the_token_appears_nowhere(alice, run, tmp_path):
    alice.fail("POST", "/commit/", status=500)
    root = Path(nanogpt_hub.hub.space.__file__).parents[2]
    done = run_python(CHILD, str(run), REPO, cwd=root, HF_HOME=str(tmp_path / "home"), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answers 500" in done.stdout
    assert "cannot write to bob" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    pushed = [data for repo in alice.repos.values() for sha in repo.commits for data in repo.files(sha).values()]
    assert len(files) > 20
    assert len(pushed) > 20
    assert not any(TOKEN.encode() in data for data in [*(path.read_bytes() for path in files), *pushed])
