"""The tab Generate: prompt, settings, the text as it comes, and ways to take it elsewhere."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.page.parts import MODEL, Page, SamplingControls, address, any_of, named, note, view
from nanogpt_hub.playground.continuation import Continuation
from nanogpt_hub.playground.links import client_snippet, link, read_link, snippet

DOWNLOAD = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "generation.json";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


class GenerateTab:
    """Text from a prompt, token by token."""

    def __init__(self, page: Page):
        self.page, self.playground = page, page.playground
        self.made = gr.State(None, time_to_live=3600)  # Continuation: the last generation
        note(
            "The model reads the prompt, gives every token of its vocabulary a probability, and one is drawn; then it "
            "reads again. **The stronger the colour, the less the model expected the token.** Choose one to see what "
            "else it could have been."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.prompt = gr.Textbox(
                    label="Prompt", lines=4, max_lines=12, max_length=page.limits.prompt_chars, elem_id="prompt"
                )
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", min_width=90, elem_id="generate")
                    stop = gr.Button("Stop", min_width=70, elem_id="stop")
                    more = gr.Button("Continue", min_width=90, elem_id="continue")
                self.controls = SamplingControls(page)
            with gr.Column(scale=3, min_width=280):
                self.status = gr.Markdown("", elem_id="status")
                self.tokens = view("tokens", elem_id="output")
                self.export = ExportPanel(page)
        self.shown = [self.made, self.tokens, self.status]
        self.inputs = [page.place, self.prompt, self.controls.int8, *self.controls.fields]
        self.wire(generate, stop, more)

    def wire(self, generate: gr.Button, stop: gr.Button, more: gr.Button) -> None:
        page, options = self.page, dict(turn=MODEL, show_progress_on=self.status)
        started = page.on(any_of(generate.click, self.prompt.submit), self.run, self.inputs, self.shown, **options)
        longer = page.on(more.click, self.go_on, [self.made, self.prompt], self.prompt)
        longer = page.on(longer.success, self.run, self.inputs, self.shown, **options)
        filled = page.on_model(
            self.fill, [page.place, page.link], [self.prompt, *self.controls.fields, self.controls.int8]
        )
        first = page.on(filled.success, self.first_text, [page.link, *self.inputs], self.shown, **options)
        stopped = stop.click(None, None, None, cancels=[started, longer, first], api_visibility="private")
        for event in (started, longer, first, stopped):
            self.export.fill_after(event.then, self.made)

    def run(self, place: Resolved, prompt: str, int8: bool, *values: Any) -> Iterator[tuple]:
        settings = self.playground.settings(place, **named(values))
        for made in self.playground.write(place, prompt or "", settings, int8):
            yield made, made.view(), made.status()

    def go_on(self, made: Continuation | None, prompt: str) -> str:
        """What was generated becomes part of the prompt; of a long one the end, which is all that counts."""
        return ((made.prompt + made.text) if made else (prompt or ""))[-self.page.limits.prompt_chars :]

    def fill(self, place: Resolved, query: dict[str, str]) -> list[Any]:
        """A new model brings its own settings and a prompt that suits it. What a link says comes first."""
        asked, problems = read_link(query)
        for problem in problems:
            gr.Warning(problem)
        prompt = asked.get("prompt", self.playground.example_prompt(place))
        wishes = {name: value for name, value in asked.items() if name not in ("prompt", "int8")}
        return [prompt, *self.controls.values(self.playground.settings(place, **wishes), asked)]

    def first_text(self, query: dict[str, str], place: Resolved, prompt: str, int8: bool, *values: Any) -> Iterator:
        """The text that a link asks for; other visits begin with the example, which is made once for all."""
        if "prompt" in query:
            yield from self.run(place, prompt, int8, *values)
        else:
            made = self.playground.example(place)
            yield made, made.view(), made.status()


class ExportPanel:
    """Plain text, link, code and file of the last generation."""

    def __init__(self, page: Page):
        self.page = page
        with gr.Accordion("Take it with you", open=False, elem_id="extras"):
            text = gr.Textbox(
                label="Plain text", lines=4, max_lines=12, interactive=False, buttons=["copy"], elem_id="plain"
            )
            address = gr.Textbox(
                label="Link", info="opens this page with the same model, prompt, settings and seed: the same text "
                "comes out", interactive=False, buttons=["copy"], max_lines=2, elem_id="link",
            )  # fmt: skip
            python = gr.Code(label="The same in Python", language="python", interactive=False, elem_id="python")
            client = gr.Code(label="The same from this page's API", language="python", interactive=False)
            download = gr.Button("Download as JSON, with all alternatives", size="sm", elem_id="download")
            data = gr.Textbox(visible="hidden", elem_id="json")
            download.click(None, data, None, js=DOWNLOAD, api_visibility="private")
        self.outputs = [text, address, python, client, data]

    def fill_after(self, then: Callable, made: gr.State) -> None:
        """Shows the last generation once it ended or was stopped."""
        self.page.on(then, self.fill, made, self.outputs, show_progress="hidden")

    def fill(self, made: Continuation | None, request: gr.Request) -> tuple:
        if made is None:
            return ("",) * len(self.outputs)
        base, models = address(request), self.page.models
        code = snippet(made), client_snippet(models, made, base)
        return made.prompt + made.text, link(models, made, base), *code, made.as_json()
