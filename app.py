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

import gradio as gr
import torch

from nanogpt_hub.generate import SamplingConfig
from nanogpt_hub.hub import Resolved
from nanogpt_hub.playground import Playground, Writing, explain

PAGE = Path(__file__).parent / "nanogpt_hub" / "page"
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
    """A part of the page that nanogpt_hub/page/views.js draws from JSON."""
    return gr.HTML(
        html_template=f'<div class="view {name}"></div>',
        js_on_load=f'drawView("{name}", element, props, watch)',
        **options,
    )


def says(text: str) -> gr.Markdown:
    """A plain sentence or two beside a thing."""
    return gr.Markdown(text, elem_classes="says")


class Page:
    """What the parts of the page share: the playground, the model in use, and how to wire an event."""

    def __init__(self, playground: Playground, workers: int):
        self.playground, self.workers = playground, workers
        self.limits = playground.limits
        self.place = gr.State(None)  # Resolved: where this visitor's model is
        self.writing = gr.State(None, time_to_live=3600)  # Writing: the last generation

    def on(self, listen: Callable, function: Callable | None, inputs=None, outputs=None, turn: str = LIGHT, **options):
        """An event whose errors are sentences, which waits its turn, and which is no public endpoint."""
        limit = {MODEL: self.workers, LOAD: 2, LIGHT: 8}[turn]
        options = {"show_progress": "minimal", "api_visibility": "private", **options}
        return listen(
            speaks(self.playground, function), inputs, outputs, concurrency_id=turn, concurrency_limit=limit, **options
        )


# ---- above the tabs: which model -------------------------------------------------------------------------------------


def model_bar(page: Page) -> SimpleNamespace:
    """The fields that name a model, and the line of facts about the one in use."""
    with gr.Row(equal_height=True, elem_id="model-bar"):
        name = gr.Dropdown(
            page.playground.names(), value=page.playground.default, allow_custom_value=True, label="Model", scale=5,
            info="a name on the Hugging Face Hub, such as user/name, or one from the list", elem_id="model",
        )  # fmt: skip
        revision = gr.Dropdown(
            [], value="", allow_custom_value=True, label="Revision", scale=3, elem_id="revision",
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


def sampling_fields(page: Page) -> list[gr.components.Component]:
    """The controls of `FIELDS`, in that order."""
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
    return [n, temperature, top_k, top_p, min_p, penalty, seed, stop]


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
            fields = sampling_fields(page)
        with gr.Column(scale=3, min_width=280):
            status = gr.Markdown("", elem_id="status")
            tokens = view("tokens", elem_id="output")
            extras = take_along()
    parts = SimpleNamespace(prompt=prompt, fields=fields, status=status, tokens=tokens, extras=extras)
    shown = [page.writing, tokens, status]
    options = dict(turn=MODEL, show_progress_on=status)

    def run(place: Resolved, prompt: str, *values) -> Iterator[tuple]:
        settings = page.playground.settings(place, **dict(zip(FIELDS, values, strict=True)))
        for writing in page.playground.write(place, prompt or "", settings):
            yield writing, writing.view(), writing.status()

    def go_on(writing: Writing | None, prompt: str) -> str:
        """What was written becomes part of the prompt; of a long one the end, which is all that counts."""
        return ((writing.prompt + writing.text) if writing else (prompt or ""))[-page.limits.prompt_chars :]

    inputs = [page.place, prompt, *fields]
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


# ---- the page as a whole ---------------------------------------------------------------------------------------------


def wire_model(page: Page, bar: SimpleNamespace, tab: SimpleNamespace) -> None:
    """What happens when the page opens, and on Load."""
    playground = page.playground
    loaded = [page.place, bar.name, bar.revision, bar.chips, tab.prompt, *tab.fields]
    wanted = gr.State(False)  # a link asked for its text

    def use(place: Resolved, token: str | None, query: dict[str, str] | None = None) -> list[Any]:
        """All that changes with the model. What a link says wins over the model's own defaults."""
        given = {name: query[name] for name in ("prompt", *FIELDS) if name in query} if query else {}
        prompt = given.pop("prompt", playground.example_prompt(place))
        asked = {name: value if name == "stop" else float(value) for name, value in given.items()}
        settings = playground.settings(place, **asked)
        values = [getattr(settings, name) or 0 for name in FIELDS[:-2]]
        revision = gr.Dropdown(playground.revisions(place, token), value=place.revision)
        seed = settings.seed if "seed" in given else None
        return [
            place,
            playground.name_of(place),
            revision,
            playground.chips(place),
            prompt,
            *values,
            seed,
            "\n".join(settings.stop),
        ]

    def open_page(request: gr.Request, token: gr.OAuthToken | None) -> list[Any]:
        query = dict(request.query_params)
        try:
            place = playground.find(query.get("repo", ""), query.get("rev", ""), secret(token))
            return [*use(place, secret(token), query), "prompt" in query]
        except (ValueError, OSError) as error:
            gr.Warning(explain(error, playground) + "; here is another model")
        place = playground.find("" if "repo" in query else "tiny")
        return [*use(place, None), False]

    def load(name: str, revision: str, token: gr.OAuthToken | None) -> list[Any]:
        return use(playground.find(name, revision, secret(token)), secret(token))

    def show(wanted: bool, place: Resolved, prompt: str, *values) -> Iterator[tuple]:
        if wanted:
            yield from tab.run(place, prompt, *values)
        else:
            writing = playground.example(place)
            yield writing, writing.view(), writing.status()

    def first(listen: Callable) -> None:
        shown = page.on(
            listen,
            show,
            [wanted, page.place, tab.prompt, *tab.fields],
            tab.shown,
            turn=MODEL,
            show_progress_on=tab.status,
        )
        tab.finish(shown.then)
        tab.started.append(shown)

    options = dict(turn=LOAD, show_progress_on=bar.chips)
    opened = page.on(page.blocks.load, open_page, None, [*loaded, wanted], **options)
    first(opened.success)
    inputs = [bar.name, bar.revision]
    changed = page.on(bar.load.click, load, inputs, loaded, **options)
    first(changed.success(lambda: False, None, wanted, api_visibility="private").success)
    page.on(bar.name.input, lambda: gr.Dropdown([], value=""), None, bar.revision, show_progress="hidden")


def wire_stop(page: Page, tab: SimpleNamespace) -> None:
    """Stop ends whatever is being written; the work itself ends at the next token."""
    stopped = tab.stop.click(None, None, None, cancels=tab.started, api_visibility="private")
    tab.finish(stopped.then)


def create_app(playground: Playground, workers: int = 1) -> gr.Blocks:
    """The page and its API. workers: how many requests compute at once; more gain nothing on a few cores."""
    with gr.Blocks(title="GPT playground", analytics_enabled=False) as blocks:
        page = Page(playground, workers)
        page.blocks = blocks
        gr.Markdown("# GPT playground\nWrite with a small GPT, and look at what happens inside.", elem_id="title")
        bar = model_bar(page)
        with gr.Tabs(), gr.Tab("Generate", id="generate"):
            tab = generate_tab(page)
        wire_model(page, bar, tab)
        wire_stop(page, tab)
        add_api(page)
    return blocks.queue(max_size=page.limits.queue, default_concurrency_limit=4, api_open=True)


# ---- for programs ----------------------------------------------------------------------------------------------------


def add_api(page: Page) -> None:
    """The public endpoints. They take names, not what the page remembers, and the same limits hold."""
    playground = page.playground

    def generate(
        prompt: str = "", model: str = "", revision: str = "", max_new_tokens: int = 160, temperature: float = 0.8,
        top_k: int = 200, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
        seed: int | None = None, stop: list[str] | None = None,
    ) -> Iterator[dict]:  # fmt: skip
        """Continue a prompt. Streams objects with text, tokens, seed and finish (null until the last one).

        model: a name on the Hugging Face Hub; empty for the app's own. revision: branch, tag or commit.
        max_new_tokens: how many tokens to write. temperature: 0 for greedy. top_k: 0 for all tokens. seed: the same
        seed gives the same text; null draws one. stop: the text ends before the first of these strings.
        """
        place = playground.find(model, revision)
        asked = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        asked |= dict(repetition_penalty=repetition_penalty, seed=seed, stop=stop)
        for writing in playground.write(place, prompt, playground.settings(place, **asked)):
            yield api_result(playground, writing)

    for function in (generate,):
        gr.api(
            speaks(playground, function),
            api_name=function.__name__,
            concurrency_id=MODEL,
            concurrency_limit=page.workers,
        )


def api_result(playground: Playground, writing: Writing) -> dict:
    """A generation for programs."""
    return {
        "text": writing.text,
        "tokens": len(writing.tokens),
        "seed": writing.settings.seed,
        "finish": writing.finish,
        "model": playground.name_of(writing.place),
        "sha": writing.place.sha,
    }


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
    if playground.device == "cpu":
        torch.set_num_threads(max(1, min(4, torch.get_num_threads())))  # small models gain nothing from more
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
