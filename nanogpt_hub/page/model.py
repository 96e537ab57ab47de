"""The tab Model: what the model is, where it comes from, and how to take it elsewhere."""

import os
from typing import Any

import gradio as gr

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.page.parts import Page, note, view
from nanogpt_hub.playground import facts
from nanogpt_hub.playground.links import load_snippet


class ModelTab:
    """Card, parameters by part, provenance, files and config."""

    def __init__(self, page: Page):
        self.models = page.models
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                card = gr.Markdown("", elem_id="card", sanitize_html=True)  # HTML is Markdown too
            with gr.Column(scale=2, min_width=280):
                note("Where the parameters are: every one is a number that training has set.")
                parts = view("bars", elem_id="parts")
                note("Where it comes from, as far as its run told.")
                provenance = view("table", elem_id="provenance")
                note("Its files. Weights are safetensors: numbers, no code.")
                files = view("table", elem_id="files")
        load = gr.Code(label="Load it elsewhere", language="python", interactive=False)
        with gr.Accordion("config.json", open=False):
            config = gr.JSON(show_label=False)
        note(f"**A page like this for your model:** {how_to_copy()}, and set its variable `NANOGPT_REPO` to its name.")
        outputs = [card, parts, provenance, files, load, config]
        page.on_model(self.fill, page.place, outputs, show_progress="hidden")

    def fill(self, place: Resolved) -> list[Any]:
        tables = [{"columns": [], "rows": rows} for rows in (facts.provenance(place), facts.files(place))]
        drawn = [facts.card(place), facts.parts(self.models, place), *tables]
        return [*drawn, load_snippet(self.models, place), facts.config(place)]


def how_to_copy() -> str:
    space = os.environ.get("SPACE_ID")
    if space:
        return f"[duplicate this Space](https://huggingface.co/spaces/{space}?duplicate=true)"
    return "run `nanogpt-hub space user/demo --model user/name`, or duplicate any Space that was made that way"
