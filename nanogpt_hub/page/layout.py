"""The page as a whole: header, tabs, API; its theme; and how it is served.

blocks = create_page(Playground(ModelStore("user/name")))
serve(blocks, server_name="127.0.0.1")
"""

import inspect
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from nanogpt_hub.page.chat import ChatTab
from nanogpt_hub.page.compare import CompareTab
from nanogpt_hub.page.generate import GenerateTab
from nanogpt_hub.page.header import Header
from nanogpt_hub.page.look import LookTab
from nanogpt_hub.page.model import ModelTab
from nanogpt_hub.page.parts import LOAD, MODEL, STATIC, Page, with_user_errors
from nanogpt_hub.page.training import TrainingTab
from nanogpt_hub.playground.api import Api
from nanogpt_hub.playground.session import Playground

SCRIPTS = (
    "base.js",
    "samplers.js",
    "text.js",
    "panel.js",
    "chat.js",
    "views.js",
    "training.js",
    "tour.js",
)  # in this order
# Nothing on the page may come from elsewhere, whatever the text of a model or a card asks for.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'"
)
BLUE = gr.themes.Color(
    "#eef5fc", "#d9e8f8", "#b5d1ef", "#8fc1fb", "#4b8fd1", "#2671b5", "#185c9c", "#134a7e", "#0f3a63", "#0b2947",
    "#071a2e", name="blue",
)  # fmt: skip
PAPER = gr.themes.Color(
    "#fbfaf7", "#f3f1ec", "#e6e2da", "#d3cec3", "#a5a19a", "#757372", "#55575e", "#3a3f4a", "#262a32", "#171a20",
    "#101217", name="paper",
)  # fmt: skip


def make_theme() -> gr.themes.Base:
    """Type, spacing and colours of the page; page.css has the two colours of its own views."""
    local = gr.themes.utils.fonts.LocalFont  # comes with gradio: nothing is fetched
    theme = gr.themes.Base(
        primary_hue=BLUE, secondary_hue=BLUE, neutral_hue=PAPER,
        radius_size=gr.themes.sizes.radius_sm, spacing_size=gr.themes.sizes.spacing_md,
        # Regular and bold alone: gradio's other weights of this type, and its Lora, lack the Latin letters.
        font=[local("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
        font_mono=[local("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "Consolas", "monospace"],
    )  # fmt: skip
    muted, muted_dark = "*neutral_600", "*neutral_300"
    return theme.set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        body_text_color="#1d2026", body_text_color_dark="#eceae5",
        body_text_color_subdued=muted, body_text_color_subdued_dark=muted_dark,
        block_info_text_color=muted, block_info_text_color_dark=muted_dark,
        block_label_text_color=muted, block_label_text_color_dark=muted_dark,
        block_title_text_color="*neutral_700", block_title_text_color_dark="*neutral_200",
        input_placeholder_color=muted, input_placeholder_color_dark=muted_dark,
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_300", button_primary_background_fill_hover_dark="*primary_200",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="*primary_950",
        slider_color="*primary_600", slider_color_dark="*primary_300",
        block_border_width="0px", block_shadow="none", block_background_fill="transparent", block_padding="4px 0px",
        block_background_fill_dark="transparent", panel_background_fill="transparent",
        input_border_color="*neutral_400", input_border_color_dark="*neutral_600",
    )  # fmt: skip


def create_page(playground: Playground, workers: int = 1) -> gr.Blocks:
    """The page and its API. workers: how many requests compute at once; more gain nothing on a few cores."""
    with gr.Blocks(title="nanogpt_hub playground", analytics_enabled=False) as blocks:
        page = Page(playground, workers)
        Header(page, blocks)
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(page)
            with gr.Tab("Chat"):
                ChatTab(page, generate.controls)
            with gr.Tab("Look inside") as tab:
                LookTab(page, tab, generate.controls)
            with gr.Tab("Training") as tab:
                TrainingTab(page, tab, tabs)
            with gr.Tab("Compare"):
                CompareTab(page, generate)
            with gr.Tab("Model"):
                ModelTab(page)
        add_api(page)
    return blocks.queue(max_size=page.limits.queue, default_concurrency_limit=4, api_open=True)


def add_api(page: Page) -> None:
    """The public endpoints."""
    api = Api(page.playground)
    for function, turn in ((api.generate, MODEL), (api.next_tokens, MODEL), (api.score, MODEL), (api.info, LOAD)):
        safe, limit = with_user_errors(page.models, function), page.turns[turn]
        gr.api(safe, api_name=function.__name__, concurrency_id=turn, concurrency_limit=limit)


class Guard:
    """ASGI middleware that sends the content policy with every answer, before the browser asks for anything else."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


HEADERS = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"same-origin")]


def serve(blocks: gr.Blocks, **options: Any) -> tuple:
    """Serves the page. Options are those of gradio's launch."""
    scripts = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS)
    fixed: dict[str, Any] = dict(
        theme=make_theme(),
        css_paths=STATIC / "page.css",
        head=f"<script>{scripts}</script>",
        footer_links=["api", "settings"],
        show_error=False,  # other errors than ours are not for visitors
        enable_monitoring=False,
        max_file_size="1kb",
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(Guard)]},
    )
    if "run_history" in inspect.signature(blocks.launch).parameters:  # what older ones do not keep
        fixed["run_history"] = False
    return blocks.launch(**fixed, **options)
