"""What is published says nothing that is the user's own: single texts, settings, and a whole run full of secrets."""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from nanogpt_hub import cli
from nanogpt_hub.hub.private import (
    Scrub,
    public_config,
    public_files,
    public_name,
    public_text,
    public_url,
    without_secrets,
)
from nanogpt_hub.hub.readme import Readme, update_readme
from nanogpt_hub.hub.resolve import explain

TOKEN = "hf_ZoeSecretToken0123456789"
TEXT = "".join(f"line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(400))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "houses" / "zoe"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NANOGPT_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery")
    return folder


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://bob:pa55@host:8080/a.txt", "https://host:8080/a.txt"),
        ("https://host/a.txt?page=2#top", "https://host/a.txt?page=2#top"),
        ("https://host/a.txt?X-Amz-Signature=ab12", "https://host/a.txt"),
        ("https://host/a.txt?se=2026&sp=r&sig=x", "https://host/a.txt"),
        ("https://host/a.txt?k=0123456789abcdef0123", "https://host/a.txt"),
        ("https://[::1/a", "(removed)"),
    ],
)
def test_urls(url, public):
    assert public_url(url) == public
    assert public_text(f"read {url}, then") == f"read {public}, then"


def test_tokens_by_their_form_and_by_the_environment(home):
    for secret in (TOKEN, "hf_" + "a1" * 17, "ghp_" + "b2" * 18, "AKIAABCDEFGHIJKLMNOP", "correct horse battery"):
        assert public_text(f"a {secret} b") == "a (removed) b"
        assert without_secrets(f"{home}/x: {secret}") == f"{home}/x: (removed)"
    assert public_text("half_life, hf_hub and a key: value") == "half_life, hf_hub and a key: value"


def test_places(home):
    scrub = Scrub()
    assert scrub(f"saved in {home}/out/run/best.") == "saved in best."
    assert scrub(f"{home}") == "zoe"
    assert scrub("/home/yann/a b") == "a b"
    assert scrub("C:\\Users\\yann\\data\\x.txt") == "x.txt"
    assert scrub("def f(): open('/home/yann/x')", free=True) == "def f(): open('/home/yann/x')"
    assert scrub(f"my file is {home}/x", free=True) == "my file is x"
    assert scrub("http://huggingface.co/home/alice/x") == "http://huggingface.co/home/alice/x"
    assert public_name("../secret/x.txt") == "x.txt"
    assert public_name("alice/fox") == "alice/fox"
    assert public_name("https://u:p@host/d/x.txt?id=7") == "https://host/d/x.txt"


def test_settings_keep_what_starts_the_same_run(home):
    settings = {
        "max_steps": 5, "out_dir": "x", "trackers": ["wandb"], "hub": {"repo_id": "zoe/x"}, "from": "zoe/base",
        "data": {"source": "customers/acme", "val_source": f"{home}/v.txt", "tokenizer": "bpe:300", "cache_dir": "c"},
    }  # fmt: skip
    data = {"source": "acme", "val_source": "v.txt", "tokenizer": "bpe:300"}
    assert public_config(settings) == {"max_steps": 5, "from": "base", "data": data}
    facts = {"data": {"source": {"kind": "hub", "name": "customers/acme"}}, "base_model": {"id": "zoe/base"}}
    told = public_config(settings, facts)
    assert told["from"] == "zoe/base"
    assert told["data"]["source"] == "customers/acme"


def test_files_are_cleaned_and_others_passed_on(home, tmp_path):
    card = update_readme(f"My notes are in {home}/notes.", {"license": "mit"}, "block")
    files = {
        "model.safetensors": tmp_path / "never read", "tokenizer.json": f'{{"a": "{home}/x"}}'.encode(),
        "training/run.json": json.dumps({"a": [f"{home}/x"], "b": 1.5}).encode(),
        "training/metrics.jsonl": b'{"step": 1}\n',
        "training/config.yaml": b"a: &x [1]\nb: *x\n", "state/state.json": b"{ torn", "README.md": card.encode(),
    }  # fmt: skip
    public = public_files(files)
    for same in ("model.safetensors", "tokenizer.json", "training/metrics.jsonl"):
        assert public[same] is files[same]
    assert json.loads(public["training/run.json"]) == {"a": ["x"], "b": 1.5}
    assert public["training/config.yaml"] == b"{}\n"
    assert "state/state.json" not in public
    parts = Readme.parse(public["README.md"].decode())
    assert parts.before + parts.after == "My notes are in notes."
    assert parts.mark == parts.words


def test_what_the_hub_says_is_told_without_the_address_of_an_upload():
    error = OSError("403 for url https://s3.example/x?X-Amz-Credential=AKIAX&X-Amz-Signature=abc")
    assert explain(error, "zoe/x") == "403 for url https://s3.example/x"


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def vault():
    """A server that gives the text to who has the password and the signature."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = self.headers.get("Authorization") == "Basic " + base64.b64encode(b"zoe:opensesame99").decode()
            self.send_response(200 if allowed and "sig=SIGNED0123" in self.path else 403)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            self.wfile.write(TEXT.encode())

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://zoe:opensesame99@127.0.0.1:{server.server_address[1]}/d/hf_InThePath0123456789/fox.txt?sig=SIGNED0123"
    server.shutdown()


CONFIG = """
max_steps: 4
batch_size: 8
device: cpu
model: {preset: nanogpt, n_layer: 2, n_head: 2, n_embd: 16, block_size: 16}
data: {tokenizer: byte}
eval: {interval: 2, max_windows: 8, sample_tokens: 8}
hub: {repo_id: zoe/fox, push_steps: true, push_state: true, minutes: 0, license: mit}
"""


def command_lines() -> bytes:
    """The process list."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return b"\n".join(found)


def run_watched(command: list[str], cwd: Path) -> tuple[str, bytes]:
    """What a command prints, and the process lists while it runs."""
    listed = b""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        output: list[str] = []
        reader = threading.Thread(target=lambda: output.append(process.stdout.read()), daemon=True)
        reader.start()
        while process.poll() is None:
            listed += command_lines()
            time.sleep(0.2)
        reader.join(10)
    assert process.returncode == 0, output
    return "".join(output), listed


def test_a_run_full_of_secrets_publishes_none(hub, home, vault, tmp_path, monkeypatch):
    hub.add_user("zoe", TOKEN)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "awsSecret/0123456789+abcdef")
    config = yaml.safe_load(CONFIG)
    config["data"]["source"] = vault
    (home / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    out = home / "customers" / "acme"
    command = [sys.executable, "-m", "train.pretrain", str(home / "run.yaml"), "--out_dir", str(out)]
    said, listed = run_watched(command, tmp_path)

    card = out / "best" / "README.md"  # words of a person who is careless, pushed by hand
    words = f"\nTrained with awsSecret/0123456789+abcdef from {vault} in {out}.\n"
    card.write_text(card.read_text(encoding="utf-8") + words, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    message = f"from {vault} and {out}"
    assert cli.main(["push", str(out / "best"), "zoe/fox", "--message", message]) == 0

    repo = hub.repo("zoe/fox")
    published = [line.encode() for c in repo.commits.values() for line in (c.title, c.description)]
    published += [name.encode() for c in repo.commits.values() for name in c.tree]
    published += [file.data for c in repo.commits.values() for file in c.tree.values()]
    published += [*hub.lfs.values(), *(name.encode() for name in (*repo.tags, *repo.branches))]
    sent = b"\n".join(published)
    assert {"main", "steps", "training-state"} <= set(repo.branches)
    assert b"/fox.txt" in sent
    secrets = [TOKEN, "opensesame99", "SIGNED0123", "hf_InThePath0123456789", "awsSecret/0123456789+abcdef"]
    for secret in (*secrets, "correct horse battery"):
        assert secret.encode() not in sent, secret
        assert secret not in said
        assert secret.encode() not in listed
    for place in (str(home), str(tmp_path), "customers", str(Path(__file__).parents[2])):
        assert place.encode() not in sent, place
    again = yaml.safe_load(repo.files()["training/config.yaml"])
    assert again["max_steps"] == 4
    assert not {"hub", "out_dir", "trackers", "save"} & {*again}
