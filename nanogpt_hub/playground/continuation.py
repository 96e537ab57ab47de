"""A generation as the page shows it: a record that grows while the model generates, and the tree of its branches.

continuation.text, continuation.finish          # so far; None until it has ended
continuation.view(), continuation.status()      # for the token view, and a line of figures
continuation.as_json()                          # everything, for a file
tree.grown(continuation, parent=2).view()       # the branches that a visitor made
"""

import json
import math
from dataclasses import asdict, dataclass, replace

from nanogpt_hub.generate import Token
from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.lens import tokens_of
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.tokenizer import Tokenizer

ENDS = {
    "length": "it reached the number of tokens asked for",
    "stop": "it came to a stop string",
    "eot": "the model ended the text",
    "time": "its time was up; Continue goes on",
    "stopped": "stopped; Continue goes on",
    None: "generating ...",
}


@dataclass(frozen=True)
class Continuation:
    """What a model generates after a prompt, under way or finished: all that is needed to show, save and repeat it."""

    place: Resolved
    prompt: str
    prompt_ids: tuple[int, ...]
    settings: SamplingConfig  # with its seed
    tokenizer: Tokenizer
    tokens: tuple[Token, ...] = ()
    given: int = 0  # how many of the tokens were there before: kept from another branch, or chosen by hand
    seconds: float = 0.0
    note: str = ""  # what was done to the prompt
    int8: bool = False  # with weights of 8 bits
    asked_engine: str | None = None  # None: the fastest that was ready
    stopped: bool = False  # by the visitor
    prompt_places: tuple[tuple[int, int], ...] = ()  # of a prompt with special tokens: the characters of each id

    @property
    def text(self) -> str:
        """What follows the prompt."""
        return "".join(token.text for token in self.tokens)

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and tokens."""
        return self.prompt_ids + tuple(token.id for token in self.tokens)

    @property
    def finish(self) -> str | None:
        """Why it ended; None while it goes on."""
        new = self.tokens[self.given :]
        return "stopped" if self.stopped else new[-1].finish if new else None

    @property
    def engine(self) -> str:
        """What computed the new tokens: plain, torch or numba. The same seed gives the same text by the same engine."""
        new = self.tokens[self.given :]
        return new[-1].engine if new else ""

    @property
    def key(self) -> str:
        """The same for all moments of one generation, another for each other one."""
        given = tuple(token.id for token in self.tokens[: self.given])
        return f"{abs(hash((self.prompt, self.settings, self.place, self.int8, given))):x}"

    def stop(self) -> "Continuation":
        """The same as the visitor stopped it."""
        return self if self.finish else replace(self, stopped=True)

    def view(self, mark: int | None = None, since: int = 0) -> dict:
        """For the token view: the tokens from `since` on (0: the prompt as well), with text, name and probabilities."""
        name = self.tokenizer.token_str
        shown = [[t.text, name(t.id), round(t.prob, 5), round(t.sampled_prob, 5)] for t in self.tokens[since:]]
        about = {"run": self.key, "from": since, "tokens": shown, "given": self.given}
        if since == 0:
            about["prompt"] = self.prompt_pieces()
        done = {"done": self.finish is not None, "stopped": self.stopped}
        return {**about, "offset": len(self.prompt_ids), **done, "mark": mark}

    def prompt_pieces(self) -> list[list[str]]:
        """[text, name] of each token of the prompt."""
        if not self.prompt_places:
            return prompt_pieces(self.tokenizer, self.prompt, self.prompt_ids)
        shown, end = [], 0
        for id, (first, last) in zip(self.prompt_ids, self.prompt_places, strict=True):
            shown.append([self.prompt[max(first, end) : last], self.tokenizer.token_str(id)])
            end = max(end, last)
        return shown

    def status(self, rate: bool = True) -> str:
        """One line: how many tokens, how fast (if `rate`), how sure, and why it ended."""
        new = self.tokens[self.given :]
        if not new:
            return "reading the prompt ..." if not self.stopped else f"0 tokens · {ENDS['stopped']}"
        n = len(new)
        bits = -sum(token.logprob for token in new) / n / math.log(2)
        parts = [f"{n} tokens", f"{bits:.2f} bits of surprise per token"]
        parts[1:1] = [f"{n / max(self.seconds, 1e-9):,.0f} tokens/s"] if rate else []
        parts += [f"seed {self.settings.seed}", f"engine {self.engine}", ENDS[self.finish], self.note]
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
            "given": self.given,
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


def prompt_pieces(tokenizer: Tokenizer, prompt: str, ids: tuple[int, ...]) -> list[list[str]]:
    """[text, name] of each token of a prompt; the texts joined are the prompt where the tokenizer did not change it."""
    if not prompt:
        return [["", tokenizer.token_str(id)] for id in ids]
    shown, group = [], -1
    for piece in tokens_of(tokenizer, prompt, len(ids)):
        text = piece.text if piece.start is None else prompt[piece.start : piece.end]
        shown.append([text if piece.group != group else "", piece.text])
        group = piece.group
    return shown


# ---- branches ----


@dataclass(frozen=True)
class Branch:
    """A continuation, and where it left another."""

    number: int
    made: Continuation
    parent: int | None = None  # number of the branch that it left


@dataclass(frozen=True)
class Tree:
    """The branches that a visitor made of one text. At most `MOST`: the oldest that no other grows from go first."""

    branches: tuple[Branch, ...] = ()
    current: int | None = None

    MOST = 12

    def grown(self, made: Continuation, parent: int | None) -> "Tree":
        """The tree with one more branch, which becomes the current one."""
        number = 1 + max((branch.number for branch in self.branches), default=-1)
        kept = list(self.branches)
        while len(kept) >= self.MOST:
            parents = {branch.parent for branch in kept} | {parent}
            kept.remove(next(branch for branch in kept if branch.number not in parents))
        return Tree((*kept, Branch(number, made, parent)), number)

    def updated(self, made: Continuation) -> "Tree":
        """The tree in which the current branch has grown."""
        number = self.current
        changed = (replace(branch, made=made) if branch.number == number else branch for branch in self.branches)
        return replace(self, branches=tuple(changed))

    def at(self, number: object) -> "Tree":
        """The tree with another current branch. ValueError where there is none of that number."""
        if number not in [branch.number for branch in self.branches]:
            raise ValueError("this branch is not there any more; choose another one")
        return replace(self, current=number)

    @property
    def made(self) -> Continuation | None:
        """The continuation of the current branch."""
        return next((branch.made for branch in self.branches if branch.number == self.current), None)

    def view(self) -> dict:
        """For the view of branches: each with its depth, the token chosen where it began and how it goes on."""
        rows: list[dict] = []

        def add(parent: int | None, depth: int) -> None:
            for branch in self.branches:
                if branch.parent == parent:
                    rows.append({"number": branch.number, "depth": depth, **beginning(branch)})
                    add(branch.number, depth + 1)

        add(None, 0)
        return {"rows": rows, "current": self.current}


def beginning(branch: Branch) -> dict:
    """Where a branch began: the token, its place, and the text right after it."""
    made = branch.made
    chosen = branch.parent is not None and made.given
    start = made.given if chosen else 0
    text = "".join(token.text for token in made.tokens[start : start + 24])[:48]
    name = made.tokenizer.token_str(made.tokens[made.given - 1].id) if chosen else ""
    return {"token": name, "at": len(made.prompt_ids) + made.given if chosen else None, "text": text}
