"""Several tokens for one pass of the model: a guess looks ahead, the model checks all of it at once.

    generate(model, tokenizer, "To be, or", draft=Speculator(), seed=1)         # guesses that the text repeats itself
    generate(model, tokenizer, "To be, or", draft=Speculator(small), seed=1)    # a smaller model guesses

A pass over a few tokens costs hardly more than one over a single token, since both read all the weights. So the model
reads the text and the guessed tokens in one pass, and draws its own token after each: as long as the guess is what was
drawn, the next draw counts too (speculative decoding, arXiv:2211.17192 and arXiv:2302.01318; guessing from the text
itself: prompt lookup decoding). Each draw is made with the random number that the token would have had anyway, so the
tokens are those of plain generation with the same seed, up to the rounding of a batch: a guess changes only the speed.

A batch is generated plainly. Shape legend:  k guessed tokens   V vocab_size
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from nanogpt_hub.engine.select import Engine
from nanogpt_hub.generate import Job, Row, Token, check_ids, inference, window_start
from nanogpt_hub.model import GPT, KVCache
from nanogpt_hub.sampling import draw

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens in a row that are looked for in the text
EXTRA_PASS = 0.5  # what guessing at all adds to a pass: 0.0 to 1.2 measured on a CPU, 4x128 to 124M; less on GPUs
EXTRA_TOKEN = 0.1  # and each guess: 0.02 to 0.25
CALLS = 10**6  # parameters that a CPU reads in the time that a layer's calls take; a GPU reads a hundred times as many
HOPE = 0.7  # how often a guess is right before anything is known


class Reader:
    """A lone text in a model's cache, which holds whatever the model read last and is still true."""

    def __init__(self, model: GPT, max_len: int, engine: Engine):
        weight, length = model.wte.weight, min(max_len, model.config.block_size)
        self.model, self.cache = model, KVCache(model.config, 1, weight.device, weight.dtype, max_len=length)
        self.decoder = engine.decoder(model, self.cache)
        self.start = 0  # the window's first token
        self.held: list[int] = []  # the tokens in the cache

    def logits(self, tokens: list[int], n: int = 1) -> Tensor:
        """Logits (n, V) of what follows each of the last n tokens, all seen in the window of the first of them."""
        start = window_start(len(tokens) - n + 1, self.model.config.block_size)
        window = tokens[start:]
        kept = min(len(self.held), len(window) - n) if start == self.start else 0
        while self.held[:kept] != window[:kept]:  # guesses that were wrong
            kept -= 1
        self.cache.lengths = [kept]
        x = self.decoder.hidden(torch.tensor([window[kept:]], device=self.cache.k.device))
        self.start, self.held = start, window
        return self.decoder.head(x[0, -n:])

    def room(self, tokens: list[int]) -> int:
        """How many tokens can be read after `tokens` in the same pass: all must see the same window."""
        block_size = self.model.config.block_size
        return window_start(len(tokens), block_size) + block_size - len(tokens)


class Guesser(Protocol):
    """Where guesses come from. Each text has its own."""

    def look(self, tokens: list[int]) -> int | None:
        """Whether there is anything to guess from: the kind of guess, which has its own record of success, or None."""

    def guess(self, tokens: list[int], uniform: Tensor) -> list[int]:
        """At most k tokens after `tokens`, by the random numbers (k, 1) with which the model will draw."""


class TextLookup:
    """Guesses that what followed the last tokens before will follow them again. Kind: how many tokens agree."""

    def __init__(self):
        self.places: dict[tuple[int, ...], int] = {}  # some tokens in a row -> where the latest such row ends
        self.seen, self.place = 0, 0

    def look(self, tokens: list[int]) -> int | None:
        for end in range(self.seen + 1, len(tokens)):  # those that end before the last token: something follows
            self.places |= {tuple(tokens[end - n : end]): end for n in LENGTHS if n <= end}
        self.seen = len(tokens) - 1
        for n in reversed(LENGTHS):
            if n <= len(tokens) and (place := self.places.get(tuple(tokens[-n:]))):
                self.place = place
                return n
        return None

    def guess(self, tokens: list[int], uniform: Tensor) -> list[int]:
        period = len(tokens) - self.place  # beyond the end of the text, the guess goes on in a circle
        return [tokens[self.place + i % period] for i in range(len(uniform))]


class SmallModel:
    """Draft tokens that a smaller model draws with the same random numbers."""

    def __init__(self, model: GPT, max_len: int, job: Job, engine: Engine):
        self.reader, self.job = Reader(model, max_len, engine), job

    def look(self, tokens: list[int]) -> int | None:
        return 0

    def guess(self, tokens: list[int], uniform: Tensor) -> list[int]:
        text, job, decoder = list(tokens), self.job, self.reader.decoder
        with inference(self.reader.model):
            for number in uniform:
                logits = self.reader.logits(text)
                drawn = draw(logits, job.vocab_size, job.config, [text], number[None], sampler_for=decoder.sampler)
                text.append(drawn[0].id)
        return text[len(tokens) :]


class Pace:
    """How many tokens to guess so that the most come for the time, by how often guesses came true lately.

    A pass with k guesses costs `1 + EXTRA_PASS + extra * k` plain ones. Each kind of guess has its own `hit`, the share
    of right ones; it returns slowly to its hopeful start while there is no guessing, so that bad luck is no end.
    """

    def __init__(self, most: int, extra: float):
        self.most, self.extra = most, extra
        self.hit: dict[int, float] = defaultdict(lambda: HOPE)

    def choose(self, kind: int) -> int:
        """The k for which a pass gives most for its cost: 1 + hit + hit^2 + ... + hit^k tokens. 0 is no guess."""
        best, best_rate, tokens = 0, 1.0, 1.0
        for k in range(1, self.most + 1):
            tokens += self.hit[kind] ** k
            rate = tokens / (1 + EXTRA_PASS + self.extra * k)
            if rate > best_rate:
                best, best_rate = k, rate
        return best

    def learn(self, kind: int, k: int, right: int) -> None:
        """Takes in a pass with k guesses, of which the first `right` came true."""
        if not k:
            self.hit[kind] += 0.01 * (HOPE - self.hit[kind])
        for came_true in [1.0] * right + [0.0] * (right < k):
            self.hit[kind] += 0.2 * (came_true - self.hit[kind])


class Speculator:
    """The `draft` of `generate`, `stream_text` and `stream_tokens`: guesses by a smaller `model`, or from the text.

    The smaller model needs the tokenizer of the large one. It pays when it guesses well for a tenth of the time; text
    lookup costs nothing and pays where a text repeats itself. When guessing does not pay it stops, to try again later.
    The counts go over all texts: `passes` of the large model, tokens `guessed`, and how many of those came `true`.
    """

    def __init__(self, model: GPT | None = None, most: int = 12):
        if most < 1:
            raise ValueError(f"most is {most}; at least 1 token must be guessed at a time")
        self.model, self.most = model, most
        self.passes = self.guessed = self.true = 0

    def stream(self, job: Job, row: Row) -> Iterator[Token]:
        """What `stream_tokens` asks for. ValueError where the smaller model has not all tokens of the large one."""
        if self.model is not None:
            check_draft(self.model, job.model, job.vocab_size)
            check_ids(job.prompts[0], self.model.config.vocab_size)
        return self._stream(job, row, list(job.prompts[0]))

    def _stream(self, job: Job, row: Row, tokens: list[int]) -> Iterator[Token]:
        model, config, deadline = job.model, job.config, job.deadline()
        max_len = len(tokens) + config.max_new_tokens
        with inference(model):
            engine = job.open_engine()
            reader = Reader(model, max_len, engine)
            pace = Pace(self.most, EXTRA_TOKEN + relative_cost(self.model, model))
            guesser = TextLookup() if self.model is None else SmallModel(self.model, max_len, job, engine)
        numbers: list[Tensor] = []  # the row's random numbers, as far as they were needed
        while not row.finish:
            with inference(model):
                kind = guesser.look(tokens)
                k = 0 if kind is None else min(pace.choose(kind), row.left - 1, reader.room(tokens))
                numbers += [torch.rand(1, generator=row.generator) for _ in range(k + 1 - len(numbers))]
                uniform = torch.stack(numbers[: k + 1])  # (k + 1, 1)
                guess = guesser.guess(tokens, uniform[:k]) if k else []
                logits = reader.logits(tokens + guess, k + 1)
                texts = [tokens + guess[:i] for i in range(k + 1)]
                drawn = draw(logits, job.vocab_size, config, texts, uniform, job.alternatives, reader.decoder.sampler)
            right = next((i for i, id in enumerate(guess) if id != drawn[i].id), k)
            if kind is not None:
                pace.learn(kind, k, right)
            self.passes, self.guessed, self.true = self.passes + 1, self.guessed + k, self.true + right
            late = time.monotonic() >= deadline
            for choice in drawn[: right + 1]:
                tokens.append(choice.id)
                yield row.push(choice, late, reader.decoder.engine)
                if row.finish:
                    return
            del numbers[: right + 1]


def relative_cost(small: GPT | None, model: GPT) -> float:
    """About what a token of the smaller model costs, in tokens of the large one."""
    return 0.0 if small is None else token_cost(small) / token_cost(model)


def token_cost(model: GPT) -> float:
    """The time of a token, in parameters that are read in that time: the weights, and the calls of each layer."""
    config, on_cpu = model.config, model.wte.weight.device.type == "cpu"
    layer = 12 * config.n_embd**2 + (CALLS if on_cpu else 100 * CALLS)
    return config.n_layer * layer + config.vocab_size * config.n_embd


def check_draft(small: GPT, model: GPT, vocab_size: int) -> None:
    """Raises ValueError unless the smaller model knows all ids that are drawn, and lies on the same device."""
    if small.config.vocab_size < vocab_size:
        raise ValueError(
            f"the draft model has {small.config.vocab_size} tokens where the model has {vocab_size}: "
            "take one that was trained with the same tokenizer"
        )
    here, there = small.wte.weight.device, model.wte.weight.device
    if here != there:
        raise ValueError(f"the draft model is on {here} and the model on {there}; load both on one device")
