"""Fine-tuning: bases by folder and by name, rows of which only the answers are learned, chat templates, LoRA."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curves import val_losses
from helpers import ROOT
from huggingface_hub import constants
from test_sources import SHA, Server, serve_dataset

from nanogpt_hub.chat import PLAIN, ChatTemplate, TemplateError, overlaps
from nanogpt_hub.checkpoint import load_model, save_model
from nanogpt_hub.hub.publish import push_to_hub
from nanogpt_hub.hub.resolve import from_pretrained, resolve
from nanogpt_hub.model import GPT, IGNORE_INDEX, GPTConfig
from nanogpt_hub.sources import Reading, SourceError
from nanogpt_hub.tokenizer import Tokenizer, build_tokenizer
from train import finetune, pretrain
from train.config import LoraConfig
from train.lora import add_adapters, without_adapters
from train.rows import Conversations, RowBatches, TokenRows, completions, encode_rows, fit, open_rows, padded_length

pytestmark = pytest.mark.usefixtures("own_cache")

NAMES, FOODS = "Ann Bob Cid Dora Eve Fred Gus Hal Ida Jon".split(), "figs rice soup eggs corn beans pie".split()
FACTS = [(name, food, number) for number in (2, 3, 5) for name in NAMES for food in FOODS]
TEXT = "".join(f"<|user|> {name} eats {number} {food}. What does {name} eat?\n" for name, food, number in FACTS)
PAIRS = [
    {"prompt": f"{name} has {number} {food}.\nWhat does {name} eat?", "completion": f" {name} eats {food}."}
    for name, food, number in FACTS
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": f"{name} likes {food}."},
            {"role": "user", "content": f"What does {name} eat?"},
            {"role": "assistant", "content": f"{name} eats {number} {food}."},
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": f"{number}.\n\nYes, {number} {food}."},
        ]
    }
    for name, food, number in FACTS
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that has read TEXT for two seconds."""
    folder = tmp_path_factory.mktemp("base")
    text = write(folder / "text.txt", TEXT)
    flags = "--model.n_layer 2 --model.n_head 2 --model.n_embd 32 --model.block_size 64 --data.tokenizer bpe:320 "
    flags += "--model.preset nanogpt --max_steps 60 --batch_size 8 --eval.sample_tokens 0 --device cpu"
    assert pretrain.main([*flags.split(), "--data.source", str(text), "--out_dir", str(folder / "run")]) == 0
    return folder / "run" / "best"


@pytest.fixture(scope="module")
def tokenizer(base) -> Tokenizer:
    return Tokenizer.load(base)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", PAIRS)


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8", newline="")
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows in the format that the file's name asks for."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        write(path, json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def tune(base: Path | str, data: Path, out: Path, *flags: str) -> int:
    always = "--max_steps 4 --batch_size 8 --log_interval 1 --eval.interval 2 --eval.max_windows 16 --device cpu"
    always += " --eval.sample_tokens 8"
    return finetune.main(
        [*always.split(), "--from", str(base), "--data.source", str(data), "--out_dir", str(out), *flags]
    )


def learned_text(tokenizer: Tokenizer, targets) -> str:
    return tokenizer.decode([t for t in targets.tolist() if t != IGNORE_INDEX])


# ---- from a base -----------------------------------------------------------------------------------------------------


def test_finetune_starts_from_the_base_and_lowers_its_loss(base, tmp_path, capsys):
    other = write(tmp_path / "other.txt", TEXT.replace("eats", "sold"))
    flags = "--model.block_size 32 --model.dropout 0.2 --optim.learning_rate 0.01".split()
    assert tune(base, other, tmp_path / "tuned", *flags) == 0
    said = capsys.readouterr().out
    losses = val_losses(tmp_path / "tuned")
    assert f"step      0  val loss {losses[0]:.4f}" in said
    assert losses[-1] < losses[0]
    assert "before the first step" in said
    model, tokenizer = load_model(tmp_path / "tuned" / "best")
    old, old_tokenizer = load_model(base)
    assert model.config.block_size == 32
    assert tokenizer.hash == old_tokenizer.hash
    assert not torch.equal(model.wte.weight, old.wte.weight)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.n_layer", "3"], "n_layer"),
        (["--model.preset", "gpt2"], "preset"),
        (["--model.block_size", "128"], "block_size"),
        (["--data.tokenizer", "byte"], "tokenizer"),
        (["--from", ""], "--from FOLDER"),
        (["--from", "me/none@v1"], "there is no me/none here, and none on the Hub"),
        (["--lora.rank", "4", "--optim.name", "muon"], "adamw"),
    ],
)
def test_finetune_refuses_what_it_cannot_do(base, pairs, tmp_path, capsys, hub, flags, words):
    assert tune(base, pairs, tmp_path / "run", "--data.format", "completion", *flags) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_finetune_names_a_character_its_tokenizer_does_not_have(tmp_path, capsys):
    tokenizer = build_tokenizer("char", [TEXT, json.dumps(CHATS)])
    config = GPTConfig.preset("nanogpt", "1m", vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=16)
    save_model(tmp_path / "base", GPT(config), tokenizer)
    assert tune(tmp_path / "base", write(tmp_path / "other.txt", TEXT + "naïve"), tmp_path / "run") == 2
    assert "ï" in capsys.readouterr().err
    rows = write_rows(tmp_path / "rows.jsonl", [*CHATS, {"messages": [{"role": "assistant", "content": "naïve"}]}])
    assert tune(tmp_path / "base", rows, tmp_path / "run", "--data.format", "messages") == 2
    assert "ï" in capsys.readouterr().err


@pytest.fixture
def alice(hub, monkeypatch):
    """The loopback Hub with alice, who is signed in."""
    hub.add_user("alice", "hf_alice")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")


def test_a_base_on_the_hub_is_named_with_its_commit(base, pairs, tmp_path, alice):
    sha = push_to_hub(base, "alice/base").sha
    assert tune("alice/base@main", pairs, tmp_path / "run", "--data.format", "completion") == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["base_model"] == {"id": "alice/base", "revision": sha, "relation": "finetune"}
    assert facts["evaluation"]["base_loss"] == val_losses(tmp_path / "run")[0]
    card = (tmp_path / "run" / "best" / "README.md").read_text(encoding="utf-8")
    assert "base_model: alice/base" in card
    assert "Fine-tuning changed the loss by -" in card
    assert sha in card


def test_a_base_that_is_damaged_in_the_cache_is_named(base, pairs, tmp_path, capsys, alice, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    push_to_hub(base, "alice/base")
    weights = (resolve("alice/base").folder / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:1000])
    for method in ("GET", "HEAD"):
        hub.fail(method, "/", times=10**6, status=503)
    assert tune("alice/base", pairs, tmp_path / "run", "--data.format", "completion") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"model.safetensors of alice/base is damaged in the cache ({weights}) and could not be fetched again" in said
    assert not (tmp_path / "run").exists()


def test_a_shared_run_with_adapters_goes_on_elsewhere_bit_for_bit(base, pairs, tmp_path, alice):
    push_to_hub(base, "alice/base")
    flags = "--data.format completion --lora.rank 2 --optim.schedule constant".split()
    share = ["--hub.repo_id", "alice/tuned", "--hub.push_state", "true"]
    assert tune("alice/base", pairs, tmp_path / "here", *flags, *share) == 0
    tuned, _ = from_pretrained("alice/tuned")
    assert {*tuned.state_dict()} == {*load_model(base)[0].state_dict()}
    resume = ["--resume", "alice/tuned", "--max_steps", "6", "--out_dir", str(tmp_path / "there")]
    assert finetune.main([*resume, "--from", "alice/base", "--data.source", str(pairs)]) == 0
    assert tune("alice/base", pairs, tmp_path / "here", *flags, "--max_steps", "6") == 0
    here, there = (tmp_path / name / "last" / "model.safetensors" for name in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize(("family", "lora"), [("gpt2", "0"), ("gpt_neox", "2"), ("llama", "2")])
def test_models_that_transformers_made_are_tuned_and_load_there_again(family, lora, tokenizer, pairs, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    shape = dict(max_position_embeddings=64, num_hidden_layers=2, num_attention_heads=2, hidden_size=32)
    shape |= dict(intermediate_size=64) if family != "gpt2" else {}
    config = AutoConfig.for_model(family, vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=0, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "own")
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path / "own")
    own.save_pretrained(tmp_path / "base")
    assert tune(tmp_path / "base", pairs, tmp_path / "run", "--data.format", "completion", "--lora.rank", lora) == 0
    assert val_losses(tmp_path / "run")[-1] < val_losses(tmp_path / "run")[0]
    ours, _ = load_model(tmp_path / "run" / "best")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best").eval()
    idx = torch.tensor([tokenizer.encode("What does Ann eat?")])
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-4)


# ---- only answers are learned ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", ["0", "4"])
@pytest.mark.parametrize(("form", "rows"), [("completion", PAIRS), ("messages", CHATS)])
def test_the_loss_on_held_out_answers_falls(base, tmp_path, capsys, form, rows, lora):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--data.format", form, "--lora.rank", lora, "--max_steps", "40", "--eval.interval", "20"]
    assert tune(base, data, tmp_path / "run", *flags, "--optim.learning_rate", "0.01") == 0
    losses = val_losses(tmp_path / "run")
    assert losses[-1] < 0.5 * losses[0]
    said = capsys.readouterr().out
    assert "rows: 210" in said
    assert ("LoRA: adapters of rank 4" in said) == (lora == "4")
    card = (tmp_path / "run" / "best" / "README.md").read_text(encoding="utf-8")
    assert ("lora.rank 4" in card) == (lora == "4")


def padded(tokenizer: Tokenizer, folder: Path, form: str, rows: list[dict], block_size: int = 64):
    """All rows as one batch (idx, targets), in their order."""
    pair = completions("prompt", "completion", tokenizer)
    encode = pair if form == "completion" else Conversations("messages", tokenizer)
    source = open_rows(str(write_rows(folder / "rows.jsonl", rows)), [*rows[0]])
    encoded, _ = encode_rows(source, encode, block_size)
    return encoded.padded(np.arange(len(encoded)), block_size)


def test_a_batch_has_the_loss_of_its_answers_alone(base, tokenizer, tmp_path):
    model, _ = load_model(base)
    rows = [*PAIRS[:5], {"prompt": "", "completion": "pie"}]
    idx, targets = padded(tokenizer, tmp_path, "completion", rows)
    total, count = 0.0, 0
    for row in rows:
        start = tokenizer.encode(row["prompt"]) or [tokenizer.eot_id]  # as generation starts
        answer = [*tokenizer.encode(row["completion"]), tokenizer.eot_id]
        logits, _ = model(torch.tensor([start + answer]))
        predicting = logits[0, len(start) - 1 : -1]
        total += F.cross_entropy(predicting, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    assert model(idx, targets)[1].item() == pytest.approx(total / count, rel=1e-5)


def test_what_is_learned_are_completions_and_their_end(tokenizer, tmp_path):
    rows = [
        {"prompt": "Say ", "completion": "it.\n\n"},
        {"prompt": "", "completion": "So"},
        {"prompt": "a", "completion": "nd"},
    ]
    idx, targets = padded(tokenizer, tmp_path, "completion", rows)
    end = tokenizer.decode([tokenizer.eot_id])
    assert [learned_text(tokenizer, row) for row in targets] == [f"it.\n\n{end}", f"So{end}", f"nd{end}"]
    assert idx[0, : len(tokenizer.encode("Say "))].tolist() == tokenizer.encode("Say ")  # as the prompt is alone
    assert idx[1, 0] == tokenizer.eot_id


def test_what_is_learned_of_conversations_is_what_the_assistant_says(tokenizer, tmp_path):
    _, targets = padded(tokenizer, tmp_path, "messages", CHATS[:3], block_size=128)
    end = tokenizer.decode([tokenizer.eot_id])
    for row, chat in zip(targets, CHATS, strict=False):
        said = [message["content"] + end for message in chat["messages"] if message["role"] == "assistant"]
        assert learned_text(tokenizer, row) == "".join(said)


CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def with_chatml(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """A tokenizer with a template and special tokens of its own, and white space trimmed off the places of tokens."""
    tokenizer.save(folder)
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in ("<|im_start|>", "<|im_end|>"):
        new = {**data["added_tokens"][0], "id": len(data["model"]["vocab"]) + len(data["added_tokens"]) - 1}
        data["added_tokens"].append({**new, "content": token})
    data["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    config = {**tokenizer.config, "eos_token": "<|im_end|>", "chat_template": CHATML}
    return Tokenizer(json.dumps(data), config)


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_conversations_have_the_ids_that_transformers_gives_them(template, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    if template == "chatml":
        tokenizer = with_chatml(tokenizer, tmp_path)
    else:
        tokenizer = Tokenizer.load(tokenizer_folder(tokenizer, tmp_path))
        tokenizer.config["chat_template"] = PLAIN
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chats = [chat["messages"] for chat in CHATS[:9]] + [[{"role": "assistant", "content": "\n  née 😀\n\n"}]]
    encoded = list(ChatTemplate(tokenizer).encode(chats))
    for messages, (ids, learned) in zip(chats, encoded, strict=True):
        expected = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=template == "chatml"
        )
        assert ids == expected["input_ids"]
        if template == "chatml":
            mask = np.array(expected["assistant_masks"], dtype=bool)
            assert (mask <= np.array(learned)).all()
            # the line end behind an answer is the template's, and comes with it
            assert {theirs.decode(i) for i in np.array(ids)[np.array(learned) & ~mask]} == {"\n"}
    asked = ChatTemplate(tokenizer).render(chats[0][:2], add_generation_prompt=True)
    assert asked == theirs.apply_chat_template(chats[0][:2], add_generation_prompt=True, tokenize=False)


def tokenizer_folder(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(folder)
    return folder


def test_the_template_travels_with_the_model(base, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", CHATS)
    assert tune(base, data, tmp_path / "run", "--data.format", "messages") == 0
    assert Tokenizer.load(tmp_path / "run" / "best").config["chat_template"] == PLAIN


def test_rows_of_from_and_value_are_those_of_role_and_content(tokenizer):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    encode = Conversations("messages", tokenizer)
    older = [
        {"messages": [{"from": names[m["role"]], "value": m["content"]} for m in c["messages"]]} for c in CHATS[:9]
    ]
    rows = [[(f"row {n}", row) for n, row in enumerate(rows)] for rows in (CHATS[:9], older)]
    assert list(encode(rows[0])) == list(encode(rows[1]))
    assert encode.question == CHATS[8]["messages"][:2]


def test_a_run_on_conversations_samples_an_answer_and_says_how_to_talk_to_it(base, tmp_path, capsys, monkeypatch):
    data, out = write_rows(tmp_path / "rows.jsonl", CHATS), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert tune(base, data, Path("run"), "--data.format", "messages", "--max_steps", "6") == 0
    command = re.search(r"^talk to it: (.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    asked = "".join(f"<|{m['role']}|>\n{m['content']}\n" for m in CHATS[-1]["messages"][:2]) + "<|assistant|>\n"
    facts = json.loads((out / "run.json").read_text(encoding="utf-8"))["sample"]
    assert (facts["prompt"], facts["question"]) == (asked, CHATS[-1]["messages"][:2])
    assert (out / "samples" / "step-000006.txt").read_text(encoding="utf-8") == asked + facts["text"]
    words = shlex.split(command)  # nanogpt-hub, or python -m nanogpt_hub where that is not on the PATH
    assert words[-2:] == ["chat", "run/best"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    talk = [
        sys.executable,
        "-m",
        "nanogpt_hub",
        *words[-2:],
        "--max-new-tokens",
        "8",
        "--seed",
        "1",
        "--system",
        "Ann likes figs.",
    ]
    done = subprocess.run(talk, input=b"What does Ann eat?\nHow many?\n", env=env, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"\n") >= 2

    card = (out / "best" / "README.md").read_text(encoding="utf-8")
    ours, theirs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "nanogpt-hub chat run/best" in card
    assert "parameters that was tuned on conversations" in card
    assert "A question, as the chat template writes it, and the answer." in card
    assert f"chat.say({CHATS[-1]['messages'][1]['content']!r}" in ours
    for code in (ours, theirs):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.strip()


def test_the_users_own_question_is_asked(base, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", CHATS)
    assert tune(base, data, tmp_path / "run", "--data.format", "messages", "--eval.prompt", "What does Ann eat?") == 0
    sample = (tmp_path / "run" / "samples" / "step-000004.txt").read_text(encoding="utf-8")
    assert sample.startswith("<|user|>\nWhat does Ann eat?\n<|assistant|>\n")


def test_an_answer_that_later_turns_change_is_not_learned(tokenizer, tmp_path):
    hides = (
        "{% for m in messages %}{{ m.content[:99 if loop.last or m.role == 'user' else 2] }}{{ eos_token }}{% endfor %}"
    )
    tokenizer = Tokenizer.load(tokenizer_folder(tokenizer, tmp_path))
    tokenizer.config["chat_template"] = hides
    roles = ("assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, ("first", "why?", "second"), strict=True)]
    [(ids, learned)] = ChatTemplate(tokenizer).encode([messages])
    end = tokenizer.decode([tokenizer.eot_id])
    assert tokenizer.decode(ids) == f"fi{end}why?{end}second{end}"
    assert tokenizer.decode(np.array(ids)[learned]) == f"second{end}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for", "cannot be read"),
        ("{{ ''.__class__.__mro__ }}", "cannot write"),
        ("{{ messages.append(1) }}", "cannot write"),
        ("{{ raise_exception('no system role, please') }}", "no system role, please"),
        ("{{ messages[9].content }}", "cannot write"),
        ("x" * 300_000, "300,000 characters"),
        ([{"name": "tools", "template": "x"}], "default"),
    ],
)
def test_a_template_that_cannot_be_used_is_told(tokenizer, tmp_path, template, words):
    tokenizer = Tokenizer.load(tokenizer_folder(tokenizer, tmp_path))
    tokenizer.config["chat_template"] = template
    with pytest.raises(TemplateError, match=words):
        list(ChatTemplate(tokenizer).encode([CHATS[0]["messages"]]))


def test_overlaps():
    tokens, spans = [(0, 2), (2, 2), (2, 5), (5, 6), (6, 9), (9, 9)], [(1, 2), (4, 6)]
    naive = [any(start < last and end > first for first, last in spans) for start, end in tokens]
    assert overlaps(tokens, spans) == naive == [True, False, True, True, False, False]
    assert overlaps(tokens, []) == [False] * 6


# ---- rows and batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "longest", "kept", "counted"),
    [
        (3, 4, 7, slice(0, 7), ""),
        (3, 4, 6, slice(1, 7), "shortened"),
        (3, 4, 5, slice(2, 7), "shortened"),
        (3, 4, 4, slice(2, 6), "shortened cut"),
        (1, 6, 4, slice(0, 4), "cut"),
        (3, 0, 9, None, "skipped"),
        (0, 1, 9, None, "skipped"),
        (0, 3, 2, slice(0, 2), "cut"),
    ],
)
def test_a_long_row_loses_of_its_prompt_before_it_loses_of_its_answer(prompt, answer, longest, kept, counted):
    ids, learned, counts = [*range(prompt + answer)], [False] * prompt + [True] * answer, Counter()
    row = fit(ids, learned, longest, counts)
    assert (row is None) == (kept is None)
    if kept:
        assert row[0].tolist() == ids[kept]
        assert row[1].tolist() == [False, *learned[kept][1:]]
    assert {name for name, n in counts.items() if n} == {"read", *counted.split()}


def test_rows_left_out_and_shortened_are_counted_and_told(base, tmp_path, capsys):
    long = {"prompt": "a very long story of figs and pie, " * 20, "completion": " Yes."}
    rows = [*PAIRS[:8], {"prompt": "no", "completion": ""}, {"prompt": "no", "completion": None}, long]
    rows.append({"prompt": "Go", "completion": " on and on" * 60})
    assert tune(base, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", "--data.format", "completion") == 0
    told = "rows: 12 (completion); 2 without an answer skipped; to fit 64 tokens, 2 prompts shortened and 1 answers cut"
    assert told in capsys.readouterr().out


def test_batches_are_a_function_of_seed_and_step_and_see_each_row_once_an_epoch():
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 19, size=30)
    rows = TokenRows.of((np.full(n, i, dtype=np.uint32), np.arange(n) > 0) for i, n in enumerate(lengths))
    batches = RowBatches(rows, block_size=17, seed=3)
    assert len(batches) == 30
    assert batches.epochs(6, 5) == 1
    seen = []
    for step in range(6):
        idx, targets = batches.batch(step, 5)
        assert idx.shape == targets.shape
        assert idx.shape[1] <= 17
        for part in range(5):
            one, its_targets = RowBatches(rows, block_size=17, seed=3).batch(step, 5, slice(part, part + 1))
            T = one.shape[1]
            assert torch.equal(one[0], idx[part, :T])
            assert torch.equal(its_targets[0], targets[part, :T])
            assert (targets[part, T:] == IGNORE_INDEX).all()
        seen += targets.max(1).values.tolist()
    assert sorted(seen) == [*range(30)]
    assert not torch.equal(batches.batch(0, 5)[0], batches.batch(6, 5)[0])


def test_few_lengths_serve_all():
    lengths = [padded_length(n) for n in range(1, 1025)]
    assert all(length >= n for n, length in enumerate(lengths, 1))
    assert sorted(set(lengths)) == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]


TRICKY = [
    {"prompt": "Q: é\r\n", "completion": " NA"},
    {"prompt": "007", "completion": "null\n"},
    {"prompt": 'a,"b"\t', "completion": "2020-01-01"},
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_every_kind_of_table_gives_the_text_as_it_is(tmp_path, name):
    source = open_rows(str(write_rows(tmp_path / name, TRICKY)), ["prompt", "completion"])
    assert [row for _, row in source.read(Reading())] == [row for _, row in source.read(Reading())] == TRICKY
    assert source.describe() == {"kind": "file", "name": name, "bytes": (tmp_path / name).stat().st_size}


ASK_THE_HUB = """
import json, sys
from nanogpt_hub.sources import Reading, SourceError
from train.rows import open_rows
for options in json.load(sys.stdin):
    try:
        source = open_rows("me/tiny", ["text"], **options)
        print(json.dumps([source.describe(), [row for _, row in source.read(Reading())]]))
    except SourceError as error:
        print(json.dumps(str(error)))
"""


def test_rows_of_a_hub_dataset(tmp_path):
    with Server() as server:
        serve_dataset(server)
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "0"}
        asked = json.dumps([{"revision": "v1"}, {"split": "test"}, {"split": "val"}])
        done = subprocess.run(
            [sys.executable, "-c", ASK_THE_HUB], env=env, input=asked, text=True, capture_output=True, check=True
        )
    train, test, error = map(json.loads, done.stdout.splitlines())
    facts = {"kind": "hub", "name": "me/tiny", "split": "train", "revision": SHA, "license": "cc0-1.0"}
    assert train[0] == facts
    assert [row["n"] for row in train[1]] == [1, 2]
    assert test == [{**facts, "split": "test"}, [{"text": "three", "n": 3}]]
    assert "the Hub dataset me/tiny (config default, split val) cannot be read: Unknown split" in error


QUESTION = '{"question": "a", "answer": "b"}\n'
LATER = '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n'
USER = '{"messages": [{"role": "user", "content": "a"}]}\n'
SHAREGPT = '{"messages": [{"from": "human", "value": "a"}]}\n'
NOBODY = '{"messages": [{"from": "nobody", "value": "a"}]}\n'
BAD = {
    "another column": ("completion", "a.jsonl", QUESTION, "no column 'prompt'; it has question, answer"),
    "a column missing later": ("completion", "a.jsonl", LATER, "line 2 has no column 'completion'; it has prompt"),
    "a single row": ("completion", "a.csv", "prompt,completion\na,b\n", "at least 2"),
    "not text": ("completion", "a.jsonl", '{"prompt": "a", "completion": 3}\n', "column 'completion' holds int"),
    "no answer at all": ("completion", "a.jsonl", '{"prompt": "a", "completion": ""}\n', "none of the 1 rows"),
    "half a character": ("completion", "a.jsonl", '{"prompt": "a", "completion": "\\ud800"}\n', "half a character"),
    "half of one said": ("messages", "a.jsonl", USER.replace("a\"}", "\\ud800\"}"), "surrogate"),
    "nobody answers": ("messages", "a.jsonl", USER, "none of the 1 rows"),
    "no messages": ("messages", "a.jsonl", '{"messages": "hello"}\n', "list of {role, content}"),
    "other keys": ("messages", "a.jsonl", SHAREGPT.replace("value", "text"), "or of {from, value}"),
    "nobody answers a human": ("messages", "a.jsonl", SHAREGPT, "none of the 1 rows"),
    "a speaker that is not known": ("messages", "a.jsonl", NOBODY, "from 'nobody'; known are system, human"),
    "no JSON": ("completion", "a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt"\n', "line 2: not valid JSON"),
    "no object": ("completion", "a.jsonl", "[1]\n", "row 1: an object with columns was expected, not int"),
    "no list": ("completion", "a.json", "3", "line 1: an object with columns was expected"),
    "no rows": ("completion", "a.json", "[]", "holds no rows"),
    "no table": ("completion", "a.txt", "text", "is no table"),
    "no parquet": ("completion", "a.parquet", "text", "is not a readable parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_rows_that_cannot_be_used_are_told_in_one_sentence(case, base, tmp_path, capsys):
    form, name, content, words = BAD[case]
    assert tune(base, write(tmp_path / name, content), tmp_path / "run", "--data.format", form) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_table_that_is_not_there_is_told(tmp_path):
    with pytest.raises(SourceError, match="there is no file"):
        open_rows(str(tmp_path / "a.jsonl"), ["prompt"])


@pytest.mark.parametrize("flags", [["--lora.rank", "4"], ["--data.format", "completion"]])
def test_pretraining_leaves_it_to_finetuning(pairs, tmp_path, capsys, flags):
    source = pairs if "--data.format" in flags else write(tmp_path / "a.txt", TEXT)
    assert (
        pretrain.main([*flags, "--data.source", str(source), "--out_dir", str(tmp_path / "run"), "--device", "cpu"])
        == 2
    )
    assert "nanogpt-hub finetune" in capsys.readouterr().err


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["gpt2", "llama", "nanochat"])
def test_a_model_without_its_adapters_computes_what_they_add(preset, tmp_path):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig.preset(preset, "1m", vocab_size=50, n_layer=2, n_embd=32, block_size=16, dropout=0.5)).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.2)
    names = [*gpt.state_dict()]
    idx = torch.randint(50, (2, 16))
    expected = gpt(idx)[0]
    assert without_adapters(gpt) is gpt
    add_adapters(gpt, LoraConfig(rank=3, alpha=6.0, dropout=0.5), seed=1)
    torch.testing.assert_close(gpt(idx)[0], expected, atol=0, rtol=0)
    trained = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * (5 if preset == "llama" else 4)
    assert all(".lora_" in name for name in trained)
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.1)
    plain = without_adapters(gpt)
    assert [*plain.state_dict()] == names
    assert plain.wte.weight.data_ptr() == gpt.wte.weight.data_ptr()
    torch.testing.assert_close(plain(idx)[0], gpt(idx)[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(gpt(idx)[0], expected, atol=1e-2)
    folder = save_model(tmp_path / "merged", plain)
    torch.testing.assert_close(load_model(folder)[0](idx)[0], gpt(idx)[0], atol=1e-5, rtol=1e-4)


def test_only_adapters_move_and_a_run_cut_in_two_is_the_whole_run_bit_for_bit(base, pairs, tmp_path):
    flags = (
        "--data.format completion --lora.rank 4 --lora.dropout 0.2 --lora.targets [c_attn] --optim.schedule constant"
    )
    flags = [*flags.split(), "--optim.learning_rate", "0.01"]
    assert tune(base, pairs, tmp_path / "whole", *flags, "--max_steps", "8") == 0
    assert tune(base, pairs, tmp_path / "parts", *flags, "--max_steps", "4") == 0
    assert tune(base, pairs, tmp_path / "parts", *flags, "--max_steps", "8") == 0
    whole, parts = (tmp_path / name / "last" / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert val_losses(tmp_path / "whole") == val_losses(tmp_path / "parts")
    old, new = load_model(base)[0].state_dict(), load_model(tmp_path / "whole" / "last")[0].state_dict()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {f"h.{layer}.attn.c_attn.weight" for layer in range(2)}


def test_a_run_is_not_continued_as_another(base, pairs, tmp_path, capsys):
    flags = ["--data.format", "completion", "--lora.rank", "4", "--max_steps", "2"]
    assert tune(base, pairs, tmp_path / "run", *flags) == 0
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    for change in ("--lora.rank=2", "--lora.rank=0", "--data.format=text --data.text_column=prompt"):
        assert tune(base, pairs, tmp_path / "run", *flags, *change.split()) == 2
        assert "holds a run with other settings" in capsys.readouterr().err
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before


def test_without_peft_the_way_out_is_told(base, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert tune(base, pairs, tmp_path / "run", "--lora.rank", "4", "--data.format", "completion") == 2
    assert "pip install peft" in capsys.readouterr().err
