"""The tab Generate: prompt, settings, the text as it comes, and ways to take it elsewhere."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.page.parts import (
    MODEL,
    Page,
    SamplingControls,
    address,
    any_of,
    named,
    note,
    said,
    save_as,
    toast,
    view,
    whole,
)
from nanogpt_hub.playground.continuation import Continuation, Tree
from nanogpt_hub.playground.links import client_snippet, link, read_link, snippet


class GenerateTab:
    """Text from a prompt, token by token; the panel that shows one token from inside; the branches of the text."""

    def __init__(self, page: Page):
        self.page, self.playground = page, page.playground
        self.tree = gr.State(Tree(), time_to_live=3600)  # the last text and its branches
        with gr.Row(elem_id="stage"):
            with gr.Column(scale=7, min_width=300):
                self.prompt = gr.Textbox(
                    label="Prompt", lines=2, max_lines=12, max_length=page.limits.prompt_chars, elem_id="prompt"
                )
                with gr.Row(elem_classes="actions"):
                    generate = gr.Button("Generate", variant="primary", min_width=92, elem_id="generate")
                    stop = gr.Button("Stop", min_width=70, elem_id="stop")
                    more = gr.Button("Continue", min_width=92, elem_id="continue")
                self.tokens = view("tokens", elem_id="output")
                self.status = gr.Markdown("", elem_id="status")
                self.branches = view("branches", elem_id="branches")
                note(
                    "The model gives every token of its vocabulary a probability, and one is drawn; then it reads "
                    "again. **The stronger the colour, the less the model expected the token.** Choose any token, "
                    "also of the prompt, to see it from inside."
                )
                self.export = ExportPanel(page)
            with gr.Column(scale=4, min_width=300, elem_id="side"):
                self.controls = SamplingControls(page)
                self.panel = view("panel", elem_id="panel")
        self.shown = [self.tree, self.tokens, self.status, self.branches]
        self.settings = [self.controls.int8, *self.controls.fields]
        self.wire(generate, stop, more)

    def wire(self, generate: gr.Button, stop: gr.Button, more: gr.Button) -> None:
        page = self.page
        working: dict[str, Any] = dict(turn=MODEL, show_progress_on=self.status)
        fresh = [page.place, self.prompt, *self.settings]
        events = [
            page.on(any_of(generate.click, self.prompt.submit), self.run, fresh, self.shown, **working),
            page.on(more.click, self.go_on, [self.tree, *fresh], self.shown, **working),
            page.on(self.panel.select, self.branch, [self.tree, *self.settings], self.shown, **working),
        ]
        changed = [self.prompt, *self.controls.fields, self.controls.int8]
        page.on(events[2].success, self.fork, [self.tree, *self.settings], self.panel, turn=MODEL)
        filled = page.on_model(self.fill, [page.place, page.link], changed)
        events.append(page.on(filled.success, self.first_text, [page.link, *fresh], self.shown, **working))
        page.on(events[-1].success, self.first_token, [self.tree, *self.settings], self.panel, turn=MODEL)
        stopped = stop.click(None, None, None, cancels=events, api_visibility="private")
        ended = page.on(stopped.then, self.stopped, self.tree, self.shown, show_progress="hidden")
        walked = page.on(self.branches.select, self.walk, self.tree, self.shown)
        for event in (*events, ended, walked):
            self.export.fill_after(event.then, self.tree)
        look = dict(turn=MODEL, show_progress="hidden", trigger_mode="always_last")
        for listen in (self.tokens.select, self.panel.input):
            page.on(listen, self.open_panel, [self.tree, *self.settings], self.panel, **look)

    def stream(
        self, growing: Iterator[Continuation], tree: Tree, parent: int | None = None, same: bool = False
    ) -> Iterator[tuple]:
        """Updates of `shown` while a new branch grows, or the current one (`same`).

        Each sends what is new and, in case one is lost, what was new in the two before; the last one sends everything.
        """
        ends = [0, 0, 0]
        for made in growing:
            first = not ends[-1]
            tree = tree.grown(made, parent) if first and not same else tree.updated(made)
            since = ends[0] if made.finish is None else 0
            branches = tree.view() if first or made.finish else gr.skip()
            yield tree, {**made.view(since=since), "panel": "panel"}, made.status(), branches
            ends = [*ends[1:], len(made.tokens)]

    def show(self, tree: Tree) -> tuple:
        """`shown` for the current branch as a whole."""
        made = tree.made
        if made is None:
            return tree, None, "", None
        return tree, {**made.view(), "panel": "panel"}, made.status(), tree.view()

    def run(self, place: Resolved, prompt: str, int8: bool, *values: Any) -> Iterator[tuple]:
        """A new text from the prompt."""
        settings = self.playground.settings(place, **named(values))
        yield from self.stream(self.playground.write(place, prompt or "", settings, int8), Tree())

    def go_on(self, tree: Tree, place: Resolved, prompt: str, int8: bool, *values: Any) -> Iterator[tuple]:
        """The text grows. A prompt that was edited since, or another model, begins a new one."""
        made = tree.made
        if made is None or made.place != place or (prompt or "") not in (made.prompt, tree.branches[0].made.prompt):
            yield from self.run(place, prompt, int8, *values)
            return
        settings = self.playground.settings(place, **named(values))
        yield from self.stream(self.playground.extend(made, settings, int8=int8), tree, same=True)

    def branch(self, event: gr.EventData, tree: Tree, int8: bool, *values: Any) -> Iterator[tuple]:
        """The text goes on from an alternative that was chosen in the panel."""
        made, n, chosen = self.chosen(event, tree), whole(event, "n"), whole(event, "id")
        settings = self.playground.settings(made.place, **named(values))
        grown = self.playground.extend(made, settings, keep=n, chosen=chosen, int8=int8)
        yield from self.stream(grown, tree, tree.current)

    def walk(self, event: gr.EventData, tree: Tree) -> tuple:
        """Back to a branch."""
        return self.show(tree.at(whole(event, "number")))

    def stopped(self, tree: Tree) -> tuple:
        return self.show(tree.updated(tree.made.stop()) if tree.made else tree)

    def open_panel(self, event: gr.EventData, tree: Tree, int8: bool, *values: Any) -> dict:
        """A token that was chosen in the text, from inside."""
        return self.look(self.chosen(event, tree), whole(event, "n"), values)

    def chosen(self, event: gr.EventData, tree: Tree) -> Continuation:
        """The text that an event of the browser is about."""
        if tree.made is None or said(event, "run") != tree.made.key:
            raise ValueError("this text is not the current one any more: choose a token of the new one")
        return tree.made

    def look(self, made: Continuation, n: int, values: tuple) -> dict:
        seen = self.playground.position(made, n, self.playground.settings(made.place, **named(values)))
        return {**seen, "run": made.key, "text": "output", "branches": True}

    def first_token(self, tree: Tree, int8: bool, *values: Any) -> dict | None:
        """A visit begins with the panel open at a token worth looking at: the least expected of the first ones."""
        made = tree.made
        if made is None or not made.tokens:
            return None
        early = made.tokens[made.given : made.given + 24] or made.tokens[-1:]
        n = min(range(len(early)), key=lambda place: early[place].logprob)
        return self.look(made, len(made.prompt_ids) + made.given + n, values)

    def fork(self, tree: Tree, int8: bool, *values: Any) -> dict | None:
        """After a branch the panel shows where it began."""
        made = tree.made
        return self.look(made, len(made.prompt_ids) + made.given - 1, values) if made and made.given else None

    def fill(self, place: Resolved, query: dict[str, str]) -> list[Any]:
        """A new model brings its own settings and a prompt that suits it. What a link says comes first."""
        asked, problems = read_link(query)
        for problem in problems:
            gr.Warning(toast(problem))
        prompt = asked.get("prompt", self.playground.example_prompt(place))
        wishes = {name: value for name, value in asked.items() if name not in ("prompt", "int8", "given", "engine")}
        return [prompt, *self.controls.values(self.playground.settings(place, **wishes), asked)]

    def first_text(self, query: dict[str, str], place: Resolved, prompt: str, int8: bool, *values: Any) -> Iterator:
        """The text that a link asks for; other visits begin with the example, which is made once for all."""
        if "prompt" not in query and "given" not in query:
            yield self.show(Tree().grown(self.playground.example(place), None))
            return
        settings, asked = self.playground.settings(place, **named(values)), read_link(query)[0]
        given, engine = asked.get("given", []), asked.get("engine")
        yield from self.stream(self.playground.write(place, prompt or "", settings, int8, given, engine), Tree())


class ExportPanel:
    """Plain text, link, code and file of the text that is shown."""

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
            download.click(None, data, None, js=save_as("generation.json"), api_visibility="private")
        self.outputs = [text, address, python, client, data]

    def fill_after(self, then: Callable, tree: gr.State) -> None:
        """Shows the text once it ended or was stopped."""
        self.page.on(then, self.fill, tree, self.outputs, show_progress="hidden")

    def fill(self, tree: Tree, request: gr.Request) -> tuple:
        made = tree.made
        if made is None:
            return ("",) * len(self.outputs)
        base, models = address(request), self.page.models
        code = snippet(made), client_snippet(models, made, base)
        return made.prompt + made.text, link(models, made, base), *code, made.as_json()
