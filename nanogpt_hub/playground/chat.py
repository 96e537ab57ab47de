"""A conversation as the page shows it: what was said, and the answer that is coming.

    for talk in say(playground, Talk(), place, "Be brief.", "Hi", playground.settings(place)): print(talk.messages)
    for talk in go_on(playground, talk, playground.settings(place)): talk.view()     # an answer that was cut goes on
    why_not(playground, place)                                                       # "" where one can talk

How a conversation becomes tokens is told in nanogpt_hub/chat.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nanogpt_hub.chat import (
    ASSISTANT,
    NO_TEMPLATE,
    SYSTEM,
    USER,
    ChatTemplate,
    Messages,
    NoTemplateError,
    TemplateError,
    has_template,
    message,
    room_for_prompt,
)
from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.playground.continuation import Continuation
from nanogpt_hub.playground.models import Loaded
from nanogpt_hub.playground.session import Playground
from nanogpt_hub.sampling import SamplingConfig

MOST_MESSAGES = 400  # of a conversation


@dataclass(frozen=True)
class Talk:
    """A conversation. `said` ends with the question that `made` answers."""

    place: Resolved | None = None
    system: str = ""
    said: tuple[dict, ...] = ()  # all messages but the system text and the last answer
    made: Continuation | None = None  # the last answer: its prompt is the conversation as the model reads it
    left_out: int = 0  # messages at the beginning that the answer could not take into account

    @property
    def messages(self) -> Messages:
        """All that was said, as rows to fine-tune on have it."""
        first = [message(SYSTEM, self.system)] if self.system else []
        last = [message(ASSISTANT, self.made.text)] if self.made else []
        return [*first, *self.said, *last]

    def stop(self) -> "Talk":
        """The same as the visitor stopped it."""
        return replace(self, made=self.made.stop()) if self.made else self

    def view(self, since: int = 0) -> dict | None:
        """For the page: all messages, or what is new of the last answer from its token `since` on."""
        if self.made is None:
            return None
        about = {"run": self.made.key, "done": self.made.finish is not None}
        if since:
            start = sum(len(token.text) for token in self.made.tokens[:since])
            return {**about, "from": start, "text": self.made.text[start:]}
        return {**about, "messages": [[each["role"], each["content"]] for each in self.messages]}

    def status(self) -> str:
        """One line of figures."""
        if self.made is None:
            return ""
        left_out = f"the context is full: the first {self.left_out} messages were left out" if self.left_out else ""
        return " · ".join(filter(None, [self.made.status(), left_out]))

    def as_json(self) -> str:
        """A row for `--data.format messages`; empty before anything was said."""
        return json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n" if self.made else ""


def template_of(loaded: Loaded) -> ChatTemplate:
    """The template of a model in memory, opened once. NoTemplateError or TemplateError where it has none to use."""
    if not has_template(loaded.tokenizer):
        raise NoTemplateError(NO_TEMPLATE)
    with loaded.lock:
        if "template" not in loaded.notes:
            loaded.notes["template"] = ChatTemplate(loaded.tokenizer)
    return loaded.notes["template"]


def why_not(playground: Playground, place: Resolved) -> str:
    """Why nobody can talk with a model, as a sentence in Markdown; empty where one can."""
    try:
        template_of(playground.models.load(place))
    except NoTemplateError:
        return (
            "This model was not tuned on conversations: it has no chat template, and can only continue a text. A "
            "fine-tune with `--data.format messages` gives it one, and with it this tab."
        )
    except TemplateError as error:
        line = " ".join(f"{error}".replace("`", "'").split())
        return f"Nobody can talk with this model: `{line}`."
    return ""


def say(
    playground: Playground, talk: Talk, place: Resolved, system: str, text: str, config: SamplingConfig,
    int8: bool = False,
) -> Iterator[Talk]:  # fmt: skip
    """The conversation while the model answers `text`. With another model, it begins anew.

    Answer n draws with seed + n. ValueError for an empty message, LimitError for one that is too long, TemplateError
    for what the template does not take (some take no system text).
    """
    if not text.strip():
        raise ValueError("write a message first")
    playground.limits.check("the message", len(text), playground.limits.prompt_chars, " characters")
    playground.limits.check("the system text", len(system), playground.limits.prompt_chars, " characters")
    before = talk.messages if talk.place == place else []
    said = (*(each for each in before if each["role"] != SYSTEM), message(USER, text))
    playground.limits.check("the conversation", len(said), MOST_MESSAGES, " messages")
    loaded = playground.models.load(place)
    template, asked = template_of(loaded), Talk(place, system, said)
    config = template.stopped(replace(config, seed=(config.seed or 0) + len(said) // 2))
    room = room_for_prompt(loaded.model.config.block_size, config.max_new_tokens)
    prompt = template.prompt(asked.messages, room)
    begun = Continuation(
        place, prompt.text, prompt.ids, config, loaded.tokenizer, int8=int8, prompt_places=prompt.places
    )
    yield from answers(playground, replace(asked, made=begun, left_out=prompt.left_out))


def go_on(playground: Playground, talk: Talk, config: SamplingConfig, int8: bool = False) -> Iterator[Talk]:
    """The last answer grows, as if it had not ended. ValueError where there is none."""
    if talk.made is None or talk.place is None:
        raise ValueError("nothing was said yet: write a message first")
    config = template_of(playground.models.load(talk.place)).stopped(config)
    for made in playground.extend(talk.made, config, int8=int8):
        yield replace(talk, made=made)


def answers(playground: Playground, talk: Talk) -> Iterator[Talk]:
    """The conversation with the question alone, then while its answer grows."""
    yield talk
    assert talk.made is not None
    for made in playground.grow(talk.made):
        yield replace(talk, made=made)
