"""The tab Look inside: what the model makes of any text, token by token and as a whole."""

from typing import Any

import gradio as gr

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.page.parts import MODEL, Page, SamplingControls, any_of, named, note, said, view, whole
from nanogpt_hub.playground import views
from nanogpt_hub.playground.continuation import Continuation


class LookTab:
    """A text coloured by surprise beside the panel of one token; below, maps and tables of the whole."""

    def __init__(self, page: Page, tab: gr.Tab, controls: SamplingControls):
        """controls: the settings whose samplers are shown."""
        self.page, self.playground = page, page.playground
        self.read = gr.State(None, time_to_live=3600)  # Continuation without tokens: the text that is shown
        with gr.Row(elem_classes="stage"):
            with gr.Column(scale=7, min_width=300):
                with gr.Row(equal_height=False):
                    self.text = gr.Textbox(
                        label="Text", lines=2, max_lines=8, max_length=page.limits.text_chars, scale=6,
                        elem_id="look-text",
                    )  # fmt: skip
                    look = gr.Button("Look", variant="primary", scale=1, min_width=90, elem_id="look")
                self.tokens = view("tokens", elem_id="surprise")
                self.figures = gr.Markdown("", elem_id="surprise-figures", elem_classes="figures")
                note(
                    "Colour is surprise: how many bits a token costs a reader who expects what the model expects, 0 "
                    "for what was certain, 1 for a coin toss. Choose any token to see it from inside."
                )
            with gr.Column(scale=4, min_width=300):
                self.panel = view("panel", elem_id="look-panel")
        with gr.Tabs():
            self.views = [*self.attention(), self.lens(), self.next_token(), self.pieces(), *self.experts()]
        self.looked = gr.State(None)  # the place that the tab shows
        self.shown = [self.text, self.read, self.tokens, self.figures, self.panel, *self.views]
        inputs, outputs = [page.place, self.text, *controls.fields], self.shown
        options: dict[str, Any] = dict(turn=MODEL, show_progress_on=self.text)
        page.on(any_of(look.click, self.text.submit), self.run, inputs, outputs, **options)
        inputs, outputs = [self.looked, *inputs], [self.looked, *outputs]
        page.on(tab.select, self.look_first, inputs, outputs, **options)
        page.on_model(self.look_again, inputs, outputs, **options)
        chosen: dict[str, Any] = dict(turn=MODEL, show_progress="hidden", trigger_mode="always_last")
        for listen in (self.tokens.select, self.panel.input):
            page.on(listen, self.open_panel, [self.read, *controls.fields], self.panel, **chosen)

    def attention(self) -> tuple[gr.Markdown, gr.HTML]:
        with gr.Tab("All attention maps"):
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

    def next_token(self) -> gr.HTML:
        with gr.Tab("Samplers"):
            note(
                "What the model expects after the text, and what each sampler of the Generate tab makes of it. ✂ marks "
                "what a sampler cut. *Undecided by n bits* is the entropy: 0 when sure, 1 for a toss between two."
            )
            return view("bars", elem_id="next")

    def pieces(self) -> gr.HTML:
        with gr.Tab("Tokenizer"):
            note("The model never sees letters. The tokenizer cuts the text into tokens; each is a number, its id.")
            return view("pieces", elem_id="pieces")

    def experts(self) -> tuple[gr.Tab, gr.HTML]:
        """Of mixtures of experts only: the tab is hidden for a dense model."""
        with gr.Tab("Experts", visible=False) as tab:
            note(
                "Each layer of this model has several feed-forwards, the experts, and a router that sends each token "
                "to a few of them. A cell names the experts that a token took, first the one that counts most, which "
                "gives the colour. Expert 1 of one layer has nothing to do with expert 1 of another."
            )
            return tab, view("experts", elem_id="experts")

    def run(self, place: Resolved, text: str, *values: Any) -> list[Any]:
        playground = self.playground
        text = text or playground.sample_text(place)
        settings = playground.settings(place, **named(values))
        next_tokens = views.next_tokens_view(playground.next_tokens(place, text, settings))
        inside, lens, end = playground.look(place, text)
        part = "" if end == text else f"Maps show the last {len(inside.ids)} tokens of the text."
        read = playground.read(place, text, settings)
        figures, tokens = playground.surprise(read)
        pieces = views.pieces_view(playground.cut(place, text))
        panel = self.look(read, len(read.ids), values)
        maps = views.attention_view(inside), views.lens_view(lens, inside)
        experts = gr.Tab(visible=inside.experts is not None), views.experts_view(inside)
        shown = [text, read, {**tokens, "panel": "look-panel"}, figures, panel, part]
        return [*shown, *maps, next_tokens, pieces, *experts]

    def look(self, read: Continuation, n: int, values: tuple) -> dict:
        seen = self.playground.position(read, n, self.playground.settings(read.place, **named(values)))
        return {**seen, "run": read.key, "text": "surprise"}

    def open_panel(self, event: gr.EventData, read: Continuation | None, *values: Any) -> dict:
        """A token that was chosen in the text, from inside."""
        if read is None or said(event, "run") != read.key:
            raise ValueError("this text is not the current one any more: choose a token of the new one")
        return self.look(read, whole(event, "n"), values)

    def look_first(self, looked: Resolved | None, place: Resolved, text: str, *values: Any) -> list[Any]:
        """What takes long waits until somebody looks."""
        if place is None or looked == place:
            return [gr.skip()] * (1 + len(self.shown))
        return [place, *self.run(place, "", *values)]

    def look_again(self, looked: Resolved | None, *inputs: Any) -> list[Any]:
        return self.look_first(looked, *inputs) if looked else [gr.skip()] * (1 + len(self.shown))
