"""The app under many visitors for a long time, with a Hub that fails and models that were made to break it.

    python -m tests.app_soak                             # 50 clients, ten minutes
    python -m tests.app_soak --clients 8 --minutes 1 --seed 3

Starts app.py as a user would, against the Hub of the tests on loopback. Each client asks for something at random, again
and again: a text of one of the good models, a text that it leaves in the middle, next tokens, a score, a hostile
model. Meanwhile the Hub answers with errors, late or not at all, and files in the app's cache are cut. Reported: what
came out, seconds until the first token, and memory and threads of the app before and after. The exit status is 1 if
anything but a right text or an announced error came out, the app ended, or memory or threads did not come back.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gradio_client import Client
from tqdm import tqdm

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from hub_server import HubServer  # noqa: E402 (found by the line above)

GOOD = [f"alice/good-{i}" for i in range(3)]
UNEXPECTED = re.compile(r"something went wrong here|Traceback|^Error$|^None$")
REFUSED_BY_GRADIO = re.compile(r"queue.*full|full.*queue", re.IGNORECASE)
TOKENS = 60


@dataclass
class Outcome:
    """What the clients saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    tally: Counter = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds until the first token
    texts: dict[tuple, str] = field(default_factory=dict)  # what each model wrote for each seed
    bad: list[str] = field(default_factory=list)

    def count(self, what: str, detail: str = "", bad: bool = False) -> None:
        with self.lock:
            self.tally[what] += 1
            if bad:
                self.bad.append(f"{what}: {detail}")

    def text(self, asked: tuple, text: str) -> None:
        """A whole text: the same question has had the same answer, whoever asked."""
        with self.lock:
            same = self.texts.setdefault(asked, text) == text
        self.count("right text" if same else "OTHER TEXT", repr(asked), bad=not same)

    def error(self, error: Exception) -> None:
        said = str(error)
        if REFUSED_BY_GRADIO.search(said):
            self.count("refused: too many wait")
        elif UNEXPECTED.search(said) or type(error).__name__ != "AppError":
            self.count("UNANNOUNCED ERROR", f"{type(error).__name__}: {said[:300]}", bad=True)
        else:
            self.count(f"announced error: {kind_of(said)}")


def kind_of(said: str) -> str:
    """A message without names and numbers, so that the same ones are counted together."""
    return re.sub(r"[\w./-]*/[\w./@-]+|'[^']*'|\d[\d,.]*", "…", said)[:70]


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def fill(hub: HubServer, place: Path) -> list[str]:
    """Puts the good models and the hostile ones there. Returns the names of the hostile ones."""
    from helpers import files_of, make_model

    good = [files_of(make_model(place / f"good-{seed}", seed=seed)) for seed in range(len(GOOD))]
    for name, files in zip(GOOD, good, strict=True):
        hub.add_repo(name, files)
    config, tokenizer = json.loads(good[0]["config.json"]), json.loads(good[0]["tokenizer.json"])
    weights = good[0]["model.safetensors"]
    growing = [{"type": "Replace", "pattern": {"String": "o"}, "content": "o" * 50}] * 9
    bomb = {**tokenizer, "normalizer": {"type": "Sequence", "normalizers": growing}}
    hostile = {
        "cut": {"model.safetensors": weights[: len(weights) // 2]},
        "nan": {"model.safetensors": weights[:-4096] + b"\xff" * 4096},
        "header": {"model.safetensors": (2**62).to_bytes(8, "little") + weights[8:]},
        "pickle": {"model.safetensors": b"\x80\x04cos\nsystem\n(S'true'\ntR."},
        "huge": {"config.json": json.dumps({**config, **dict.fromkeys(("n_embd", "hidden_size"), 2**20)}).encode()},
        "deep": {"config.json": b"[" * 100_000},
        "bomb": {"tokenizer.json": json.dumps(bomb).encode()},
        "html": {"config.json": json.dumps({**config, "model_type": "<img src=x onerror=alert(1)>"}).encode()},
        "empty": dict.fromkeys(good[0], b""),
    }  # fmt: skip
    for name, files in hostile.items():
        hub.add_repo(f"mallory/{name}", {**good[0], **files})
    nowhere = ["nobody/there", "https://huggingface.co/datasets/a/b", "../../etc/passwd"]
    return [f"mallory/{name}" for name in hostile] + nowhere


def trouble(hub: HubServer, cache: Path, over: threading.Event, rng: random.Random) -> None:
    """Until it is over, something goes wrong with the Hub or with the files that came from it."""
    kinds = [dict(status=500), dict(status=503), dict(status=429, headers={"Retry-After": "1"}), dict(drop=True),
             dict(hang=2.0), dict(status=404)]  # fmt: skip
    while not over.wait(rng.uniform(0.2, 1.5)):
        hub.faults[:] = [fault for fault in hub.faults if fault.times > 0]
        method, path = rng.choice([("GET", "/api/models/"), ("GET", "/resolve/"), ("HEAD", "/resolve/")])
        hub.fail(method, path, times=rng.randrange(1, 4), **rng.choice(kinds))
        blobs = [path for path in cache.rglob("*") if path.is_file() and "blobs" in path.parts]
        if blobs and rng.random() < 0.1:
            with suppress(OSError), open(rng.choice(blobs), "r+b") as file:
                file.truncate(rng.randrange(1 + os.fstat(file.fileno()).st_size))


# ---- the app and its visitors ----------------------------------------------------------------------------------------


def start_app(hub: HubServer, place: Path) -> tuple[subprocess.Popen, str]:
    """app.py as a process of its own, and its address. What it logs is in `place`/app.log."""
    home = place / "home"
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "",
        "PYTHONUNBUFFERED": "1", "NANOGPT_MAX_MODEL_BYTES": str(10**8), "GRADIO_TEMP_DIR": str(place / "gradio"),
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, str(TESTS.parent / "app.py"), "--model", GOOD[0], "--runs", str(place / "none")]
    log = place / "app.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=TESTS.parent, stdout=file, stderr=subprocess.STDOUT, env=environment)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"http://[\w.]+:\d+", log.read_text(errors="replace")):
            return process, found[0]
        time.sleep(0.2)
    process.kill()
    raise SystemExit(f"the app did not start:\n{log.read_text(errors='replace')[-2000:]}")


def visit(url: str, hostile: list[str], outcome: Outcome, over: threading.Event, rng: random.Random) -> None:
    """One client, until it is over."""
    client = Client(url, verbose=False, httpx_kwargs={"timeout": 120})  # all connect at once
    while not over.is_set():
        try:
            ask(client, hostile, outcome, rng)
        except Exception as error:  # what a client is told is the result
            outcome.error(error)
        over.wait(rng.expovariate(1.0))


def ask(client: Client, hostile: list[str], outcome: Outcome, rng: random.Random) -> None:
    """One request of one kind."""
    model, dice = rng.choice(GOOD), rng.random()
    if dice < 0.7:
        write(client, model, outcome, rng, leaves=dice < 0.15)
    elif dice < 0.78:
        client.predict(text="To be", model=model, api_name="/next_tokens")
        outcome.count("next tokens")
    elif dice < 0.86:
        client.predict(text="To be, or not to be", model=model, api_name="/score")
        outcome.count("score")
    else:
        name = rng.choice(hostile)
        client.predict(prompt="To be", model=name, max_new_tokens=5, seed=0, api_name="/generate")
        outcome.count("A HOSTILE MODEL ANSWERED", name, bad=True)


def write(client: Client, model: str, outcome: Outcome, rng: random.Random, leaves: bool) -> None:
    """A text of a model, or its beginning."""
    seed, began = rng.randrange(20), time.perf_counter()
    asked = dict(prompt="To be", model=model, seed=seed, max_new_tokens=TOKENS, temperature=0.8, engine="torch")
    job = client.submit(**asked, api_name="/generate")
    while not job.done():  # iterating over a job that was refused never ends
        time.sleep(0.005)
        outputs = job.outputs()
        if began and outputs and outputs[-1]["tokens"]:
            with outcome.lock:
                outcome.first.append(time.perf_counter() - began)
            began = 0.0
            if leaves:
                job.cancel()
                outcome.count("left in the middle")
                return
    job.result()  # of a stream it is the first part; raises what went wrong
    outcome.text((model, seed), job.outputs()[-1]["text"])


# ---- the report ------------------------------------------------------------------------------------------------------


def of_process(pid: int) -> tuple[float, int]:
    """Resident memory in MiB and threads of a process and its children."""
    tasks = Path(f"/proc/{pid}/task")
    children = [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
    rss = os.sysconf("SC_PAGE_SIZE") / 2**20 * int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    below = [of_process(child) for child in children if Path(f"/proc/{child}/task").is_dir()]
    return rss + sum(one[0] for one in below), len(list(tasks.iterdir())) + sum(one[1] for one in below)


def settled(process: subprocess.Popen) -> tuple[float, int]:
    """Memory and threads when nobody has asked for a while: idle threads end, the client's pools too."""
    time.sleep(20)
    return of_process(process.pid)


def soak(clients: int, seconds: float, seed: int, place: Path) -> bool:
    """Runs it and prints the report. Whether all was well."""
    hub, outcome, over, rng = HubServer(), Outcome(), threading.Event(), random.Random(seed)
    hostile = fill(hub, place)
    process, url = start_app(hub, place)
    try:
        warm = Outcome()
        visits(url, hostile, warm, rng, clients, min(30.0, seconds / 4))
        before = settled(process)
        maker = threading.Thread(target=trouble, args=(hub, place / "home", over, random.Random(seed)), daemon=True)
        maker.start()
        visits(url, hostile, outcome, rng, clients, seconds)
        over.set()
        maker.join()
        hub.faults.clear()
        alive = process.poll() is None
        after = settled(process) if alive else (float("nan"), 0)
    finally:
        process.terminate()
        process.wait(30)
    return told(outcome, before, after, alive, place / "app.log")


def visits(url: str, hostile: list[str], outcome: Outcome, rng: random.Random, clients: int, seconds: float) -> None:
    """So many clients at once, for so long."""
    over = threading.Event()
    threads = [
        threading.Thread(target=visit, args=(url, hostile, outcome, over, random.Random(rng.random())), daemon=True)
        for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    for _ in tqdm(range(round(seconds)), unit="s", desc=f"{clients} clients", disable=None):
        time.sleep(1)
    over.set()
    for thread in threads:
        thread.join(120)
        if thread.is_alive():
            outcome.count("HUNG", "a client waits for longer than two minutes", bad=True)


def told(outcome: Outcome, before: tuple, after: tuple, alive: bool, log: Path) -> bool:
    """Prints what was seen. Whether all was well."""
    for what, n in outcome.tally.most_common():
        print(f"{n:7,}  {what}")
    if len(outcome.first) > 1:
        p50, p99 = (statistics.quantiles(outcome.first, n=100)[at] for at in (49, 98))
        print(f"first token: p50 {p50:.2f} s, p99 {p99:.2f} s, of {len(outcome.first):,} texts")
    print(f"memory {before[0]:.0f} MiB before, {after[0]:.0f} after; threads {before[1]} before, {after[1]} after")
    for line in outcome.bad[:20]:
        print("BAD ", line)
    back = after[0] < 1.25 * before[0] + 50 and after[1] <= before[1] + 20
    traces = log.read_text(errors="replace").count("Traceback (most recent call last)")
    print(f"the app {'stood' if alive else 'ENDED'}; {'memory and threads came back' if back else 'NOT GIVEN BACK'}; "
          f"{traces} stack traces in its log")  # fmt: skip
    if traces:
        print(log.read_text(errors="replace")[-3000:])
    return alive and back and not outcome.bad and not traces


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.app_soak", description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        raise SystemExit(0 if soak(args.clients, 60 * args.minutes, args.seed, Path(place)) else 1)


if __name__ == "__main__":
    main()
