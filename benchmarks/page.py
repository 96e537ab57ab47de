"""How the app feels: `python -m benchmarks.page [--clients 20]` starts it as a user would and measures from outside.

Targets on two cores with a model of ten million parameters: the page served within 10 s of the command and usable
within 10 s of being opened, first text under 0.5 s after the click, the panel of a chosen token within 0.3 s, still
within 0.5 s after Stop, and 20 clients at once all answered with their own text, the memory back to where it was.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from gradio_client import Client
from playwright.sync_api import expect

from benchmarks.web import MODELS, browser, make_model

ROOT = Path(__file__).parents[1]
TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--model", default="", help="a model folder; default: a random one of ten million parameters")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(make_model(Path(folder) / "10m", *MODELS["10m"][:2]))
        process, url, seconds = start(model, folder)
        try:
            report("page is there", seconds, 10)
            in_browser(url)
            client = Client(url, verbose=False)
            began = time.perf_counter()
            ask(client, 0)  # the model is being loaded, or made
            report("first generation of all", time.perf_counter() - began)
            one_client(client)
            many_clients(process, url, args.clients)
        finally:
            process.terminate()
            process.wait()


def start(model: str, folder: str) -> tuple[subprocess.Popen, str, float]:
    """The app as a process of its own, its address, and seconds until the page is served."""
    command = [sys.executable, str(ROOT / "app.py"), "--runs", folder, *(["--model", model] if model else [])]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if found := re.search(r"http://[\w.]+:\d+", line):
            urllib.request.urlopen(found[0]).read()
            return process, found[0], time.perf_counter() - began
    raise SystemExit("the app did not start")


# Measured inside the page, so that the driver's own messages do not count. Both give seconds.
FIRST_TEXT = """() => new Promise((resolve) => {
    const started = performance.now(), old = new Set(document.querySelectorAll("#output .token"));
    const timer = setInterval(() => {
        const made = [...document.querySelectorAll("#output .token")].filter((token) => !old.has(token));
        if (!made.length) return;
        clearInterval(timer);
        resolve((performance.now() - started) / 1000);
    }, 5);
    document.querySelector("#generate").click();
})"""
PANEL = """(n) => new Promise((resolve) => {
    const started = performance.now();
    const timer = setInterval(() => {
        const title = document.querySelector("#panel .panel-title");
        if (!title || !title.textContent.includes(`token ${n + 1}`)) return;
        clearInterval(timer);
        resolve((performance.now() - started) / 1000);
    }, 5);
    document.querySelectorAll("#output .token")[n].click();
})"""


def in_browser(url: str) -> None:
    """A visitor with Chromium: the first visit of all, then a few texts and tokens."""
    with browser() as opened:
        page = opened.new_page()
        page.set_default_timeout(120_000)
        page.add_init_script("localStorage.setItem('nanogpt-hub-tour', 'seen')")
        began = time.perf_counter()
        page.goto(url)
        page.locator("#output .token").first.wait_for()
        report("usable after it is opened: a text of the model", time.perf_counter() - began, 10)
        ended = re.compile("asked for|ended|time was up")
        expect(page.locator("#status")).to_contain_text(ended, timeout=120_000)
        first, panel = [], []
        for n in range(5):
            first.append(page.evaluate(FIRST_TEXT))
            expect(page.locator("#status")).to_contain_text(ended, timeout=120_000)
            panel += [page.evaluate(PANEL, 10 + n), page.evaluate(PANEL, 30 + n)]
        report("first text after the click, in the browser", statistics.median(first), 0.5)
        report("panel of a chosen token", statistics.median(panel), 0.3)


def ask(client: Client, seed: int) -> str:
    asked = dict(prompt="A language model", seed=seed, max_new_tokens=TOKENS, temperature=0.8)
    return client.predict(**asked, api_name="/generate")["text"]


def one_client(client: Client) -> None:
    first, still = [], []
    for seed in range(5):
        began = time.perf_counter()
        job = client.submit(prompt="A language model", seed=seed, max_new_tokens=500, api_name="/generate")
        next(iter(job))
        first.append(time.perf_counter() - began)
        job.cancel()
        began = time.perf_counter()
        client.predict(prompt="A", seed=0, max_new_tokens=1, api_name="/generate")  # waits for the worker to be free
        still.append(time.perf_counter() - began)
    report("first text after the click", statistics.median(first), 0.5)
    report("worker free after Stop, and one token more", statistics.median(still), 0.5)


def many_clients(process: subprocess.Popen, url: str, n: int) -> None:
    clients = [Client(url, verbose=False) for _ in range(n)]
    expected = [ask(clients[0], seed) for seed in range(n)]
    before, results, seconds = memory(process), {}, {}

    def run(seed: int) -> None:
        began = time.perf_counter()
        try:
            results[seed] = ask(clients[seed], seed)
        except Exception as error:  # what a client is told is the result
            results[seed] = f"refused: {error}"
        seconds[seed] = time.perf_counter() - began

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(n)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = time.perf_counter() - began
    right = sum(results[seed] == expected[seed] for seed in range(n))
    refused = sum(text.startswith("refused") for text in results.values())
    report(f"{n} clients, {TOKENS} tokens each: all done", total)
    report("  the median client waited", statistics.median(seconds.values()))
    print(f"| {'  got their own text / refused / mixed up':50} | {right} / {refused} / {n - right - refused} | |")
    print(f"| {'  memory before and after, MiB':50} | {before:.0f}, {memory(process):.0f} | |", flush=True)


def memory(process: subprocess.Popen) -> float:
    """Resident memory in MiB; nan where the system does not tell."""
    status = Path(f"/proc/{process.pid}/status")
    found = re.search(r"VmRSS:\s+(\d+)", status.read_text()) if status.is_file() else None
    return int(found[1]) / 1024 if found else float("nan")


def report(what: str, seconds: float, target: float | None = None) -> None:
    aim = f"under {target:g} s" if target else ""
    print(f"| {what:50} | {seconds:.2f} s | {aim} |", flush=True)


if __name__ == "__main__":
    main()
