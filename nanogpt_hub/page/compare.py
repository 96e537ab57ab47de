"""The tab Compare: two models, or two moments of one, on the same prompt with the same seed."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.page.generate import GenerateTab
from nanogpt_hub.page.parts import LOAD, MODEL, Page, named, note, secret, view
from nanogpt_hub.playground import views
from nanogpt_hub.playground.counterpart import counterpart
from nanogpt_hub.playground.session import user_message


class CompareTab:
    """Two generations side by side, and how far apart the two expectations are."""

    def __init__(self, page: Page, generate: GenerateTab):
        """generate: the tab whose prompt and settings are used."""
        self.page, self.playground = page, page.playground
        note(
            "Two models, or two revisions of one, write after the same prompt with the same seed and the settings of "
            "the Generate tab. The first token in which they part is framed, all that differ are underlined; the table "
            "shows what each expected right after the prompt."
        )
        with gr.Row():
            sides = [*self.side("A"), *self.side("B")]
        self.prompt = gr.Textbox(label="Prompt", lines=2, max_length=page.limits.prompt_chars, elem_id="compare-prompt")
        with gr.Row():
            start = gr.Button("Compare", variant="primary", elem_id="compare")
            stop = gr.Button("Stop")
        with gr.Row():
            shown = [*self.output("a"), *self.output("b")]
        shown += [gr.Markdown("", elem_id="apart"), view("bars", elem_id="divergence")]
        shown += [gr.Markdown("", elem_id="reread-note"), view("tokens", elem_id="reread")]
        places = [gr.State(None), gr.State(None)]
        found = page.on(start.click, self.find, sides, places, turn=LOAD)
        inputs = [*places, self.prompt, *generate.controls.fields]
        started = page.on(found.success, self.run, inputs, shown, turn=MODEL, show_progress_on=shown[0])
        stop.click(None, None, None, cancels=[found, started], api_visibility="private")
        page.on_model(self.suggest, page.place, [*sides, self.prompt], show_progress="hidden")

    def side(self, letter: str) -> list[gr.Dropdown]:
        """Name and revision of one of the two."""
        free: dict[str, Any] = dict(value="", allow_custom_value=True)
        with gr.Column(min_width=280), gr.Row():
            known: dict[str, Any] = dict(choices=self.page.models.names(), scale=3, min_width=150)
            name = gr.Dropdown(label=f"Model {letter}", elem_id=f"model-{letter}", **known, **free)
            of: dict[str, Any] = dict(choices=[], scale=2, min_width=110)
            revision = gr.Dropdown(label="Revision", elem_id=f"revision-{letter}", **of, **free)
        return [name, revision]

    def output(self, letter: str) -> list[gr.components.Component]:
        with gr.Column(min_width=280):
            return [gr.Markdown("", elem_id=f"status-{letter}"), view("tokens", elem_id=f"output-{letter}")]

    def find(
        self, name_a: str, revision_a: str, name_b: str, revision_b: str, token: gr.OAuthToken | None
    ) -> list[Resolved]:
        sides = ((name_a, revision_a), (name_b, revision_b))
        return [self.page.models.find(name, revision, secret(token)) for name, revision in sides]

    def run(self, a: Resolved, b: Resolved, prompt: str, *values: Any) -> Iterator[list]:
        settings = self.playground.settings(a, **named(values))
        apart, bars = self.expectations(a, b, prompt)
        for one, two in self.playground.compare(a, b, prompt, settings):
            mark = self.playground.first_difference(one, two)
            same = " **They wrote the same, token for token.**" if one.finish and two.finish and mark is None else ""
            differs = self.playground.differences(one, two)
            shown = [{**made.view(mark), "differs": differs} for made in (one, two)]
            yield [one.status(rate=False), shown[0], two.status(rate=False), shown[1], apart + same, bars, "", None]
        found = self.playground.reread(one, b)
        if found:
            says = (
                f"What A wrote, as B reads it: {found[0]}. The stronger the colour, the more B was surprised beyond A."
            )
            yield [*[gr.skip()] * 6, says, found[1]]

    def expectations(self, a: Resolved, b: Resolved, prompt: str) -> tuple[str, dict | None]:
        """What the two expect right after the prompt, in a sentence and as bars; the sentence alone if that fails."""
        try:
            found = self.playground.divergence(a, b, prompt)
        except ValueError as error:
            return user_message(error, self.page.models), None
        return views.divergence_note(found), views.divergence_view(found, ("A", "B"))

    def suggest(self, place: Resolved, token: gr.OAuthToken | None) -> list[Any]:
        """The model in use against something that it is worth comparing with."""
        names = self.page.models.revisions(place, secret(token))
        name, revision = counterpart(self.page.models, place, names, secret(token))
        first, second = gr.Dropdown(names, value=place.revision), gr.Dropdown(names, value=revision)
        return [self.page.models.name_of(place), first, name, second, self.playground.example_prompt(place)]
