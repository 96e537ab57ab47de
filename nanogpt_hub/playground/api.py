"""What programs can ask of the app: functions of plain values, which its API and its MCP server offer as they are.

Their docstrings are what a caller, or an agent, gets to read. Models go by name; the limits of the page hold here too.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace

from nanogpt_hub.playground.session import Playground


class Api:
    """The public endpoints of a playground, by the names of the methods."""

    def __init__(self, playground: Playground):
        self.playground = playground

    def generate(
        self, prompt: str = "", model: str = "", revision: str = "", max_new_tokens: int = 160,
        temperature: float = 0.8, top_k: int = 200, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, seed: int | None = None, stop: list[str] | None = None,
        int8: bool = False,
    ) -> Iterator[dict]:  # fmt: skip
        """Continue a prompt. Streams objects with text, tokens, seed and finish (null until the last one).

        model: a name on the Hugging Face Hub; empty for the app's own. revision: branch, tag or commit.
        max_new_tokens: how many tokens to write. temperature: 0 for greedy. top_k: 0 for all tokens. seed: the same
        seed gives the same text; null draws one. stop: the text ends before the first of these strings.
        int8: weights of 8 bits, faster for large models on a CPU.
        """
        place = self.playground.find(model, revision)
        asked = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        asked |= dict(repetition_penalty=repetition_penalty, seed=seed, stop=stop)
        for writing in self.playground.write(place, prompt, self.playground.settings(place, **asked), int8):
            yield {
                "text": writing.text,
                "tokens": len(writing.tokens),
                "seed": writing.settings.seed,
                "finish": writing.finish,
                "model": self.playground.name_of(place),
                "sha": place.sha,
            }

    def next_tokens(
        self, text: str = "", model: str = "", revision: str = "", n: int = 10, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    ) -> dict:  # fmt: skip
        """What the model expects after a text: the n likeliest tokens with their probability after each sampler.

        Returns stages (the model itself, then each sampler that is on), tokens (id, text, probs by stage, cut_by), and
        by stage entropy in bits, kept (how many tokens may be drawn) and rest (probability of tokens not listed).
        """
        place = self.playground.find(model, revision)
        config = self.playground.settings(place, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        found = asdict(self.playground.next_tokens(place, text, replace(config, repetition_penalty=1.0), n))
        return {**found, "tokens": [token._asdict() for token in found["tokens"]]}

    def score(self, text: str, model: str = "", revision: str = "") -> dict:
        """How well the model foresees a text: bits per token, per character and per byte, perplexity, and each token.

        A token has id, text, bits (null for the first, before which nothing stands), rank, and the likeliest instead.
        """
        found = self.playground.score(self.playground.find(model, revision), text)
        names = ("bits_per_token", "bits_per_character", "bits_per_byte", "perplexity", "total_bits")
        tokens = [
            {"id": t.piece.id, "text": t.piece.text, "bits": t.bits, "rank": t.rank, "best": t.best_text}
            for t in found.tokens
        ]
        return {**{name: getattr(found, name) for name in names}, "tokens": tokens}

    def info(self, model: str = "", revision: str = "") -> dict:
        """What a model is: name, commit, parameters, shape, tokenizer, sampling defaults, validation loss."""
        return self.playground.info(self.playground.find(model, revision))
