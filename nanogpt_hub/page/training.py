"""The tab Training: the curves of runs, and what the model wrote on the way."""

from collections.abc import Mapping
from typing import Any

import gradio as gr
import pandas as pd

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.page.parts import Page, note
from nanogpt_hub.playground import views
from nanogpt_hub.runs import CURVES, Run


class TrainingTab:
    """Curves, a slider over the kept steps, and the sample of each."""

    def __init__(self, page: Page, tab: gr.Tab, tabs: gr.Tabs):
        self.page, self.playground, self.tabs = page, page.playground, tabs
        note(
            "Loss is how wrong the model's predictions are, in nats per token: lower is better. *Training* is text it "
            "learns from, *validation* text it never saw; when the two part, it has begun to learn by heart."
        )
        self.runs = gr.Dropdown(
            [], multiselect=True, max_choices=2, label="Runs", info="one, or two to compare", elem_id="runs",
            allow_custom_value=True,
        )  # fmt: skip
        self.plots = self.curves()
        note("What the model wrote from the same prompt at each kept step. Move the slider and watch it learn.")
        with gr.Row():
            self.step = gr.Slider(0, 1, 0, step=1, label="Step", scale=4, elem_id="step")
            self.use = gr.Button("Generate with this one", scale=1, min_width=180, elem_id="use-step")
        self.facts = gr.Markdown("", elem_id="step-facts")
        self.sample = gr.Textbox(label="Sample", lines=8, max_lines=16, interactive=False, elem_id="sample")
        self.timer = gr.Timer(3, active=False)
        self.seen = gr.State(0)  # the last step that the slider was told of
        self.wire(tab)

    def curves(self) -> list[gr.LinePlot]:
        plot = dict(
            x="step", y="value", color="curve", color_title=" ", x_title="step", tooltip="all", buttons=["fullscreen"]
        )
        loss = gr.LinePlot(label="Loss", y_title="nats per token", elem_id="loss", **plot)
        with gr.Row():
            rate = gr.LinePlot(label="Learning rate", y_title="learning rate", **plot)
            speed = gr.LinePlot(label="Throughput", y_title="tokens/s", **plot)
        return [loss, rate, speed]

    def wire(self, tab: gr.Tab) -> None:
        """Moving the slider shows another step; new runs and a timer bring new curves; the slider follows the run."""
        page, quiet = self.page, dict(show_progress="hidden", trigger_mode="always_last")
        at_step = [page.place, self.runs, self.step], [self.facts, self.sample, self.use]
        refresh = [*at_step[0], self.seen], [*self.plots, self.step, self.seen, self.timer]
        page.on(self.step.change, self.show_step, *at_step, **quiet)
        page.on(self.timer.tick, self.show_runs, *refresh, **quiet)
        page.on(self.use.click, self.use_step, at_step[0], [page.wanted, self.tabs])
        other = page.on_model(self.choices, page.place, [self.runs, self.step, self.seen], **quiet)
        for listen in (other.success, self.runs.input, tab.select):
            shown = page.on(listen, self.show_runs, *refresh, **quiet)
            page.on(shown.success, self.show_step, *at_step, **quiet)

    def choices(self, place: Resolved) -> tuple[Any, int, int]:
        """The runs to choose from, the model's own first."""
        names = self.playground.training_names(place)
        return gr.Dropdown(names, value=names[:1]), 0, 0

    def use_step(self, place: Resolved, names: list[str], step: float) -> list[Any]:
        """Asks for the weights of a kept step, and goes to the tab Generate."""
        run = self.playground.training(place, names)[0]
        found = self.playground.model_at(place, run, int(step), self.page.models.revisions(place))
        return [found, gr.Tabs(selected="generate")]

    def show_runs(self, place: Resolved, names: list[str], step: float, seen: int) -> list[Any]:
        """Curves and slider of the chosen runs. A slider that stood at the end follows a run that goes on."""
        runs = self.playground.training(place, names)
        steps = [*runs[0].samples] if runs else []
        last = steps[-1] if steps else 0
        slider = gr.skip()  # a visitor may be moving it
        if last != seen or step not in steps:
            at = int(step) if step in steps and step != seen else last
            first, spacing = min(steps, default=0), views.spacing(steps)
            slider = gr.Slider(first, max(1, last), at, step=spacing, interactive=len(steps) > 1)
        frames = [frame(runs, keys) for keys in (CURVES, {"learning_rate": ""}, {"tokens_per_second": ""})]
        plots = [gr.LinePlot(data, visible=len(data) > 0) for data in frames]
        return [*plots, slider, last, gr.Timer(active=any(run.going_on() for run in runs))]

    def show_step(self, place: Resolved, names: list[str], step: float) -> tuple[str, str, Any]:
        """What was measured at the nearest kept step, what the model wrote there, and whether it can be loaded."""
        runs = self.playground.training(place, names)
        if not runs:
            return "There is no training log beside this model.", "", gr.Button(interactive=False)
        run = runs[0]
        near = min(run.samples, key=lambda kept: abs(kept - step), default=int(step))
        known = self.playground.model_at(place, run, near, self.page.models.revisions(place)) is not None
        return views.step_note(run, near, known), run.sample(near), gr.Button(interactive=known)


def frame(runs: list[Run], keys: Mapping[str, str]) -> pd.DataFrame:
    """Curves as the plots take them: a row for each point."""
    rows = []
    for run in runs:
        for key, label in keys.items():
            name = ": ".join([label] * bool(label) + [run.name] * (len(runs) > 1 or not label))
            rows += [(step, value, name) for step, value in run.curve(key)]
    return pd.DataFrame(rows, columns=["step", "value", "curve"])
