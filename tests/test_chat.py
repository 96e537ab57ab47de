"""Conversations: what a model reads, what ends an answer, what is remembered; and the command `nanogpt-hub chat`."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import HOSTILE, ROOT, chat_tokenizer, make_chat_model, make_model

from nanogpt_hub import Chat, cli
from nanogpt_hub.chat import PLAIN, ChatTemplate, NoTemplateError, message, room_for_prompt, without_oldest_turn
from nanogpt_hub.checkpoint import load_model
from nanogpt_hub.generate import stream_tokens
from nanogpt_hub.sampling import SamplingConfig

ALPACA = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
TURNS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system text, please') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% if not loop.last %}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}|[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat") / "best")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


def texts(model, tokenizer, ids, **settings):
    return "".join(token.text for token in stream_tokens(model, tokenizer, [ids], **settings))


# ---- the library ----


def test_answers_are_what_follows_the_conversation_so_far(loaded):
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, "Be brief.", SamplingConfig(20, temperature=1.2, seed=5))
    answers = [chat.say("Hi"), chat.say("And then?")]
    history = [message("system", "Be brief.")]
    template = ChatTemplate(tokenizer)
    for n, said in enumerate(("Hi", "And then?")):
        history.append(message("user", said))
        ids = template.prompt(history, 1000).ids
        stop = template.ends[0]
        assert answers[n] == texts(
            model, tokenizer, ids, max_new_tokens=20, temperature=1.2, seed=5 + n, stop_tokens=stop
        )
        history.append(message("assistant", answers[n]))
    assert chat.messages == history
    chat.reset()
    assert chat.messages == history[:1]
    assert chat.say("Hi") == answers[0], "after a reset the same seed says the same again"


def test_an_answer_that_is_stopped_is_part_of_what_was_said(loaded):
    chat = Chat(*loaded, config=SamplingConfig(20, seed=1))
    answer = chat.stream("Hi")
    seen = next(answer).text + next(answer).text
    answer.close()
    assert chat.messages[1:] == [message("assistant", seen)]
    chat.say("Go on")
    assert [each["role"] for each in chat.messages] == ["user", "assistant", "user", "assistant"]


def test_a_message_that_cannot_be_written_leaves_the_conversation_as_it_was(loaded):
    chat = Chat(*loaded, config=SamplingConfig(5, seed=1))
    chat.say("Hi")
    before = [*chat.messages]
    with pytest.raises(ValueError, match="surrogates"):
        chat.say("\ud800")
    assert chat.messages == before
    model, _ = loaded
    with pytest.raises(ValueError, match="no system text, please"):
        Chat(model, chat_tokenizer(TURNS), "Be brief.").say("Hi")


def test_the_oldest_turns_make_room_and_the_system_text_stays(loaded):
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, "Be brief.", SamplingConfig(16, seed=1))
    for n in range(8):
        chat.say(f"question {n}")
    assert chat.left_out > 0
    assert chat.left_out % 2 == 0
    assert len(chat.messages) == 1 + 2 * 8
    room = room_for_prompt(model.config.block_size, 16)
    prompt = ChatTemplate(tokenizer).prompt(chat.messages[:-1], room)
    assert len(prompt.ids) <= room
    assert "Be brief." in prompt.text
    assert "question 7" in prompt.text
    assert "question 0" not in prompt.text
    assert prompt.left_out == chat.left_out
    long = ChatTemplate(tokenizer).prompt([message("user", "x" * 500)], room)
    assert len(long.ids) > room, "a last turn that is too long is read from its end, as any prompt"


def test_without_oldest_turn():
    system, user, assistant = message("system", "s"), message("user", "u"), message("assistant", "a")
    assert without_oldest_turn([system, user, assistant, user]) == [system, user]
    assert without_oldest_turn([user, assistant, user, assistant, user]) == [user, assistant, user]
    assert without_oldest_turn([assistant, user]) == [user]
    assert without_oldest_turn([system, user]) is without_oldest_turn([user]) is without_oldest_turn([]) is None
    assert (room_for_prompt(100, 20), room_for_prompt(100, 400)) == (80, 75)


def test_what_ends_an_answer(loaded):
    _, tokenizer = loaded
    eot = tokenizer.eot_id
    assert ChatTemplate(chat_tokenizer(PLAIN)).ends == ((eot,), ())
    assert ChatTemplate(chat_tokenizer(ALPACA)).ends == ((eot,), ("\n\n",))
    assert ChatTemplate(chat_tokenizer(TURNS)).ends == ((eot,), ("|[user]",))
    marked = chat_tokenizer("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", ["<|im_end|>"])
    assert marked.eot_id == eot, "its own end-of-text is another token"
    assert ChatTemplate(marked).ends == ((eot, eot + 1), ())
    settings = ChatTemplate(marked).stopped(SamplingConfig(stop=("x",)))
    assert (settings.stop_tokens, settings.stop) == ((eot, eot + 1), ("x",))
    assert ChatTemplate(marked).stopped(SamplingConfig(stop_tokens=())).stop_tokens == (), "asked for otherwise"


def test_the_places_of_a_prompt_are_its_characters(loaded):
    prompt = ChatTemplate(loaded[1]).prompt([message("user", "né 😀\n" + HOSTILE)], 1000)
    shown, end = "", 0
    for first, last in prompt.places:
        assert first <= end, "nothing is left out"
        shown += prompt.text[max(first, end) : last]
        end = max(end, last)
    assert shown == prompt.text


def test_a_model_that_was_not_tuned_on_conversations_is_told(tmp_path):
    with pytest.raises(NoTemplateError, match="not tuned on conversations"):
        Chat(*load_model(make_model(tmp_path / "plain")))


def test_threads_may_share_a_template():
    template, wrong = ChatTemplate(chat_tokenizer(ALPACA)), []

    def work(n):
        for k in range(30):
            if f"{n}/{k}\n" not in template.render([message("user", f"{n}/{k}")]):
                wrong.append((n, k))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(os.name == "nt", reason="sessions are those of POSIX")
def test_ctrl_c_in_the_terminal_does_not_reach_the_template():
    template = ChatTemplate(chat_tokenizer(ALPACA))
    child = template._render.child
    assert os.getsid(child.pid) != os.getsid(0)
    os.kill(child.pid, signal.SIGINT)
    assert template.render([message("user", "still here")]) == "### user:\nstill here\n\n"
    assert template._render.child is child


# ---- the command ----


def talk(monkeypatch, folder, said: bytes, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said)))
    return cli.main(["chat", str(folder), "--device", "cpu", "--seed", "3", "--max-new-tokens", "12", *flags])


def test_the_command_answers_each_line_and_remembers(folder, loaded, monkeypatch, capsys):
    said = "Hi\n\nÄnd then?\r\n/reset\nHi".encode()
    assert talk(monkeypatch, folder, said, "--system", "Be brief.", "--temperature", "0.9") == 0
    chat = Chat(*loaded, "Be brief.", SamplingConfig(12, temperature=0.9, seed=3))
    answers = [chat.say("Hi"), chat.say("Änd then?")]
    out, err = capsys.readouterr()
    assert out == "".join(f"{answer}\n" for answer in (*answers, answers[0]))
    assert "[seed 3;" in err
    assert "[what was said is forgotten]" in err
    assert "[cut: --max-new-tokens allows longer answers]" in err


def test_the_command_tells_when_the_beginning_is_forgotten(folder, monkeypatch, capsys):
    assert talk(monkeypatch, folder, b"one more question\n" * 8) == 0
    assert "[the context is full: the first 2 messages were left out]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "flags", "words"),
    [
        (b"\xff\n", [], "line 1 of stdin is not UTF-8"),
        (b"Hi\n", ["--system", "-"], "would read the messages"),
        (b"Hi\n", ["--system", "FILE:not/there"], "not/there"),
        (b"Hi\n", ["--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(folder, monkeypatch, capsys, said, flags, words):
    assert talk(monkeypatch, folder, said, *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err.splitlines()[-1]


def test_the_command_needs_a_template(tmp_path, monkeypatch, capsys):
    assert talk(monkeypatch, make_model(tmp_path / "plain"), b"Hi\n") == 2
    assert "was not tuned on conversations" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="needs a terminal of POSIX")
def test_in_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(folder):
    import pty

    main, side = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "nanogpt_hub",
        "chat",
        str(folder),
        "--device",
        "cpu",
        "--max-new-tokens",
        "1000000",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "NANOGPT_HUB_ENGINE": "torch"}
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=env, start_new_session=True)
    os.close(side)
    seen = b""

    def until(words: bytes) -> None:
        nonlocal seen
        while words not in seen:
            seen += os.read(main, 4096)

    try:
        until(b"> ")
        os.write(main, b"Hi\n")
        until(b"Hi\r\n")
        seen = b""
        while not seen:  # the answer has no end
            seen += os.read(main, 4096)
        process.send_signal(signal.SIGINT)
        until(b"[stopped]")
        until(b"> ")
        os.write(main, b"\x04")
        assert process.wait(timeout=100) == 0
    finally:
        process.kill()
        os.close(main)


def test_info_and_push_name_the_command(folder, hub, monkeypatch, capsys):
    assert cli.main(["info", str(folder)]) == 0
    assert "nanogpt-hub chat PATH" in capsys.readouterr().out
    hub.add_user("alice", "hf_AliceSecretToken0123456789")
    monkeypatch.setenv("HF_TOKEN", "hf_AliceSecretToken0123456789")
    assert cli.main(["push", str(folder), "alice/talks", "--license", "mit"]) == 0
    said = capsys.readouterr().err
    command = said.rpartition("to try it: nanogpt-hub ")[2].split()
    assert command == ["chat", "alice/talks"]
    assert talk(monkeypatch, command[1], b"Hi\n") == 0
    assert json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"] == PLAIN
