"""The command line: what it prints, what it says when something is wrong, how it ends when interrupted."""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanogpt_hub import cli
from nanogpt_hub.checkpoint import save_model
from nanogpt_hub.commands import text as text_commands
from nanogpt_hub.evaluate import evaluate
from nanogpt_hub.generate import generate
from nanogpt_hub.hub.publish import push_to_hub
from nanogpt_hub.model import GPT, SIZES, GPTConfig
from nanogpt_hub.sources import open_source
from nanogpt_hub.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model folder, its model and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer("byte", [])
    config = GPTConfig.preset("gpt2", "1m", n_layer=2, n_embd=32, vocab_size=tokenizer.vocab_size, block_size=32)
    model = GPT(config).eval()
    folder = save_model(tmp_path_factory.mktemp("cli") / "model", model, tokenizer)
    return folder, model, tokenizer


def test_samples_are_those_of_the_library(saved, capsys):
    folder, model, tokenizer = saved
    flags = ["--prompt", "ab", "--num-samples", "2", "--seed", "5", "--max-new-tokens", "40", "--temperature", "1.5"]
    assert cli.main(["generate", str(folder), "--device", "cpu", *flags]) == 0
    texts = generate(model, tokenizer, ["ab"] * 2, seed=5, max_new_tokens=40, temperature=1.5)
    out, err = capsys.readouterr()
    assert out == f"ab{texts[0].text}\n{text_commands.SAMPLE_LINE}\nab{texts[1].text}\n"
    assert [line.split(",")[0] for line in err.splitlines()] == ["[seed 5", "[seed 6"]


def test_stop_and_no_echo(saved, capsys):
    folder, model, tokenizer = saved
    text = generate(model, tokenizer, "ab", seed=5, max_new_tokens=40).text
    command = ["generate", str(folder), "--prompt", "ab", "--seed", "5", "--max-new-tokens", "40", "--device", "cpu"]
    assert cli.main([*command, "--no-echo", "--stop", text[9:11], "--stop", "not there at all"]) == 0
    assert capsys.readouterr().out == text[: text.index(text[9:11])] + "\n"


def test_prompts_from_files_and_stdin_are_byte_exact(tmp_path, monkeypatch):
    text = "\ufeffeine Zeile\r\nnoch eine 🙂\n"
    file = tmp_path / "prompt.txt"
    file.write_bytes(text.encode())
    assert text_commands.read_prompt(f"FILE:{file}") == text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
    assert text_commands.read_prompt("-") == text
    assert text_commands.read_prompt("plain") == "plain"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--prompt", "FILE:not/there"], "not/there"),
        (["--prompt", "FILE:binary"], "the prompt from binary is not UTF-8 text"),
        (["--device", "abacus"], "device abacus is not available here; there is: "),
        (["--stop", ""], "stop string"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_sentence(saved, capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert cli.main(["generate", str(saved[0]), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["generate PATH", "info PATH", "eval PATH --data python", "push PATH alice/tiny"])
@pytest.mark.parametrize("content", ["nothing", "pickles"])
def test_a_folder_that_is_no_model(command, content, capsys, tmp_path):
    if content == "pickles":
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert cli.main(command.replace("PATH", str(tmp_path)).split()) == 2
    err = capsys.readouterr().err
    assert str(tmp_path) in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("info nowhere/at-all", "there is no nowhere/at-all here, and none on the Hub"),
        ("generate ../nowhere", "neither a folder here nor a name on the Hub"),
        ("eval MODEL --data not/there", "'not/there' is neither a file or folder here nor a dataset on the Hub"),
        ("eval MODEL --data TEXT --split test", "belong to Hub datasets"),
        ("eval MODEL --data TEXT --max-windows -1", "--max-windows is -1"),
        ("push MODEL alice/tiny@v1", "give the branch to push to by --branch"),
        ("push MODEL alice/tiny", "not signed in"),
        ("space alice/demo --model alice/tiny --secret NOT_SET", "no environment variable NOT_SET"),
        ("import not-there.pt OUT", "not-there.pt"),
        ("import TEXT OUT", "no whole file of torch.save"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(saved, hub, capsys, tmp_path, command, message):
    (tmp_path / "text.txt").write_text("to be", encoding="utf-8")
    names = {"MODEL": saved[0], "TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out"}
    assert cli.main([str(names.get(word, word)) for word in command.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_help_tells_types_and_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--temperature FLOAT", "else 0.8", "--top-k INT", "else 200", "--num-samples INT", "FILE:path"):
        assert part in text


def test_info(saved, capsys):
    folder, model, tokenizer = saved
    assert cli.main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    for part in ("gpt2, float32", f"{model.num_params():,}", f"byte, {tokenizer.vocab_size} tokens", sha256):
        assert part in out
    assert "provenance" not in out


def test_info_tells_where_a_model_comes_from(saved, capsys, tmp_path):
    save_model(tmp_path / "best", saved[1])
    facts = {
        "data": {"source": {"kind": "hub", "name": "a/b"}, "train_tokens": 123456},
        "training": {"steps": 2000, "hyperparameters": {"seed": 1}},
        "evaluation": {"val_loss": 1.25},
        "base_model": {"id": "evil\x1b[2J\nname"},
    }
    (tmp_path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    assert cli.main(["info", str(tmp_path / "best")]) == 0
    out = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    assert rows["data.source.name"] == "a/b"
    assert (rows["data.train_tokens"], rows["training.steps"], rows["evaluation.val_loss"]) == (
        "123,456",
        "2,000",
        "1.25",
    )
    assert rows["base_model.id"] == "evil [2J name"
    assert "hyperparameters" not in out
    assert "tokenizer    none" in out


# ---- eval ----


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "plays.txt"
    path.write_text("To be, or not to be – that is the question.\n" * 9, encoding="utf-8")
    return path


def test_eval(saved, text, capsys):
    folder, model, tokenizer = saved
    result = evaluate(model, tokenizer, open_source(str(text)))
    assert cli.main(["eval", str(folder), "--data", str(text), "--device", "cpu"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["loss"].split()[0] == f"{result.loss:.4f}"
    assert rows["bits per byte"].split()[0] == f"{result.bits_per_byte:.4f}"
    assert rows["tokens"].split()[0] == f"{text.stat().st_size - 1:,}"


@pytest.mark.parametrize(("variable", "flags", "used"), [("", [], "plain"), ("torch", [], "torch"),
                                                       ("torch", ["--engine", "plain"], "plain")])  # fmt: skip
def test_eval_measures_with_the_engine_that_is_asked_for(saved, text, variable, flags, used, capsys, monkeypatch):
    monkeypatch.setenv("NANOGPT_HUB_ENGINE", variable)
    command = ["eval", str(saved[0]), "--data", str(text), "--max-windows", "1", "--json", "--device", "cpu"]
    assert cli.main([*command, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["engine"] == used


def test_eval_as_json(saved, tmp_path, capsys):
    folder, model, tokenizer = saved
    table = tmp_path / "rows.jsonl"
    table.write_text('{"poem": "to be, or not to be"}\n{"poem": "that is the question"}\n', encoding="utf-8")
    flags = ["--text-column", "poem", "--max-windows", "1", "--json", "--device", "cpu"]
    assert cli.main(["eval", str(folder), "--data", str(table), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    result = evaluate(model, tokenizer, open_source(str(table), text_column="poem"), max_windows=1)
    assert found["loss"] == pytest.approx(result.loss)
    assert (found["tokens"], found["max_windows"]) == (model.config.block_size, 1)
    assert found["data"]["name"] == "rows.jsonl"


def test_eval_needs_a_tokenizer(saved, text, tmp_path, capsys):
    save_model(tmp_path / "bare", saved[1])
    assert cli.main(["eval", str(tmp_path / "bare"), "--data", str(text), "--device", "cpu"]) == 2
    assert "bare has no tokenizer" in capsys.readouterr().err


# ---- import ----


def test_import_tells_what_it_found_and_what_to_do_next(tmp_path, capsys):
    args = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=4, dropout=0.0)
    model = GPT(GPTConfig.preset("gpt2", n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=4, activation="gelu",
                                 attn_bias=False, mlp_bias=False, norm_bias=False))  # fmt: skip
    state = {name if name == "lm_head.weight" else f"transformer.{name}": t for name, t in model.state_dict().items()}
    config = {"always_save_checkpoint": False}
    content = dict(model=state, model_args=args, iter_num=2000, best_val_loss=1.5, config=config)
    torch.save(content, tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, "itos": dict(enumerate("\nabc"))}))
    out = tmp_path / "out"
    command = ["import", str(tmp_path / "ckpt.pt"), "--meta", str(tmp_path / "meta.pkl"), str(out)]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    for part in ("1 layers, 2 heads, width 8, context 16, no biases", "2,000 steps, validation loss 1.5000",
                 "char, 4 tokens", f"nanogpt-hub generate {out}", f"nanogpt-hub push {out} user/name"):  # fmt: skip
        assert part in text
    assert cli.main(["generate", str(out), "--prompt", "abc", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out) == len("abc") + 5 + len("\n")
    assert cli.main(command) == 2
    assert "is there already" in capsys.readouterr().err


# ---- the Hub ----

TOKEN = "hf_AliceSecretToken0123456789"


@pytest.fixture
def alice(hub, monkeypatch):
    """The loopback Hub, and alice signed in; returns what runs a command in a process of its own."""
    hub.add_user("alice", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*words: object) -> str:
        command = [sys.executable, "-m", "nanogpt_hub", *map(str, words)]
        done = subprocess.run(command, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert TOKEN.encode() not in done.stdout + done.stderr
        return done.stdout.decode().replace(os.linesep, "\n")

    return run


def test_push_then_every_command_takes_the_name(saved, text, hub, alice, capsys):
    folder, model, tokenizer = saved
    said = alice("push", folder, "alice/tiny", "--message", "Mine", "--revision", "draft", "--private")
    repo = hub.repo("alice/tiny")
    sha = repo.branches["draft"]
    assert repo.private
    assert repo.titles("draft")[0] == "Mine"
    assert "/alice/tiny (draft, commit " + sha in said
    name = "alice/tiny@draft"
    assert cli.main(["info", name]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("alice/tiny\n", "draft\n", sha, f"{model.num_params():,}"))
    assert cli.main(["eval", name, "--data", str(text), "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == f"alice/tiny@{sha[:7]}"
    assert found["loss"] == pytest.approx(evaluate(model, tokenizer, open_source(str(text))).loss)
    flags = ["--prompt", "ab", "--seed", "5", "--max-new-tokens", "20", "--device", "cpu"]
    assert alice("generate", name, *flags) == f"ab{generate(model, tokenizer, 'ab', seed=5, max_new_tokens=20).text}\n"
    assert cli.main(["generate", "alice/tiny@v9"]) == 2
    assert "no branch, tag or commit 'v9'" in capsys.readouterr().err


def test_a_space_from_the_command_line(saved, hub, alice, tmp_path, monkeypatch):
    push_to_hub(saved[0], "alice/tiny")
    root = Path(cli.__file__).parents[1]
    shutil.copytree(root / "nanogpt_hub", tmp_path / "app" / "nanogpt_hub")
    shutil.copy(root / "requirements.txt", tmp_path / "app")
    (tmp_path / "app" / "app.py").write_text("print('app')\n", encoding="utf-8")
    monkeypatch.setenv("OTHER", "thing")
    flags = ["--private", "--hardware", "cpu-basic", "--secret", "HF_TOKEN", "--secret", "OTHER"]
    said = alice("space", "alice/demo", "--model", "alice/tiny@main", "--app-folder", tmp_path / "app", *flags)
    demo = hub.repos["spaces", "alice/demo"]
    assert demo.branches["main"] in said
    assert demo.private
    assert demo.files()["app.py"] == b"print('app')\n"
    assert demo.settings["secrets"] == {"HF_TOKEN": TOKEN, "OTHER": "thing"}
    assert demo.settings["hardware"] == "cpu-basic"
    assert demo.settings["variables"]["NANOGPT_REPO"] == "alice/tiny"


# ---- sizes ----


def test_sizes_counts_what_the_model_has(capsys):
    assert cli.main(["sizes", "--preset", "gpt2"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[2:]] == list(SIZES)
    gpt2 = next(row for row in rows if row[0] == "| 124m")
    assert gpt2[6:8] == ["124.5 M", "497.9 MB"]
    assert gpt2[-1] == "37.7 MB |"  # 2 (k, v) * 12 layers * 1024 tokens * 768 wide * 2 bytes


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to the whole console")
def test_interrupt_ends_without_a_traceback(saved):
    command = [sys.executable, "-m", "nanogpt_hub", "generate", str(saved[0]), "--max-new-tokens", "1000000"]
    with subprocess.Popen(
        [*command, "--ignore-eot"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs are born deaf to it
    ) as process:
        assert process.stdout.read(20)  # it streams
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 130
