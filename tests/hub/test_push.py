"""The command `push` and its manners."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import make_model

from nanogpt_hub import cli
from nanogpt_hub.hub.background import Pusher
from nanogpt_hub.hub.publish import STATE_BRANCH, STEPS_BRANCH, preflight, push_state, push_to_hub
from nanogpt_hub.hub.readme import Readme, update_readme
from nanogpt_hub.hub.resolve import HubError, split_name
from nanogpt_hub.runs import read_run

TOKEN, BOB = "hf_AliceSecretToken0123456789", "hf_BobSecretToken0123456789abc"
REPO = "alice/fox"


@pytest.fixture
def alice(hub, monkeypatch):
    hub.add_user("alice", TOKEN, orgs=("club",))
    hub.add_user("bob", BOB)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run, as the trainer leaves it."""
    out = tmp_path / "out" / "fox"
    for name in ("best", "last"):
        make_model(out / name)
    facts = {
        "data": {"source": {"kind": "file", "name": "fox.txt"}},
        "training": {"command": "python -m train.pretrain --data.source fox.txt", "hyperparameters": {"seed": 1}},
        "evaluation": {"step": 3, "val_loss": 2.5},
    }
    (out / "state").mkdir()
    for name, content in {
        "run.json": json.dumps(facts), "metrics.jsonl": '{"step": 3, "val_loss": 2.5}\n',
        "config.yaml": "max_steps: 9\n",
        "state/state.json": "{}", "state/model-00000003.safetensors": "weights",
    }.items():  # fmt: skip
        (out / name).write_text(content, encoding="utf-8")
    return out


def test_what_did_not_arrive_is_finished_by_the_printed_commands(alice, run, capsys):
    preflight(REPO)
    alice.fail("POST", "commit", status=403, times=1000)
    pusher = Pusher(REPO, say=print, backoff=0.01, longest_pause=0.1)
    assert pusher.submit(run / "best")
    assert pusher.submit(run / "last", tag="step-000003")
    assert pusher.submit_state(run)
    left = pusher.close(timeout=60)
    alice.faults.clear()
    commands = [re.search("finish with: (.*)", lost.sentence)[1] for lost in left]
    assert len(commands) == 3
    for command in commands:
        program, *words = shlex.split(command)
        assert (program, cli.main(words)) == ("nanogpt-hub", 0)
    repo = alice.repo(REPO)
    assert "model.safetensors" in repo.files()
    assert "step-000003" in repo.tags
    assert "training/metrics.jsonl" in repo.files(STEPS_BRANCH)
    assert {"state/state.json", "config.yaml", "best/config.json"} <= {*repo.files(STATE_BRANCH)}
    tried = re.findall("to try it: nanogpt-hub (.*)", capsys.readouterr().err)
    assert sorted(shlex.split(line)[1] for line in tried) == [REPO, f"{REPO}@{STEPS_BRANCH}"]
    for line in tried:
        assert cli.main([*shlex.split(line), "--max-new-tokens", "2"]) == 0


def test_the_state_keeps_no_history(alice, run):
    push_state(run, REPO)
    (run / "state" / "state.json").write_text('{"step": 4}', encoding="utf-8")
    push_state(run, REPO)
    assert len(alice.repo(REPO).log(STATE_BRANCH)) == 1
    assert alice.repo(REPO).files(STATE_BRANCH)["state/state.json"] == b'{"step": 4}'
    with pytest.raises(HubError, match="holds no training state"):
        push_state(run / "best", REPO)


def test_license_description_and_token_of_a_push(alice, run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n", encoding="utf-8")
    best = str(run / "best")
    assert cli.main(["push", best, REPO, "--token-file", str(token)]) == 0
    said = capsys.readouterr().err
    assert "no license is given" in said
    assert "it is public: everybody can read it" in said
    words = ["--license", "mit", "--description", "Written for my class."]
    assert cli.main(["push", best, f"https://huggingface.co/{REPO}", "--token-file", str(token), *words]) == 0
    card = Readme.parse(alice.repo(REPO).files()["README.md"].decode())
    assert (card.data["license"], card.before) == ("mit", "Written for my class.")
    assert cli.main(["push", best, REPO, "--token-file", str(token), "--license", "mit"]) == 0
    again = Readme.parse(alice.repo(REPO).files()["README.md"].decode())
    assert (again.data["license"], again.before) == ("mit", "Written for my class.")
    assert TOKEN not in said + str(alice.repo(REPO).files())


def test_a_card_tells_how_to_train_the_same(alice, run):
    push_to_hub(run / "best", REPO)
    card = alice.repo(REPO).files()["README.md"].decode()
    assert (
        f"hf download {REPO} training/config.yaml --local-dir fox\nnanogpt-hub train fox/training/config.yaml" in card
    )
    assert "give yours by `--data.source`" in card
    assert card.index("## How to use it") < card.index("## Model")
    assert "With Transformers 4.45 or newer" in card
    assert "dataset" not in card or "type: text\n" in card


def test_a_pull_request_to_somebody_else(alice, run, capsys, monkeypatch):
    push_to_hub(run / "best", REPO)
    monkeypatch.setenv("HF_TOKEN", BOB)
    assert cli.main(["push", str(run / "best"), REPO]) == 2
    assert cli.main(["push", str(run / "best"), REPO, "--create-pr", "--license", "mit"]) == 0
    assert f"{REPO}/discussions/1" in capsys.readouterr().out
    assert b"license: mit" in alice.repo(REPO).files("refs/pr/1")["README.md"]
    assert b"license: mit" not in alice.repo(REPO).files()["README.md"]


def test_manners(alice, run):
    push_to_hub(run / "best", "alice/old")
    alice.repos["models", "alice/new"] = alice.repos.pop(("models", "alice/old"))
    alice.repo("alice/new").id, alice.renamed = "alice/new", {"alice/old": "alice/new"}
    assert push_to_hub(run / "best", "alice/old", about={"license": "mit"}).repo_id == "alice/new"
    assert [*alice.repos] == [("models", "alice/new")]
    alice.fail("PUT", "lfs", status=400, times=2)  # bytes that changed on the way
    assert push_to_hub(run / "best", "club/fox", backoff=0.01).repo_id == "club/fox"
    alice.users[TOKEN].org_role = "read"
    with pytest.raises(HubError, match="only read in club"):
        push_to_hub(run / "best", "club/fox")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/alice/fox", ("alice/fox", "main")),
        ("https://hf.co/alice/fox/", ("alice/fox", "main")),
        ("https://huggingface.co/alice/fox/tree/step-000500", ("alice/fox", "step-000500")),
        ("https://huggingface.co/alice/fox/blob/refs%2Fpr%2F1/README.md?x=1", ("alice/fox", "refs/pr/1")),
    ],
)
def test_addresses_of_pages_are_names(address, name):
    assert split_name(address) == name


def test_addresses_of_other_things_are_not():
    for address in ("https://huggingface.co/datasets/alice/fox", "https://example.com/alice/fox"):
        with pytest.raises(HubError):
            split_name(address)


def test_a_downloaded_run_is_not_going_on(run, tmp_path):
    assert read_run(run).going_on()
    folder = make_model(tmp_path / "model")
    (folder / "training").mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        (folder / "training" / name).write_bytes((run / name).read_bytes())
    assert not read_run(folder / "training").going_on()


def test_what_a_person_measured_and_named_is_kept():
    def result(name: str) -> dict:
        return {"task": {"type": "text-generation"}, "dataset": {"name": name, "type": "text"}, "metrics": []}

    def index(*results: dict) -> list:
        return [{"name": "fox", "results": [*results]}]

    ours, theirs = result("fox.txt, validation part"), result("my exam")
    old = update_readme("", {"model-index": index(ours, theirs), "base_model": "bob/base"}, "a block")
    new = Readme.parse(update_readme(old, {"model-index": index(ours)}, "a block")).data
    assert new == {"model-index": index(ours, theirs), "base_model": "bob/base"}
    assert Readme.parse(update_readme(old, {}, "a block")).data["model-index"] == index(theirs)
    claimed = update_readme("", {"base_model": "bob/base"}, "fine-tuned from [bob/base](x)")
    assert Readme.parse(update_readme(claimed, {}, "a block")).data == {}
