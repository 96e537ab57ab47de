"""The tab Look inside: one text, and five ways to look at what the model makes of it."""

from typing import Any

import gradio as gr

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.page.parts import MODEL, Page, SamplingControls, any_of, named, note, view
from nanogpt_hub.playground import views


class LookTab:
    """Next token, attention, logit lens, surprise and tokens of a text."""

    def __init__(self, page: Page, tab: gr.Tab, controls: SamplingControls):
        """controls: the settings whose samplers the next-token table shows."""
        self.page, self.playground = page, page.playground
        note("Give the model a text and watch it read. Everything here is computed from this one model.")
        with gr.Row(equal_height=False):
            self.text = gr.Textbox(
                label="Text", lines=2, max_lines=8, max_length=page.limits.text_chars, scale=6, elem_id="look-text"
            )
            look = gr.Button("Look", variant="primary", scale=1, min_width=90, elem_id="look")
        with gr.Tabs():
            self.views = [self.next_token(), *self.attention(), self.lens(), *self.surprise(), self.pieces()]
        self.looked = gr.State(None)  # the place that the tab shows
        inputs, outputs = [page.place, self.text, *controls.fields], [self.text, *self.views]
        options = dict(turn=MODEL, show_progress_on=self.text)
        page.on(any_of(look.click, self.text.submit), self.run, inputs, outputs, **options)
        inputs, outputs = [self.looked, *inputs], [self.looked, *outputs]
        page.on(tab.select, self.look_first, inputs, outputs, **options)
        page.on_model(self.look_again, inputs, outputs, **options)

    def next_token(self) -> gr.HTML:
        with gr.Tab("Next token"):
            note(
                "What the model expects after the text, and what each sampler of the Generate tab makes of it. ✂ marks "
                "what a sampler cut. *Undecided by n bits* is the entropy: 0 when sure, 1 for a toss between two."
            )
            return view("bars", elem_id="next")

    def attention(self) -> tuple[gr.Markdown, gr.HTML]:
        with gr.Tab("Attention"):
            note(
                "In each layer every token looks back at the tokens before it, in several ways at once: the heads. "
                "Each square is one head; row by row it shows where each token looks, the last one below. Choose a "
                f"head, then a token. Of long texts the last {self.page.limits.look_tokens} tokens are shown."
            )
            return gr.Markdown(""), view("attention", elem_id="attention")

    def lens(self) -> gr.HTML:
        with gr.Tab("Logit lens"):
            note(
                "What would the model answer if it ended after an earlier layer? Each cell is the likeliest next token "
                "at that depth and position, in a stronger colour where it is surer. The last row is the real answer; "
                "where an earlier layer already has it, it is **underlined**."
            )
            return view("lens", elem_id="lens")

    def surprise(self) -> tuple[gr.Markdown, gr.HTML]:
        with gr.Tab("Surprise"):
            note(
                "How many bits each token costs a reader who expects what the model expects: 0 for what was certain, 1 "
                "for a coin toss. Strong colour is where the model was caught out."
            )
            return gr.Markdown("", elem_id="surprise-figures"), view("tokens", elem_id="surprise")

    def pieces(self) -> gr.HTML:
        with gr.Tab("Tokenizer"):
            note("The model never sees letters. The tokenizer cuts the text into tokens; each is a number, its id.")
            return view("pieces", elem_id="pieces")

    def run(self, place: Resolved, text: str, *values: Any) -> list[Any]:
        text = text or self.playground.sample_text(place)
        settings = self.playground.settings(place, **named(values))
        next_tokens = views.next_tokens_view(self.playground.next_tokens(place, text, settings))
        inside, lens, end = self.playground.look(place, text)
        score = self.playground.score(place, text)
        part = "" if end == text else f"Maps show the last {len(inside.ids)} tokens of the text."
        pieces = views.pieces_view(self.playground.cut(place, text))
        attention, depths = views.attention_view(inside), views.lens_view(lens, inside)
        figures = views.surprise_note(score), views.surprise_view(score)
        return [text, next_tokens, part, attention, depths, *figures, pieces]

    def look_first(self, looked: Resolved | None, place: Resolved, text: str, *values: Any) -> list[Any]:
        """What takes long waits until somebody looks."""
        if place is None or looked == place:
            return [gr.skip()] * (2 + len(self.views))
        return [place, *self.run(place, "", *values)]

    def look_again(self, looked: Resolved | None, *inputs: Any) -> list[Any]:
        return self.look_first(looked, *inputs) if looked else [gr.skip()] * (2 + len(self.views))
