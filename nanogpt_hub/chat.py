"""Conversations with a model: its chat template, what ends an answer, and which tokens of a row are the answers.

    chat = Chat(model, tokenizer, system="Be brief.")             # a conversation that remembers
    print(chat.say("Hello!"))
    for token in chat.stream("And then?"): print(token.text, end="")
    [(ids, learned)] = ChatTemplate(tokenizer).encode([messages])  # for training

messages are [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]. The ids are those of
`apply_chat_template` in Transformers. To learn conversations, a tokenizer that has no template gets `PLAIN`: ordinary
text that most vocabularies can spell, each answer ended by end-of-text (by a new line where the tokenizer has none):

    <|user|>
    Hi
    <|assistant|>
    Hello.<|endoftext|>

A template is a program in the Jinja language, and mostly somebody else's: it runs in Jinja's sandbox, in a process of
its own with limits on time and memory, and sees nothing but the conversation and the names of the special tokens.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import tokenizers

from nanogpt_hub.generate import Token, stream_tokens
from nanogpt_hub.model import GPT
from nanogpt_hub.sampling import SamplingConfig
from nanogpt_hub.sandbox.child import environment
from nanogpt_hub.sandbox.renderer import Renderer, TemplateError
from nanogpt_hub.tokenizer import Tokenizer

PLAIN = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{{ (eos_token or '\\n') if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"  # roles; what the assistant says is learned
NO_TEMPLATE = (
    "this model was not tuned on conversations: it has no chat template and can only continue text. A fine-tune with "
    "--data.format messages gives it one"
)
MAX_CHARACTERS = 200_000  # of a template; the longest in use have a tenth of it

Messages = list[dict]  # {"role": ..., "content": ...} and whatever else a template may look at
Encoded = tuple[list[int], list[bool]]  # ids, and which of them are learned


class NoTemplateError(TemplateError):
    """A model that was not tuned on conversations."""


# ---- conversations as text and ids ----


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as a model reads it, up to where its answer begins."""

    text: str
    ids: tuple[int, ...]
    places: tuple[tuple[int, int], ...]  # the characters of the text that each id stands for
    left_out: int = 0  # messages at the beginning for which there was no room


class ChatTemplate:
    """The chat template of a tokenizer, or `PLAIN`, at work. Raises TemplateError when it cannot be read."""

    def __init__(self, tokenizer: Tokenizer):
        text = template_of(tokenizer)
        if len(text) > MAX_CHARACTERS:
            raise TemplateError(f"the chat template has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
        self._tokenizer, self._backend = tokenizer, special_aware(tokenizer)
        self._special = special_tokens(tokenizer)
        try:
            self._render = plain_renderer() if text == PLAIN else Renderer(text)
        except TemplateError as error:
            raise TemplateError(f"the tokenizer's chat template cannot be read: {error}") from error

    def __reduce__(self):
        return ChatTemplate, (self._tokenizer,)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The conversation as text; with `add_generation_prompt`, up to where the next answer begins."""
        about = {"tools": None, "documents": None, **self._special}
        try:
            return self._render("text", messages=messages, add_generation_prompt=add_generation_prompt, **about)
        except Exception as error:
            raise TemplateError(f"the chat template cannot write this conversation: {error}") from error

    def prompt(self, messages: Messages, room: int) -> ChatPrompt:
        """What a model reads to answer the last of the messages, in at most `room` tokens where that can be.

        The oldest turns are left out until it fits; the system text and the last turn stay. Raises ValueError as
        `encode` does.
        """
        kept: Messages | None = messages
        while kept is not None:
            made = self._read(self.render(kept, add_generation_prompt=True), len(messages) - len(kept))
            if len(made.ids) <= room:
                break
            kept = without_oldest_turn(kept)
        return made

    def _read(self, text: str, left_out: int) -> ChatPrompt:
        self._check([text])
        encoding = self._backend.encode(text, add_special_tokens=False)
        return ChatPrompt(text, tuple(encoding.ids), tuple(encoding.offsets), left_out)

    @cached_property
    def ends(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """(ids, strings) that end an answer: end-of-text, and what the template writes behind one.

        That is the first special token there, else the text up to the next turn.
        """
        eot = self._tokenizer.eot_id
        ids = () if eot is None else (eot,)
        asked, answer, again = "a question", "an answer", "one more question"
        turns = [message(USER, asked), message(ASSISTANT, answer), message(USER, again)]
        end = self.render(turns[:2]).partition(answer)[2]
        between = self.render(turns).partition(answer)[2].partition(again)[0]
        special = {id for id, token in self._backend.get_added_tokens_decoder().items() if token.special}
        first = next((id for id in self._backend.encode(between, add_special_tokens=False).ids if id in special), None)
        if first is not None:
            return tuple(dict.fromkeys((*ids, first))), ()
        text = end or between.rstrip()
        return ids, (text,) if text else ()

    def stopped(self, config: SamplingConfig) -> SamplingConfig:
        """The settings with what ends an answer; stop tokens of their own stay."""
        ids, texts = self.ends
        stop_tokens = ids if config.stop_tokens is None else config.stop_tokens
        return replace(config, stop_tokens=stop_tokens, stop=(*config.stop, *texts))

    def answers(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where in it (characters) the assistant's messages and their ends are.

        They are what is added to the text up to where an answer begins. An answer that the template writes another way
        when more follows (some leave out its reasoning) is not found, and so not learned.
        """
        text, spans = self.render(messages), []
        for i, each in enumerate(messages):
            if each["role"] == ASSISTANT:
                before = self.render(messages[:i], add_generation_prompt=True)
                after = self.render(messages[: i + 1])
                if after.startswith(before) and text.startswith(after):
                    spans.append((len(before), len(after)))
        return text, spans

    def encode(self, conversations: list[Messages]) -> Iterator[Encoded]:
        """Ids of conversations, special tokens of the template among them, and which ids are learned.

        Raises ValueError: TemplateError, and UnknownCharacterError as the tokenizer does.
        """
        rendered = [self.answers(messages) for messages in conversations]
        texts = [text for text, _ in rendered]
        self._check(texts)
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        for encoding, (_, spans) in zip(encodings, rendered, strict=True):
            yield encoding.ids, overlaps(encoding.offsets, spans)

    def _check(self, texts: list[str]) -> None:
        """Raises ValueError for what the tokenizer cannot spell."""
        if self._tokenizer.kind == "char":  # which drops unknown characters without a word
            eos = self._special.get("eos_token", "")
            self._tokenizer.encode_batch(text.replace(eos, "") for text in texts)
        for text in texts:
            text.encode()  # raises for half a character, which the library below meets with a TypeError


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def without_oldest_turn(messages: Messages) -> Messages | None:
    """Without the oldest question and its answer; the system text stays. None where only the last turn is left."""
    head = 1 if messages and messages[0]["role"] == SYSTEM else 0
    turns = [n for n, each in enumerate(messages) if each["role"] == USER and n > head]
    return messages[:head] + messages[turns[0] :] if turns else None


def room_for_prompt(block_size: int, new_tokens: int) -> int:
    """Tokens of a prompt after which an answer fits into the context; of long answers a quarter of the context."""
    return block_size - min(new_tokens, block_size // 4)


def overlaps(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each token (start, end) has a character in one of the spans. Both are in order."""
    learned, rest = [], iter([*spans, (10**12, 10**12)])
    first, last = next(rest)
    for start, end in offsets:
        while start >= last:
            first, last = next(rest)
        learned.append(end > first)
    return learned


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether a model was tuned on conversations, as far as its tokenizer tells."""
    return bool(tokenizer.config.get("chat_template"))


def template_of(tokenizer: Tokenizer) -> str:
    """The tokenizer's own template, the one called default of several, else `PLAIN`."""
    found = tokenizer.config.get("chat_template") or PLAIN
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str):
        raise TemplateError("the tokenizer has chat templates, but none that is called default")
    return found


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token, ... as templates know them."""
    named = {name: value for name, value in tokenizer.config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def special_aware(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as Transformers uses it: special tokens written in a text are tokens."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        data = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    # A post-processor would only trim white space off the places of tokens, which must be whole here.
    data |= dict(post_processor=None, truncation=None, padding=None)
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def plain_renderer() -> Callable[..., str]:
    """`PLAIN` in this process: it is ours, and does what it says."""
    template = environment().from_string(PLAIN)
    return lambda part, **request: template.render(**request)


# ---- a conversation ----


class Chat:
    """A conversation with a model. `messages` is what was said so far, the system text first."""

    def __init__(self, model: GPT, tokenizer: Tokenizer | None, system: str = "", config: SamplingConfig | None = None):
        """config: sampling settings of all answers. NoTemplateError for a model that was not tuned on conversations,
        TemplateError for one whose template cannot be read."""
        if tokenizer is None or not has_template(tokenizer):
            raise NoTemplateError(NO_TEMPLATE)
        self.model, self.tokenizer, self.config = model, tokenizer, (config or SamplingConfig()).seeded()
        self.template, self.system = ChatTemplate(tokenizer), system
        self.left_out = 0  # of the messages, the oldest that the last answer could not take into account
        self.reset()

    def reset(self) -> None:
        """Forgets what was said; the system text stays."""
        self.messages: Messages = [message(SYSTEM, self.system)] if self.system else []
        self.answers = 0

    def say(self, text: str, engine: str | None = None, **overrides) -> str:
        """The answer to `text`; `overrides` are fields of the sampling settings. ValueError as `stream` raises."""
        return "".join(token.text for token in self.stream(text, engine, **overrides))

    def stream(self, text: str, engine: str | None = None, **overrides) -> Iterator[Token]:
        """The answer, token by token; closing the iterator ends it, and what has come by then is what was said.

        Answer n draws with seed + n. Raises ValueError, before anything is said, for what the template or the
        tokenizer cannot write.
        """
        config = self.template.stopped(replace(self.config, **overrides).seeded())
        messages = [*self.messages, message(USER, text)]
        room = room_for_prompt(self.model.config.block_size, config.max_new_tokens)
        prompt = self.template.prompt(messages, room)
        config = replace(config, seed=(config.seed or 0) + self.answers)
        tokens = stream_tokens(self.model, self.tokenizer, [prompt.ids], config, engine=engine)
        answer = message(ASSISTANT, "")
        self.messages, self.left_out, self.answers = [*messages, answer], prompt.left_out, self.answers + 1
        return growing(answer, tokens)


def growing(answer: dict[str, str], tokens: Iterator[Token]) -> Iterator[Token]:
    """The tokens of an answer, which is written down as it comes."""
    for token in tokens:
        answer["content"] += token.text
        yield token
