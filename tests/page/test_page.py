"""The page in a real browser, used as a visitor uses it; nothing may be asked of any other machine."""

import json
import re
import time
from urllib.parse import urlsplit

import pytest
import torch
from helpers import HOSTILE, chat_tokenizer, files_of, make_chat_model, make_model

from nanogpt_hub.checkpoint import load_model, save_model
from nanogpt_hub.page.layout import create_page, serve
from nanogpt_hub.playground.models import ModelStore
from nanogpt_hub.playground.session import Playground
from nanogpt_hub.runs import attention_file, attention_json
from nanogpt_hub.sampling import SAMPLERS, SamplingConfig, filter_logits, seen_tokens

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
TABS = ("Generate", "Chat", "Look inside", "Training", "Compare", "Model")
WAIT = 60_000  # milliseconds; a loaded machine is slow
playwright.expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def served(served_run):
    return served_run[0]


@pytest.fixture(scope="module")
def served_run(tmp_path_factory):
    """The address of an app, and its run that goes on training, in which hostile text is everywhere."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    folder = make_model(run / "best")
    make_model(run / "last", seed=4)
    make_chat_model(run.parent / "talks" / "best")
    make_model(run.parent / "experts" / "best", n_expert=3, n_expert_per_tok=2)
    (run / "samples").mkdir()
    log = [f'{{"step": {n}, "train_loss": {4 - n / 300}, "val_loss": {4 - n / 400}}}\n' for n in range(0, 1001, 250)]
    (run / "metrics.jsonl").write_text("".join(log), encoding="utf-8")
    for n in range(0, 1001, 250):
        (run / "samples" / f"step-{n:06d}.txt").write_text(f"sample {n} {HOSTILE}", encoding="utf-8")
        maps = torch.eye(3).expand(2, 2, 3, 3) * n / 1000
        maps = json.dumps(attention_json(["a", "<b>", "c"], maps))
        (run / "samples" / attention_file(n)).write_text(maps, encoding="utf-8")
    (run / "config.yaml").write_text("max_steps: 2000\n", encoding="utf-8")
    (run / "run.json").write_text('{"evaluation": {"floor_loss": 0.2771}}', encoding="utf-8")
    picture = "![p](http://198.51.100.1/x.png)"
    (folder / "README.md").write_text(f"# The card\n{HOSTILE} {picture}\n", encoding="utf-8")
    blocks = create_page(Playground(ModelStore(str(folder), run.parent)))
    _, url, _ = serve(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url, run
    blocks.close()


@pytest.fixture
def page(browser, served):
    """A page that is open and shows the example. Dialogs, script errors and outside requests fail the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(WAIT)
    page.add_init_script("localStorage.setItem('nanogpt-hub-tour', 'seen')")
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
    playwright.expect(page.locator("#status")).to_contain_text(
        re.compile("asked for|ended|stop string|time was up|stopped")
    )


def written(page):
    """Prompt and text as the page shows them."""
    return "".join(page.locator("#output .token").all_text_contents())


def choose(page, selector, value):
    if not page.locator("#model-bar").is_visible():
        page.locator("#change-model").click()
    field = page.locator(f"{selector} input").first
    field.fill(value)
    field.press("Enter")


def set_slider(page, selector, value):
    field = page.locator(f"{selector} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def open_extras(page):
    page.get_by_text("Take it with you").click()


def test_write_click_a_token_and_open_the_link_again(page):
    assert len(written(page)) > 20, "a first visit shows something"
    page.locator("#prompt textarea").fill("be, or")
    set_slider(page, "#tokens", 61)
    page.locator("#generate").click()
    playwright.expect(page.locator("#status")).to_contain_text("61 tokens")
    ready(page)
    text = written(page)
    assert text.startswith("be, or"), "the prompt is made of tokens too"
    page.locator("#output .token").nth(9).click()
    panel = page.locator("#panel")
    playwright.expect(panel.locator(".panel-title")).to_contain_text("token 10")
    assert panel.locator(".choice").count() >= 12
    page.keyboard.press("ArrowRight")
    playwright.expect(panel.locator(".panel-title")).to_contain_text("token 11")
    page.locator("#output .token").first.click()
    playwright.expect(panel).to_contain_text("is the first token")
    open_extras(page)
    link = page.locator("#link textarea, #link input").first
    playwright.expect(link).to_have_value(re.compile("seed="))
    assert page.locator("#plain textarea").input_value() == text
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "generation.json"
    page.goto(link.input_value())
    playwright.expect(page.locator("#status")).to_contain_text("61 tokens")
    ready(page)
    assert written(page) == text
    page.locator("#continue").click()
    playwright.expect(page.locator("#output .token")).to_have_count(6 + 2 * 61)
    assert written(page).startswith(text)
    page.locator("#prompt textarea").fill("or be")
    page.locator("#continue").click()
    playwright.expect(page.locator("#output .token")).to_have_count(5 + 61)
    assert page.locator("#prompt textarea").input_value() == "or be", "an edited prompt stays"


def test_the_bars_follow_the_sliders_as_the_samplers_say(page):
    """The samplers in the browser give what those of sampling.py give, over a grid of settings."""
    torch.manual_seed(3)
    many = {"repetition_penalty": 1.2, "temperature": 0.9, "top_k": 50, "top_p": 0.7, "min_p": 0.05}
    for vocab, settings in (
        (7, {"top_k": 3}),
        (50, {"temperature": 0.6, "top_p": 0.8}),
        (50, {"temperature": 0.0}),
        (50, {"min_p": 0.2, "temperature": 1.7}),
        (300, {"repetition_penalty": 1.4, "top_k": 40}),
        (300, many),
    ):
        logits = torch.randn(1, vocab) * 3
        config = SamplingConfig(**{"temperature": 1.0, "top_k": 0, **settings})
        seen = list(range(0, vocab, 3))
        expected = filter_logits(logits, config, seen_tokens([seen], vocab)).softmax(-1)[0]
        listed = [[each.name, each.neutral, getattr(config, each.name)] for each in SAMPLERS.values()]
        script = "([l, s, t]) => Array.from(nanogpt.samplers.distribution(Float64Array.from(l), s, new Set(t)))"
        got = torch.tensor(page.evaluate(script, [logits[0].tolist(), listed, seen]), dtype=torch.float32)
        assert torch.allclose(got, expected, atol=1e-5), settings
    unknown = page.evaluate("nanogpt.samplers.distribution(Float64Array.of(1, 2), [['new_one', 0, 1]], new Set())")
    assert unknown is None, "the server computes what the browser does not know"


def test_a_slider_reshapes_the_bars_without_the_server(page):
    figures = page.locator("#panel .choice .figure")
    playwright.expect(figures.first).to_be_visible()
    page.wait_for_timeout(500)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    set_slider(page, "#top-k", 1)
    playwright.expect(page.locator("#panel .choice.cut")).to_have_count(page.locator("#panel .choice").count() - 1)
    playwright.expect(figures.first).to_have_text("100 %")
    assert asked == []


def test_heads_light_up_the_text(page):
    page.locator("#output .token").nth(12).click()
    playwright.expect(page.locator("#panel .panel-title")).to_contain_text("token 13")
    heads = page.locator("#panel .att")
    playwright.expect(heads).to_have_count(4)
    heads.nth(1).focus()
    playwright.expect(page.locator("#output .token-text")).to_have_class(re.compile("lit"))
    playwright.expect(page.locator("#panel")).to_contain_text("Layer 1, head 2 looks most at")
    page.keyboard.press("ArrowDown")
    playwright.expect(page.locator("#panel")).to_contain_text("Layer 2, head 2 looks most at")
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#output .token-text")).not_to_have_class(re.compile("lit"))
    assert page.locator("#panel .path-row").count() == 3


def test_branches_grow_are_walked_and_have_links(page):
    first = written(page)
    page.locator("#output .token").nth(15).click()
    playwright.expect(page.locator("#panel .panel-title")).to_contain_text("token 16")
    choice = page.locator("#panel .choice:not(:has(.chosen))").first
    name = choice.locator("code").text_content()
    choice.click()
    playwright.expect(page.locator(".branch")).to_have_count(2)
    ready(page)
    page.wait_for_function("!document.querySelector('#output .writing')")
    branch = written(page)
    assert branch[:15] == first[:15]
    assert branch[15].replace(" ", "␣").replace("\n", "⏎") == name
    open_extras(page)
    link = page.locator("#link textarea, #link input").first
    playwright.expect(link).to_have_value(re.compile("given="))
    address = link.input_value()
    page.locator(".branch").first.click()
    playwright.expect(page.locator("#output .fork")).to_have_count(0)
    assert written(page) == first
    page.goto(address)
    playwright.expect(page.locator("#output .fork")).to_have_count(1)
    ready(page)
    assert written(page) == branch


def test_the_tour_is_offered_once(browser, served):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(served)
    page.get_by_role("button", name="Show me").click()
    for title in ("Tokens", "Probabilities", "Choosing", "Attention", "Training"):
        playwright.expect(page.locator(".tour h2")).to_have_text(title)
        page.locator(".tour .play").click()
    playwright.expect(page.locator(".tour")).to_have_count(0)
    page.goto(served)
    page.locator("#output .token").first.wait_for()
    page.wait_for_timeout(1500)
    assert page.locator(".tour").count() == 0
    page.locator("#tour").click()
    playwright.expect(page.locator(".tour h2")).to_have_text("Tokens")
    page.keyboard.press("Escape")
    playwright.expect(page.locator(".tour")).to_have_count(0)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, served, served_run, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(WAIT)
    page.goto(served)
    page.locator("#panel .choice").first.wait_for()

    def check(name):
        page.wait_for_timeout(1500)
        found = axe.Axe().run(page).response["violations"]
        bad = [(v["id"], v["nodes"][0]["target"]) for v in found if v["impact"] in ("serious", "critical")]
        assert bad == [], name

    for name in TABS:
        tab(page, name)
        check(name)
    choose(page, "#model", str(served_run[1].parent / "talks" / "best"))
    page.locator("#load").click()
    tab(page, "Chat")
    speak(page, "Hi")
    playwright.expect(page.locator("#chat-status")).to_contain_text("asked for")
    page.locator("#chat-tokens .token").nth(5).click()
    page.locator("#chat-panel .choice").first.wait_for()
    check("a chat")
    page.close()


def test_weights_of_8_bits_and_their_link(page, served, monkeypatch):
    asked, original = [], ModelStore.load_int8
    monkeypatch.setattr(ModelStore, "load_int8", lambda *args: (asked.append(args), original(*args))[1])
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Weights of 8 bits").check()
    set_slider(page, "#tokens", 61)
    page.locator("#generate").click()
    playwright.expect(page.locator("#status")).to_contain_text("61 tokens")
    ready(page)
    text = written(page)
    page.get_by_text("Take it with you").click()
    link = page.locator("#link textarea, #link input").first
    playwright.expect(link).to_have_value(re.compile("int8=1"))
    page.goto(link.input_value())
    playwright.expect(page.locator("#status")).to_contain_text("61 tokens")
    ready(page)
    assert written(page) == text
    assert len(asked) == 2
    page.get_by_text("More", exact=True).click()
    playwright.expect(page.get_by_label("Weights of 8 bits")).to_be_checked()
    page.goto(f"{served}?int8=abc")
    playwright.expect(page.get_by_test_id("toast-body")).to_contain_text("int8 is 'abc'")


def slow_down(monkeypatch):
    """Has tokens come one by one, ten a second."""
    original = Playground._stream

    def slowly(self, *args):
        for tokens in original(self, *args):
            time.sleep(0.1)
            yield tokens

    monkeypatch.setattr(Playground, "_stream", slowly)
    monkeypatch.setattr("nanogpt_hub.playground.session.UPDATES_PER_SECOND", 20)


def test_stop_in_the_middle(page, monkeypatch):
    slow_down(monkeypatch)
    set_slider(page, "#tokens", 500)
    page.locator("#generate").click()
    playwright.expect(page.locator("#status")).to_contain_text("generating")
    page.wait_for_function("document.querySelectorAll('#output .token').length > 5")
    page.locator("#stop").click()
    page.wait_for_timeout(1500)
    stopped = page.locator("#output .token").count()
    page.wait_for_timeout(700)
    assert page.locator("#output .token").count() == stopped < 500
    playwright.expect(page.locator("#status")).to_contain_text("stopped")
    playwright.expect(page.locator(".only-heard")).to_have_text(re.compile("^Stopped after [0-9]+ new tokens"))
    assert page.locator("#output .writing").count() == 0
    page.get_by_text("Take it with you").click()
    playwright.expect(page.locator("#plain textarea")).to_have_value(re.compile(r"\S"))


@pytest.fixture
def talk(page, served_run):
    """The tab Chat of a model that was tuned on conversations."""
    folder = served_run[1].parent / "talks" / "best"
    choose(page, "#model", str(folder))
    page.locator("#load").click()
    playwright.expect(page.locator("#facts")).to_contain_text("talks/best")
    tab(page, "Chat")
    playwright.expect(page.locator("#message textarea")).to_be_visible()
    return page


def speak(page, text):
    page.locator("#message textarea").fill(text)
    page.locator("#message textarea").press("Enter")
    playwright.expect(page.locator("#message textarea")).to_have_value("")


def test_a_chat_streams_remembers_and_shows_what_the_model_reads(talk):
    page = talk
    tab(page, "Generate")
    set_slider(page, "#tokens", 12)
    tab(page, "Chat")
    page.locator("#system textarea").fill("Be brief.")
    speak(page, f"Hi {HOSTILE}")
    playwright.expect(page.locator("#chat-status")).to_contain_text("12 tokens")
    playwright.expect(page.locator("#chat-log .said")).to_have_count(3)
    playwright.expect(page.locator("#chat-log .said.user p")).to_have_text(f"Hi {HOSTILE}")
    answer = page.locator("#chat-log .said.assistant p").text_content()
    assert len(answer) > 3
    playwright.expect(page.locator(".only-heard")).to_have_text(f"The model answered: {answer}")
    asked = f"<|system|>\nBe brief.\n<|user|>\nHi {HOSTILE}\n<|assistant|>\n"
    assert "".join(page.locator("#chat-tokens .token").all_text_contents()) == asked + answer
    speak(page, "More")
    playwright.expect(page.locator("#chat-log .said.assistant")).to_have_count(2)
    playwright.expect(page.locator("#chat-status")).to_contain_text("12 tokens")
    read = "".join(page.locator("#chat-tokens .token.prompt").all_text_contents())
    assert read == f"{asked}{answer}<|endoftext|><|user|>\nMore\n<|assistant|>\n", "what was said is read again"
    page.locator("#chat-tokens .token").nth(20).click()
    playwright.expect(page.locator("#chat-panel .panel-title")).to_contain_text("token 21")
    playwright.expect(page.locator("#chat-panel .att")).to_have_count(4)
    page.locator("#chat-continue").click()
    playwright.expect(page.locator("#chat-tokens .token:not(.prompt)")).to_have_count(24)
    page.get_by_text("Take it with you").last.click()
    with page.expect_download() as download:
        page.locator("#chat-download").click()
    row = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert [each["role"] for each in row["messages"]] == ["system", *["user", "assistant"] * 2]
    assert row["messages"][-1]["content"] == page.locator("#chat-log .said.assistant p").last.text_content()
    page.locator("#chat-reset").click()
    playwright.expect(page.locator("#chat-log .said")).to_have_count(0)
    playwright.expect(page.locator("#chat-log")).to_contain_text("Nothing was said yet")


def test_a_chat_is_stopped_and_goes_on(talk, monkeypatch):
    page = talk
    slow_down(monkeypatch)
    speak(page, "Hi")
    page.wait_for_function("document.querySelector('#chat-log .said.assistant p').textContent.length > 5")
    page.locator("#chat-stop").click()
    playwright.expect(page.locator("#chat-status")).to_contain_text("stopped")
    playwright.expect(page.locator("#chat-log .said.writing")).to_have_count(0)
    answer = page.locator("#chat-log .said.assistant p").text_content()
    assert 5 < len(answer) < 160
    playwright.expect(page.locator(".only-heard")).to_have_text(f"The model answered: {answer}")
    tab(page, "Generate")
    set_slider(page, "#tokens", 5)
    tab(page, "Chat")
    speak(page, "Go on")
    playwright.expect(page.locator("#chat-status")).to_contain_text("5 tokens")
    assert answer in "".join(page.locator("#chat-tokens .token.prompt").all_text_contents())


def test_a_model_without_a_template_says_so_in_place_of_a_chat(page, served_run, tmp_path):
    tab(page, "Chat")
    playwright.expect(page.locator("#no-chat")).to_contain_text("was not tuned on conversations")
    assert not page.locator("#message").is_visible()
    folder = served_run[1].parent / "hostile" / "best"
    model, _ = load_model(served_run[1].parent / "talks" / "best")
    save_model(folder, model, chat_tokenizer("{% for ![x](http://198.51.100.1/p.png) <b>"))
    choose(page, "#model", str(folder))
    page.locator("#load").click()
    playwright.expect(page.locator("#no-chat")).to_contain_text("Nobody can talk with this model")
    assert page.locator("#no-chat img, #no-chat b").count() == 0
    assert not page.locator("#message").is_visible()


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
    playwright.expect(page.locator(".only-heard")).to_contain_text("there is no alice/none")
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
    playwright.expect(page.locator("#look-panel .choice").first).to_be_visible()
    page.locator("#look-text textarea").fill("or not to be" + HOSTILE)
    page.locator("#look").click()
    playwright.expect(page.locator("#surprise .token")).to_have_count(len("or not to be" + HOSTILE))
    playwright.expect(page.locator("#surprise-figures")).to_contain_text("bits per character")
    page.locator("#surprise .token").nth(4).click()
    playwright.expect(page.locator("#look-panel .panel-title")).to_contain_text("token 5")
    page.locator("#look-panel .att").nth(3).focus()
    playwright.expect(page.locator("#surprise .token-text")).to_have_class(re.compile("lit"))
    tab(page, "Tokenizer")
    playwright.expect(page.locator("#pieces .piece")).to_have_count(len("or not to be" + HOSTILE))
    tab(page, "Samplers")
    playwright.expect(page.locator("#next .bar").first).to_be_visible()
    tab(page, "All attention maps")
    playwright.expect(page.locator("#attention .maps button")).to_have_count(4)
    page.locator("#attention .maps button").nth(3).click()
    playwright.expect(page.locator("#attention h4")).to_have_text("Layer 2, head 2")
    tab(page, "Logit lens")
    playwright.expect(page.locator("#lens tbody tr")).to_have_count(3)


def test_the_experts_of_a_mixture(page, served_run):
    tab(page, "Look inside")
    playwright.expect(page.locator("#look-panel .choice").first).to_be_visible()
    playwright.expect(page.get_by_role("tab", name="Experts", exact=True)).to_be_hidden()
    choose(page, "#model", str(served_run[1].parent / "experts" / "best"))
    page.locator("#load").click()
    playwright.expect(page.locator("#facts")).to_contain_text("experts")
    tab(page, "Experts")
    page.locator("#look-text textarea").fill("or not to be")
    page.locator("#look").click()
    playwright.expect(page.locator("#experts tbody tr")).to_have_count(2)
    cells = page.locator("#experts tbody tr").first.locator("td")
    playwright.expect(cells).to_have_count(len("or not to be"))
    playwright.expect(cells.first).to_have_text(re.compile(r"^[123] [123]$"))
    playwright.expect(cells.first).to_have_attribute(
        "title", re.compile(r"^o, layer 1: \d+ % expert [123], \d+ % expert [123]$")
    )


def test_training_plays_and_a_step_can_be_used(page):
    tab(page, "Training")
    sample = page.locator("#sample")
    playwright.expect(sample).to_have_text(f"sample 1000 {HOSTILE}")
    playwright.expect(page.locator("#training .chart").first).to_be_visible()
    named = page.locator("#training .floor-name")  # in the chart of the loss alone
    playwright.expect(named).to_have_text("entropy of the text, the best possible: 0.277")
    playwright.expect(page.locator("#training line.floor")).to_have_count(1)
    slider = page.locator("#step")
    slider.focus()
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    playwright.expect(sample).to_have_text(f"sample 500 {HOSTILE}")
    playwright.expect(page.locator("#step-facts")).to_contain_text("step 500")
    playwright.expect(page.locator("#use-step")).to_be_disabled()
    page.locator("#training .play").click()
    playwright.expect(sample).to_have_text(f"sample 1000 {HOSTILE}")
    playwright.expect(page.locator("#training .play")).to_contain_text("Play")
    playwright.expect(page.locator("#use-step")).to_be_enabled()
    growth = page.locator("#growth")
    playwright.expect(growth.locator(".att")).to_have_count(4)
    playwright.expect(growth.locator(".token")).to_have_text(["a", "<b>", "c"])
    growth.locator(".att").nth(0).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    playwright.expect(growth.locator("h3")).to_have_text("Where layer 2, head 1 looks")
    growth.locator(".play").click()
    playwright.expect(page.locator("#training .play")).to_contain_text("Pause")
    playwright.expect(growth.locator(".figures-line")).to_have_text("step 500")
    playwright.expect(growth.locator(".hint").last).to_contain_text("50 % of its attention")
    playwright.expect(growth.locator(".figures-line")).to_have_text("step 1,000")
    playwright.expect(growth.locator(".play")).to_contain_text("Play")
    playwright.expect(growth.locator(".hint").last).to_contain_text("100 % of its attention")
    page.locator("#use-step").click()
    playwright.expect(page.locator("#facts")).to_contain_text("mine/last")
    playwright.expect(page.locator("#output")).to_be_visible()


def test_compare_best_and_last(page):
    tab(page, "Compare")
    playwright.expect(page.locator("#model-B input")).to_have_value(re.compile("/last$"))
    page.locator("#compare").click()
    for side in "ab":
        playwright.expect(page.locator(f"#status-{side}")).to_contain_text("asked for")
    assert page.locator("#output-a .mark").count() == page.locator("#output-b .mark").count() == 1
    assert page.locator("#output-a .differs").count() > 1
    playwright.expect(page.locator("#reread-note")).to_contain_text("as B reads it")
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
    (run / "metrics.jsonl").touch()  # it was written when the app was started: how long ago that is does not count
    tab(page, "Training")
    sample = page.locator("#sample")
    playwright.expect(sample).to_have_text(re.compile("^sample 1000"))
    (run / "samples" / "step-001250.txt").write_text("it went on", encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 1250, "val_loss": 0.5}\n')
    playwright.expect(sample).to_have_text("it went on")
    playwright.expect(page.locator("#step-facts")).to_contain_text("step 1,250 of 2,000 · ")
    playwright.expect(page.locator("#training .live")).to_contain_text("step 1,250 of 2,000")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_does_not_scroll_sideways(browser, served, scheme):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.set_default_timeout(WAIT)
    page.goto(served)
    page.locator("#output .token").first.wait_for()
    place = page.locator("#output .token").nth(20).bounding_box()
    assert place["y"] + place["height"] < 844, "the text is on the first screen"
    for name in TABS:
        inner = page.get_by_role("tab", name=name, exact=True)
        if not inner.count():  # there is no room for all of them
            page.get_by_label("More tabs").first.click()
            inner = page.locator(".overflow-dropdown").first.get_by_text(name, exact=True)
        inner.click()
        page.wait_for_timeout(500)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{name} is {width} wide"
    page.close()
