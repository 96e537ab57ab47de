"""What several tabs use: events whose errors are sentences, views drawn from JSON, notes, sampling controls."""

import functools
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from nanogpt_hub.playground.links import FIELDS
from nanogpt_hub.playground.models import ModelStore
from nanogpt_hub.playground.session import Playground, toast, user_message
from nanogpt_hub.sampling import SAMPLERS, Sampler, SamplingConfig

STATIC = Path(__file__).parent / "static"
MODEL, LOAD, LIGHT = "model", "load", "light"  # what waits for the same turn: computing, loading, everything else


def with_user_errors(models: ModelStore, function: Callable) -> Callable:
    """The function with its errors as sentences. Neither page nor client ever sees a stack trace."""

    def sentence(error: Exception) -> gr.Error:
        return gr.Error(toast(user_message(error, models)), print_exception=not isinstance(error, ValueError | OSError))

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise sentence(error) from error

    @functools.wraps(function)
    def stream(*args, **kwargs):
        try:
            yield from function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise sentence(error) from error

    return stream if inspect.isgeneratorfunction(function) else call


def view(name: str, **options: Any) -> gr.HTML:
    """A part of the page that the scripts in static/ draw from JSON; `name` is that of the function there."""
    return gr.HTML(
        html_template=f'<div class="view {name}"></div>',
        js_on_load=f'drawView("{name}", element, props, watch, trigger)',
        apply_default_css=False,
        **options,
    )


def note(text: str) -> gr.Markdown:
    """A plain sentence or two beside a thing."""
    return gr.Markdown(text, elem_classes="note")


def save_as(name: str) -> str:
    """JavaScript that hands a text to the browser as a file."""
    return """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = NAME;
  link.click();
  URL.revokeObjectURL(link.href);
}""".replace("NAME", json.dumps(name))


class Page:
    """What the tabs share: the playground, the model in use, and how to wire an event."""

    def __init__(self, playground: Playground, workers: int):
        """workers: how many requests compute at once."""
        self.playground, self.models, self.limits = playground, playground.models, playground.limits
        self.turns = {MODEL: workers, LOAD: 2, LIGHT: 8}
        self.place = gr.State(None)  # Resolved: where this visitor's model is
        self.wanted = gr.State(None)  # (name, revision) of a model that a tab asks for
        self.link = gr.State({})  # what the visitor's link asks for, until another model is loaded
        self._loads = gr.State(0)  # changes with each load of a model, the same one included

    def on(
        self, listen: Callable, function: Callable, inputs: Any = None, outputs: Any = None, turn: str = LIGHT,
        **options: Any,
    ) -> Any:  # fmt: skip
        """An event whose errors are sentences, which waits its turn, and which is no public endpoint."""
        options = {"show_progress": "minimal", "api_visibility": "private", **options}
        limit = self.turns[turn]
        return listen(
            with_user_errors(self.models, function), inputs, outputs, concurrency_id=turn, concurrency_limit=limit,
            **options,
        )  # fmt: skip

    def on_model(self, function: Callable, inputs: Any = None, outputs: Any = None, **options: Any) -> Any:
        """An event that happens whenever a model was loaded."""
        return self.on(self._loads.change, function, inputs, outputs, **options)

    def loaded_outputs(self) -> list[gr.State]:
        """What a load writes: place, link and a number that it never wrote before."""
        return [self.place, self.link, self._loads]


def said(event: gr.EventData, name: str) -> Any:
    """What an event of a view says under a name; None where it says nothing of the kind."""
    data = event._data
    return data.get(name) if isinstance(data, dict) else None


def whole(event: gr.EventData, name: str) -> int:
    """A whole number that an event of a view says. ValueError where it is none."""
    value = said(event, name)
    if type(value) is not int:
        raise ValueError(f"the page asked for something that is not there ({name}); load it again")
    return value


def any_of(*listeners: Callable) -> Callable:
    """One event for several listeners."""
    return functools.partial(gr.on, list(listeners))


def secret(token: gr.OAuthToken | None) -> str | None:
    return token.token if token else None


def address(request: gr.Request) -> str:
    """Where visitors find this page."""
    host = os.environ.get("SPACE_HOST")
    return f"https://{host}/" if host else str(request.request.base_url if request.request else "")


class SamplingControls:
    """The controls of `FIELDS`: how much to generate, one slider for each sampler, seed and stop strings."""

    def __init__(self, page: Page):
        self.device = page.models.device
        self._by_name: dict[str, Any] = {"max_new_tokens": token_slider(page.limits.new_tokens)}
        groups = [[each for each in SAMPLERS.values() if each.basic is basic] for basic in (True, False)]
        self._by_name |= {each.name: sampler_slider(each) for each in groups[0]}
        with gr.Accordion("More", open=False):
            self._by_name |= {each.name: sampler_slider(each) for each in groups[1]}
            self._by_name["seed"] = gr.Number(
                None, precision=0, minimum=0, label="Seed", elem_id="seed",
                info="the same seed gives the same text; empty for a new one each time",
            )  # fmt: skip
            self._by_name["stop"] = gr.Textbox(
                "", lines=2, label="Stop strings", info="one a line; the text ends before the first that comes up"
            )
            self.int8 = gr.Checkbox(
                False, label="Weights of 8 bits", elem_id="int8", visible=self.device == "cpu",
                info="large models generate about twice as fast on a CPU, and the text may differ slightly; "
                "small ones gain nothing",
            )  # fmt: skip
        self.fields = [self._by_name[name] for name in FIELDS]
        self.sliders = [self._by_name[name] for name in SAMPLERS]
        known = ", ".join(f'["{each.name}", {each.neutral}, values[{n}]]' for n, each in enumerate(SAMPLERS.values()))
        follow = f"(...values) => nanogpt.setSamplers([{known}])"  # panels are redrawn without asking the server
        for slider in self.sliders:
            slider.change(None, self.sliders, None, js=follow, api_visibility="private")

    def values(self, settings: SamplingConfig, asked: dict[str, Any]) -> list[Any]:
        """Updates of `[*fields, int8]` for a model's settings, and for what a link asked for."""
        values = [slider_update(self._by_name["max_new_tokens"], settings.max_new_tokens)]
        for each in SAMPLERS.values():
            value = getattr(settings, each.name)
            values.append(slider_update(self._by_name[each.name], each.neutral if value is None else value))
        int8 = bool(asked.get("int8"))
        box = gr.Checkbox(int8, visible=int8 or self.device == "cpu")  # a link ticks it anywhere
        return [*values, settings.seed if "seed" in asked else None, "\n".join(settings.stop), box]


def named(values: tuple) -> dict[str, Any]:
    """The values of `SamplingControls.fields` by their names."""
    return dict(zip(FIELDS, values, strict=True))


def token_slider(most: int) -> gr.Slider:
    return gr.Slider(1, most, min(160, most), step=1, label="New tokens", info="how many to generate", elem_id="tokens")


def sampler_slider(each: Sampler) -> gr.Slider:
    """The control of a sampler, as its declaration says."""
    least, most = each.slider
    value = each.neutral if each.default is None else each.default
    step = 1 if each.kind is int else 0.01
    name = each.name.replace("_", "-")
    return gr.Slider(least, most, value, step=step, label=each.label, info=each.help, elem_id=name)


def slider_update(slider: gr.Slider, value: float) -> Any:
    """The value for a slider, which is made longer for a value beyond its ends."""
    if slider.minimum <= value <= slider.maximum:
        return value
    return gr.Slider(min(slider.minimum, value), max(slider.maximum, value), value)
