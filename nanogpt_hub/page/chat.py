"""The tab Chat: a conversation with a model that was tuned on conversations, and what it really reads of it."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from nanogpt_hub.hub.resolve import Resolved
from nanogpt_hub.page.parts import MODEL, Page, SamplingControls, any_of, named, note, said, save_as, view, whole
from nanogpt_hub.playground import chat, facts
from nanogpt_hub.playground.chat import Talk
from nanogpt_hub.playground.links import chat_command, chat_snippet

TOKENS = {"panel": "chat-panel", "quiet": True}  # the conversation tells when an answer ended
MESSAGE: dict[str, Any] = dict(max_lines=6, lines=1)


class ChatTab:
    """The conversation beside the tokens that the model reads; hidden behind a sentence where a model cannot talk."""

    def __init__(self, page: Page, controls: SamplingControls):
        """controls: the settings with which answers are drawn."""
        self.page, self.playground = page, page.playground
        most: dict[str, Any] = dict(max_length=page.limits.prompt_chars)
        self.talk = gr.State(Talk(), time_to_live=3600)
        self.sentence = gr.Markdown("", elem_id="no-chat")
        with gr.Row(elem_classes="stage", visible=False, elem_id="chat") as self.stage:
            with gr.Column(scale=7, min_width=300):
                self.log = view("chat", elem_id="chat-log")
                self.status = gr.Markdown("", elem_id="chat-status", elem_classes="figures")
                self.message = gr.Textbox(label="Message", elem_id="message", **MESSAGE, **most)
                with gr.Row(elem_classes="actions"):
                    send = gr.Button("Send", variant="primary", min_width=92, elem_id="send")
                    stop = gr.Button("Stop", min_width=70, elem_id="chat-stop")
                    more = gr.Button("Continue", min_width=92, elem_id="chat-continue")
                    reset = gr.Button("Start over", min_width=92, elem_id="chat-reset")
                self.system = gr.Textbox(
                    label="System text", info="how the model shall be; it stands before everything that was said",
                    elem_id="system", **MESSAGE, **most,
                )  # fmt: skip
                self.export(save_as("conversation.jsonl"))
            with gr.Column(scale=4, min_width=300):
                note(
                    "**What the model reads.** A chat is one text to it: its template writes who says what, with "
                    "tokens that stand for no text. It goes on with that text until it draws the token that ends an "
                    "answer. Choose any token to see it from inside."
                )
                self.tokens = view("tokens", elem_id="chat-tokens")
                self.panel = view("panel", elem_id="chat-panel")
        self.shown = [self.talk, self.log, self.status, self.tokens]
        self.settings = [controls.int8, *controls.fields]
        self.wire(send, stop, more, reset)

    def wire(self, send: gr.Button, stop: gr.Button, more: gr.Button, reset: gr.Button) -> None:
        page, settings = self.page, self.settings
        working: dict[str, Any] = dict(turn=MODEL, show_progress_on=self.status)
        asked = [self.talk, page.place, self.system, self.message, *settings]
        events = [
            page.on(any_of(send.click, self.message.submit), self.say, asked, [*self.shown, self.message], **working),
            page.on(more.click, self.go_on, [self.talk, *settings], self.shown, **working),
        ]
        stopped = stop.click(None, None, None, cancels=events, api_visibility="private")
        cleared = reset.click(None, None, None, cancels=events, api_visibility="private")
        quiet: dict[str, Any] = dict(show_progress="hidden")
        ended = [
            page.on(stopped.then, self.stopped, self.talk, self.shown, **quiet),
            page.on(cleared.then, self.start_over, None, self.shown, **quiet),
        ]
        filled = [self.sentence, self.stage, self.system, self.message, *self.shown, self.panel]
        ended.append(page.on_model(self.fill, page.place, filled, **quiet))
        for event in (*events, *ended):
            page.on(event.then, self.take, [self.talk, page.place], self.exported, **quiet)
        look: dict[str, Any] = dict(turn=MODEL, trigger_mode="always_last", **quiet)
        for listen in (self.tokens.select, self.panel.input):
            page.on(listen, self.open_panel, [self.talk, *settings], self.panel, **look)

    def export(self, download: str) -> None:
        """Ways to take the conversation elsewhere."""
        with gr.Accordion("Take it with you", open=False):
            python = gr.Code(label="The same in Python", language="python", interactive=False, elem_id="chat-python")
            shell = gr.Code(label="In a terminal", language="shell", interactive=False, elem_id="chat-shell")
            button = gr.Button("Download as a row to fine-tune on", size="sm", elem_id="chat-download")
            data = gr.Textbox(visible="hidden", elem_id="chat-json")
            button.click(None, data, None, js=download, api_visibility="private")
        self.exported = [python, shell, data]

    def stream(self, growing: Iterator[Talk]) -> Iterator[list]:
        """Updates of `shown` while an answer grows: the first and the last one send everything."""
        ends = [0, 0, 0]
        for talk in growing:
            made = talk.made
            assert made is not None
            since = ends[0] if made.finish is None else 0
            tokens = {**made.view(since=since), **TOKENS}
            yield [talk, talk.view(since), talk.status(), tokens]
            ends = [*ends[1:], len(made.tokens)]

    def say(
        self, talk: Talk, place: Resolved, system: str, text: str, int8: bool, *values: Any
    ) -> Iterator[list]:  # fmt: skip
        """The answer to a message, which leaves its field once it is understood."""
        settings = self.playground.settings(place, **named(values))
        growing = chat.say(self.playground, talk, place, system or "", text or "", settings, int8)
        for number, updates in enumerate(self.stream(growing)):
            yield [*updates, gr.skip() if number else ""]

    def go_on(self, talk: Talk, int8: bool, *values: Any) -> Iterator[list]:
        """The last answer grows."""
        if talk.made is None or talk.place is None:
            raise ValueError("nothing was said yet: write a message first")
        settings = self.playground.settings(talk.place, **named(values))
        yield from self.stream(chat.go_on(self.playground, talk, settings, int8))

    def show(self, talk: Talk) -> list:
        """`shown` for a conversation as a whole."""
        tokens = {**talk.made.view(), **TOKENS} if talk.made else None
        return [talk, talk.view(), talk.status(), tokens]

    def stopped(self, talk: Talk) -> list:
        return self.show(talk.stop())

    def start_over(self) -> list:
        return self.show(Talk())

    def fill(self, place: Resolved) -> list:
        """Another model: a new conversation, or a sentence that says why there is none."""
        why = chat.why_not(self.playground, place)
        system, question = facts.example_question(place)
        sentence = gr.Markdown(why, visible=bool(why))
        return [sentence, gr.Row(visible=not why), system, question, *self.show(Talk()), None]

    def take(self, talk: Talk, place: Resolved) -> list[str]:
        """The conversation as code, as a command, and as a row."""
        if talk.made is None or place is None:
            return [""] * len(self.exported)
        return [chat_snippet(talk), chat_command(self.page.models, talk), talk.as_json()]

    def open_panel(self, event: gr.EventData, talk: Talk, int8: bool, *values: Any) -> dict:
        """A token that was chosen in the text, from inside."""
        if talk.made is None or talk.place is None or said(event, "run") != talk.made.key:
            raise ValueError("this text is not the current one any more: choose a token of the new one")
        settings = self.playground.settings(talk.place, **named(values))
        seen = self.playground.position(talk.made, whole(event, "n"), settings)
        return {**seen, "run": talk.made.key, "text": "chat-tokens"}
