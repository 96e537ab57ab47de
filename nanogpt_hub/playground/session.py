"""What the page's tabs do, without the page: generating, looking inside, comparing, and reading training runs.

    playground = Playground(ModelStore("user/name"))
    place = playground.models.find("user/name", "step-000500")              # resolved to a commit
    for continuation in playground.write(place, "To be", playground.settings(place, seed=1)): print(continuation.text)

The functions take plain values, check each against `Limits` whoever asks, and return records that say everything a
page needs (`view`), so that one process serves many visitors and tests need no browser.
"""

import html
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError

from nanogpt_hub import lens
from nanogpt_hub.compare import Experiment, compare, read_experiment, tables
from nanogpt_hub.engine.select import engine_setting
from nanogpt_hub.generate import Token, check_ids, encode_prompt, stream_tokens
from nanogpt_hub.hub.private import public_text, without_secrets
from nanogpt_hub.hub.resolve import HubError, Resolved, chain
from nanogpt_hub.playground.continuation import Continuation
from nanogpt_hub.playground.facts import example_question, run_facts
from nanogpt_hub.playground.models import ModelStore, is_hidden
from nanogpt_hub.playground.position import ALTERNATIVES, given_tokens, position_view
from nanogpt_hub.playground.tiny import PROMPT
from nanogpt_hub.playground.views import head_view, kept_steps, surprise_note, training_view
from nanogpt_hub.runs import Run, find_runs, read_run, run_of
from nanogpt_hub.sampling import SAMPLERS, SamplingConfig
from nanogpt_hub.tokenizer import Tokenizer

UPDATES_PER_SECOND = 10  # more only makes a browser lag behind the model
SMALL_MODEL = 30_000_000  # parameters; below, a lent GPU takes longer to come than the CPU to answer
MOST_RUNS = 6  # that are drawn over each other
WHOLE = ("max_new_tokens", "seed", *(each.name for each in SAMPLERS.values() if each.kind is int))  # whole numbers

# ---- the playground --------------------------------------------------------------------------------------------------


class Playground:
    """What the tabs do, for all visitors of a process."""

    def __init__(self, models: ModelStore, gpu: Callable | None = None):
        """gpu: a decorator (`spaces.GPU`) that runs a generator function in a process that has a GPU for a while.

        Small models do without.
        """
        self.models, self.limits = models, models.limits
        self._stream_on_lent_gpu = gpu(self._stream_on_gpu) if gpu else None

    # -- writing

    def settings(self, place: Resolved, **asked) -> SamplingConfig:
        """Sampling settings: the model's own defaults, and what was asked for (None: not asked), within the limits.

        Raises ValueError or LimitError for what is not allowed.
        """
        asked = {name: value for name, value in asked.items() if value is not None}
        if isinstance(asked.get("stop"), str):
            asked["stop"] = tuple(line for line in asked["stop"].split("\n") if line)
        for name in WHOLE:  # JSON and sliders know one kind of number
            if isinstance(asked.get(name), float) and asked[name].is_integer():
                asked[name] = int(asked[name])
        config = replace(self.models.load(place).defaults, **asked)
        if "max_new_tokens" in asked:
            self.limits.check("max_new_tokens", config.max_new_tokens, self.limits.new_tokens)
        elif config.max_new_tokens > self.limits.new_tokens:
            config = replace(config, max_new_tokens=self.limits.new_tokens)
        self.limits.check("stop", len(config.stop), 8, " strings")
        self.limits.check("stop", sum(map(len, config.stop)), 400, " characters")
        return replace(config, max_seconds=self.limits.seconds).seeded()

    def write(
        self, place: Resolved, prompt: str, config: SamplingConfig, int8: bool = False, given: Sequence[int] = (),
        engine: str | None = None,
    ) -> Iterator[Continuation]:  # fmt: skip
        """What follows the prompt, as it grows: at most `UPDATES_PER_SECOND`, and always the finished one.

        int8: with weights of 8 bits, on the CPU whatever the device is. given: ids of tokens that stand after the
        prompt already. engine: one of ENGINES; None takes the fastest that is ready. Closing the iterator ends the
        work at the next token.
        """
        loaded = self.models.load(place)
        self.limits.check("the prompt", len(prompt), self.limits.prompt_chars, " characters")
        self.limits.check("the text", len(given), self.limits.kept_tokens, " tokens")
        ids = encode_prompt(loaded.tokenizer, prompt)
        check_ids([*ids, *given], loaded.model.config.vocab_size)
        tokens = tuple(given_tokens(loaded, ids, given, config)) if given else ()
        begun = Continuation(
            place, prompt, tuple(ids), config, loaded.tokenizer, tokens, len(tokens), int8=int8, asked_engine=engine
        )
        yield from self.grow(begun)

    def extend(
        self, made: Continuation, config: SamplingConfig, keep: int | None = None, chosen: int | None = None,
        int8: bool = False,
    ) -> Iterator[Continuation]:  # fmt: skip
        """The text goes on: after all of it, or after its first `keep` tokens (the prompt's count) and the id `chosen`.

        As `write` in all else. ValueError for a place or an id that is not there.
        """
        loaded = self.models.load(made.place)
        keep = len(made.ids) if keep is None else keep
        if not 0 < keep <= len(made.ids):
            raise ValueError("there is no such token in this text any more: choose another one")
        if chosen is not None:
            check_ids([chosen], min(loaded.model.config.vocab_size, loaded.tokenizer.vocab_size))
        if keep < len(made.prompt_ids):  # the prompt itself is left: as much as its text gives again is the new one
            prompt, ids = prompt_of(loaded.tokenizer, made.prompt_ids[:keep])
            tokens = tuple(given_tokens(loaded, ids, made.prompt_ids[len(ids) : keep], config))
            made = replace(made, prompt=prompt, prompt_ids=ids, prompt_places=(), tokens=tokens)
        tokens = made.tokens[: keep - len(made.prompt_ids)]
        if chosen is not None:
            before = [*made.prompt_ids, *(token.id for token in tokens)]
            tokens += tuple(given_tokens(loaded, before, [chosen], config))
        tokens = tuple(replace(token, finish=None) for token in tokens)
        self.limits.check("the text", len(tokens), self.limits.kept_tokens, " tokens")
        begun = replace(made, settings=config, tokens=tokens, given=len(tokens), int8=int8, stopped=False, seconds=0.0)
        yield from self.grow(begun)

    def grow(self, begun: Continuation) -> Iterator[Continuation]:
        """`begun` with new tokens, as they come."""
        place, config, int8 = begun.place, begun.settings, begun.int8
        model = self.models.load(place).model
        unseen = len(begun.prompt_ids) > model.config.block_size
        note = f"the model saw only the end of the prompt's {len(begun.prompt_ids)} tokens" if unseen else ""
        ids = list(begun.ids)
        if self._stream_on_lent_gpu and not int8 and model.num_params() >= SMALL_MODEL:
            stream = self._stream_on_lent_gpu(place, ids, config)
        else:
            stream = self._stream(place, ids, config, None, int8, begun.asked_engine)
        tokens: list[Token] = [*begun.tokens]
        started = time.monotonic()
        for new in stream:
            tokens += new
            seconds = time.monotonic() - started
            yield replace(begun, tokens=tuple(tokens), seconds=seconds, note=note)

    def position(self, made: Continuation, n: int, config: SamplingConfig) -> dict:
        """What the panel shows of the n-th token of a text (of its next one, if n is their number)."""
        return position_view(self.models.load(made.place), made.ids, n, config)

    def _stream(
        self, place: Resolved, ids: list[int], config: SamplingConfig, device: str | None = None, int8: bool = False,
        engine: str | None = None,
    ) -> Iterator[list[Token]]:  # fmt: skip
        """The new tokens since the last update. Takes and gives what can travel to another process."""
        loaded = self.models.load(place, "cpu" if int8 else device)
        model = self.models.load_int8(place) if int8 else loaded.model
        new: list[Token] = []
        shown = -math.inf  # the first token is shown at once
        engine = "auto" if engine_setting(engine) == "numba" else engine  # no visitor waits for a compiler
        chosen = stream_tokens(model, loaded.tokenizer, [ids], config, alternatives=ALTERNATIVES, engine=engine)
        for token in chosen:
            new.append(token)
            now = time.monotonic()
            if token.finish or now - shown >= 1 / UPDATES_PER_SECOND:
                shown = now
                yield new
                new = []

    def _stream_on_gpu(self, place: Resolved, ids: list[int], config: SamplingConfig) -> Iterator[list[Token]]:
        """`_stream` in a process that has a GPU; what it loads stays there for the next request."""
        yield from self._stream(place, ids, config, "cuda")

    def example(self, place: Resolved) -> Continuation:
        """What a first visit shows: the same for everyone, so made once for each model."""
        loaded = self.models.load(place)
        if "example" not in loaded.notes:
            config = self.settings(place, seed=1)
            *_, loaded.notes["example"] = self.write(place, self.example_prompt(place), config)
        return loaded.notes["example"]

    def example_prompt(self, place: Resolved) -> str:
        """A prompt that suits the model: what its run used or how a line of its sample begins, else one it can read."""
        tokenizer = self.models.load(place).tokenizer
        sample = run_facts(place).get("sample", {})
        given, written = (str(sample.get(name) or "") for name in ("prompt", "text"))
        given = example_question(place)[1] or given  # of a chat model, whose prompt is full of its template
        line = next((whole_words(line, 32) for line in written.splitlines() if line.strip()), None)
        for prompt in (given if given.strip() else line, PROMPT, "\n"):
            try:
                if isinstance(prompt, str) and tokenizer.encode(prompt):
                    return prompt[: self.limits.prompt_chars]
            except ValueError:
                continue
        return ""

    # -- looking inside

    def sample_text(self, place: Resolved, n_tokens: int = 40) -> str:
        """A text to look into at first: how the model's example begins."""
        example, tokenizer = self.example(place), self.models.load(place).tokenizer
        ids = tokenizer.encode(example.prompt + example.text)
        return tokenizer.decode(ids[: min(n_tokens, self.models.load(place).model.config.block_size)])

    def next_tokens(self, place: Resolved, text: str, config: SamplingConfig, n: int = 12) -> lens.NextTokens:
        """The likeliest next tokens, before and after each sampler."""
        self.limits.check("the text", len(text), self.limits.text_chars, " characters")
        self.limits.check("n", n, 100, " tokens")
        loaded = self.models.load(place)
        return lens.next_tokens(loaded.model, loaded.tokenizer, text, config, n)

    def look(self, place: Resolved, text: str) -> tuple[lens.Inside, lens.LogitLens, str]:
        """Attention maps and logit lens of the end of a text, as much of it as is allowed, and that end."""
        self.limits.check("the text", len(text), self.limits.text_chars, " characters")
        loaded = self.models.load(place)
        most = min(self.limits.look_tokens, loaded.model.config.block_size)
        ids = loaded.tokenizer.encode(text)
        text = loaded.tokenizer.decode(ids[-most:]) if len(ids) > most else text
        inside = lens.look_inside(loaded.model, loaded.tokenizer, text, most)
        return inside, lens.logit_lens(loaded.model, loaded.tokenizer, inside), text

    def score(self, place: Resolved, text: str) -> lens.Surprise:
        """How well the model foresees each token of a text."""
        self.limits.check("the text", len(text), self.limits.text_chars, " characters")
        loaded = self.models.load(place)
        return lens.surprise(loaded.model, loaded.tokenizer, text, self.limits.text_tokens)

    def read(self, place: Resolved, text: str, config: SamplingConfig) -> Continuation:
        """A text as a record without new tokens, for `position` and `surprise`."""
        self.limits.check("the text", len(text), self.limits.text_chars, " characters")
        tokenizer = self.models.load(place).tokenizer
        ids = encode_prompt(tokenizer, text)
        self.limits.check("the text", len(ids), self.limits.text_tokens, " tokens")
        return Continuation(place, text, tuple(ids), config, tokenizer)

    def surprise(self, read: Continuation) -> tuple[str, dict]:
        """(figures, view): how well the model foresees a text, as a sentence and for the token view.

        A text of one token has no figures: nothing stands before it.
        """
        view = {**read.view(), "done": True}
        if len(read.ids) < 2:
            return "One token: nothing stands before it that could have foretold it. Write more.", view
        scored = self.score(read.place, read.prompt)
        prompt = [[*piece, token.bits] for piece, token in zip(view["prompt"], scored.tokens, strict=True)]
        return surprise_note(scored), {**view, "prompt": prompt}

    def cut(self, place: Resolved, text: str) -> list[lens.Piece]:
        """How the tokenizer cuts a text."""
        self.limits.check("the text", len(text), self.limits.text_chars, " characters")
        return lens.tokens_of(self.models.load(place).tokenizer, text, self.limits.text_tokens)

    # -- two models

    def compare(
        self, a: Resolved, b: Resolved, prompt: str, config: SamplingConfig
    ) -> Iterator[tuple[Continuation, Continuation]]:
        """What both write after the prompt with the same seed, side by side as it grows."""
        streams = [self.write(place, prompt, config) for place in (a, b)]
        one, two = (next(stream) for stream in streams)
        yield one, two
        while one.finish is None or two.finish is None:
            one, two = next(streams[0], one), next(streams[1], two)
            yield one, two

    def first_difference(self, a: Continuation, b: Continuation) -> int | None:
        """Index of the first token in which two generations differ, as far as both have come."""
        ids = [[token.id for token in writing.tokens] for writing in (a, b)]
        if a.tokenizer.hash != b.tokenizer.hash:
            return 0
        if a.finish is None or b.finish is None:
            n = min(map(len, ids))
            ids = [row[:n] for row in ids]
        return lens.first_difference(*ids)

    def differences(self, a: Continuation, b: Continuation) -> list[int]:
        """Indices of the tokens in which two generations differ, as far as both have come."""
        if a.tokenizer.hash != b.tokenizer.hash:
            return []
        return [n for n, (one, two) in enumerate(zip(a.tokens, b.tokens, strict=False)) if one.id != two.id]

    def reread(self, made: Continuation, other: Resolved) -> tuple[str, dict] | None:
        """(sentence, view): a text as another model reads it. None where the tokenizers differ or nothing was made.

        The view's bits are by how much the other was more surprised than the model that generated the text.
        """
        text, loaded = made.prompt + made.text, self.models.load(other)
        if loaded.tokenizer.hash != made.tokenizer.hash or len(made.ids) < 2:
            return None
        own, others = (self.score(place, text).tokens for place in (made.place, other))
        pairs = [(one.bits, two.bits) for one, two in zip(own, others, strict=True)]
        more = [None if one is None or two is None else two - one for one, two in pairs]
        view = {**self.read(made.place, text, made.settings).view(), "done": True}
        shown = [None if bits is None else max(0.0, bits) for bits in more]
        view["prompt"] = [[*piece, bits] for piece, bits in zip(view["prompt"], shown, strict=True)]
        mean = sum(bits for bits in more if bits is not None) / max(1, len(more) - 1)
        return f"{abs(mean):.2f} bits per token {'more' if mean >= 0 else 'less'} than its own model", view

    def divergence(self, a: Resolved, b: Resolved, prompt: str) -> lens.Divergence:
        """How far apart what the two expect after the prompt is."""
        self.limits.check("the prompt", len(prompt), self.limits.prompt_chars, " characters")
        one, two = self.models.load(a), self.models.load(b)
        return lens.divergence(one.model, two.model, one.tokenizer, two.tokenizer, prompt)

    # -- training

    def training(self, place: Resolved, names: Sequence[str] = ()) -> list[Run]:
        """The runs by these names (`training_names`), at most `MOST_RUNS`; without names the model's own."""
        known = self._run_folders(place)
        chosen = [name for name in names if name in known][:MOST_RUNS] or [*known][:1]
        return [read_run(known[name], name) for name in chosen]

    def training_view(self, place: Resolved, names: Sequence[str], revisions: Sequence[str]) -> dict:
        """The runs for the page: curves, and the first one's kept steps with samples and whether weights are there."""
        runs = self.training(place, names)
        if not runs:
            return {"runs": [], "steps": []}
        steps = kept_steps(runs[0])
        usable = {step for step in steps if self.model_at(place, runs[0], step, revisions)}
        return training_view(runs, steps, usable)

    def verdicts(self, place: Resolved, names: Sequence[str]) -> str:
        """What differs between runs, their losses, and whether that is beyond noise, as Markdown; "" for one run."""
        runs = self.training(place, names)
        if len(runs) < 2:
            return ""
        try:
            found = compare([plain_experiment(read_experiment(run.folder, run.name)) for run in runs])
        except (ValueError, OSError) as error:
            return f"These runs cannot be compared in numbers: {plain_text(public_text(str(error)))}"
        return "\n\n".join(tables(found))

    def head_view(
        self, place: Resolved, names: Sequence[str], chosen: tuple[int, int] | None = None
    ) -> dict | None:  # fmt: skip
        """Where one head of the first run looked at each kept step, for the page; None where the run kept no maps."""
        runs = self.training(place, names)
        return head_view(runs[0], kept_steps(runs[0]), chosen) if runs else None

    def training_names(self, place: Resolved) -> list[str]:
        return list(self._run_folders(place))

    def _run_folders(self, place: Resolved) -> dict[str, Path]:
        own = run_of(place.folder)
        known = {f"{self.models.name_of(place)} (this model)": own} if own else {}
        return known | {folder.as_posix(): folder for folder in find_runs(self.models.runs) if folder != own}

    def model_at(self, place: Resolved, run: Run, step: int, names: Sequence[str]) -> tuple[str, str] | None:
        """(name, revision) of the weights of a kept step; None where they were not kept.

        names: the repo's revisions. A repo has a tag for each kept step, a folder the best and the last weights.
        """
        tag = f"step-{step:06d}"
        if place.repo_id and place.folder in run.folder.parents:
            return (place.repo_id, tag) if tag in names else None
        folder = run.folder / {run.best_step: "best", run.last_step: "last"}.get(step, "")
        kept = step in (run.best_step, run.last_step) and (folder / "config.json").is_file()
        return (self.models.name_of(Resolved(folder)), "") if kept else None


def plain_experiment(experiment: Experiment) -> Experiment:
    """A run whose names and settings, which anybody may have written, hold nothing that Markdown takes for more."""
    settings = {plain_text(key): plain_text(value) for key, value in experiment.settings.items()}
    return replace(experiment, run=replace(experiment.run, name=plain_text(experiment.run.name)), settings=settings)


def plain_text(text: str) -> str:
    return re.sub(r"[^\w .,:;=/@+()-]", " ", text)[:200]


def prompt_of(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """The longest beginning of `ids` that is a prompt: a text that gives exactly these ids. At least one."""
    for n in range(len(ids), 0, -1):
        text = tokenizer.decode(list(ids[:n]))
        if text and tokenizer.encode(text) == list(ids[:n]):
            return text, tuple(ids[:n])
    raise ValueError("the text cannot branch here: choose a later token")


def whole_words(line: str, most: int) -> str:
    """The beginning of a line, at most `most` characters, not cut within a word unless one word is longer."""
    if len(line) <= most:
        return line
    cut = line[: most + 1].rpartition(" ")[0]
    return cut if cut.strip() else line[:most]


# ---- what went wrong -------------------------------------------------------------------------------------------------


def user_message(error: BaseException, models: ModelStore) -> str:
    """One sentence for the visitor: plain text, and without what this machine alone should know, folders included.

    A page that shows it as HTML, as toasts are, passes it through `toast`.
    """
    kinds = list(chain(error))
    if models.on_space and any(isinstance(e, GatedRepoError) for e in kinds):
        return "this model is gated: ask for access on its page on the Hub, then sign in above"
    if models.on_space and is_hidden(error):
        return "there is no such model on the Hub that you may read: check the name, or sign in above if it is private"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "there is not enough memory for this: try a smaller model or a shorter text"
    if isinstance(error, HubError | ValueError):
        return without_secrets(str(error)) if models.any_folder else public_text(str(error))
    return f"something went wrong here ({type(error).__name__}); what you had is still there"


def toast(text: object) -> str:
    """A message as a page may show it in a toast, which reads HTML: what a visitor, a link or a model wrote in it stays
    text. Cut to 500 characters."""
    line = " ".join(str(text).split())
    return html.escape(line if len(line) <= 500 else f"{line[:499]}…", quote=False)
