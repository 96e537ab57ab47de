"""Conversations as token ids by a tokenizer's chat template, and which of the ids are the assistant's own.

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    [(ids, learned)] = ChatTemplate(tokenizer).encode([messages])

The ids are those of `apply_chat_template` in Transformers. A tokenizer that has no template gets `PLAIN`: ordinary text
that most vocabularies can spell, each answer ended by end-of-text (by a new line where the tokenizer has none):

    <|user|>
    Hi
    <|assistant|>
    Hello.<|endoftext|>

A template is a program in the Jinja language, and mostly somebody else's: it runs in Jinja's sandbox, in a process of
its own with limits on time and memory, and sees nothing but the conversation and the names of the special tokens.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers

from nanogpt_hub.tokenizer import Tokenizer

from .template_child import environment

WALL_SECONDS = 30.0  # for one conversation, where the system cannot count the processor's
PLAIN = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{{ (eos_token or '\\n') if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
ASSISTANT = "assistant"  # the role whose messages are learned
MAX_CHARACTERS = 200_000  # of a template; the longest in use have a tenth of it

Messages = list[dict]  # {"role": ..., "content": ...} and whatever else a template may look at
Encoded = tuple[list[int], list[bool]]  # ids, and which of them are learned


class TemplateError(ValueError):
    """A chat template that is none, or that cannot write a conversation."""


class Renderer:
    """A template in a process of its own, with limits on time and memory (template_child.py).

    Started when it is first needed, and anew in a process that was forked since. Raises TemplateError.
    """

    def __init__(self, template: str):
        self.template, self.pid = template, 0
        self.child: subprocess.Popen | None = None
        self("template", template=template)

    def __call__(self, part: str, **request) -> str:
        """What the child answers: the `part` of its reply."""
        if self.pid != os.getpid() or self.child is None:
            self._start()
            if part != "template":
                self("template", template=self.template)
        reply = self._ask(request)
        if "error" in reply:
            raise TemplateError(reply["error"])
        return reply.get(part, "")

    def _start(self) -> None:
        script = str(Path(__file__).with_name("template_child.py"))
        self.child = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = os.getpid()
        weakref.finalize(self, end, self.child)

    def _ask(self, request: dict) -> dict:
        guard = threading.Timer(WALL_SECONDS, self.child.kill) if os.name == "nt" else None  # elsewhere it ends itself
        if guard:
            guard.start()
        try:
            self.child.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self.child.stdin.flush()
            return json.loads(self.child.stdout.readline())
        except (OSError, ValueError) as error:
            end(self.child)
            self.child = None
            raise TemplateError("it takes too much time or memory, and was stopped") from error
        finally:
            if guard:
                guard.cancel()


def end(child: subprocess.Popen) -> None:
    """Ends a child and lets go of its pipes."""
    child.kill()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
    child.wait()


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

    def answers(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where in it (characters) the assistant's messages and their ends are.

        They are what is added to the text up to where an answer begins. An answer that the template writes another way
        when more follows (some leave out its reasoning) is not found, and so not learned.
        """
        text, spans = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] == ASSISTANT:
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
        if self._tokenizer.kind == "char":  # which drops unknown characters without a word
            eos = self._special.get("eos_token", "")
            self._tokenizer.encode_batch(text.replace(eos, "") for text in texts)
        for text in texts:
            text.encode()  # raises for half a character, which the library below meets with a TypeError
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        for encoding, (_, spans) in zip(encodings, rendered, strict=True):
            yield encoding.ids, overlaps(encoding.offsets, spans)


def overlaps(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each token (start, end) has a character in one of the spans. Both are in order."""
    learned, rest = [], iter([*spans, (10**12, 10**12)])
    first, last = next(rest)
    for start, end in offsets:
        while start >= last:
            first, last = next(rest)
        learned.append(end > first)
    return learned


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
