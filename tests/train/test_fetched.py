"""A run that somebody else pushed: what of its config counts, and that the rest does nothing."""

import contextlib
import json
import re
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass

import pytest
import yaml
from huggingface_hub import HfApi

from nanogpt_hub.hub.publish import STATE_BRANCH
from train import finetune, pretrain, run
from train.config import TrainConfig, make_parser, parse
from train.fetched import GROUPS, TAKEN, leaves, take

ALICE, MALLORY = "hf_AliceSecretToken0123456789", "hf_MalloryToken0123456789abcd"
TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(400))
TINY = (
    "--model.preset nanogpt --model.n_layer 2 --model.n_head 2 --model.n_embd 16 --model.block_size 16 "
    "--data.tokenizer char --max_steps 6 --batch_size 8 --eval.interval 3 --eval.max_windows 8 "
    "--eval.sample_tokens 0 --optim.warmup_steps 2 --device cpu --hub.minutes 0 --hub.license mit"
).split()


def leaf_names(cls: type = TrainConfig, prefix: str = "") -> list[str]:
    names = []
    for field in fields(cls):
        nested = field.default_factory if is_dataclass(field.default_factory) else None
        names += leaf_names(nested, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return names


def test_each_field_of_the_config_is_in_one_group():
    classified = [name for group in GROUPS.values() for name in group]
    assert sorted(classified) == sorted(leaf_names()), "say in train/fetched.py whether a fetched run may decide it"
    assert set(TAKEN) < set(GROUPS)


def test_what_is_taken_is_plain_and_names_no_file(tmp_path):
    settings = dict.fromkeys(leaf_names(), "x") | {
        "batch_size": 4,
        "model.n_layer": {},
        "data.tokenizer": "bpe:300",
    }
    assert dict(leaves(take(settings, tmp_path)))["data.tokenizer"] == "bpe:300"
    for odd in ("alice/private", "/etc/passwd", ["char"], None):
        assert take({"data.tokenizer": odd}, tmp_path) == {"data": {"tokenizer": tmp_path.as_posix()}}
    taken = dict(
        leaves(
            take({"seed": 1, "max_steps": "9" * 300, "lora.targets": [[1]], "hub.private": 1, "from": "a/b"}, tmp_path)
        )
    )
    assert taken == {"seed": 1}


def test_nodes_that_share_a_disk_fetch_a_run_once(tmp_path, monkeypatch):
    fetched, together = [], threading.Barrier(2)

    def fetch(name, out, clean):
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(1)  # as long as it takes the other node to come here, if it may
        fetched.append(name)
        (out / "state").mkdir(parents=True)

    monkeypatch.setattr(run, "fetch_state", fetch)
    monkeypatch.setattr(run, "seal_fetched", lambda state: None)
    monkeypatch.setattr(run, "read_facts", lambda state: {} if state.is_dir() else None)
    words = ["quickstart", "--resume", "alice/fox", "--out_dir", str(tmp_path / "fox")]
    config, parsed = parse(parser := make_parser("train", ""), words)
    with ThreadPoolExecutor(2) as nodes:
        for node in [nodes.submit(run.fetch_run, config, parsed, parser, words) for _ in range(2)]:
            assert node.result() == (config, parsed)
    assert fetched == ["alice/fox"]


@pytest.fixture
def as_user(hub, monkeypatch, tmp_path):
    """Signs a user in, with a cache of their own."""
    hub.add_user("alice", ALICE)
    hub.add_user("mallory", MALLORY)

    def sign_in(name: str, token: str) -> None:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / f"cache of {name}"))

    return sign_in


def poisoned(server, repo_id: str, **sections) -> None:
    """Writes what an attacker wants into the config of a shared run."""
    repo = server.repo(repo_id)
    config = yaml.safe_load(repo.files(STATE_BRANCH)["config.yaml"])
    for name, value in sections.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    config["config"] = ["/etc/hostname"]
    repo.put({"config.yaml": yaml.safe_dump(config).encode()}, branch=STATE_BRANCH)


def printed_command(err: str) -> list[str]:
    return shlex.split(re.search(r"`python -m [\w.]+ (.*)`", err)[1])


def test_a_strangers_run_reads_and_publishes_nothing_that_was_not_named(
    hub, as_user, text, tmp_path, capsys, monkeypatch
):
    as_user("mallory", MALLORY)
    share = ["--hub.repo_id", "mallory/nice", "--hub.push_state", "true"]
    assert pretrain.main([*TINY, "--data.source", str(text), "--out_dir", str(tmp_path / "theirs"), *share]) == 0
    token_file, loot = tmp_path / "home" / "token", tmp_path / "loot"
    token_file.parent.mkdir()
    token_file.write_text(ALICE * 100, encoding="utf-8")
    read = dict.fromkeys(("source", "val_source", "tokenizer"), str(token_file))
    poisoned(
        hub, "mallory/nice", max_steps=9, out_dir=str(loot), trackers=["tensorboard"], device="mps", precision="bf16",
        data={**read, "cache_dir": str(loot)},
        hub={"repo_id": "alice/stolen", "private": False, "push_state": True, "push_steps": True},
        eval={"prompt": ALICE, "sample_tokens": 10**9},
    )  # fmt: skip
    as_user("alice", ALICE)
    monkeypatch.chdir(tmp_path)
    theirs = {repo: [*about.commits] for repo, about in hub.repos.items()}
    hub.requests.clear()
    capsys.readouterr()
    out = tmp_path / "mine"
    resume = ["--resume", "mallory/nice", "--out_dir", str(out)]
    assert pretrain.main(resume) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: what a run from the Hub reads is yours to say")
    assert str(token_file) not in err
    assert not out.exists()

    words = printed_command(err)
    assert words == [*resume, "--data.source", "FILE", "--data.val_source", "SOURCE"]
    words = [{"FILE": str(text), "SOURCE": ""}.get(word, word) for word in words]  # the last part of the text after all
    assert pretrain.main([*words, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert json.loads((out / "state" / "state.json").read_text())["step"] == 9
    assert "--hub.repo_id you/name" in said.out
    assert pretrain.main([*resume, "--max_steps", "12"]) == 0  # what was said once counts for the next sitting

    assert {repo: [*about.commits] for repo, about in hub.repos.items()} == theirs
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
    assert not loot.exists()
    assert not any("events" in path.name for path in out.rglob("*"))
    everything = said.out + said.err + "".join(p.read_bytes().decode("latin-1") for p in out.rglob("*") if p.is_file())
    assert ALICE not in everything
    assert "loot" not in everything


def test_a_strangers_fine_tune_does_not_open_private_models(hub, as_user, text, tmp_path, capsys):
    as_user("mallory", MALLORY)
    assert (
        pretrain.main(
            [*TINY, "--data.source", str(text), "--out_dir", str(tmp_path / "run"), "--hub.repo_id", "mallory/base"]
        )
        == 0
    )
    tune = "--max_steps 4 --eval.interval 2 --eval.sample_tokens 0 --device cpu --hub.repo_id mallory/tuned"
    about = ["--data.source", str(text), "--out_dir", str(tmp_path / "tuned")]
    assert finetune.main(["--from", "mallory/base", *tune.split(), "--hub.push_state", "true", *about]) == 0
    as_user("alice", ALICE)
    HfApi().create_repo("alice/private", private=True)
    repo = hub.repo("mallory/tuned")
    config = repo.files(STATE_BRANCH)["config.yaml"].replace(b"from: mallory/base", b"from: alice/private")
    repo.put({"config.yaml": config}, branch=STATE_BRANCH)
    hub.requests.clear()
    capsys.readouterr()
    out = ["--out_dir", str(tmp_path / "mine")]
    assert finetune.main(["--resume", "mallory/tuned", "--max_steps", "6", *out]) == 2
    err = capsys.readouterr().err
    assert "began from 'mallory/base'" in err
    words = [{"FILE": str(text), "MODEL": "mallory/base"}.get(word, word) for word in printed_command(err)]
    assert finetune.main([*words, "--device", "cpu"]) == 0
    assert not [request.path for request in hub.requests if "private" in request.path]


@pytest.mark.parametrize(
    "config",
    [
        b"a: &a [x, x]\nb: *a\n",
        b"[" * 5000,
        b"max_steps: 1\n" * 99999,
        b"- 1\n",
        b"optim: ../../x.yaml\nseed: {a: b}\n",
    ],
)
def test_a_config_that_is_none_is_refused_in_one_line(hub, as_user, text, tmp_path, capsys, config):
    as_user("mallory", MALLORY)
    HfApi().create_repo("mallory/odd")
    hub.repo("mallory/odd").put({"config.yaml": config, "state/state.json": b"{}"}, branch=STATE_BRANCH)
    as_user("alice", ALICE)
    status = 2
    try:
        status = pretrain.main(
            ["--resume", "mallory/odd", "--data.source", str(text), "--out_dir", str(tmp_path / "mine")]
        )
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert "Traceback" not in capsys.readouterr().err
