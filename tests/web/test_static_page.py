"""The page in which the browser runs the model, in a real browser, against files and the loopback Hub."""

import functools
import http.server
import json
import re
import threading
from urllib.parse import urlsplit

import pytest
from helpers import HOSTILE, make_model

from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.cli import main
from nanogpt_hub.generate import generate
from nanogpt_hub.hub.serve import PageServer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
WAIT = 120_000  # milliseconds; a loaded machine is slow
expect = playwright.expect
expect.set_options(timeout=WAIT)


def sample_of(step):
    return f"To be {'not ' * (step // 250)}{HOSTILE}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with hostile text wherever text may be."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    make_model(run / "best")
    (run / "samples").mkdir()
    log = [f'{{"step": {n}, "train_loss": {4 - n / 300}, "val_loss": {4 - n / 400}}}\n' for n in range(0, 1001, 250)]
    (run / "metrics.jsonl").write_text("".join(log), encoding="utf-8")
    for n in range(0, 1001, 250):
        (run / "samples" / f"step-{n:06d}.txt").write_text(sample_of(n), encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def served(run):
    with PageServer(run / "best") as server:
        yield server.url


@pytest.fixture
def page(browser):
    """An empty page. Dialogs, script errors and requests to other machines fail the test."""
    page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
    page.set_default_timeout(WAIT)
    problems = []

    def guard(route):
        if urlsplit(route.request.url).hostname in ("127.0.0.1", "localhost", None, ""):
            return route.continue_()
        problems.append(f"asked {route.request.url}")
        return route.abort()

    page.route("**/*", guard)
    page.on("dialog", lambda dialog: (problems.append(f"script ran: {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.context.close()
    assert problems == []


def ready(page):
    """Waits for the end of a generation."""
    expect(page.locator("#status")).to_contain_text("seed")


def written(page):
    return "".join(page.locator("#text .token:not(.typed)").all_text_contents())


def set_field(page, name, value):
    page.locator(f"#{name}").fill(str(value))


def test_what_it_writes_is_what_python_writes_and_a_link_gives_it_again(page, served, run):
    page.goto(f"{served}?prompt=To+be&seed=3&max_new_tokens=61&temperature=1&top_k=0")
    ready(page)
    model, tokenizer = load_model(run / "best")
    expected = generate(model, tokenizer, "To be", max_new_tokens=61, seed=3, temperature=1.0, top_k=None).text
    assert written(page) == expected
    expect(page.locator("#status")).to_contain_text("61 tokens, as many as asked for")
    link = page.url
    set_field(page, "temperature", 0)
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("61 tokens")
    greedy = generate(model, tokenizer, "To be", max_new_tokens=61, temperature=0.0).text
    expect(page.locator("#text")).to_have_text("To be" + greedy)
    page.goto(link)
    ready(page)
    assert written(page) == expected
    page.locator("#continue").click()
    expect(page.locator("#prompt")).to_have_value("To be" + expected)


def test_a_token_shows_how_it_came_about_and_branches(page, served):
    page.goto(f"{served}?prompt=To+be&seed=3&max_new_tokens=40&temperature=1&top_k=0")
    ready(page)
    first = written(page)
    page.locator("#text .token").nth(12).click()
    panel = page.locator("#panel")
    expect(panel).to_contain_text("Token 13")
    expect(panel.locator(".bars li")).to_have_count(10, timeout=WAIT)
    expect(panel.locator(".layer .head")).to_have_count(4)
    expect(panel.locator(".lens tbody tr")).to_have_count(3)
    panel.locator(".layer .head").nth(3).click()
    expect(panel).to_contain_text("Layer 2, head 2:")
    assert page.locator("#text .token.lit").count() > 0
    set_field(page, "top_k", 2)
    expect(panel.locator(".bars .cut").first).to_contain_text("cut by top-k")
    set_field(page, "top_k", 0)
    expect(panel.locator(".bars .cut")).to_have_count(0)
    panel.get_by_label("The next token").click()
    expect(panel).to_contain_text("Token 14")
    page.locator("#text").focus()
    page.keyboard.press("ArrowLeft")
    expect(panel).to_contain_text("Token 13")
    panel.locator(".bars li:not(.came) button").first.click()
    expect(page.locator("#branches .branch")).to_have_count(2)
    ready(page)
    second = written(page)
    assert second[:7] == first[:7]
    assert second != first
    assert page.locator("#text .token.forced").count() == 1
    link = page.url
    assert "branch=7%3A" in link
    page.locator("#branches .branch").first.click()
    expect(page.locator("#text")).to_have_text("To be" + first)
    page.goto(link)
    ready(page)
    assert written(page) == second


def test_stop(page, served):
    page.goto(f"{served}?prompt=To+be&max_new_tokens=4000")
    expect(page.locator("#status")).to_contain_text("writing")
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("stopped")
    count = page.locator("#text .token").count()
    page.wait_for_timeout(500)
    assert page.locator("#text .token").count() == count < 4000


def test_training_plays_and_hostile_text_is_text(page, served):
    page.goto(served)
    ready(page)
    expect(page.locator("#prompt")).to_have_value("To be not not not not")
    expect(page.locator("#sample")).to_have_text(sample_of(1000))
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#step-facts")).to_contain_text("Step 500 · training loss 2.333 · validation loss 2.750")
    expect(page.locator("#sample")).to_have_text(sample_of(500))
    page.locator("#play").click()
    expect(page.locator("#step-facts")).to_contain_text("Step 750")
    expect(page.locator("#step-facts")).to_contain_text("Step 1,000")
    page.locator("#prompt").fill(HOSTILE)
    page.locator("#generate").click()
    ready(page)
    assert page.locator("#text").inner_text().startswith("<img")
    assert page.locator("main img, main script").count() == 0


def test_what_cannot_be_used_is_said_in_a_sentence(page, served):
    page.goto(f"{served}?prompt=%C3%9F&seed=abc&temperature=-1&max_new_tokens=30")
    notice = page.locator("#notice")
    expect(notice).to_contain_text("seed is 'abc' in this link")
    expect(notice).to_contain_text("temperature is '-1'")
    assert page.locator("#max_new_tokens").input_value() == "30"
    page.locator("#generate").click()
    expect(notice).to_contain_text("(U+00DF) at position 0 is not among")
    page.locator("#prompt").fill("To be")
    set_field(page, "top_p", 2)
    page.locator("#generate").click()
    expect(notice).to_contain_text("top_p is 2; it must be a number from 0 to 1")
    set_field(page, "top_p", 1)
    page.locator("#generate").click()
    ready(page)
    expect(notice).to_be_hidden()


def test_a_folder_from_this_computer_and_a_hostile_one(page, served, tmp_path):
    folder = make_model(tmp_path / "other", seed=8)
    with PageServer() as server:
        page.goto(server.url)
        expect(page.locator("#notice")).to_contain_text("choose a model by its name")
        choose_folder(page, folder)
        expect(page.locator("#model-name")).to_have_text("other")
        ready(page)
        (folder / "config.json").write_text(json.dumps({"model_type": HOSTILE}))
        choose_folder(page, folder)
        expect(page.locator("#notice")).to_contain_text("model_type is '<img src=x onerror=alert(1)>")
        expect(page.locator("#model-name")).to_have_text("other")


def choose_folder(page, folder):
    page.locator("#choose").click()
    page.locator("#folder").set_input_files(folder)
    page.locator("#load").click()


# ---- published ----


@pytest.fixture
def published(hub, monkeypatch, tmp_path):
    """A static Space as `nanogpt-hub space --static` publishes it: its address when served, and the model's repo."""
    hub.add_user("alice", "hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    files = {path.name: path.read_bytes() for path in make_model(tmp_path / "model", seed=8).iterdir()}
    repo = hub.add_repo("alice/tiny", {**files, "training/metrics.jsonl": b'{"step": 500, "val_loss": 2}\n'})
    repo.tags["step-000500"] = repo.branches["main"]
    assert main(["space", "alice/demo", "--static", "--model", "alice/tiny"]) == 0
    site = tmp_path / "site"
    for name, data in hub.repo("alice/demo", "spaces").files().items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(data)
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", repo
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Any server of static files will do."""

    def guess_type(self, path):
        return "text/javascript" if path.endswith(".js") else super().guess_type(path)

    def log_message(self, *args):
        pass


def test_the_published_page_loads_models_from_the_hub(page, published, hub):
    url, repo = published
    assert hub.repo("alice/demo", "spaces").settings["sdk"] == "static"
    page.goto(url)
    expect(page.locator("#model-name")).to_have_text("alice/tiny@main")
    ready(page)
    assert f"rev={repo.branches['main']}" in page.url
    fetched = len(hub.asked("GET", "/cdn/"))
    assert fetched == 1, "the weights, once"
    page.reload()
    ready(page)
    assert len(hub.asked("GET", "/cdn/")) == fetched, "they are kept in the browser"
    expect(page.locator("#use-step")).to_be_enabled()
    page.locator("#use-step").click()
    expect(page.locator("#model-name")).to_have_text("alice/tiny@step-000500")
    ready(page)
    repo.put({"note.txt": b"newer"})
    hub.fail("GET", "/api/models/alice/tiny/revision/main", status=500)
    choose_repo(page, "alice/tiny", "main")
    expect(page.locator("#notice")).to_contain_text("the Hub answers 500")
    choose_repo(page, "alice/tiny", "nowhere")
    expect(page.locator("#notice")).to_contain_text("alice/tiny has no branch, tag or commit 'nowhere'")
    choose_repo(page, "alice/none")
    expect(page.locator("#notice")).to_contain_text("there is no alice/none on the Hub that this page may read")
    expect(page.locator("#model-name")).to_have_text("alice/tiny@step-000500")


def choose_repo(page, name, revision="", token=""):
    page.locator("#choose").click()
    page.locator("#repo").fill(name)
    page.locator("#revision").fill(revision)
    page.locator("#token").fill(token)
    page.locator("#load").click()


def test_damaged_files_are_refused_and_private_models_need_a_token(page, published, hub, tmp_path):
    url, _ = published
    hub.corrupt.add("model.safetensors")
    page.goto(url)
    expect(page.locator("#notice")).to_contain_text("model.safetensors arrived damaged")
    hub.corrupt.clear()
    files = {path.name: path.read_bytes() for path in make_model(tmp_path / "secret", seed=9).iterdir()}
    hub.add_repo("alice/secret", files, private=True)
    choose_repo(page, "alice/secret")
    expect(page.locator("#notice")).to_contain_text("give a token if it is private")
    choose_repo(page, "alice/secret", token="hf_secret")
    expect(page.locator("#model-name")).to_have_text("alice/secret@main")
    ready(page)
    assert "hf_secret" not in page.url
    assert not any("hf_secret" in request.path for request in hub.requests)
    assert not any(r.headers.get("authorization") for r in hub.asked("GET", "/cdn/")), "the token goes to the Hub alone"
    stored = page.evaluate("caches.open('nanogpt_hub models').then((c) => c.keys()).then((ks) => ks.map((k) => k.url))")
    assert not [address for address in stored if "secret" in address]


def test_page_and_worker_can_ask_no_other_machine(page, served):
    page.goto(served)
    ready(page)
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert "unsafe-inline" not in policy
    assert re.search(r"default-src 'none'; script-src 'self' 'wasm-unsafe-eval'", policy)
    ask = "fetch('http://127.0.0.2:9/').then(() => 'sent', (error) => error.name)"
    assert page.evaluate(ask) == "TypeError"
    blocked = page.evaluate(
        """() => new Promise((resolve) => {
            const code = `addEventListener("securitypolicyviolation", (e) => postMessage(e.effectiveDirective));
                          fetch("http://127.0.0.2:9/").catch(() => {});`;
            const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
            new Worker(url, { type: "module" }).onmessage = ({ data }) => resolve(data);
        })"""
    )
    assert blocked == "connect-src"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_does_not_scroll_sideways(browser, served, scheme):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.set_default_timeout(WAIT)
    page.goto(f"{served}?prompt=To+be&max_new_tokens=60")
    ready(page)
    assert page.locator("#text").bounding_box()["y"] < 500, "the text is on the first screen"
    page.locator("#text .token").nth(20).click()
    expect(page.locator("#panel .lens")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_the_commands_say_what_is_wrong(tmp_path, capsys):
    assert main(["web", str(tmp_path)]) == 2
    assert "there is no config.json" in capsys.readouterr().err
    assert main(["web", "not a name"]) == 2
    assert main(["space", "a/b", "--static", "--model", "a/c", "--hardware", "t4-small"]) == 2
    assert "--hardware is for a Space with a server" in capsys.readouterr().err
