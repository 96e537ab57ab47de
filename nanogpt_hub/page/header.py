"""Above the tabs: which model is in use. Opens the page, loads models, and tells the tabs."""

import os
import time
from typing import Any

import gradio as gr

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.page.parts import LOAD, Page, secret, toast, view
from nanogpt_hub.playground.facts import chips
from nanogpt_hub.playground.session import user_message

OPEN = """() => {
  const open = document.getElementById("model-bar").classList.toggle("open");
  document.getElementById("change-model").setAttribute("aria-expanded", open);
}"""


class Header:
    """The fields that name a model, and the line of facts about the one in use."""

    def __init__(self, page: Page, blocks: gr.Blocks):
        self.page, self.models = page, page.models
        with gr.Row(elem_id="header"):
            gr.Markdown("# nanogpt_hub", elem_id="title")
            self.facts = view("chips", elem_id="facts")
            tour = gr.Button("Tour", size="sm", elem_id="tour")
            change = gr.Button("Change model", size="sm", elem_id="change-model")
        with gr.Row(equal_height=True, elem_id="model-bar"):
            self.name = gr.Dropdown(
                self.models.names(), value=self.models.default, allow_custom_value=True, label="Model",
                info="a name or address on the Hugging Face Hub, such as user/name, or one from the list",
                scale=5, min_width=220, elem_id="model",
            )  # fmt: skip
            self.revision = gr.Dropdown(
                [], value="", allow_custom_value=True, label="Revision", scale=3, min_width=220, elem_id="revision",
                info="a branch, a tag such as step-000500, or a commit; empty for main",
            )  # fmt: skip
            load = gr.Button("Load", variant="primary", scale=1, min_width=90, elem_id="load")
            if os.environ.get("OAUTH_CLIENT_ID"):
                gr.LoginButton(scale=1, min_width=140, size="sm", variant="secondary")
        tour.click(None, None, None, js="() => nanogpt.tour()", api_visibility="private")
        change.click(None, None, None, js=OPEN, api_visibility="private")
        outputs = [*page.loaded_outputs(), self.name, self.revision, self.facts]
        options: dict[str, Any] = dict(turn=LOAD, show_progress_on=self.facts)
        page.on(blocks.load, self.open_page, None, outputs, **options)
        page.on(load.click, self.load, [self.name, self.revision], outputs, **options)
        page.on(page.wanted.change, self.load_wanted, page.wanted, outputs, **options)
        self.name.input(None, None, self.revision, js="() => ''", api_visibility="private")  # it was the old name's

    def open_page(self, request: gr.Request, token: gr.OAuthToken | None) -> list[Any]:
        """What the link asks for, else the default, else the tiny model: a page always opens."""
        query = dict(request.query_params)
        asked = (query.get("repo", ""), query.get("rev", ""), query)
        for name, revision, link in (asked, ("", "", {}), ("tiny", "", {})):
            try:
                return self.update(self.models.find(name, revision, secret(token)), token, link)
            except (ValueError, OSError) as error:
                gr.Warning(toast(f"{user_message(error, self.models)}. Here is another model."))
        raise ValueError("not even the built-in model could be made; see the log of the program")

    def load(self, name: str, revision: str, token: gr.OAuthToken | None) -> list[Any]:
        return self.update(self.models.find(name, revision, secret(token)), token)

    def load_wanted(self, wanted: tuple[str, str] | None, token: gr.OAuthToken | None) -> list[Any]:
        """The model that a tab asks for."""
        return self.load(*(wanted or ("", "")), token)

    def update(self, place: Resolved, token: gr.OAuthToken | None, link: dict[str, str] | None = None) -> list[Any]:
        """What a load writes. The model is in memory before anything is shown of it."""
        facts = chips(self.models, place)
        revision = gr.Dropdown(self.models.revisions(place, secret(token)), value=place.revision)
        return [place, link or {}, time.monotonic_ns(), self.models.name_of(place), revision, facts]
