"""What programs can ask of the page: functions of plain values, which its API and its MCP server offer as they are.

Their docstrings are what a caller, or an agent, gets to read. Models go by name; the limits of the page hold here too.
Each function that samples has one parameter for each sampler of `SAMPLERS`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from nanogpt_hub.playground.facts import info
from nanogpt_hub.playground.session import Playground
from nanogpt_hub.sampling import SAMPLERS


class Api:
    """The public endpoints of a playground, by the names of the methods."""

    def __init__(self, playground: Playground):
        self.playground, self.models = playground, playground.models
        self.generate = with_samplers(self._generate, "generate", neutral=False)
        self.next_tokens = with_samplers(self._next_tokens, "next_tokens", neutral=True)

    def _generate(
        self, prompt: str | None = "", model: str | None = "", revision: str | None = "",
        max_new_tokens: int | None = 160, samplers: Any = None, seed: int | None = None,
        stop: list[str] | None = None, given: list[int] | None = None,
        engine: str | None = None, int8: bool = False,
    ) -> Iterator[dict]:  # fmt: skip
        """Continue a prompt. Streams objects with text, tokens, seed, engine and finish (null until the last one).

        model: a name on the Hugging Face Hub; empty for the page's own. revision: branch, tag or commit.
        max_new_tokens: how many tokens to generate. {samplers}. Null takes the model's own default. seed: the same seed
        gives the same text; null draws one. stop: the text ends before the first of these strings. given: ids of
        tokens that stand after the prompt already. engine: plain, torch or numba; null takes the fastest that is
        ready. int8: weights of 8 bits, faster for large models on a CPU.
        """
        place = self.models.find(model or "", revision or "")
        asked = dict(max_new_tokens=max_new_tokens, seed=seed, stop=stop, **samplers)
        settings = self.playground.settings(place, **asked)
        for made in self.playground.write(place, prompt or "", settings, int8, given or [], engine):
            yield {
                "text": made.text,
                "tokens": len(made.tokens) - made.given,
                "seed": made.settings.seed,
                "engine": made.engine,
                "finish": made.finish,
                "model": self.models.name_of(place),
                "sha": place.sha,
            }

    def _next_tokens(
        self, text: str | None = "", model: str | None = "", revision: str | None = "", n: int = 10,
        samplers: Any = None,
    ) -> dict:  # fmt: skip
        """What the model expects after a text: the n likeliest tokens with their probability after each sampler.

        {samplers}. Returns stages (the model itself, then each sampler that is on), tokens (id, text, probs by stage,
        cut_by), and by stage entropy in bits, kept (how many tokens may be drawn) and rest (probability of tokens not
        listed).
        """
        place = self.models.find(model or "", revision or "")
        neutral: dict[str, Any] = {**neutral_samplers()}
        config = replace(self.playground.settings(place), **neutral)
        given = {name: value for name, value in samplers.items() if value is not None}
        found = asdict(self.playground.next_tokens(place, text or "", replace(config, **given), n))
        return {**found, "tokens": [token._asdict() for token in found["tokens"]]}

    def score(self, text: str, model: str | None = "", revision: str | None = "") -> dict:
        """How well the model foresees a text: bits per token, per character and per byte, perplexity, and each token.

        A token has id, text, bits (null for the first, before which nothing stands), rank, and the likeliest instead.
        """
        found = self.playground.score(self.models.find(model or "", revision or ""), text or "")
        names = ("bits_per_token", "bits_per_character", "bits_per_byte", "perplexity", "total_bits")
        tokens = [
            {"id": t.piece.id, "text": t.piece.text, "bits": t.bits, "rank": t.rank, "best": t.best_text}
            for t in found.tokens
        ]
        return {**{name: getattr(found, name) for name in names}, "tokens": tokens}

    def info(self, model: str | None = "", revision: str | None = "") -> dict:
        """What a model is: name, commit, parameters, shape, tokenizer, sampling defaults, validation loss."""
        return info(self.models, self.models.find(model or "", revision or ""))


def neutral_samplers() -> dict[str, float]:
    """Every sampler at the value that changes nothing."""
    return {each.name: each.kind(each.neutral) for each in SAMPLERS.values()}


def with_samplers(function: Callable, name: str, *, neutral: bool) -> Callable:
    """A method whose parameter `samplers` becomes one for each sampler: name, type, default and help are read there.

    neutral: by default each changes nothing; else each is None, which means the model's own.
    """
    own = inspect.signature(function)
    defaults = neutral_samplers() if neutral else dict.fromkeys(SAMPLERS)
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    added = [
        inspect.Parameter(each.name, keyword, default=defaults[each.name], annotation=each.kind | None)
        for each in SAMPLERS.values()
    ]
    listed = []
    for parameter in own.parameters.values():
        listed += added if parameter.name == "samplers" else [parameter]
    signature = own.replace(parameters=listed)

    def bind(args: tuple, kwargs: dict) -> dict:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        samplers = {name: given.pop(name) for name in SAMPLERS}
        return {**given, "samplers": samplers}

    def call(*args, **kwargs):
        return function(**bind(args, kwargs))

    def stream(*args, **kwargs):
        yield from function(**bind(args, kwargs))

    made = stream if inspect.isgeneratorfunction(function) else call
    functools.update_wrapper(made, function)
    vars(made).update(__signature__=signature)
    made.__name__ = name
    made.__annotations__ = {p.name: p.annotation for p in listed} | {"return": own.return_annotation}
    helps = "; ".join(f"{each.name}: {each.help}" for each in SAMPLERS.values())
    made.__doc__ = (function.__doc__ or "").replace("{samplers}", helps)
    return made
