"""A generation as the page shows it: a record that grows while the model generates.

continuation.text, continuation.finish          # so far; None until it has ended
continuation.view(), continuation.status()      # for the token view, and a line of figures
continuation.as_json()                          # everything, for a file
"""

import json
import math
from dataclasses import asdict, dataclass

from nanogpt_hub.generate import Token
from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.tokenizer import Tokenizer


@dataclass(frozen=True)
class Continuation:
    """What a model generates after a prompt, under way or finished: all that is needed to show, save and repeat it."""

    place: Resolved
    prompt: str
    settings: SamplingConfig  # with its seed
    tokenizer: Tokenizer
    tokens: tuple[Token, ...] = ()
    seconds: float = 0.0
    note: str = ""  # what was done to the prompt
    int8: bool = False  # with weights of 8 bits
    engine: str = "torch"  # which engine computed it

    @property
    def text(self) -> str:
        """What was generated, without the prompt."""
        return "".join(token.text for token in self.tokens)

    @property
    def finish(self) -> str | None:
        return self.tokens[-1].finish if self.tokens else None

    def view(self, mark: int | None = None) -> dict:
        """For the token view: each token's text, probability, and what could have come instead."""
        return {
            "run": f"{self.settings.seed}-{hash((self.prompt, self.settings, self.place, self.int8))}",
            "prompt": self.prompt,
            "tokens": [self._token_view(token) for token in self.tokens],
            "done": self.finish is not None,
            "mark": mark,
        }

    def _token_view(self, token: Token) -> dict:
        name = self.tokenizer.token_str
        return {
            "t": token.text,
            "name": name(token.id),
            "p": round(token.prob, 5),
            "q": round(token.sampled_prob, 5),
            "alts": [[name(a.id), round(a.prob, 5), round(a.sampled_prob, 5)] for a in token.alternatives],
        }

    def status(self, rate: bool = True) -> str:
        """One line: how many tokens, how fast (if `rate`), how sure, and why it ended."""
        if not self.tokens:
            return "reading the prompt ..."
        n = len(self.tokens)
        bits = -sum(token.logprob for token in self.tokens) / n / math.log(2)
        ends = {
            "length": "it reached the number of tokens asked for",
            "stop": "it came to a stop string",
            "eot": "the model ended the text",
            "time": "its time was up; Continue goes on",
            None: "writing ...",
        }
        parts = [f"{n} tokens", f"{bits:.2f} bits of surprise per token"]
        parts[1:1] = [f"{n / max(self.seconds, 1e-9):,.0f} tokens/s"] if rate else []
        parts += [f"seed {self.settings.seed}", f"engine {self.engine}", ends[self.finish], self.note]
        return " · ".join(filter(None, parts))

    def as_json(self) -> str:
        """Everything, for a file."""
        about = {
            "model": str(self.place.repo_id or self.place.folder.name),
            "revision": self.place.sha,
            "prompt": self.prompt,
            "text": self.text,
            "finish": self.finish,
            "settings": asdict(self.settings),
            "int8": self.int8,
            "engine": self.engine,
            "tokens": [
                {
                    "id": token.id,
                    "text": self.tokenizer.token_str(token.id),
                    "prob": token.prob,
                    "sampled_prob": token.sampled_prob,
                    "alternatives": [a._asdict() for a in token.alternatives],
                }
                for token in self.tokens
            ],
        }
        return json.dumps(about, indent=1, ensure_ascii=False)
