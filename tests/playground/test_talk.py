"""A conversation as the page's tab has it, without the page."""

import json
import shlex

import pytest
from helpers import HOSTILE, chat_tokenizer, make_chat_model, make_model

from nanogpt_hub import Chat, cli
from nanogpt_hub.checkpoint import load_model, save_model
from nanogpt_hub.commands import text as text_commands
from nanogpt_hub.playground.chat import MOST_MESSAGES, Talk, go_on, say, why_not
from nanogpt_hub.playground.facts import example_question
from nanogpt_hub.playground.links import chat_command, chat_snippet
from nanogpt_hub.playground.models import LimitError, ModelStore
from nanogpt_hub.playground.session import Playground
from nanogpt_hub.sampling import SamplingConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("talks") / "best")


def spoken(playground, place, *texts, system="", talk=None, **asked):
    talk = talk or Talk()
    for text in texts:
        settings = playground.settings(place, max_new_tokens=12, seed=3, **asked)
        *_, talk = say(playground, talk, place, system, text, settings)
    return talk


def test_the_page_and_the_library_answer_alike(playground, place, folder):
    talk = spoken(playground, place, "Hi", "And then?", system="Be brief.", temperature=1.1)
    chat = Chat(*load_model(folder), "Be brief.", SamplingConfig(12, temperature=1.1, seed=3))
    chat.say("Hi"), chat.say("And then?")
    assert talk.messages == chat.messages
    assert talk.made.prompt.endswith("<|user|>\nAnd then?\n<|assistant|>\n")
    assert json.loads(talk.as_json()) == {"messages": chat.messages}


def test_updates_hold_what_is_new(playground, place):
    settings = playground.settings(place, max_new_tokens=30, seed=3)
    moments = list(say(playground, Talk(), place, "", "Hi", settings))
    assert moments[0].view() == {
        "run": moments[0].made.key,
        "done": False,
        "messages": [["user", "Hi"], ["assistant", ""]],
    }
    last = moments[-1]
    part, whole = last.view(since=10), last.view()
    assert whole["messages"][-1][1][: part["from"]] + part["text"] == last.made.text
    assert part["from"] == len("".join(token.text for token in last.made.tokens[:10]))
    assert whole["done"]
    assert Talk().view() is None
    assert Talk().status() == Talk().as_json() == ""


def test_what_the_model_reads_is_shown_token_by_token(playground, place):
    talk = spoken(playground, place, f"né 😀 {HOSTILE}")
    shown = talk.made.view()
    assert "".join(text for text, _ in shown["prompt"]) == talk.made.prompt
    assert len(shown["prompt"]) == len(talk.made.prompt_ids)
    more = spoken(playground, place, "And?", talk=talk)
    assert ["<|endoftext|>", "<|endoftext|>"] in more.made.view()["prompt"]
    seen = playground.position(more.made, 9, playground.settings(place))
    assert seen["n"] == 9


def test_a_stopped_answer_goes_on(playground, place):
    settings = playground.settings(place, max_new_tokens=12, seed=3)
    stopped = next(talk for talk in say(playground, Talk(), place, "", "Hi", settings) if talk.made.tokens).stop()
    assert "stopped" in stopped.status()
    *_, longer = go_on(playground, stopped, settings)
    assert longer.made.text.startswith(stopped.made.text)
    assert len(longer.made.tokens) == len(stopped.made.tokens) + 12
    assert longer.said == stopped.said
    assert "two seeds" in chat_snippet(longer)
    with pytest.raises(ValueError, match="nothing was said yet"):
        next(go_on(playground, Talk(), settings))


def test_another_model_is_another_conversation(playground, place, tmp_path):
    other = make_chat_model(tmp_path / "other", seed=5)
    both = Playground(ModelStore(str(other), any_folder=True))
    talk = spoken(playground, place, "Hi")
    assert len(spoken(both, both.models.find(), "Hi", talk=talk).messages) == 2
    assert len(spoken(playground, place, "Hi", talk=talk).messages) == 4


def test_limits(playground, place):
    settings = playground.settings(place)
    long = Talk(place, "", tuple({"role": "user", "content": "x"} for _ in range(MOST_MESSAGES + 1)))
    for talk, system, text in ((Talk(), "", "x" * 2001), (Talk(), "x" * 2001, "x"), (long, "", "x")):
        with pytest.raises(LimitError, match="at most"):
            next(say(playground, talk, place, system, text, settings))
    with pytest.raises(ValueError, match="write a message"):
        next(say(playground, Talk(), place, "", " \n", settings))
    talk = spoken(playground, place, *(f"a question of some length, number {n}" for n in range(8)))
    assert "messages were left out" in talk.status()


def test_why_nobody_can_talk(playground, place, tmp_path):
    assert why_not(playground, place) == ""
    plain = Playground(ModelStore(str(make_model(tmp_path / "plain"))))
    assert "not tuned on conversations" in why_not(plain, plain.models.find())
    with pytest.raises(ValueError, match="not tuned on conversations"):
        spoken(plain, plain.models.find(), "Hi")
    model, _ = load_model(make_chat_model(tmp_path / "talks"))
    save_model(tmp_path / "broken", model, chat_tokenizer("{% for `x`\n ![p](http://198.51.100.1)"))
    broken = Playground(ModelStore(str(tmp_path / "broken")))
    said = why_not(broken, broken.models.find())
    assert said.startswith("Nobody can talk with this model: `the tokenizer's chat template cannot be read")
    assert said.count("`") == 2


def test_the_question_of_the_run_is_the_first_one(folder, tmp_path):
    place = Playground(ModelStore(str(folder))).models.find()
    assert example_question(place) == ("", "")
    run = make_chat_model(tmp_path / "run" / "best").parent
    (run / "metrics.jsonl").write_text("")
    for question, expected in (
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], ("s", "u")),
        ([{"role": "user", "content": 3}, {"role": [], "content": "x"}, "x"], ("", "")),
        ("x", ("", "")),
    ):
        (run / "run.json").write_text(json.dumps({"sample": {"question": question}}))
        found = Playground(ModelStore(str(run / "best"))).models.find()
        assert example_question(found) == expected
    (run / "run.json").write_text(
        json.dumps({"sample": {"question": [{"role": "user", "content": "u"}], "prompt": "p"}})
    )
    shown = Playground(ModelStore(str(run / "best")))
    assert shown.example_prompt(shown.models.find()) == "u", "the tab Generate begins with it, too"


def test_code_and_command_say_the_same_again(playground, place, monkeypatch, capsys):
    talk = spoken(playground, place, "It's me", "And then?", system='Be "brief".', temperature=1.1)
    exec(chat_snippet(talk), {})
    assert capsys.readouterr().out == f"{talk.made.text}\n"
    program, *words = shlex.split(chat_command(playground.models, talk))
    assert program == "nanogpt-hub"
    assert words[:4] == ["chat", str(place.folder), "--system", 'Be "brief".']
    monkeypatch.setattr(text_commands, "typed_lines", lambda: iter(["It's me", "And then?"]))
    assert cli.main([*words, "--seed", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "".join(
        f"{each['content']}\n" for each in talk.messages if each["role"] == "assistant"
    )
