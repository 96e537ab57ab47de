"""The page in a real browser, used as a visitor uses it; nothing may be asked of any other machine."""

import os
import re
import shutil
import time
from urllib.parse import urlsplit

import pytest
from helpers import HOSTILE, files_of, import_app, make_model

from nanogpt_hub.playground.session import Playground

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
WAIT = 20_000  # milliseconds; a loaded machine is slow
playwright.expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as p:
        if path is None and not os.path.exists(p.chromium.executable_path):
            pytest.skip("no chromium is installed: apt-get install chromium, or playwright install chromium")
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(served_run):
    return served_run[0]


@pytest.fixture(scope="module")
def served_run(tmp_path_factory):
    """The address of an app, and its run that goes on training, in which hostile text is everywhere."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    folder = make_model(run / "best")
    make_model(run / "last", seed=4)
    (run / "samples").mkdir()
    log = [f'{{"step": {n}, "train_loss": {4 - n / 300}, "val_loss": {4 - n / 400}}}\n' for n in range(0, 1001, 250)]
    (run / "metrics.jsonl").write_text("".join(log), encoding="utf-8")
    for n in range(0, 1001, 250):
        (run / "samples" / f"step-{n:06d}.txt").write_text(f"sample {n} {HOSTILE}", encoding="utf-8")
    (run / "config.yaml").write_text("max_steps: 2000\n", encoding="utf-8")
    picture = "![p](http://198.51.100.1/x.png)"
    (folder / "README.md").write_text(f"# The card\n{HOSTILE} {picture}\n", encoding="utf-8")
    app = import_app()
    blocks = app.create_app(Playground(str(folder), run.parent))
    _, url, _ = app.launch(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url, run
    blocks.close()


@pytest.fixture
def page(browser, served):
    """A page that is open and shows the example. Dialogs, script errors and outside requests fail the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(WAIT)
    problems = []

    def guard(route):
        if urlsplit(route.request.url).hostname in ("127.0.0.1", None, ""):
            return route.continue_()
        problems.append(f"asked {route.request.url}")
        return route.abort()

    page.route("**/*", guard)
    page.on("dialog", lambda dialog: (problems.append(f"script ran: {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(served)
    page.locator("#output .token").first.wait_for()
    ready(page)
    yield page
    page.close()
    assert problems == []


def ready(page):
    """Waits for the end of a generation."""
    playwright.expect(page.locator("#status")).to_contain_text(re.compile("asked for|ended|stop string|time was up"))


def written(page):
    return "".join(page.locator("#output .token").all_text_contents())


def choose(page, selector, value):
    field = page.locator(f"{selector} input").first
    field.fill(value)
    field.press("Enter")


def set_slider(page, selector, value):
    field = page.locator(f"{selector} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def test_write_click_a_token_and_open_the_link_again(page):
    assert len(written(page)) > 20, "a first visit shows something"
    page.locator("#prompt textarea").fill("be, or")
    set_slider(page, "#tokens", 61)
    page.locator("#generate").click()
    playwright.expect(page.locator("#status")).to_contain_text("61 tokens")
    ready(page)
    text = written(page)
    token = page.locator("#output .token").nth(3)
    token.click()
    panel = page.locator("#output .token-panel")
    playwright.expect(panel).to_contain_text("Token 4")
    assert panel.locator("tbody tr").count() == 8
    page.keyboard.press("ArrowRight")
    playwright.expect(panel).to_contain_text("Token 5")
    page.get_by_text("Take it with you").click()
    link = page.locator("#link textarea, #link input").first
    playwright.expect(link).to_have_value(re.compile("seed="))
    assert page.locator("#plain textarea").input_value() == "be, or" + text
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "generation.json"
    page.goto(link.input_value())
    playwright.expect(page.locator("#status")).to_contain_text("61 tokens")
    ready(page)
    assert written(page) == text
    page.locator("#continue").click()
    playwright.expect(page.locator("#prompt textarea")).to_have_value("be, or" + text)


def test_weights_of_8_bits_and_their_link(page, served, monkeypatch):
    asked, original = [], Playground.load_int8
    monkeypatch.setattr(Playground, "load_int8", lambda *args: (asked.append(args), original(*args))[1])
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Weights of 8 bits").check()
    set_slider(page, "#tokens", 61)
    page.locator("#generate").click()
    playwright.expect(page.locator("#status")).to_contain_text("61 tokens")
    ready(page)
    text = written(page)
    page.get_by_text("Take it with you").click()
    link = page.locator("#link textarea, #link input").first
    playwright.expect(link).to_have_value(re.compile("int8=1$"))
    page.goto(link.input_value())
    playwright.expect(page.locator("#status")).to_contain_text("61 tokens")
    ready(page)
    assert written(page) == text
    assert len(asked) == 2
    page.get_by_text("More", exact=True).click()
    playwright.expect(page.get_by_label("Weights of 8 bits")).to_be_checked()
    page.goto(f"{served}?int8=abc")
    playwright.expect(page.get_by_test_id("toast-body")).to_contain_text("int8 is 'abc' in this link")


def test_stop_in_the_middle(page, monkeypatch):
    original = Playground._stream

    def slowly(self, *args):
        for tokens in original(self, *args):
            time.sleep(0.03)
            yield tokens

    monkeypatch.setattr(Playground, "_stream", slowly)
    monkeypatch.setattr("nanogpt_hub.playground.session.UPDATES_PER_SECOND", 1e9)
    set_slider(page, "#tokens", 500)
    page.locator("#generate").click()
    playwright.expect(page.locator("#status")).to_contain_text("writing")
    page.wait_for_function("document.querySelectorAll('#output .token').length > 5")
    page.locator("#stop").click()
    page.wait_for_timeout(1500)
    stopped = page.locator("#output .token").count()
    page.wait_for_timeout(700)
    assert page.locator("#output .token").count() == stopped < 500
    page.get_by_text("Take it with you").click()
    playwright.expect(page.locator("#plain textarea")).to_have_value(re.compile(r"\S"))


def test_load_a_model_at_a_revision(page, hub, tmp_path):
    repo = hub.add_repo("alice/steps", files_of(make_model(tmp_path / "other", seed=8)))
    repo.tags["step-000500"] = repo.branches["main"]
    repo.put({"notes.txt": b"newer"})
    choose(page, "#model", "alice/steps")
    choose(page, "#revision", "step-000500")
    page.locator("#load").click()
    playwright.expect(page.locator("#facts")).to_contain_text("step-000500 (" + repo.tags["step-000500"][:7])
    choose(page, "#model", "alice/none")
    page.locator("#load").click()
    playwright.expect(page.get_by_test_id("toast-body")).to_contain_text("there is no alice/none")
    playwright.expect(page.locator("#facts")).to_contain_text("alice/steps")
    page.locator("#generate").click()
    ready(page)
    assert written(page)


def test_links_of_all_kinds_open(page, served):
    page.goto(f"{served}?prompt=be&temperature=3&top_k=900&max_new_tokens=33&seed=1")  # beyond the sliders' ends
    playwright.expect(page.locator("#status")).to_contain_text("33 tokens")
    page.locator("#generate").click()
    ready(page)
    playwright.expect(page.get_by_test_id("toast-body")).to_have_count(0)
    page.goto(f"{served}?repo=nobody/none&prompt=x")
    playwright.expect(page.get_by_test_id("toast-body")).to_contain_text("there is no nobody/none")
    playwright.expect(page.locator("#facts")).to_contain_text("/best")
    ready(page)


def test_look_inside(page):
    tab(page, "Look inside")
    playwright.expect(page.locator("#next .bar").first).to_be_visible()
    page.locator("#look-text textarea").fill("or not to be" + HOSTILE)
    page.locator("#look").click()
    tab(page, "Tokenizer")
    playwright.expect(page.locator("#pieces .piece")).to_have_count(len("or not to be" + HOSTILE))
    tab(page, "Attention")
    playwright.expect(page.locator("#attention .heads button")).to_have_count(4)
    page.locator("#attention .heads button").nth(3).click()
    playwright.expect(page.locator("#attention h4")).to_have_text("Layer 2, head 2")
    page.locator("#attention .head .token").nth(2).click()
    playwright.expect(page.locator("#attention .head .hint")).to_contain_text("(token 3) looks most at")
    tab(page, "Logit lens")
    playwright.expect(page.locator("#lens tbody tr")).to_have_count(3)
    tab(page, "Surprise")
    playwright.expect(page.locator("#surprise-figures")).to_contain_text("bits per character")
    page.locator("#surprise .token").nth(4).click()
    playwright.expect(page.locator("#surprise .token-panel")).to_contain_text("Token 5")


def test_training_slider_and_generating_with_a_step(page):
    tab(page, "Training")
    sample = page.locator("#sample textarea")
    playwright.expect(sample).to_have_value(f"sample 1000 {HOSTILE}")
    playwright.expect(page.locator("#loss canvas, #loss svg").first).to_be_visible()
    slider = page.locator("#step input[type=range]")
    slider.focus()
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    playwright.expect(sample).to_have_value(f"sample 500 {HOSTILE}")
    playwright.expect(page.locator("#step-facts")).to_contain_text("Step 500")
    playwright.expect(page.locator("#use-step")).to_be_disabled()
    slider.press("End")
    playwright.expect(page.locator("#use-step")).to_be_enabled()
    page.locator("#use-step").click()
    playwright.expect(page.locator("#facts")).to_contain_text("/last")
    playwright.expect(page.locator("#output")).to_be_visible()


def test_compare_best_and_last(page):
    tab(page, "Compare")
    playwright.expect(page.locator("#model-B input")).to_have_value(re.compile("/last$"))
    page.locator("#compare").click()
    for side in "ab":
        playwright.expect(page.locator(f"#status-{side}")).to_contain_text("asked for")
    assert page.locator("#output-a .mark").count() == page.locator("#output-b .mark").count() == 1
    playwright.expect(page.locator("#apart")).to_contain_text("Jensen-Shannon")
    assert page.locator("#divergence tbody tr").count() == 10


def test_model_tab_shows_the_card_as_text(page):
    tab(page, "Model")
    card = page.locator("#card")
    playwright.expect(card).to_contain_text("The card")
    playwright.expect(card).to_contain_text("<img src=x onerror=alert(1)>")
    assert card.locator("img").count() == 0
    playwright.expect(page.locator("#files")).to_contain_text("model.safetensors")
    playwright.expect(page.locator("#parts")).to_contain_text("attention")


def test_training_moves_while_a_run_goes_on(browser, served_run):
    url, run = served_run
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.goto(url)
    page.locator("#output .token").first.wait_for()
    tab(page, "Training")
    sample = page.locator("#sample textarea")
    playwright.expect(sample).to_have_value(re.compile("^sample 1000"))
    (run / "samples" / "step-001250.txt").write_text("it went on", encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 1250, "val_loss": 0.5}\n')
    playwright.expect(sample).to_have_value("it went on")
    playwright.expect(page.locator("#step-facts")).to_contain_text("Step 1,250 of 2,000 · ")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_does_not_scroll_sideways(browser, served, scheme):
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(WAIT)
    page.goto(served)
    page.locator("#output .token").first.wait_for()
    for name in ("Generate", "Look inside", "Training", "Compare", "Model"):
        inner = page.get_by_role("tab", name=name, exact=True)
        if not inner.count():  # there is no room for all of them
            page.get_by_label("More tabs").first.click()
            inner = page.locator(".overflow-dropdown").first.get_by_text(name, exact=True)
        inner.click()
        page.wait_for_timeout(500)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{name} is {width} wide"
    page.close()
