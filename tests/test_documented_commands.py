"""Every command that README, docs and lessons show, and every one that the code prints as advice.

Those of README and docs are run, with small sizes, in a folder as it is after what they tell to do before; names of
files and repos are those of the text. docs/change-the-architecture.md has a test of its own, and so have the lessons.
Commands inside the code cannot be run without what led to them, so their words and flags are looked up.
"""

import ast
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT, files_of, make_chat_model, write_nanogpt

from nanogpt_hub import cli
from train import cost, finetune, prepare, pretrain, speedrun
from train.config import make_parser

TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(400))
SMALL = (
    "--max_steps 2 --batch_size 2 --eval.interval 1 --eval.max_windows 2 --eval.sample_tokens 4 --save.interval 2 "
    "--micro_batch_size 0 --data.val_fraction 0.1 --device cpu --precision fp32 --data.cache_dir cache"
)
SHAPE = "--model.n_layer 2 --model.n_head 2 --model.n_embd 16 --model.block_size 16 --data.tokenizer byte"
NANOGPT = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=3, dropout=0.0)
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
for name in ("change-the-architecture", "extend"):
    PAGES.remove(f"docs/{name}.md")
PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )?(?:\S*/)?(nanogpt-hub|python|make|accelerate|bash|git|pip) |\S+\\activate")
SET_UP = re.compile(
    r"python -m venv|\S*activate|(python -m )?pip install|git "
)  # they need a network; a wheel has a test of its own


def commands_of(page: str) -> Iterator[str]:
    """The lines of its code blocks and its inline code that call one of our programs."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in fenced if language in ("", "sh", "text", "powershell", "bat")]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [*"\n".join(blocks).replace("\\\n", " ").splitlines(), *spans]:
        command = re.sub(r"\s+#.*", "", line).strip().removeprefix("$ ")
        if PROGRAM.match(command) and "(" not in command:
            yield command


DOCUMENTED = list(dict.fromkeys((page, command) for page in PAGES for command in commands_of(page)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """One small run, which stands for every run that the text speaks of."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "fox.txt").write_text(TEXT, encoding="utf-8")
    flags = [*SMALL.split(), *SHAPE.split(), "--data.source", str(folder / "fox.txt")]
    cache = ["--data.cache_dir", str(folder / "cache")]
    assert pretrain.main([*flags, "--out_dir", str(folder / "run"), "--model.preset", "llama", *cache]) == 0
    return folder / "run"


@pytest.fixture
def workspace(tmp_path, monkeypatch, hub, trained, command) -> Path:
    """Where somebody stands who has done what the text said so far."""
    for name in ("configs", "nanogpt_hub", "web", "README.md", "app.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("my.txt", "other.txt", "fox.txt"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    (tmp_path / "my.jsonl").write_text('{"text": "a fox"}\n{"text": "a dog"}\n', encoding="utf-8")
    (tmp_path / "token").write_text("hf_you", encoding="utf-8")
    (tmp_path / "token").chmod(0o600)
    write_nanogpt(tmp_path, NANOGPT, sorted("fox"))
    for user in ("you", "user", "alice"):
        hub.add_user(user, f"hf_{user}")
    published = {
        str(path.relative_to(trained / "best")): path.read_bytes()
        for path in sorted((trained / "best").rglob("*"))
        if path.is_file()
    }
    for name in ("you/name", "user/name"):
        repo = hub.add_repo(name, published)
        repo.tags.update(dict.fromkeys(("revision", "v1", "step-000500"), repo.branches["main"]))
    if "alice/" in command:
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        assert cli.main(["push", str(trained / "best"), "alice/fox"]) == 0
        assert cli.main(["push", str(trained), "alice/fox", "--state"]) == 0
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "HF_TOKEN": "hf_you",
        "HOME": str(tmp_path),
        "NANOGPT_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize(("page", "command"), DOCUMENTED)
def test_documented_command(page, command, workspace, trained, hub, monkeypatch):
    assignments = re.match(r"(?:[A-Z_]+=\S+ )*", command)[0].split()
    for name, value in (assignment.split("=", 1) for assignment in assignments):
        monkeypatch.setenv(name, value)
    if SET_UP.match(command):
        return
    words = [word.replace("~", str(workspace)) for word in shlex.split(command)[len(assignments) :]]
    for folder in re.findall(r"(?<!--out_dir )\bout/[\w-]+", command):
        if not (workspace / folder).exists() and not folder.endswith("/imported"):
            shutil.copytree(trained, workspace / folder)
    if words[:2] == ["nanogpt-hub", "chat"] and len(words) > 2:
        can_talk(words[2], hub)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    run(words)


def can_talk(name: str, hub) -> None:
    """In the place of a model, one that was tuned on conversations."""
    made = make_chat_model(Path("talks"))
    if Path(name).is_dir():
        shutil.copytree(made, name, dirs_exist_ok=True)
    else:
        hub.repo(name).put(files_of(made))


def run(words: list[str]) -> None:
    """One command, in this process where that is the same."""
    program, *args = words
    program = Path(program).name.removesuffix(".exe")
    if program == "python" and args[0] == "-m":
        program, args = args[1], args[2:]
    if program in ("nanogpt-hub", "nanogpt_hub"):
        assert status_of(cli.main, as_small(args)) == 0
    elif program == "train.cost":
        assert status_of(cost.main, args) == 0
    elif program in TRAINERS:
        assert status_of(TRAINERS[program].main, small_run(args)) == 0
    elif program == "accelerate" and "-m" not in args:  # named in a sentence
        launched(args)
    elif program == "accelerate":
        module = args.index("-m")
        launched(args[:module])
        run(["python", *(word for word in args[module:] if word != "...")])
    elif program == "make":
        subprocess.run(["make", "-n", *args], cwd=ROOT, check=True, capture_output=True, timeout=60)
    elif program == "python" and args[0] == "app.py":
        starts_and_stops([sys.executable, *args, "--port", "0"])
    else:
        looked_up(program, args)


TRAINERS = {"train.pretrain": pretrain, "train.finetune": finetune, "train.prepare": prepare}
SERVERS = ("web", "app")


def launched(args: list[str]) -> None:
    """Accelerate's launcher knows the flags, and the configuration file is one of its own."""
    parsed = launch_command_parser().parse_args([*args[1:], "script.py"])
    if parsed.config_file:
        load_config_from_file(str(ROOT / parsed.config_file))


def status_of(main, args: list[str]) -> int:
    try:
        return main(args) or 0
    except SystemExit as stop:  # --help ends so
        return stop.code or 0


def as_small(args: list[str]) -> list[str]:
    """A command that is only named in the text is asked for its help."""
    if len(args) == 1 and args[0] not in ("core", "sizes", "speedrun"):
        return [*args, "--help"]
    if args[0] in SERVERS:
        starts_and_stops([sys.executable, "-m", "nanogpt_hub", *args, "--port", "0"])
        return [args[0], "--help"]
    if args[0] == "plan":
        return args
    if args[0] == "speedrun":  # a race of minutes; it has a test of its own
        assert {*args[1:2]} <= {*speedrun.TRACKS}
        return args[:1]
    if args[0] == "jobs":  # the loopback Hub takes it; here no public repository has the code
        return [*args, "--code", "git+https://example.org/you/nanogpt_hub@0123abc"]
    if args[0] in ("train", "finetune", "prepare"):
        return [args[0], *small_run(args[1:])]
    if args[0] in ("generate", "chat"):
        return [*args, "--max-new-tokens", "4"]
    if args[0] == "eval":
        return [*args, "--max-windows", "2"]
    return args


def small_run(args: list[str]) -> list[str]:
    if "--help" in args or not args:
        return ["--help"]
    of_another = "--resume" in args or "--from" in args
    longer = ["--max_steps", "4"] if "--resume" in args else []
    source = [] if "--data.source" in args else ["--data.source", "my.txt", "--data.revision", ""]
    return [*args, *source, *SMALL.split(), *([] if of_another else SHAPE.split()), *longer]


def starts_and_stops(command: list[str]) -> None:
    """A server says where it is, and ends when it is asked to."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as server:
        try:
            said = ""
            for line in server.stdout:
                said += line
                if re.search(r"http://127\.0\.0\.1:\d+", line):
                    return
            pytest.fail(f"it ended without an address:\n{said}")
        finally:
            server.kill()


def looked_up(program: str, args: list[str]) -> None:
    """A script or benchmark, whose run takes minutes: it is there and knows the flags."""
    target = args[0] if program in ("python", "bash") else program
    path = ROOT / (target if program in ("python", "bash") else f"{target.replace('.', '/')}.py")
    if not path.exists():
        path = path.with_suffix("") / "__main__.py"
    source = path.read_text(encoding="utf-8")
    for flag in args:
        assert not flag.startswith("--") or flag in source or flag[2:].replace("-", "_") in source, (
            f"{path} has no {flag}"
        )


# ---- in the code ----


def printed_commands() -> Iterator[tuple[str, str]]:
    """(file:line, words) of each command within a string of the code; what is filled in stands as VALUE."""
    for folder in ("nanogpt_hub", "train", "lessons", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
            pieces = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
            for node in (node for node in nodes if id(node) not in pieces):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                words = (part.value if isinstance(part, ast.Constant) else "VALUE" for part in parts)
                text = "".join(str(word) for word in words if isinstance(node, ast.JoinedStr | ast.Constant))
                for found in re.findall(r"(?:nanogpt-hub|python -m nanogpt_hub) ([a-z]+\b[^\n`]*)", text):
                    yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", found


def flags_of_commands() -> dict[str, set[str]]:
    parsers = cli.build_parser()._subparsers._group_actions[0].choices
    flags = {name: set(parser._option_string_actions) for name, parser in parsers.items()}
    of_a_run = set(make_parser("", "")._option_string_actions)
    of_a_job = of_a_run | {"--flavor", "--timeout", "--namespace", "--secret", "--code", "--dry-run"}
    flags |= {"jobs": of_a_job}
    return flags | {"train": of_a_run, "finetune": of_a_run | {"--from"}, "prepare": of_a_run | {"--from", "--workers"}}


def test_commands_in_the_code_exist():
    known, wrong = flags_of_commands(), []
    found = list(printed_commands())
    assert len(found) > 10
    for place, text in found:
        command, rest = re.match(r"([a-z]+)(.*)", text).groups()
        flags = re.findall(r"(?<!\S)--[a-z][\w.-]*", rest)
        if command not in known:
            wrong.append(f"{place}: {command}")
        elif command != "app":
            wrong += [f"{place}: {command} {flag}" for flag in flags if flag not in known[command]]
    assert not wrong


def test_each_command_that_is_printed_is_taken_by_its_parser():
    parser, tried = cli.build_parser(), 0
    for place, text in printed_commands():
        words = shlex.split(re.split(r' \(|[)"]|, or |;', text)[0].rstrip(" .,"))
        prose = len(words) < 2 or words[0].isupper() or words[0] in ("writes", "loads", "only")
        if place.startswith(("nanogpt_hub", "train")) and not prose:
            parser.parse_args(words)
            tried += 1
    assert tried > 5
