"""The tab Training: how a model learned, from gibberish to language, and how runs compare."""

from typing import Any

import gradio as gr

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.page.parts import Page, note, view, whole

REFRESH_SECONDS = 3  # between two looks at a run that goes on


class TrainingTab:
    """Curves of runs, a slider and a play button over the kept steps, the sample of each, and where a head looked."""

    def __init__(self, page: Page, tab: gr.Tab, tabs: gr.Tabs):
        self.page, self.playground = page, page.playground
        note(
            "What the model generated from the same prompt at each kept step of its training. **Play** runs through "
            "them. Loss is how wrong its predictions are, in nats per token: *training* is text that it learns from, "
            "*validation* text that it never sees; where the two part, it begins to learn by heart. Of several runs a "
            "table tells what differs; those that differ in the seed alone are averaged."
        )
        self.runs = gr.Dropdown(
            [], multiselect=True, max_choices=6, label="Runs", info="the first is played; others are drawn over it",
            elem_id="runs", allow_custom_value=True,
        )  # fmt: skip
        self.view = view("training", elem_id="training")
        self.verdicts = gr.Markdown("", elem_id="verdicts")
        self.growth = view("growth", elem_id="growth")
        self.head = gr.State(None)  # (layer, head) that was chosen in it
        self.drawn = gr.State("")  # what the view shows: a run that goes on is drawn again when it has grown
        timer = gr.Timer(REFRESH_SECONDS, active=False)
        quiet = dict(show_progress="hidden", trigger_mode="always_last")
        inputs = [page.place, self.runs, self.drawn, self.head]
        outputs = [self.view, self.growth, self.drawn, timer]
        page.on(self.growth.input, self.choose_head, inputs[:2], [self.growth, self.head], **quiet)
        page.on(self.view.select, self.use_step, [page.place, self.runs], [page.wanted, tabs])
        page.on(timer.tick, self.show, inputs, outputs, **quiet)
        other = page.on_model(self.choices, page.place, [self.runs, self.drawn, self.head], **quiet)
        for listen in (other.success, self.runs.input, tab.select):
            page.on(listen, self.show, inputs, outputs, **quiet)
            page.on(listen, self.compare, [page.place, self.runs], self.verdicts, **quiet)

    def choices(self, place: Resolved) -> tuple[Any, str, None]:
        """The runs to choose from, the model's own first."""
        names = self.playground.training_names(place)
        return gr.Dropdown(names, value=names[:1]), "", None

    def show(self, place: Resolved, names: list[str], drawn: str, head: tuple[int, int] | None) -> list[Any]:
        """The chosen runs as they are now, if that is not what is shown."""
        shown = self.playground.training_view(place, names, self.page.models.revisions(place))
        points = [(run["name"], len(run["curves"]["train_loss"]), run["floor"]) for run in shown["runs"]]
        state = str((points, len(shown["steps"]), shown.get("last"), shown.get("live")))
        timer = gr.Timer(active=bool(shown.get("live")))
        if state == drawn:
            return [gr.skip(), gr.skip(), state, timer]
        return [shown, self.playground.head_view(place, names, head), state, timer]

    def compare(self, place: Resolved, names: list[str]) -> str:
        """What differs between the chosen runs, and whether it is beyond noise."""
        return self.playground.verdicts(place, names)

    def choose_head(self, event: gr.EventData, place: Resolved, names: list[str]) -> list[Any]:
        """Another head, over the same steps."""
        head = (whole(event, "layer"), whole(event, "head"))
        return [self.playground.head_view(place, names, head), head]

    def use_step(self, event: gr.EventData, place: Resolved, names: list[str]) -> list[Any]:
        """Asks for the weights of a kept step, and goes to the tab Generate."""
        run = self.playground.training(place, names)[0]
        found = self.playground.model_at(place, run, whole(event, "step"), self.page.models.revisions(place))
        if found is None:
            raise ValueError("the weights of this step were not kept; a run that pushes to the Hub can keep each step")
        return [found, gr.Tabs(selected="generate")]
