"""A run as a job of the Hub: what is checked, what is asked for, and that the job's own command works and goes on."""

import os

import pytest
from hub_server import Repo

from nanogpt_hub import cli
from nanogpt_hub.hub.publish import STATE_BRANCH
from nanogpt_hub.system import installed
from train import jobs
from train.report import read_metrics

TOKEN = "hf_AliceSecretToken0123456789"
CODE = "git+https://github.com/alice/nanogpt_hub@0123abc"
TINY = (
    "--model.preset nanogpt --model.n_layer 1 --model.n_head 2 --model.n_embd 16 --model.block_size 16 "
    "--data.source stories:level=1,seed=3,size=20000 --data.tokenizer char --max_steps 4 --batch_size 8 "
    "--eval.interval 2 --eval.max_windows 8 --eval.sample_tokens 0 --optim.warmup_steps 2 --device cpu "
    "--hub.license mit"
).split()
JOB = [*TINY, "--hub.repo_id", "alice/fox"]


@pytest.fixture
def alice(hub, monkeypatch, tmp_path):
    hub.add_user("alice", TOKEN, orgs=("lab",))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(installed, "public_source", lambda: CODE)
    monkeypatch.chdir(tmp_path)
    return hub


def there(words: list[str], folder) -> int:
    """Runs a job's command as its machine does after uv has installed the code: in an empty folder."""
    at = words.index("nanogpt-hub")
    assert words[:at] == ["uv", "run", "--with", f"nanogpt-hub[train] @ {CODE}"]
    folder.mkdir()
    before = os.getcwd()
    os.chdir(folder)
    try:
        return cli.main(words[at + 1 :])
    finally:
        os.chdir(before)


def test_the_job_trains_pushes_and_the_same_command_goes_on(alice, tmp_path, capsys):
    assert cli.main(["jobs", *JOB, "--flavor", "t4-small", "--timeout", "90m"]) == 0
    said = capsys.readouterr()
    asked = alice.jobs[-1]
    assert (asked["flavor"], asked["timeoutSeconds"], asked["namespace"]) == ("t4-small", 5400, "alice")
    assert asked["dockerImage"].startswith("ghcr.io/astral-sh/uv:")
    assert asked["secrets"] == {"HF_TOKEN": TOKEN}
    assert asked["environment"] == {}
    assert TOKEN not in str([asked["command"], said.out, said.err])
    assert f"command: {installed.joined(asked['command'])}\n" in said.out
    assert f"started: {alice.url}/jobs/alice/job1" in said.out
    assert not any(word.startswith("--resume") for word in asked["command"])

    assert there(asked["command"], tmp_path / "first") == 0
    assert STATE_BRANCH in alice.repo("alice/fox").branches
    capsys.readouterr()

    assert cli.main(["jobs", *JOB, "--max_steps", "8", "--namespace", "lab"]) == 0
    assert "going on from the training state of alice/fox\n" in capsys.readouterr().out
    assert alice.jobs[-1]["namespace"] == "lab"
    assert "--resume=alice/fox" in alice.jobs[-1]["command"]
    assert there(alice.jobs[-1]["command"], tmp_path / "second") == 0
    assert "resuming at step 4" in capsys.readouterr().out
    run = next((tmp_path / "second" / "out").iterdir())
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "val_loss" in row] == [0, 2, 4, 6, 8]


def test_a_dry_run_says_what_would_run_and_makes_nothing(alice, capsys):
    assert jobs.main(["quickstart", "--hub.repo_id", "fox", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "--hub.repo_id=alice/fox" in said
    assert "--data.source=python" in said
    assert "at most 2h, paid by you" in said
    assert "nothing was started" in said
    assert (alice.jobs, alice.repos) == ([], {})


def test_settings_of_a_file_travel_as_flags(alice, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "max_steps: 7\ntrackers: [tensorboard]\ndata: {source: alice/text, mix: {alice/more: 0.5}, cache_dir: /here}\n"
        'lora: {targets: [c_attn]}\neval: {prompt: "Once\\n"}\noptim: {learning_rate: 1.0e-05}\n',
        encoding="utf-8",
    )
    for name in ("alice/text", "alice/more"):
        alice.repos["datasets", name] = repo = Repo(name)
        repo.commit({}, "initial commit")
    flags = ["--hub.repo_id", "alice/fox", "--model.n_expert", "4"]
    assert jobs.main(["mine.yaml", *flags]) == 0
    words = alice.jobs[-1]["command"]
    assert words[:6] == ["uv", "run", "--with", f"nanogpt-hub[train] @ {CODE}", "--with", "tensorboard"]
    assert {"--max_steps=7", "--data.source=alice/text", '--data.mix={"alice/more": 0.5}', "--eval.prompt=Once\n",
            "--optim.learning_rate=1e-05", "--model.n_expert=4", "--out_dir=out/mine", "--hub.push_state=true",
            '--trackers=["tensorboard"]', '--lora.targets=["c_attn"]'} <= set(words)  # fmt: skip
    assert "/here" not in str(words)
    config, _ = jobs.parse(jobs.make_parser("train", ""), words[words.index("train") + 1 :])
    assert (config.max_steps, config.data.mix, config.trackers) == (7, {"alice/more": 0.5}, ["tensorboard"])
    assert config.eval.prompt == "Once\n"


REFUSED = {
    "no place to push to": (TINY, "say where the model goes, --hub.repo_id you/name"),
    "a file of this machine": ([*JOB, "--data.source", "here.txt"], "data.source here.txt is on this machine"),
    "a validation text of this machine": ([*JOB, "--data.val_source", "here.txt"], "data.val_source here.txt is on"),
    "a mix with this machine": ([*JOB, "--data.mix", '{"here.txt": 1}'], "data.mix here.txt is on this machine"),
    "a tokenizer of this machine": ([*JOB, "--data.tokenizer", "here.txt"], "data.tokenizer here.txt is on this"),
    "no such dataset": ([*JOB, "--data.source", "alice/none"], "there is no dataset alice/none"),
    "no name of a dataset": ([*JOB, "--data.source", "no/such/file.txt"], "neither a folder here nor a name"),
    "an address of this machine": ([*JOB, "--data.source", "http://127.0.0.1/x.txt"], "cannot be read from elsewhere"),
    "a name of this machine": ([*JOB, "--data.source", "http://localhost/x.txt"], "cannot be read from elsewhere"),
    "an address of another kind": ([*JOB, "--data.source", "file:///x.txt"], "cannot be read from elsewhere"),
    "a key in an address": ([*JOB, "--data.source", "https://a.org/x?token=0123456789abcdef"], "the command of a job"),
    "no time": ([*JOB, "--timeout", "soon"], "timeout is 'soon'; give a number and its unit"),
    "a time of nothing": ([*JOB, "--timeout", "0h"], "timeout is '0h'"),
    "nothing is saved": ([*JOB, "--save.interval", "0", "--save.minutes", "0"], "would have saved nothing"),
    "a resume": ([*JOB, "--resume"], "a job goes on by itself"),
    "somebody else's repo": ([*TINY, "--hub.repo_id", "bob/fox"], "signed in as alice and cannot write to bob"),
    "somebody else's money": ([*JOB, "--namespace", "bob"], "cannot write to bob"),
    "a secret that is not set": ([*JOB, "--secret", "NO_SUCH_KEY"], "no environment variable NO_SUCH_KEY"),
    "a fine-tune": ([*JOB, "--lora.rank", "4"], "lora.rank is for fine-tuning"),
    "an impossible shape": ([*JOB, "--model.n_embd", "15"], "n_embd 15 is not a multiple"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_work_there_is_one_sentence_here(case, alice, tmp_path, capsys):
    (tmp_path / "here.txt").write_text("text", encoding="utf-8")
    words, sentence = REFUSED[case]
    assert jobs.main(words) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert (alice.jobs, [name for _, name in alice.repos]) == ([], [])


def test_without_a_public_repository_or_a_login_it_says_what_to_do(alice, monkeypatch, capsys):
    monkeypatch.setattr(installed, "public_source", lambda: "")
    assert jobs.main(JOB) == 2
    assert "push it (git push) to one on github.com" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert jobs.main([*JOB, "--code", CODE]) == 2
    assert "you are not signed in to the Hub: run `hf auth login`" in capsys.readouterr().err


def test_more_secrets_go_as_secrets(alice, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert jobs.main([*JOB, "--secret", "WANDB_API_KEY"]) == 0
    assert alice.jobs[-1]["secrets"] == {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "0123456789abcdef"}
    said = capsys.readouterr().out
    assert "secrets: HF_TOKEN, WANDB_API_KEY (" in said
    assert "0123456789abcdef" not in said + str(alice.jobs[-1]["command"])


@pytest.mark.parametrize(("status", "sentence"), [(402, "the Hub asks for payment to run a job on t4-small"),
                                                  (500, "the Hub answers 500 when asked to run a job")])  # fmt: skip
def test_a_hub_that_refuses(status, sentence, alice, capsys):
    alice.fail("POST", "/api/jobs/", status=status, times=9)
    assert jobs.main(JOB) == 2
    assert sentence in capsys.readouterr().err
