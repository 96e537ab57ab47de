"""What the app's tabs do, without the app: writing, looking inside, comparing, and what is known of a model.

    playground = Playground(default="user/name")
    place = playground.find("user/name", "step-000500")              # resolved to a commit
    for writing in playground.write(place, "To be", playground.settings(place, seed=1)): print(writing.text)

The functions here know no page. They take plain values, check each against `Limits` whoever asks, and return records
that say everything a page needs (`view`), so that one process can serve many visitors and tests need no browser.
"""

import filecmp
import html
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlencode

import torch
from huggingface_hub.errors import GatedRepoError

from nanogpt_hub import lens
from nanogpt_hub.checkpoint import WEIGHTS, read_json
from nanogpt_hub.generate import Token, encode_prompt, stream_tokens
from nanogpt_hub.hub.card import size
from nanogpt_hub.hub.private import public_text, without_secrets
from nanogpt_hub.hub.resolve import HubError, Resolved, chain
from nanogpt_hub.playground.models import Shelf, is_hidden
from nanogpt_hub.playground.tiny import PROMPT
from nanogpt_hub.playground.views import parts_view, safe_markdown
from nanogpt_hub.runs import Run, find_runs, read_run, run_of
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.tokenizer import Tokenizer

ALTERNATIVES = 8  # likeliest tokens kept with each generated one
UPDATES_PER_SECOND = 10  # more only makes a browser lag behind the model
SMALL_MODEL = 30_000_000  # parameters; below, a borrowed GPU takes longer to come than the CPU to answer

# ---- text as it is written -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writing:
    """A generation, under way or finished: all that is needed to show it, to save it and to have it again."""

    place: Resolved
    prompt: str
    settings: SamplingConfig  # with its seed
    tokenizer: Tokenizer
    tokens: tuple[Token, ...] = ()
    seconds: float = 0.0
    note: str = ""  # what was done to the prompt
    int8: bool = False  # with weights of 8 bits

    @property
    def text(self) -> str:
        """What was written, without the prompt."""
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
        return " · ".join([*parts, f"seed {self.settings.seed}", ends[self.finish], *filter(None, [self.note])])

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


# ---- the playground --------------------------------------------------------------------------------------------------


class Playground(Shelf):
    """What the tabs do, for all visitors of a process."""

    def __init__(self, *args, borrow: Callable | None = None, **kwargs):
        """What `Shelf` takes, and borrow (`spaces.GPU`): makes a generator function run where a GPU is for a while.

        Small models do without.
        """
        super().__init__(*args, **kwargs)
        self._stream_borrowed = borrow(self._stream_on_gpu) if borrow else None

    # -- writing

    def settings(self, place: Resolved, **asked) -> SamplingConfig:
        """Sampling settings: the model's own defaults, and what was asked for (None: not asked), within the limits.

        Raises ValueError or LimitError for what is not allowed.
        """
        asked = {name: value for name, value in asked.items() if value is not None}
        if isinstance(asked.get("stop"), str):
            asked["stop"] = tuple(line for line in asked["stop"].split("\n") if line)
        for name in ("max_new_tokens", "top_k", "seed"):  # JSON and sliders know one kind of number
            if isinstance(asked.get(name), float) and asked[name].is_integer():
                asked[name] = int(asked[name])
        config = replace(self.load(place).defaults, **asked)
        if "max_new_tokens" in asked:
            self.limits.check("max_new_tokens", config.max_new_tokens, self.limits.new_tokens)
        elif config.max_new_tokens > self.limits.new_tokens:
            config = replace(config, max_new_tokens=self.limits.new_tokens)
        self.limits.check("stop", len(config.stop), 8, " strings")
        self.limits.check("stop", sum(map(len, config.stop)), 400, " characters")
        return replace(config, max_seconds=self.limits.seconds).seeded()

    def write(self, place: Resolved, prompt: str, config: SamplingConfig, int8: bool = False) -> Iterator[Writing]:
        """What follows the prompt, as it grows: at most `UPDATES_PER_SECOND`, and always the finished one.

        int8: with weights of 8 bits, on the CPU whatever the device is. Closing the iterator ends the work at the next
        token.
        """
        loaded = self.load(place)
        self.limits.check("the prompt", len(prompt), self.limits.prompt_chars, " characters")
        ids = encode_prompt(loaded.tokenizer, prompt)
        unseen = len(ids) > loaded.model.config.block_size
        note = f"the model saw only the end of the prompt's {len(ids)} tokens" if unseen else ""
        borrows = self._stream_borrowed and not int8 and loaded.model.num_params() >= SMALL_MODEL
        stream = self._stream_borrowed(place, ids, config) if borrows else self._stream(place, ids, config, None, int8)
        tokens: list[Token] = []
        started = time.monotonic()
        for new in stream:
            tokens += new
            seconds = time.monotonic() - started
            yield Writing(place, prompt, config, loaded.tokenizer, tuple(tokens), seconds, note, int8)

    def _stream(
        self, place: Resolved, ids: list[int], config: SamplingConfig, device: str | None = None, int8: bool = False
    ) -> Iterator[list[Token]]:
        """The new tokens since the last update. Takes and gives what can travel to another process."""
        loaded = self.load(place, "cpu" if int8 else device)
        model = self.load_int8(place) if int8 else loaded.model
        new: list[Token] = []
        shown = -math.inf  # the first token is shown at once
        for token in stream_tokens(model, loaded.tokenizer, [ids], config, alternatives=ALTERNATIVES):
            new.append(token)
            now = time.monotonic()
            if token.finish or now - shown >= 1 / UPDATES_PER_SECOND:
                shown = now
                yield new
                new = []

    def _stream_on_gpu(self, place: Resolved, ids: list[int], config: SamplingConfig) -> Iterator[list[Token]]:
        """`_stream` in a process that has a GPU; what it loads stays there for the next request."""
        yield from self._stream(place, ids, config, "cuda")

    def example(self, place: Resolved) -> Writing:
        """What a first visit shows: the same for everyone, so made once for each model."""
        loaded = self.load(place)
        if "example" not in loaded.notes:
            config = self.settings(place, max_new_tokens=min(160, self.limits.new_tokens), seed=1)
            *_, loaded.notes["example"] = self.write(place, self.example_prompt(place), config)
        return loaded.notes["example"]

    def example_prompt(self, place: Resolved) -> str:
        """A prompt that suits the model: what its run used or how a line of its sample begins, else one it can read."""
        tokenizer = self.load(place).tokenizer
        sample = run_facts(place).get("sample", {})
        given, written = (str(sample.get(name) or "") for name in ("prompt", "text"))
        line = next((line[:24] for line in written.splitlines() if line.strip()), None)
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
        example, tokenizer = self.example(place), self.load(place).tokenizer
        ids = tokenizer.encode(example.prompt + example.text)
        return tokenizer.decode(ids[: min(n_tokens, self.load(place).model.config.block_size)])

    def next_tokens(self, place: Resolved, text: str, config: SamplingConfig, n: int = 12) -> lens.NextTokens:
        """The likeliest next tokens, before and after each sampler."""
        self.limits.check("the text", len(text), self.limits.text_chars, " characters")
        self.limits.check("n", n, 100, " tokens")
        loaded = self.load(place)
        return lens.next_tokens(loaded.model, loaded.tokenizer, text, config, n)

    def look(self, place: Resolved, text: str) -> tuple[lens.Inside, lens.LogitLens, str]:
        """Attention maps and logit lens of the end of a text, as much of it as is allowed, and that end."""
        self.limits.check("the text", len(text), self.limits.text_chars, " characters")
        loaded = self.load(place)
        most = min(self.limits.look_tokens, loaded.model.config.block_size)
        ids = loaded.tokenizer.encode(text)
        text = loaded.tokenizer.decode(ids[-most:]) if len(ids) > most else text
        inside = lens.look_inside(loaded.model, loaded.tokenizer, text, most)
        return inside, lens.logit_lens(loaded.model, loaded.tokenizer, inside), text

    def score(self, place: Resolved, text: str) -> lens.Surprise:
        """How well the model foresees each token of a text."""
        self.limits.check("the text", len(text), self.limits.text_chars, " characters")
        loaded = self.load(place)
        return lens.surprise(loaded.model, loaded.tokenizer, text, self.limits.text_tokens)

    def cut(self, place: Resolved, text: str) -> list[lens.Piece]:
        """How the tokenizer cuts a text."""
        self.limits.check("the text", len(text), self.limits.text_chars, " characters")
        return lens.tokens_of(self.load(place).tokenizer, text, self.limits.text_tokens)

    # -- two models

    def compare(
        self, a: Resolved, b: Resolved, prompt: str, config: SamplingConfig
    ) -> Iterator[tuple[Writing, Writing]]:
        """What both write after the prompt with the same seed, side by side as it grows."""
        streams = [self.write(place, prompt, config) for place in (a, b)]
        current: list[Writing | None] = [None, None]
        while any(writing is None or writing.finish is None for writing in current):
            for n, stream in enumerate(streams):
                current[n] = next(stream, current[n])
            yield current[0], current[1]

    def rival(self, place: Resolved, names: Sequence[str]) -> tuple[str, str]:
        """(name, revision) of something to compare a model with: an early step of it, else another model that is here.

        names: the repo's revisions.
        """
        early = sorted(name for name in names if name.startswith("step-") and name != place.revision)
        if early:
            return place.repo_id, early[0]
        own = self.name_of(place)
        beside = place.folder.parent / ("last" if place.folder.name == "best" else "best")
        others = [self.name_of(Resolved(beside))] if differ(place.folder / WEIGHTS, beside / WEIGHTS) else []
        others += ["tiny-early"] if own == "tiny" else [name for name in self.run_models() if name.endswith("best")]
        others = [name for name in [*others, "tiny"] if Path(name).resolve() != place.folder.resolve()]
        return others[0], ""

    def parting(self, a: Writing, b: Writing) -> int | None:
        """Index of the first token in which two generations differ, as far as both have come."""
        ids = [[token.id for token in writing.tokens] for writing in (a, b)]
        if a.tokenizer.hash != b.tokenizer.hash:
            return 0
        if a.finish is None or b.finish is None:
            n = min(map(len, ids))
            ids = [row[:n] for row in ids]
        return lens.first_difference(*ids)

    def divergence(self, a: Resolved, b: Resolved, prompt: str) -> lens.Divergence:
        """How far apart what the two expect after the prompt is."""
        self.limits.check("the prompt", len(prompt), self.limits.prompt_chars, " characters")
        one, two = self.load(a), self.load(b)
        return lens.divergence(one.model, two.model, one.tokenizer, two.tokenizer, prompt)

    # -- facts

    def info(self, place: Resolved) -> dict:
        """What a model is, in plain JSON: name, commit, shape, size, tokenizer, training."""
        loaded = self.load(place)
        model, facts = loaded.model, run_facts(place)
        return {
            "model": self.name_of(place),
            "revision": place.revision,
            "sha": place.sha,
            "parameters": model.num_params(),
            "config": asdict(model.config),
            "tokenizer": {"kind": loaded.tokenizer.kind, "vocab_size": loaded.tokenizer.vocab_size},
            "defaults": asdict(loaded.defaults),
            "step": facts.get("evaluation", {}).get("step"),
            "val_loss": facts.get("evaluation", {}).get("val_loss"),
            "device": str(model.wte.weight.device),
        }

    def chips(self, place: Resolved) -> list[list[str]]:
        """The line of facts above the tabs: (what, value) each."""
        info = self.info(place)
        config = info["config"]
        revision = f"{place.revision} ({place.sha[:7]})" if place.sha != place.revision else place.sha[:7]
        rows = [
            ("model", info["model"]),
            ("revision", revision if place.sha else ""),
            ("parameters", short(info["parameters"])),
            ("layers × heads × width", f"{config['n_layer']} × {config['n_head']} × {config['n_embd']}"),
            ("context", f"{config['block_size']} tokens"),
            ("tokenizer", f"{info['tokenizer']['kind']}, {info['tokenizer']['vocab_size']:,} tokens"),
            ("trained", f"{info['step']:,} steps" if isinstance(info["step"], int) else ""),
            ("validation loss", f"{info['val_loss']:.3f}" if isinstance(info["val_loss"], float) else ""),
            ("runs on", info["device"]),
        ]
        return [[what, value] for what, value in rows if value]

    def link(self, writing: Writing, base: str = "") -> str:
        """An address that gives the same text again: model at its commit, prompt, settings and seed."""
        s, place = writing.settings, writing.place
        query = {"repo": self.name_of(place), "rev": place.sha, "prompt": writing.prompt, "seed": s.seed}
        defaults = SamplingConfig(top_k=None)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            if name in ("max_new_tokens", "temperature") or getattr(s, name) != getattr(defaults, name):
                query[name] = getattr(s, name)
        query |= {"stop": "\n".join(s.stop)} if s.stop else {}
        query |= {"int8": 1} if writing.int8 else {}
        return f"{base}?{urlencode({name: value for name, value in query.items() if value not in ('', None)})}"

    def snippet(self, writing: Writing) -> str:
        """The same text again, in Python."""
        place = writing.place
        where = f"{place.repo_id}@{place.sha}" if place.repo_id else place.folder.as_posix()
        also = "from nanogpt_hub.engine.int8 import quantize_int8\n" if writing.int8 else ""
        model = "quantize_int8(model)" if writing.int8 else "model"
        return (
            f"from nanogpt_hub import from_pretrained, generate\n{also}\n"
            f"model, tokenizer = from_pretrained({where!r})\n"
            f"result = generate({model}, tokenizer, {writing.prompt!r}, {arguments(writing.settings)})\n"
            "print(result.text)\n"
        )

    def client_snippet(self, writing: Writing, base: str) -> str:
        """The same text again, from this app's API."""
        place = writing.place
        revision = f", revision={place.sha!r}" if place.sha else ""
        return (
            "from gradio_client import Client\n\n"
            f"client = Client({base!r})\n"
            f"result = client.predict(\n    prompt={writing.prompt!r},\n    model={self.name_of(place)!r}{revision},\n"
            f"    {arguments(writing.settings)}{', int8=True' if writing.int8 else ''},\n"
            '    api_name="/generate",\n)\n'
            'print(result["text"])\n'
        )

    def card(self, place: Resolved) -> str:
        """README.md, made harmless; a sentence where there is none."""
        path = place.folder / "README.md"
        if not path.is_file() or path.stat().st_size > 2**20:
            return "*This model has no card.*"
        return safe_markdown(path.read_text(encoding="utf-8", errors="replace"))

    def files(self, place: Resolved) -> list[list[str]]:
        """(name, size) of each file of the model."""
        paths = [path for path in sorted(place.folder.rglob("*")) if path.is_file()]
        return [[path.relative_to(place.folder).as_posix(), size(path.stat().st_size)] for path in paths[:500]]

    def provenance(self, place: Resolved) -> list[list[str]]:
        """(what, value): where the model comes from, as far as its run told."""
        facts = run_facts(place)
        data, training, base = (facts.get(name, {}) for name in ("data", "training", "base_model"))
        source = data.get("source") if isinstance(data.get("source"), dict) else {}
        rows = [
            ("repository", place.repo_id), ("commit", place.sha), ("trained on", source.get("name")),
            ("licence of the text", source.get("license")), ("tokenizer", data.get("tokenizer")),
            ("training tokens in the text", data.get("train_tokens")), ("tokens trained on", training.get("tokens")),
            ("steps", training.get("steps")), ("optimizer", training.get("optimizer")),
            ("precision", training.get("precision")), ("hardware", training.get("hardware")),
            ("seconds", training.get("seconds")), ("fine-tuned from", base.get("id")),
            ("code", training.get("commit")), ("command", training.get("command")),
        ]  # fmt: skip
        known = [[what, f"{value:,}" if type(value) is int else str(value)[:500]] for what, value in rows if value]
        return known or [["its run left no record", ""]]

    def parts(self, place: Resolved) -> dict:
        """Bars: where the parameters are."""
        return parts_view(lens.parameters_by_part(self.load(place).model))

    def config(self, place: Resolved) -> dict:
        """config.json as it is."""
        return read_json(place.folder / "config.json")

    def load_snippet(self, place: Resolved) -> str:
        """How to load the model elsewhere."""
        name, at = place.repo_id or place.folder.as_posix(), f", revision={place.sha!r}" if place.sha else ""
        ours = f"{name}@{place.sha}" if place.sha else name
        return (
            "# pip install nanogpt-hub\nfrom nanogpt_hub import from_pretrained\n\n"
            f"model, tokenizer = from_pretrained({ours!r})\n\n"
            "# or, where its shape is one that Transformers knows\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({name!r}{at})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name!r}{at})\n"
        )

    # -- training

    def training(self, place: Resolved, names: Sequence[str] = ()) -> list[Run]:
        """The runs by these names (`training_names`), at most two; without names the one that the model is from."""
        known = self._run_folders(place)
        chosen = [name for name in names if name in known][:2] or [*known][:1]
        return [read_run(known[name], name) for name in chosen]

    def training_names(self, place: Resolved) -> list[str]:
        return list(self._run_folders(place))

    def _run_folders(self, place: Resolved) -> dict[str, Path]:
        own = run_of(place.folder)
        known = {f"{self.name_of(place)} (this model)": own} if own else {}
        return known | {folder.as_posix(): folder for folder in find_runs(self.runs) if folder != own}

    def model_at(self, place: Resolved, run: Run, step: int, names: Sequence[str]) -> tuple[str, str] | None:
        """(name, revision) of the weights of a kept step; None where they were not kept.

        names: the repo's revisions. A repo has a tag for each kept step, a folder the best and the last weights.
        """
        tag = f"step-{step:06d}"
        if place.repo_id and place.folder in run.folder.parents:
            return (place.repo_id, tag) if tag in names else None
        folder = run.folder / {run.best_step: "best", run.last_step: "last"}.get(step, "")
        kept = step in (run.best_step, run.last_step) and (folder / "config.json").is_file()
        return (self.name_of(Resolved(folder)), "") if kept else None


def differ(one: Path, other: Path) -> bool:
    """Whether both files are there and hold different bytes."""
    return one.is_file() and other.is_file() and not filecmp.cmp(one, other, shallow=False)


def arguments(settings: SamplingConfig) -> str:
    """Settings as keyword arguments, those that do nothing left out."""
    idle = SamplingConfig(top_k=None)
    shown = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_k": settings.top_k or 0,
    }
    shown |= {
        n: getattr(settings, n)
        for n in ("top_p", "min_p", "repetition_penalty")
        if getattr(settings, n) != getattr(idle, n)
    }
    shown |= {"stop": list(settings.stop)} if settings.stop else {}
    return ", ".join(f"{name}={value!r}" for name, value in {**shown, "seed": settings.seed}.items())


def run_facts(place: Resolved) -> dict:
    """What the run knew of itself (run.json), where it came along; empty where not."""
    for path in (place.folder / "training" / "run.json", place.folder.parent / "run.json"):
        if path.is_file() and (path.parent.name == "training" or (path.parent / "metrics.jsonl").is_file()):
            facts = read_json(path)
            return {key: value for key, value in facts.items() if isinstance(value, dict)}
    return {}


def short(n: int) -> str:
    """A count for people: 102 thousand, 10.7 million."""
    for limit, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if n >= limit:
            return f"{n / limit:.3g} {word}"
    return str(n)


# ---- what went wrong -------------------------------------------------------------------------------------------------


def explain(error: BaseException, playground: Playground) -> str:
    """One sentence for the visitor: plain text, and without what this machine alone should know.

    A page that shows it as HTML, as toasts are, passes it through `toast`.
    """
    kinds = list(chain(error))
    if playground.on_space and any(isinstance(e, GatedRepoError) for e in kinds):
        return "this model is gated: ask for access on its page on the Hub, then sign in above"
    if playground.on_space and is_hidden(error):
        return "there is no such model on the Hub that you may read: check the name, or sign in above if it is private"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "there is not enough memory for this: try a smaller model or a shorter text"
    if isinstance(error, HubError | ValueError):
        return without_secrets(str(error)) if playground.any_folder else public_text(str(error))
    return f"something went wrong here ({type(error).__name__}); what you had is still there"


def toast(text: object) -> str:
    """A message as a page may show it in a toast, which reads HTML: what a visitor, a link or a model wrote in it stays
    text. Cut to 500 characters."""
    line = " ".join(str(text).split())
    return html.escape(line if len(line) <= 500 else f"{line[:499]}…")
