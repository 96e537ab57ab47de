"""The page as a whole: header, tabs, API; its theme; and how it is served.

blocks = create_page(Playground(ModelStore("user/name")))
serve(blocks, server_name="127.0.0.1")
"""

from typing import Any

import gradio as gr

from nanogpt_hub.page.compare import CompareTab
from nanogpt_hub.page.generate import GenerateTab
from nanogpt_hub.page.header import Header
from nanogpt_hub.page.look import LookTab
from nanogpt_hub.page.model import ModelTab
from nanogpt_hub.page.parts import LOAD, MODEL, STATIC, Page, with_user_errors
from nanogpt_hub.page.training import TrainingTab
from nanogpt_hub.playground.api import Api
from nanogpt_hub.playground.session import Playground

# Nothing on the page may come from elsewhere, whatever the text of a model or a card asks for.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'"
)
GREY = dict(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")  # the default is faint
THEME = gr.themes.Default(primary_hue="orange").set(
    **GREY, block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400"
)


def create_page(playground: Playground, workers: int = 1) -> gr.Blocks:
    """The page and its API. workers: how many requests compute at once; more gain nothing on a few cores."""
    with gr.Blocks(title="GPT playground", analytics_enabled=False) as blocks:
        page = Page(playground, workers)
        Header(page, blocks)
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(page)
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


def serve(blocks: gr.Blocks, **options: Any) -> tuple:
    """Serves the page. Options are those of gradio's launch."""
    script = (STATIC / "views.js").read_text(encoding="utf-8")
    fixed = dict(
        theme=THEME,
        css_paths=STATIC / "page.css",
        head=f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><script>{script}</script>',
        footer_links=["api", "settings"],
        show_error=False,  # other errors than ours are not for visitors
        run_history=False,
        enable_monitoring=False,
        max_file_size="1kb",
        ssr_mode=False,
    )
    return blocks.launch(**fixed, **options)
