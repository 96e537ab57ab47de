"""web/ in Node against the library: the same configs, tokens, logits and texts, for all families and tokenizers."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import ROOT, VARIANTS

from nanogpt_hub import model as model_py
from nanogpt_hub.checkpoint import load_model, save_model
from nanogpt_hub.families import FAMILIES
from nanogpt_hub.generate import encode_prompt, generate
from nanogpt_hub.lens import logit_lens, look_inside
from nanogpt_hub.model import GPT, GPTConfig
from nanogpt_hub.sampling import SamplingConfig, sampler_stages, seen_tokens
from nanogpt_hub.tokenizer import build_tokenizer

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")
TEXT = "To be, or not to be: that is the question. Zwölf Boxkämpfer — 日本語 🙂!\n"
TOKENIZERS = ("char", "byte", "bpe:300")
SETTINGS = (
    dict(temperature=0.0, top_k=0),
    dict(temperature=1.0, top_k=0, seed=5),
    dict(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=2**40 + 7),
)


def node(call: str, **asked):
    """The answer of one call of core.mjs. AssertionError for one that failed."""
    script = Path(__file__).with_name("core.mjs")
    done = subprocess.run(
        [NODE, script], input=json.dumps({"call": call, **asked}).encode(), capture_output=True, timeout=250
    )
    assert done.returncode == 0, done.stderr.decode()
    answer = json.loads(done.stdout)
    assert not (isinstance(answer, dict) and "error" in answer), answer
    return answer


def make(folder: Path, preset: str = "nanogpt", tokenizer: str = "char", dtype=None, seed: int = 0, **config) -> Path:
    """A random model whose tokens are far from being equally likely; its vocabulary exceeds its tokenizer's."""
    torch.manual_seed(seed)
    tokens = build_tokenizer(tokenizer, [TEXT])
    shape = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=tokens.vocab_size + 3)
    model = GPT(GPTConfig.preset(preset, size="1m", **{**shape, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.1 * torch.randn_like(parameter))
    return save_model(folder, model, tokens, dtype=dtype)


# ---- the core ----


def test_model_js_has_the_names_of_model_py_in_their_order():
    wanted = re.findall(r"^(?:class|def) (\w+)", Path(model_py.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    found = re.findall(
        r"^export (?:class|function) (\w+)", (ROOT / "web" / "model.js").read_text(encoding="utf-8"), re.M
    )
    assert [name for name in found if name in wanted] == wanted


def test_configs_and_tables_are_those_of_python():
    tables = node("tables")
    fields = {field.name: field.default for field in dataclasses.fields(GPTConfig) if field.name != "init"}
    assert tables["config"] == fields
    assert tables["families"].keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        theirs = tables["families"][name]
        fixed = {key: values[0] for key, values in family.only.items() if len(values) == 1 and key != "activation"}
        assert {key: theirs["fixed"].get(key, fields[key]) for key in fixed} == fixed
        assert theirs["fixed"].keys() <= fixed.keys()
        assert theirs["stored"] == list(family.stored)
        assert theirs["keys"] == {k: list(v) for k, v in family.keys.items() if k != "dropout"}
        assert theirs["rope_keys"] == family.rope_keys
        assert theirs["missing"] == {k: v for k, v in family.missing.items() if k != "dropout"}
        assert theirs["activations"] == family.activations
        assert (theirs["layout"], theirs["prefix"], theirs["head"]) == (family.layout, family.prefix, family.head)
        assert theirs["names"] == {k: list(v) for k, v in family.names.items()}


@pytest.mark.parametrize("case", range(len(VARIANTS)))
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_texts_are_those_of_python(tmp_path, case, tokenizer):
    """Greedy and sampled, past the context, from files in float32, bfloat16 and float16."""
    preset, config = VARIANTS[case]
    dtype = (None, torch.bfloat16, torch.float16)[(case + TOKENIZERS.index(tokenizer)) % 3]
    folder = make(tmp_path / "model", preset, tokenizer, dtype, seed=case, **config)
    check_texts(folder, "auto")


def test_texts_with_the_vocabulary_of_gpt2(tmp_path, gpt2_ranks):
    check_texts(make(tmp_path / "model", "gpt2", "gpt2"), "f32")


@pytest.mark.parametrize("arithmetic", ["plain", "f32", "bf16", "int8"])
def test_every_arithmetic_gives_what_its_whole_passes_give(tmp_path, arithmetic):
    folder = make(tmp_path / "model", "llama", "byte", n_kv_head=2)
    settings = [{"max_new_tokens": 40, **given} for given in SETTINGS]
    got = node("generate", folder=str(folder), prompt="To be", settings=settings, arithmetic=arithmetic, naive=True)
    assert got["storage"] == arithmetic
    for result in got["results"]:
        assert result["ids"] == result["slow"]
    if arithmetic in ("plain", "f32"):
        check_texts(folder, arithmetic)


def check_texts(folder: Path, arithmetic: str) -> None:
    model, tokenizer = load_model(folder)
    settings = [{"max_new_tokens": 40, **given} for given in SETTINGS]
    got = node("generate", folder=str(folder), prompt="To be, or", settings=settings, arithmetic=arithmetic)["results"]
    for given, result in zip(settings, got, strict=True):
        expected = generate(model, tokenizer, "To be, or", SamplingConfig(**{"top_k": 0, **given}))
        assert result["start"] == tokenizer.encode("To be, or")
        assert (result["ids"], result["text"]) == (expected.ids, expected.text)
        assert result["finish"] == expected.finish


def test_logits_are_those_of_python(tmp_path):
    ids = [5, 3, 9, 1, 20, 7]
    for case, (preset, config) in enumerate(VARIANTS):
        folder = make(tmp_path / str(case), preset, seed=case, **config)
        model, _ = load_model(folder)
        expected = model(torch.tensor([ids]))[0][0, -1]
        for arithmetic in ("plain", "f32"):
            got = torch.tensor(node("logits", folder=str(folder), ids=ids, arithmetic=arithmetic))
            torch.testing.assert_close(got, expected.detach(), atol=2e-4, rtol=2e-4)


def test_an_empty_prompt_stop_strings_and_forced_tokens(tmp_path):
    folder = make(tmp_path / "model", tokenizer="byte")
    model, tokenizer = load_model(folder)
    given = dict(max_new_tokens=30, temperature=1.0, top_k=0, seed=3)
    whole = generate(model, tokenizer, "", SamplingConfig(**given))
    (empty,) = node("generate", folder=str(folder), prompt="", settings=[given])["results"]
    assert empty["start"] == encode_prompt(tokenizer, "")
    assert empty["ids"] == whole.ids
    stop = next(c for c in whole.text if c.isprintable() and c != "\ufffd")
    (stopped,) = node("generate", folder=str(folder), prompt="", settings=[given], stop=[stop])["results"]
    expected = generate(model, tokenizer, "", SamplingConfig(**given, stop=(stop,)))
    assert (stopped["text"], stopped["finish"]) == (expected.text, "stop")
    (branch,) = node("generate", folder=str(folder), prompt="", settings=[given], forced=[[4, 65]])["results"]
    assert branch["ids"][:5] == [*whole.ids[:4], 65]
    (same,) = node("generate", folder=str(folder), prompt="", settings=[given], forced=[[4, whole.ids[4]]])["results"]
    assert same["ids"] == whole.ids, "a forced token uses up its random number"


# ---- its parts ----

TEXTS = [
    TEXT, "", "a", "  two  spaces \n\n\n and\ttabs ", "it's I'll WE'RE 'sup 12345 ½ ٣", "x\u00a0y\u2003z\u0085w\ufeffv",
    "\ufeffstart", "e\u0301 नमस्ते 🏳️‍🌈 \U0001f1e9\U0001f1ea", "a" * 31, "<|endoftext|>", "\x00\x1f\x7f",
]  # fmt: skip


@pytest.mark.parametrize("spec", ["byte", "bpe:300", "gpt2"])
def test_tokens_are_those_of_python(tmp_path, spec, gpt2_ranks):
    tokenizer = build_tokenizer(spec, [TEXT * 5, *TEXTS])
    tokenizer.save(tmp_path)
    for text, got in zip(TEXTS, node("tokenize", folder=str(tmp_path), texts=TEXTS), strict=True):
        ids = tokenizer.encode(text)
        assert got["ids"] == ids, text
        assert got["decoded"] == got["streamed"] == text
        assert got["names"] == [tokenizer.token_str(token) for token in ids]


def test_characters_and_one_that_is_unknown(tmp_path):
    tokenizer = build_tokenizer("char", TEXTS)
    tokenizer.save(tmp_path)
    for text, got in zip(TEXTS, node("tokenize", folder=str(tmp_path), texts=TEXTS), strict=True):
        assert (got["ids"], got["decoded"]) == (tokenizer.encode(text), text)
    with pytest.raises(AssertionError, match=r"U\+00DF.* at position 1 is not among"):
        node("tokenize", folder=str(tmp_path), texts=["aß"])


def test_random_numbers_are_those_of_torch():
    seeds = [0, 1, 5489, 2**32 - 1, 2**32 + 3, 2**53 - 1]
    for seed, got in zip(seeds, node("random", seeds=seeds, n=700), strict=True):
        generator = torch.Generator().manual_seed(seed)
        assert got == [torch.rand(1, generator=generator).item() for _ in range(700)]


def test_sampler_stages_are_those_of_python():
    torch.manual_seed(0)
    logits, seen = 3 * torch.randn(1, 40), [3, 5, 7]
    logits[0, 11] = logits[0, 12]  # a tie
    settings = [{}, {"temperature": 0.3}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2},
                {"repetition_penalty": 1.7}, {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.05}]  # fmt: skip
    got = node("stages", logits=logits[0].tolist(), settings=settings, seen=seen)
    for given, stages in zip(settings, got, strict=True):
        config = SamplingConfig(**{"temperature": 1.0, "top_k": 0, **given})
        expected = list(sampler_stages(logits, config, seen_tokens([seen], 40)))
        assert [name for name, _ in stages] == [name for name, _ in expected]
        for (_, after), (_, wanted) in zip(stages, expected, strict=True):
            after = torch.tensor([-math.inf if x == "-inf" else x for x in after])
            torch.testing.assert_close(after, wanted[0], atol=1e-6, rtol=1e-6)


def test_attention_and_lens_are_those_of_python(tmp_path):
    for case, (preset, config) in enumerate(VARIANTS):
        folder = make(tmp_path / str(case), preset, "byte", seed=case, **config)
        model, tokenizer = load_model(folder)
        text = "To be, or not"
        ids = tokenizer.encode(text)
        inside = look_inside(model, tokenizer, text)
        lens = logit_lens(model, tokenizer, inside)
        got = node("look", folder=str(folder), ids=[*ids, 65], place=len(ids), arithmetic="plain")
        assert got["start"] == 0
        torch.testing.assert_close(torch.tensor(got["attention"]), inside.attention[:, :, -1], atol=1e-5, rtol=1e-4)
        assert [depth["id"] for depth in got["lens"]] == lens.top_ids[:, -1].tolist()
        for key, wanted in (("prob", lens.top_probs), ("entropy", lens.entropy)):
            mine = torch.tensor([depth[key] for depth in got["lens"]])
            torch.testing.assert_close(mine, wanted[:, -1].float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("storage", ["f32", "bf16", "int8"])
def test_kernels_against_the_plain_way(storage):
    shapes = [(65, 30, 1), (4, 8, 1), (1, 1, 1), (64, 384, 5), (33, 31, 4), (7, 130, 9)]
    got = node("kernels", shapes=shapes, storage=storage)
    assert got["supported"]
    for difference, rounding in got["differences"]:
        assert difference < 1e-5
        assert rounding <= {"f32": 0, "bf16": 2**-9, "int8": 0.5 / 127 + 1e-6}[storage]


def test_fast_attention_against_the_plain_way():
    shapes = [(1, 64), (7, 64), (64, 32), (33, 8), (20, 40), (5, 6)]
    assert max(node("attention", shapes=shapes)) < 1e-5


def test_hashes():
    for text in ("", "abc", "x" * 55, "x" * 56, "x" * 64, "ä" * 500):
        data = text.encode()
        got = node("hashes", text=text)
        assert got["sha256"] == hashlib.sha256(data).hexdigest()
        assert got["sha1"] == hashlib.sha1(data).hexdigest()
        assert got["git"] == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def test_names_on_the_hub():
    got = node(
        "names", texts=["a/b", " a/b@v1 ", "https://huggingface.co/a/b/tree/step-000500", "a", "../b", "a/b/c", "a/<b>"]
    )
    assert got[:3] == [{"name": "a/b", "revision": revision} for revision in ("main", "v1", "step-000500")]
    assert all("is no name on the Hub" in message for message in got[3:])


def test_logs_are_taken_only_where_they_are_numbers():
    lines = ['{"step": 2, "val_loss": 3.5}', "{", '{"step": 1, "train_loss": "x", "lr": 0.1}', "[]", "null",
             '{"step": 1.5}', '{"step": 0, "val_loss": 1e99}']  # fmt: skip
    got = node("rows", text="\n".join(lines))
    assert got == [{"step": 0}, {"step": 1, "lr": 0.1}, {"step": 2, "val_loss": 3.5}]


# ---- folders that are refused ----


def edit_json(name: str, **changes):
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


def edit_header(change):
    """Rewrites the header of the weights; their bytes stay."""

    def edit(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return edit


def overwrite(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def poison(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-4:] = struct.pack("<f", math.nan)
    (folder / "model.safetensors").write_bytes(data)


def overlap(header: dict) -> None:
    first, second = [entry for name, entry in header.items() if name != "__metadata__"][:2]
    second["data_offsets"] = [n + first["data_offsets"][0] - second["data_offsets"][0] for n in second["data_offsets"]]


def first_tensor(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


EVIL = "<img src=x onerror=alert(1)>"
HOSTILE_FOLDERS = {
    "config.json is not valid JSON": overwrite("config.json", b"{"),
    "config.json is not valid JSON ": overwrite("config.json", b"[" * 10**6),
    "config.json does not hold a JSON object": overwrite("config.json", b"[]"),
    "there is no config.json": lambda folder: (folder / "config.json").rename(folder / "x" / "config.txt"),
    "model_type is 'bert'": edit_json("config.json", model_type="bert"),
    "model_type is 'constructor'": edit_json("config.json", model_type="constructor"),
    "n_layer is 100000; it must be from 1 to 1000": edit_json("config.json", n_layer=100000),
    "n_embd is '8'; it must be a number": edit_json("config.json", n_embd="8"),
    "n_head is 2.5; it must be an integer": edit_json("config.json", n_head=2.5),
    "n_embd 32 is not a multiple of n_head 5": edit_json("config.json", n_head=5),
    "tie_word_embeddings is 1; it must be true or false": edit_json("config.json", tie_word_embeddings=1),
    "quantization_config is": edit_json("config.json", quantization_config={"bits": 4}),
    "sliding_window is 4": edit_json("config.json", sliding_window=4),
    "activation_function is": edit_json("config.json", activation_function=EVIL),
    "too few for the": edit_json("config.json", n_positions=2**20),
    "a browser holds at most": edit_json("config.json", vocab_size=10**7, n_embd=65536, n_head=4),
    "config.json asks for [24,32]": edit_header(lambda h: h["transformer.wpe.weight"].update(shape=[32, 24])),
    "is not part of the model in config.json": edit_header(lambda h: h.update({EVIL: h.pop("transformer.ln_f.bias")})),
    "is missing from the weights": edit_json("config.json", n_layer=3),
    "is 'F64'; F32, BF16, F16 can be loaded": edit_header(lambda h: first_tensor(h).update(dtype="F64")),
    "a malformed entry for tensor": edit_header(lambda h: first_tensor(h).update(shape=[-1])),
    "overlap or leave gaps": edit_header(overlap),
    "is no complete safetensors file": overwrite("model.safetensors", struct.pack("<Q", 2**60) + b"{}" * 60000),
    "holds values that are not finite": poison,
    "only pickled weights": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "there is no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer.json has no vocabulary": edit_json("tokenizer.json", model={"type": "BPE", "vocab": []}),
    "this tokenizer changes the text": edit_json("tokenizer.json", normalizer={"type": "NFC"}),
    "this tokenizer is a 'Unigram'": edit_json("tokenizer.json", model={"type": "Unigram", "vocab": {"a": 0}}),
    "ids are 0 to": edit_json("tokenizer.json", added_tokens=[{"id": 4 * 10**9, "content": EVIL, "special": True}]),
    "they do not belong together": edit_json(
        "tokenizer.json", added_tokens=[{"id": 10**5, "content": "<|endoftext|>", "special": True}]
    ),
}


def test_hostile_folders_are_refused_in_a_sentence(tmp_path):
    good = make(tmp_path / "good", "gpt2")
    (good / "x").mkdir()
    folders = []
    for i, spoil in enumerate(HOSTILE_FOLDERS.values()):
        folder = Path(shutil.copytree(good, tmp_path / f"folder{i}"))
        spoil(folder)
        folders.append(str(folder))
    messages = node("refusals", folders=[str(good), *folders])
    assert messages[0] == ""
    for wanted, message in zip(HOSTILE_FOLDERS, messages[1:], strict=True):
        assert wanted.strip() in message
        assert len(message) < 400
        assert "\n" not in message
