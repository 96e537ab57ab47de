"""The page in which a browser runs the model: tokens per second, and how long a visitor waits, in headless Chromium.

    python -m benchmarks.web [--rounds 5] [--only 1m|10m|124m] [--soak SECONDS]

Random models of three shapes, served from this machine. Each round loads the page once for every arithmetic, in turn:

usable      from asking for the page until the model is loaded
first text  from the click on Write until the first new token is on the page
panel       from the click on a token until its bars, attention and lens are there
tokens/s    of the text, as the page says it

--soak writes texts one after the other for so long, and reports the memory of all of the browser's processes.
"""

import argparse
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.common import report
from nanogpt_hub.checkpoint import save_model
from nanogpt_hub.hub.serve import PageServer
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.tokenizer import build_tokenizer

MODELS = {  # name (1m is as the quickstart trains it): shape, tokenizer, new tokens, arithmetics
    "1m": (dict(name="nanogpt", size="1m", block_size=128, vocab_size=1024), "char", 120, ("plain", "f32")),
    "10m": (dict(name="nanogpt", size="10m"), "char", 200, ("plain", "f32", "int8")),
    "124m": (dict(name="gpt2", size="124m", vocab_size=50257), "byte", 40, ("bf16", "int8")),
}
TEXT = "".join(map(chr, range(32, 127))) + "\n"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
         "--disable-component-update"]  # fmt: skip


def make_model(folder: Path, shape: dict, tokenizer: str) -> Path:
    torch.manual_seed(0)
    tokens = build_tokenizer(tokenizer, [TEXT])
    model = GPT(GPTConfig.preset(**{"vocab_size": tokens.vocab_size, **shape}))
    with torch.no_grad():  # a text never ends: the logit of end-of-text is far below all others
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[tokens.eot_id] = -10.0
    return save_model(folder, model, tokens)


@contextmanager
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


def wait(page: Page, script: str) -> None:
    """Until a script is true. (Playwright's own way needs eval, which the page's policy forbids.)"""
    while not page.evaluate(script):
        page.wait_for_timeout(10)


ENDED = "() => document.querySelector('#status').textContent.includes('seed')"


def visit(browser: Browser, url: str, arithmetic: str, tokens: int) -> dict[str, float]:
    """Seconds and rates of one visit."""
    page = browser.new_page()
    page.set_default_timeout(300_000)
    started = time.perf_counter()
    page.goto(f"{url}?prompt=The+first&seed=1&temperature=1&top_k=0&max_new_tokens=1")
    wait(page, ENDED)
    usable = time.perf_counter() - started
    page.locator("#choose").click()
    page.locator("#arithmetic").select_option(arithmetic)
    page.locator("#load").click()
    page.locator("#loading").wait_for(state="visible")
    page.locator("#loading").wait_for(state="hidden")
    wait(page, ENDED)
    page.locator("#max_new_tokens").fill(str(tokens))
    page.locator("#generate").click()
    wait(page, ENDED)  # one text to warm up
    first = page.evaluate(FIRST_TEXT)
    wait(page, ENDED)
    rate = float(re.search(r"([\d,.]+) a second", page.locator("#status").text_content())[1])
    panel = page.evaluate(PANEL)
    page.close()
    return {"usable": usable, "first text": first, "panel": panel, "tokens/s": rate}


# Measured inside the page, so that the driver's own messages do not count. Both give seconds.
FIRST_TEXT = """() => new Promise((resolve) => {
    const started = performance.now();
    new MutationObserver((_, observer) => {
        if (!document.querySelector("#text .token:not(.typed)")) return;
        observer.disconnect();
        resolve((performance.now() - started) / 1000);
    }).observe(document.querySelector("#text"), { childList: true });
    document.querySelector("#generate").click();
})"""
PANEL = """() => new Promise((resolve) => {
    const started = performance.now(), panel = document.querySelector("#panel");
    new MutationObserver((_, observer) => {
        if (!panel.querySelector(".lens")) return;
        observer.disconnect();
        resolve((performance.now() - started) / 1000);
    }).observe(panel, { childList: true });
    document.querySelectorAll("#text .token")[30].click();
})"""


def measure(names: list[str], rounds: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        for name in names:
            shape, tokenizer, tokens, arithmetics = MODELS[name]
            with PageServer(make_model(Path(folder) / name, shape, tokenizer)) as server:
                taken: dict[str, list[dict]] = {arithmetic: [] for arithmetic in arithmetics}
                for _ in range(rounds):
                    for arithmetic in arithmetics:
                        taken[arithmetic].append(visit(opened, server.url, arithmetic, tokens))
            for arithmetic, visits in taken.items():
                middle = {key: round(median(one[key] for one in visits), 3) for key in visits[0]}
                rows.append({"model": name, "arithmetic": arithmetic, **middle})
    return rows


def resident(pid: int) -> int:
    """Bytes of memory of a process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for child in children)


def soak(seconds: float) -> list[dict]:
    """Memory of this process and its browser at the start and at the end of `seconds` of writing."""
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        shape, tokenizer, tokens, _ = MODELS["10m"]
        with PageServer(make_model(Path(folder) / "10m", shape, tokenizer)) as server:
            page = opened.new_page()
            page.goto(f"{server.url}?prompt=The+first&max_new_tokens={tokens}")
            rows, end, texts = [], time.monotonic() + seconds, 0
            while time.monotonic() < end:
                wait(page, ENDED)
                texts += 1
                if texts in (3, 10) or texts % 50 == 0:
                    rows.append({"texts": texts, "MB": round(resident(os.getpid()) / 1e6)})
                page.locator("#generate").click()
            rows.append({"texts": texts, "MB": round(resident(os.getpid()) / 1e6)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(MODELS))
    parser.add_argument("--soak", type=float, default=0.0)
    args = parser.parse_args()
    if args.soak:
        report("web-soak", soak(args.soak))
        return
    report("web", measure([args.only] if args.only else list(MODELS), args.rounds))


if __name__ == "__main__":
    main()
