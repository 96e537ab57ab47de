"""The command line: what it prints, what it says when something is wrong, how it ends when interrupted."""

import io
import os
import signal
import subprocess
import sys

import pytest
import torch

from nanogpt_hub import __main__ as cli
from nanogpt_hub.checkpoint import save_model
from nanogpt_hub.generate import generate
from nanogpt_hub.model import GPT, SIZES, GPTConfig
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
    assert out == f"ab{texts[0].text}\n{cli.SAMPLE_LINE}\nab{texts[1].text}\n"
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
    assert cli.read_prompt(f"FILE:{file}") == text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
    assert cli.read_prompt("-") == text
    assert cli.read_prompt("plain") == "plain"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--prompt", "FILE:not/there"], "not/there"),
        (["--prompt", "FILE:binary"], "the prompt from binary is not UTF-8 text"),
        (["--device", "abacus"], "--device abacus is not to be had"),
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


@pytest.mark.parametrize("command", ["generate", "info"])
def test_a_folder_that_is_no_model(command, capsys, tmp_path):
    assert cli.main([command, str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


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
    for part in ("gpt2", f"{model.num_params():,}", f"byte, {tokenizer.vocab_size} tokens", "model.safetensors"):
        assert part in out


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
