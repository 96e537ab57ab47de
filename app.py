"""The app: loads any GPT of this project by name or folder, writes with it, and shows what happens inside.

    python app.py                              # the newest model of your runs (out/), else a tiny one made on the spot
    python app.py --model out/quickstart/best  # a folder
    python app.py --model user/name@step-000500

As a Space it needs nothing but this file, nanogpt_hub/ and requirements.txt; the variable NANOGPT_REPO names its model.
This file only places things on the page. What they do is in nanogpt_hub/playground.py, what the page draws by itself
in nanogpt_hub/page/.
"""

import argparse
import functools
import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is: threads that spin for long starve each other

import gradio as gr
import pandas as pd
import torch

from nanogpt_hub.engine.select import preparation
from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.playground import views
from nanogpt_hub.playground.api import Api
from nanogpt_hub.playground.session import Playground, Writing, explain
from nanogpt_hub.runs import CURVES, Run
from nanogpt_hub.sampling import SamplingConfig

PAGE = Path(__file__).parent / "nanogpt_hub" / "page" / "static"
MODEL, LOAD, LIGHT = "model", "load", "light"  # what waits for the same turn: computing, loading, everything else
# Nothing on the page may come from elsewhere, whatever the text of a model or a card asks for.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'"
)
GREY = dict(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")  # the default is faint
THEME = gr.themes.Default(primary_hue="orange").set(
    **GREY, block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400"
)
DOWNLOAD = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "generation.json";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


# ---- around every function that the page or a client calls -----------------------------------------------------------


def speaks(playground: Playground, function: Callable) -> Callable:
    """The function with its errors as sentences. Neither page nor client ever sees a stack trace."""

    def sentence(error: Exception) -> gr.Error:
        return gr.Error(explain(error, playground), print_exception=not isinstance(error, ValueError | OSError))

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise sentence(error) from error

    @functools.wraps(function)
    def stream(*args, **kwargs):
        try:
            yield from function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise sentence(error) from error

    return stream if inspect.isgeneratorfunction(function) else call


def view(name: str, **options) -> gr.HTML:
    """A part of the page that nanogpt_hub/page/static/views.js draws from JSON."""
    return gr.HTML(
        html_template=f'<div class="view {name}"></div>',
        js_on_load=f'drawView("{name}", element, props, watch)',
        apply_default_css=False,
        **options,
    )


def says(text: str) -> gr.Markdown:
    """A plain sentence or two beside a thing."""
    return gr.Markdown(text, elem_classes="says")


class Page:
    """What the parts of the page share: the playground, the model in use, and how to wire an event."""

    def __init__(self, playground: Playground, workers: int):
        self.playground = playground
        self.turns = {MODEL: workers, LOAD: 2, LIGHT: 8}
        self.limits = playground.limits
        self.place = gr.State(None)  # Resolved: where this visitor's model is
        self.writing = gr.State(None, time_to_live=3600)  # Writing: the last generation

    def on(self, listen: Callable, function: Callable | None, inputs=None, outputs=None, turn: str = LIGHT, **options):
        """An event whose errors are sentences, which waits its turn, and which is no public endpoint."""
        limit = self.turns[turn]
        options = {"show_progress": "minimal", "api_visibility": "private", **options}
        return listen(
            speaks(self.playground, function), inputs, outputs, concurrency_id=turn, concurrency_limit=limit, **options
        )


# ---- above the tabs: which model -------------------------------------------------------------------------------------


def model_bar(page: Page) -> SimpleNamespace:
    """The fields that name a model, and the line of facts about the one in use."""
    with gr.Row(equal_height=True, elem_id="model-bar"):
        name = gr.Dropdown(
            page.playground.names(), value=page.playground.default, allow_custom_value=True, label="Model",
            info="a name on the Hugging Face Hub, such as user/name, or one from the list",
            scale=5, min_width=220, elem_id="model",
        )  # fmt: skip
        revision = gr.Dropdown(
            [], value="", allow_custom_value=True, label="Revision", scale=3, min_width=220, elem_id="revision",
            info="a branch, a tag such as step-000500, or a commit; empty for main",
        )  # fmt: skip
        load = gr.Button("Load", variant="primary", scale=1, min_width=90, elem_id="load")
        if os.environ.get("OAUTH_CLIENT_ID"):
            gr.LoginButton(scale=1, min_width=140)
    chips = view("chips", elem_id="facts")
    return SimpleNamespace(name=name, revision=revision, load=load, chips=chips)


def secret(token: gr.OAuthToken | None) -> str | None:
    return token.token if token else None


# ---- Generate --------------------------------------------------------------------------------------------------------

FIELDS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")


def sampling_fields(page: Page) -> tuple[list[gr.components.Component], gr.Checkbox]:
    """The controls of `FIELDS`, in that order, and the choice of weights of 8 bits."""
    n = gr.Slider(
        1, page.limits.new_tokens, 160, step=1, label="New tokens", info="how much to write", elem_id="tokens"
    )
    temperature = gr.Slider(
        0, 2, 0.8, step=0.01, label="Temperature", elem_id="temperature",
        info="below 1 it plays safe, above 1 it takes risks; 0 always takes the likeliest token",
    )  # fmt: skip
    top_k = gr.Slider(
        0, 500, 200, step=1, label="Top-k", info="choose among the k likeliest tokens only; 0 for all", elem_id="top-k"
    )
    with gr.Accordion("More", open=False):
        top_p = gr.Slider(
            0, 1, 1, step=0.01, label="Top-p", info="choose among the likeliest that together have this probability"
        )
        min_p = gr.Slider(
            0, 1, 0, step=0.01, label="Min-p", info="leave out what is less likely than this share of the likeliest"
        )
        penalty = gr.Slider(
            1, 2, 1, step=0.01, label="Repetition penalty", info="above 1, tokens already there become less likely"
        )
        seed = gr.Number(
            None, precision=0, minimum=0, label="Seed", elem_id="seed",
            info="the same seed gives the same text; empty for a new one each time",
        )  # fmt: skip
        stop = gr.Textbox(
            "", lines=2, label="Stop strings", info="one a line; the text ends before the first that comes up"
        )
        int8 = gr.Checkbox(
            False, label="Weights of 8 bits", elem_id="int8", visible=page.playground.device == "cpu",
            info="large models write about twice as fast on a CPU, and the text may differ slightly; "
            "small ones gain nothing",
        )  # fmt: skip
    return [n, temperature, top_k, top_p, min_p, penalty, seed, stop], int8


def generate_tab(page: Page) -> SimpleNamespace:
    """Prompt, settings, the text as it is written, and ways to take it along."""
    says(
        "The model reads the prompt, gives every token of its vocabulary a probability, and one is drawn; then it "
        "reads again. **The stronger the colour, the less the model expected the token.** Choose one to see what else "
        "it could have been."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            prompt = gr.Textbox(
                label="Prompt", lines=4, max_lines=12, max_length=page.limits.prompt_chars, elem_id="prompt"
            )
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", min_width=90, elem_id="generate")
                stop = gr.Button("Stop", min_width=70, elem_id="stop")
                more = gr.Button("Continue", min_width=90, elem_id="continue")
            fields, int8 = sampling_fields(page)
        with gr.Column(scale=3, min_width=280):
            status = gr.Markdown("", elem_id="status")
            tokens = view("tokens", elem_id="output")
            extras = take_along()
    parts = SimpleNamespace(prompt=prompt, int8=int8, fields=fields, status=status, tokens=tokens, extras=extras)
    shown = [page.writing, tokens, status]
    options = dict(turn=MODEL, show_progress_on=status)

    def run(place: Resolved, prompt: str, int8: bool, *values) -> Iterator[tuple]:
        settings = page.playground.settings(place, **dict(zip(FIELDS, values, strict=True)))
        for writing in page.playground.write(place, prompt or "", settings, int8):
            yield writing, writing.view(), writing.status()

    def go_on(writing: Writing | None, prompt: str) -> str:
        """What was written becomes part of the prompt; of a long one the end, which is all that counts."""
        return ((writing.prompt + writing.text) if writing else (prompt or ""))[-page.limits.prompt_chars :]

    inputs = [page.place, prompt, int8, *fields]
    started = [page.on(functools.partial(gr.on, [generate.click, prompt.submit]), run, inputs, shown, **options)]
    finish = functools.partial(wire_extras, page, extras)
    finish(started[0].then)
    moved = page.on(more.click, go_on, [page.writing, prompt], prompt)
    started.append(page.on(moved.success, run, inputs, shown, **options))
    finish(started[1].then)
    parts.run, parts.shown, parts.finish, parts.stop, parts.started = run, shown, finish, stop, started
    return parts


def take_along() -> SimpleNamespace:
    """Plain text, link, code and file of the last generation."""
    with gr.Accordion("Take it with you", open=False, elem_id="extras"):
        text = gr.Textbox(
            label="Plain text", lines=4, max_lines=12, interactive=False, buttons=["copy"], elem_id="plain"
        )
        link = gr.Textbox(
            label="Link", info="opens this app with the same model, prompt, settings and seed: the same text comes out",
            interactive=False, buttons=["copy"], max_lines=2, elem_id="link",
        )  # fmt: skip
        python = gr.Code(label="The same in Python", language="python", interactive=False, elem_id="python")
        client = gr.Code(label="The same from this app's API", language="python", interactive=False)
        download = gr.Button("Download as JSON, with all alternatives", size="sm", elem_id="download")
        data = gr.Textbox(visible="hidden", elem_id="json")
        download.click(None, data, None, js=DOWNLOAD, api_visibility="private")
    return SimpleNamespace(text=text, link=link, python=python, client=client, data=data)


def wire_extras(page: Page, extras: SimpleNamespace, then: Callable) -> None:
    """Fills `take_along` from the last generation, once it ended or was stopped."""

    def fill(writing: Writing | None, request: gr.Request) -> tuple:
        if writing is None:
            return ("",) * 5
        base, playground = address(request), page.playground
        link, client = playground.link(writing, base), playground.client_snippet(writing, base)
        return writing.prompt + writing.text, link, playground.snippet(writing), client, writing.as_json()

    outputs = [extras.text, extras.link, extras.python, extras.client, extras.data]
    page.on(then, fill, page.writing, outputs, show_progress="hidden")


def address(request: gr.Request) -> str:
    """Where visitors find this app."""
    host = os.environ.get("SPACE_HOST")
    return f"https://{host}/" if host else str(request.request.base_url)


# ---- Look inside -----------------------------------------------------------------------------------------------------


def look_tab(page: Page, generate: SimpleNamespace, tab: gr.Tab) -> SimpleNamespace:
    """One text, and five ways to look at what the model makes of it."""
    says(
        "Give the model a text and watch it read. Everything here is computed from this one model, nothing is made up."
    )
    with gr.Row(equal_height=False):
        text = gr.Textbox(
            label="Text", lines=2, max_lines=8, max_length=page.limits.text_chars, scale=6, elem_id="look-text"
        )
        look = gr.Button("Look", variant="primary", scale=1, min_width=90, elem_id="look")
    shown = text_views(page.limits.look_tokens)
    playground = page.playground

    def run(place: Resolved, text: str, *values) -> list[Any]:
        text = text or playground.sample_text(place)
        settings = playground.settings(place, **dict(zip(FIELDS, values, strict=True)))
        next_tokens = views.next_tokens_view(playground.next_tokens(place, text, settings))
        inside, lens, end = playground.look(place, text)
        score = playground.score(place, text)
        note = "" if end == text else f"Maps show the last {len(inside.ids)} tokens of the text."
        says = [note, views.surprise_says(score)]
        drawn = [views.attention_view(inside), views.lens_view(lens, inside), views.surprise_view(score)]
        return [text, next_tokens, *drawn, views.pieces_view(playground.cut(place, text)), *says]

    inputs, outputs = [page.place, text, *generate.fields], [text, *shown]
    page.on(
        functools.partial(gr.on, [look.click, text.submit]), run, inputs, outputs, turn=MODEL, show_progress_on=text
    )
    return SimpleNamespace(tab=tab, text=text, run=run, inputs=inputs, outputs=outputs)


def text_views(look_tokens: int) -> list[gr.components.Component]:
    """The views of a text, one a tab, and the two sentences that change with it."""
    with gr.Tabs():
        with gr.Tab("Next token"):
            says(
                "What the model expects after the text, and what each sampler of the Generate tab makes of it. ✂ marks "
                "what a sampler cut. *Undecided by n bits* is the entropy: 0 when sure, 1 for a toss between two."
            )
            next_tokens = view("bars", elem_id="next")
        with gr.Tab("Attention"):
            says(
                "In each layer every token looks back at the tokens before it, in several ways at once: the heads. "
                "Each square is one head; row by row it shows where each token looks, the last one below. Choose a "
                f"head, then a token. Of long texts the last {look_tokens} tokens are shown."
            )
            note = gr.Markdown("")
            attention = view("attention", elem_id="attention")
        with gr.Tab("Logit lens"):
            says(
                "What would the model answer if it ended after an earlier layer? Each cell is the likeliest next token "
                "at that depth and position, in a stronger colour where it is surer. The last row is the real answer; "
                "where an earlier layer already has it, it is **underlined**."
            )
            lens = view("lens", elem_id="lens")
        with gr.Tab("Surprise"):
            says(
                "How many bits each token costs a reader who expects what the model expects: 0 for what was certain, 1 "
                "for a coin toss. Strong colour is where the model was caught out."
            )
            figures = gr.Markdown("", elem_id="surprise-figures")
            surprise = view("tokens", elem_id="surprise")
        with gr.Tab("Tokenizer"):
            says("The model never sees letters. The tokenizer cuts the text into tokens; each is a number, its id.")
            pieces = view("pieces", elem_id="pieces")
    return [next_tokens, attention, lens, surprise, pieces, note, figures]


# ---- Training --------------------------------------------------------------------------------------------------------


def training_tab(page: Page, tab: gr.Tab) -> SimpleNamespace:
    """The curves of a run, and what the model wrote on the way."""
    says(
        "Loss is how wrong the model's guesses are, in nats per token: lower is better. *Training* is text it learns "
        "from, *validation* text it never saw; when the two part, it has begun to learn by heart."
    )
    runs = gr.Dropdown(
        [],
        multiselect=True,
        max_choices=2,
        label="Runs",
        info="one, or two to compare",
        elem_id="runs",
        allow_custom_value=True,
    )
    plot = dict(
        x="step", y="value", color="curve", color_title=" ", x_title="step", tooltip="all", buttons=["fullscreen"]
    )
    loss = gr.LinePlot(label="Loss", y_title="nats per token", elem_id="loss", **plot)
    with gr.Row():
        rate = gr.LinePlot(label="Learning rate", y_title="learning rate", **plot)
        speed = gr.LinePlot(label="Throughput", y_title="tokens/s", **plot)
    says("What the model wrote from the same prompt at each kept step. Move the slider and watch it learn.")
    with gr.Row():
        step = gr.Slider(0, 1, 0, step=1, label="Step", scale=4, elem_id="step")
        use = gr.Button("Generate with this one", scale=1, min_width=180, elem_id="use-step")
    facts = gr.Markdown("", elem_id="step-facts")
    sample = gr.Textbox(label="Sample", lines=8, max_lines=16, interactive=False, elem_id="sample")
    timer = gr.Timer(3, active=False)
    parts = SimpleNamespace(tab=tab, runs=runs, plots=[loss, rate, speed], step=step, use=use, timer=timer)
    parts.facts, parts.sample = facts, sample
    wire_training(page, parts)
    return parts


def wire_training(page: Page, parts: SimpleNamespace) -> None:
    """Moving the slider shows another step; new runs and a timer bring new curves, and the slider follows the run."""
    playground = page.playground
    seen = gr.State(0)  # the last step that the slider was told of
    step_inputs, step_outputs = [page.place, parts.runs, parts.step], [parts.facts, parts.sample, parts.use]
    at_step = functools.partial(show_step, playground)

    def choices(place: Resolved) -> tuple[Any, int, int]:
        names = playground.training_names(place)
        return gr.Dropdown(names, value=names[:1]), 0, 0

    def pick(place: Resolved, names: list[str], step: float) -> list[Any]:
        run = playground.training(place, names)[0]
        name, revision = playground.model_at(place, run, int(step), playground.revisions(place)) or ("", "")
        return [name, revision, gr.Tabs(selected="generate")]

    def use_step(bar: SimpleNamespace) -> Any:
        return page.on(parts.use.click, pick, step_inputs, [bar.name, bar.revision, page.tabs])

    refresh = functools.partial(show_runs, playground)
    inputs, outputs = [*step_inputs, seen], [*parts.plots, parts.step, seen, parts.timer]
    quiet = dict(show_progress="hidden", trigger_mode="always_last")
    page.on(parts.step.change, at_step, step_inputs, step_outputs, **quiet)
    page.on(parts.timer.tick, refresh, inputs, outputs, **quiet)
    other = page.on(page.place.change, choices, page.place, [parts.runs, parts.step, seen], **quiet)
    for listen in (other.success, parts.runs.input, parts.tab.select):
        shown = page.on(listen, refresh, inputs, outputs, **quiet)
        page.on(shown.success, at_step, step_inputs, step_outputs, **quiet)
    parts.use_step = use_step


def show_runs(playground: Playground, place: Resolved, names: list[str], step: float, seen: int) -> list[Any]:
    """Curves and slider of the chosen runs. A slider that stood at the end follows a run that goes on."""
    runs = playground.training(place, names)
    steps = [*runs[0].samples] if runs else []
    last = steps[-1] if steps else 0
    slider = gr.skip()  # a visitor may be moving it
    if last != seen or step not in steps:
        at = int(step) if step in steps and step != seen else last
        first, spacing = min(steps, default=0), views.spacing(steps)
        slider = gr.Slider(first, max(1, last), at, step=spacing, interactive=len(steps) > 1)
    frames = [frame(runs, keys) for keys in (CURVES, {"learning_rate": ""}, {"tokens_per_second": ""})]
    plots = [gr.LinePlot(data, visible=len(data) > 0) for data in frames]
    return [*plots, slider, last, gr.Timer(active=any(run.going_on() for run in runs))]


def show_step(playground: Playground, place: Resolved, names: list[str], step: float) -> tuple[str, str, Any]:
    """What was measured at the kept step that is nearest, what the model wrote there, and whether it can be loaded."""
    runs = playground.training(place, names)
    if not runs:
        return "There is no training log beside this model.", "", gr.Button(interactive=False)
    run = runs[0]
    near = min(run.samples, key=lambda kept: abs(kept - step), default=int(step))
    known = playground.model_at(place, run, near, playground.revisions(place)) is not None
    return views.step_says(run, near, known), run.sample(near), gr.Button(interactive=known)


def frame(runs: list[Run], keys: dict[str, str]) -> pd.DataFrame:
    """Curves as the plots take them: a row for each point."""
    rows = []
    for run in runs:
        for key, label in keys.items():
            name = ": ".join([label] * bool(label) + [run.name] * (len(runs) > 1 or not label))
            rows += [(step, value, name) for step, value in run.curve(key)]
    return pd.DataFrame(rows, columns=["step", "value", "curve"])


# ---- Compare ---------------------------------------------------------------------------------------------------------


def compare_tab(page: Page, tab: SimpleNamespace) -> SimpleNamespace:
    """Two models, or two moments of one, on the same prompt with the same seed."""
    says(
        "Two models, or two revisions of one, write after the same prompt with the same seed and the settings of the "
        "Generate tab. The first token in which they part is framed; the table shows what each expected right "
        "after the prompt."
    )
    sides = []
    with gr.Row():
        for letter in "AB":
            with gr.Column(min_width=280):
                free = dict(value="", allow_custom_value=True)
                name = gr.Dropdown(page.playground.names(), label=f"Model {letter}", elem_id=f"model-{letter}", **free)
                revision = gr.Dropdown([], label="Revision", elem_id=f"revision-{letter}", **free)
                sides.append([name, revision])
    prompt = gr.Textbox(label="Prompt", lines=2, max_length=page.limits.prompt_chars, elem_id="compare-prompt")
    with gr.Row():
        start = gr.Button("Compare", variant="primary", elem_id="compare")
        stop = gr.Button("Stop")
    shown = []
    with gr.Row():
        for letter in "ab":
            with gr.Column(min_width=280):
                shown += [gr.Markdown("", elem_id=f"status-{letter}"), view("tokens", elem_id=f"output-{letter}")]
    apart = gr.Markdown("", elem_id="apart")
    bars = view("bars", elem_id="divergence")
    parts = SimpleNamespace(sides=sides, prompt=prompt, start=start, stop=stop, outputs=[*shown, apart, bars])
    wire_compare(page, parts, tab)
    return parts


def wire_compare(page: Page, parts: SimpleNamespace, tab: SimpleNamespace) -> None:
    playground = page.playground

    def find(name_a: str, revision_a: str, name_b: str, revision_b: str, token: gr.OAuthToken | None) -> list[Resolved]:
        sides = ((name_a, revision_a), (name_b, revision_b))
        return [playground.find(name, revision, secret(token)) for name, revision in sides]

    def run(a: Resolved, b: Resolved, prompt: str, *values) -> Iterator[list]:
        settings = playground.settings(a, **dict(zip(FIELDS, values, strict=True)))
        says, bars = expectations(playground, a, b, prompt)
        for one, two in playground.compare(a, b, prompt, settings):
            mark = playground.parting(one, two)
            same = " **They wrote the same, token for token.**" if one.finish and two.finish and mark is None else ""
            yield [one.status(rate=False), one.view(mark), two.status(rate=False), two.view(mark), says + same, bars]

    def suggest(place: Resolved, prompt: str) -> list[Any]:
        """The model in use against something that it is worth comparing with."""
        names = playground.revisions(place)
        (name, revision), first = playground.rival(place, names), gr.Dropdown(names, value=place.revision)
        return [playground.name_of(place), first, name, gr.Dropdown(names, value=revision), prompt]

    parts.prompt_from, parts.suggest = tab.prompt, suggest
    parts.fields = [*parts.sides[0], *parts.sides[1], parts.prompt]
    places = [gr.State(None), gr.State(None)]
    found = page.on(parts.start.click, find, [*parts.sides[0], *parts.sides[1]], places, turn=LOAD)
    inputs = [*places, parts.prompt, *tab.fields]
    started = page.on(found.success, run, inputs, parts.outputs, turn=MODEL, show_progress_on=parts.outputs[0])
    parts.stop.click(None, None, None, cancels=[found, started], api_visibility="private")


def expectations(playground: Playground, a: Resolved, b: Resolved, prompt: str) -> tuple[str, dict | None]:
    """What the two expect right after the prompt, in a sentence and as bars; the sentence alone if that cannot be."""
    try:
        found = playground.divergence(a, b, prompt)
    except ValueError as error:
        return explain(error, playground), None
    return views.divergence_says(found), views.divergence_view(found, ("A", "B"))


# ---- Model -----------------------------------------------------------------------------------------------------------


def model_tab(page: Page) -> SimpleNamespace:
    """What the model is, where it comes from, and how to take it elsewhere."""
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            card = gr.Markdown("", elem_id="card", sanitize_html=True)
        with gr.Column(scale=2, min_width=280):
            says("Where the parameters are: every one is a number that training has set.")
            parts = view("bars", elem_id="parts")
            says("Where it comes from, as far as its run told.")
            provenance = view("table", elem_id="provenance")
            says("Its files. Weights are safetensors: numbers, no code.")
            files = view("table", elem_id="files")
    load = gr.Code(label="Load it elsewhere", language="python", interactive=False)
    with gr.Accordion("config.json", open=False):
        config = gr.JSON(show_label=False)
    says(f"**A page like this for your own model:** {how_to_copy()}, and set its variable `NANOGPT_REPO` to its name.")
    playground = page.playground

    def fill(place: Resolved) -> list[Any]:
        table = [{"columns": [], "rows": rows} for rows in (playground.provenance(place), playground.files(place))]
        drawn = [playground.card(place), playground.parts(place), *table]
        return [*drawn, playground.load_snippet(place), playground.config(place)]

    return SimpleNamespace(fill=fill, outputs=[card, parts, provenance, files, load, config])


def how_to_copy() -> str:
    space = os.environ.get("SPACE_ID")
    if space:
        return f"[duplicate this Space](https://huggingface.co/spaces/{space}?duplicate=true)"
    return "run `nanogpt-hub space user/demo --model user/name`, or duplicate any Space that was made that way"


# ---- the page as a whole ---------------------------------------------------------------------------------------------


def model_update(
    page: Page, sliders: list[gr.Slider], place: Resolved, token: str | None, query: dict[str, str]
) -> list[Any]:
    """All that changes with the model: `loaded_parts`. What a link says wins over the model's own defaults."""
    playground = page.playground
    given = {name: query[name] for name in ("prompt", *FIELDS) if name in query}
    prompt = given.pop("prompt", playground.example_prompt(place))
    int8 = bool(number("int8", query.get("int8", "0")))
    settings = playground.settings(place, **{k: v if k == "stop" else number(k, v) for k, v in given.items()})
    named = zip(sliders, FIELDS[:-2], strict=True)  # seed and stop are no sliders
    values = [fitted(slider, getattr(settings, name) or 0) for slider, name in named]
    seed = settings.seed if "seed" in given else None
    revision = gr.Dropdown(playground.revisions(place, token), value=place.revision)
    shown = [playground.name_of(place), revision, playground.chips(place)]
    box = gr.Checkbox(int8, visible=int8 or playground.device == "cpu")  # a link ticks it anywhere
    return [place, *shown, prompt, box, *values, seed, "\n".join(settings.stop)]


def fitted(slider: gr.Slider, value: float) -> Any:
    """The value for a slider, which is made longer for a value beyond its ends."""
    if slider.minimum <= value <= slider.maximum:
        return value
    return gr.Slider(min(slider.minimum, value), max(slider.maximum, value), value)


def number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} is {text[:40]!r} in this link; it must be a number") from None


def wire_model(page: Page, bar: SimpleNamespace, tab: SimpleNamespace, use_step: Callable) -> None:
    """What happens when the page opens, on Load, and on the Training tab's button."""
    playground = page.playground
    loaded = [page.place, bar.name, bar.revision, bar.chips, tab.prompt, tab.int8, *tab.fields]
    wanted = gr.State(False)  # a link asks for its text, where other visits begin with the example
    update = functools.partial(model_update, page, tab.fields[:-2])

    def open_page(request: gr.Request, token: gr.OAuthToken | None) -> list[Any]:
        """What the link asks for, else the default, else the tiny model: a page always opens."""
        query = dict(request.query_params)
        asked = (query.get("repo", ""), query.get("rev", ""), query)
        for name, revision, wishes in (asked, ("", "", {}), ("tiny", "", {})):
            try:
                place = playground.find(name, revision, secret(token))
                return [*update(place, secret(token), wishes), "prompt" in wishes]
            except (ValueError, OSError) as error:
                gr.Warning(f"{explain(error, playground)}. Here is another model.")
        raise ValueError("not even the built-in model could be made; see the app's log")

    def load(name: str, revision: str, token: gr.OAuthToken | None) -> list[Any]:
        place = playground.find(name, revision, secret(token))
        return [*update(place, secret(token), {}), False]

    def show(wanted: bool, place: Resolved, prompt: str, *values) -> Iterator[tuple]:
        if wanted:
            yield from tab.run(place, prompt, *values)
        else:
            writing = playground.example(place)
            yield writing, writing.view(), writing.status()

    outputs, options = [*loaded, wanted], dict(turn=LOAD, show_progress_on=bar.chips)
    inputs = [wanted, page.place, tab.prompt, tab.int8, *tab.fields]
    for event in (
        page.on(page.blocks.load, open_page, None, outputs, **options),
        page.on(bar.load.click, load, [bar.name, bar.revision], outputs, **options),
        page.on(use_step(bar).success, load, [bar.name, bar.revision], outputs, **options),
    ):
        shown = page.on(event.success, show, inputs, tab.shown, turn=MODEL, show_progress_on=tab.status)
        tab.finish(shown.then)
        tab.started.append(shown)
    bar.name.input(None, None, bar.revision, js="() => ''", api_visibility="private")  # it belongs to the old name


def wire_stop(page: Page, tab: SimpleNamespace) -> None:
    """Stop ends whatever is being written; the work itself ends at the next token."""
    stopped = tab.stop.click(None, None, None, cancels=tab.started, api_visibility="private")
    tab.finish(stopped.then)


def wire_tabs(page: Page, look: SimpleNamespace, compare: SimpleNamespace, model: SimpleNamespace) -> None:
    """What the tabs show of a model, once it is loaded. What takes long waits until somebody looks."""
    looked = gr.State(None)  # the place that the Look inside tab shows

    def look_first(looked: Resolved | None, place: Resolved, text: str, *values) -> list[Any]:
        if place is None or looked == place:
            return [gr.skip()] * (1 + len(look.outputs))
        return [place, *look.run(place, "", *values)]

    def look_again(looked: Resolved | None, *inputs) -> list[Any]:
        return look_first(looked, *inputs) if looked else [gr.skip()] * (1 + len(look.outputs))

    for listen, function in ((look.tab.select, look_first), (page.place.change, look_again)):
        page.on(
            listen, function, [looked, *look.inputs], [looked, *look.outputs], turn=MODEL, show_progress_on=look.text
        )
    quiet = dict(show_progress="hidden")
    page.on(page.place.change, model.fill, page.place, model.outputs, **quiet)
    page.on(page.place.change, compare.suggest, [page.place, compare.prompt_from], compare.fields, **quiet)


def create_app(playground: Playground, workers: int = 1) -> gr.Blocks:
    """The page and its API. workers: how many requests compute at once; more gain nothing on a few cores."""
    with gr.Blocks(title="GPT playground", analytics_enabled=False) as blocks:
        page = Page(playground, workers)
        page.blocks = blocks
        gr.Markdown("# GPT playground\nWrite with a small GPT, and look at what happens inside.", elem_id="title")
        bar = model_bar(page)
        with gr.Tabs() as page.tabs:
            with gr.Tab("Generate", id="generate"):
                generate = generate_tab(page)
            with gr.Tab("Look inside") as tab:
                look = look_tab(page, generate, tab)
            with gr.Tab("Training") as tab:
                training = training_tab(page, tab)
            with gr.Tab("Compare"):
                compare = compare_tab(page, generate)
            with gr.Tab("Model"):
                model = model_tab(page)
        wire_model(page, bar, generate, training.use_step)
        wire_stop(page, generate)
        wire_tabs(page, look, compare, model)
        add_api(page)
    return blocks.queue(max_size=page.limits.queue, default_concurrency_limit=4, api_open=True)


def add_api(page: Page) -> None:
    """The public endpoints."""
    api = Api(page.playground)
    for function, turn in ((api.generate, MODEL), (api.next_tokens, MODEL), (api.score, MODEL), (api.info, LOAD)):
        spoken, limit = speaks(page.playground, function), page.turns[turn]
        gr.api(spoken, api_name=function.__name__, concurrency_id=turn, concurrency_limit=limit)


# ---- starting it -----------------------------------------------------------------------------------------------------


def launch(blocks: gr.Blocks, **options) -> tuple:
    """Serves the page. Options are those of gradio's launch."""
    script = (PAGE / "views.js").read_text(encoding="utf-8")
    fixed = dict(
        theme=THEME,
        css_paths=PAGE / "page.css",
        head=f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><script>{script}</script>',
        footer_links=["api", "settings"],
        show_error=False,  # other errors than ours are not for visitors
        run_history=False,
        enable_monitoring=False,
        max_file_size="1kb",
        ssr_mode=False,
    )
    return blocks.launch(**fixed, **options)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A page that loads any GPT of this project and shows what it does.")
    parser.add_argument("--model", default="", help="a folder, or user/name[@revision] on the Hub")
    parser.add_argument("--runs", default="out", help="folder of your training runs (default: out)")
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="0.0.0.0 for the whole network"
    )
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    parser.add_argument("--mcp", action="store_true", help="also serve the API to agents (needs gradio[mcp])")
    return parser.parse_args(argv)


def make_playground(args: argparse.Namespace) -> Playground:
    """The playground that arguments and variables ask for."""
    on_space = bool(os.environ.get("SPACE_ID"))
    name, revision = os.environ.get("NANOGPT_REPO", ""), os.environ.get("NANOGPT_REVISION", "")
    return Playground(
        args.model or (f"{name}@{revision}" if name and revision else name),
        args.runs if Path(args.runs).is_dir() else None,
        allowed=[pattern.strip() for pattern in os.environ.get("NANOGPT_ALLOWED", "*").split(",")],
        any_folder=not on_space and args.host in ("127.0.0.1", "localhost", "::1"),
        on_space=on_space,
        device=best_device(),
        borrow=gpu_lender(),
    )


def best_device() -> str:
    """Where models run in this process. On ZeroGPU it has no GPU of its own."""
    if os.environ.get("SPACES_ZERO_GPU"):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def gpu_lender() -> Callable | None:
    """On a ZeroGPU Space, the decorator that runs a generator in a process that has a GPU; elsewhere None."""
    if not os.environ.get("SPACES_ZERO_GPU") or importlib.util.find_spec("spaces") is None:
        return None
    import spaces

    def seconds(place: Resolved, ids: list[int], config: SamplingConfig) -> int:
        return min(60, 10 + config.max_new_tokens // 20)

    return spaces.GPU(duration=seconds)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    playground = make_playground(args)
    if hasattr(os, "register_at_fork"):  # a GPU is lent to a fork of this process, whose locks may be held for ever
        os.register_at_fork(after_in_child=playground.cache.clear)
    if playground.device == "cpu":
        torch.set_num_threads(max(1, min(4, torch.get_num_threads())))  # small models gain nothing from more
        preparation.poll()
    threading.Thread(target=warm_up, args=(playground,), daemon=True).start()
    workers = int(os.environ.get("NANOGPT_WORKERS", "1"))
    mcp = args.mcp or os.environ.get("NANOGPT_MCP", "") not in ("", "0")
    launch(create_app(playground, workers), server_name=args.host, server_port=args.port, mcp_server=mcp)


def warm_up(playground: Playground) -> None:
    """Loads the first model while the page is built; what goes wrong is said to the first visitor."""
    try:
        playground.example(playground.find())
    except (ValueError, OSError):
        return


if __name__ == "__main__":
    main()
