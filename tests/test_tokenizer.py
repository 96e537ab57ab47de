"""Tokenizers: exact round trips, the same ids as Transformers, streams that never break, files that may be hostile."""

import json
import pickle
import unicodedata

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from nanogpt_hub import tokenizer as module
from nanogpt_hub.tokenizer import EOT, StreamDecoder, Tokenizer, UnknownCharacterError, build_tokenizer

NASTY = (
    "  Hello,\n\n\tworld !  it 's a  test . \r\n naïve cafe\u0301 日本語 😀👩‍👩‍👧 \u00a0x\u3000 \x00\x7f don't I'LL  \n"
    f" ١٢٣ 3.14 {EOT} </s> ▁ <0x41> \ufffd\n   "
)
TEXTS = [NASTY, "the cat sat on the mat, the dog at the cat\n" * 20]
KINDS = ("char", "byte", "bpe:300", "gpt2")


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request) -> Tokenizer:
    """Each kind that can be built."""
    return request.getfixturevalue("gpt2") if request.param == "gpt2" else build_tokenizer(request.param, TEXTS)


@pytest.fixture(scope="session")
def gpt2(gpt2_ranks) -> Tokenizer:
    return build_tokenizer("gpt2", unreadable)


def unreadable():
    raise AssertionError("this kind of tokenizer has no need of the texts")


def llama_like(*strip: decoders.Strip) -> tokenizers.Tokenizer:
    """Sentencepiece as Llama 2 has it: spaces are ▁, the text gets one in front, unknown characters become bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdehlorw\n", "he", "▁he", "lo"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("h", "e"), ("▁", "he"), ("l", "o")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def nanochat_like() -> tokenizers.Tokenizer:
    """Bytes with another split into words than GPT-2's, and special tokens that no byte-level letters spell."""
    backend = tokenizers.Tokenizer.from_str(build_tokenizer("bpe:270", TEXTS)._json)
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,2}|\s+|\S"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens(["<｜end▁of talk｜>"])
    return backend


def words(decoder: object) -> tokenizers.Tokenizer:
    """A vocabulary whose tokens read differently by what stands beside them. No token has the id 3."""
    pieces = ["<unk>", "▁a", "b", None, "▁b", "##a", "a</w>", ".", "<pad>", "▁", "c", "'s"]
    vocab = {piece: i for i, piece in enumerate(pieces) if piece}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        backend.decoder = decoder
    return backend


FOREIGN = {
    "nanochat": nanochat_like(),
    "llama": llama_like(decoders.Strip(" ", 1, 0)),
    "gemma": llama_like(),
    "metaspace": words(decoders.Metaspace()),
    "wordpiece": words(decoders.WordPiece()),
    "suffix": words(decoders.BPEDecoder()),
    "ctc": words(decoders.CTC()),
    "no decoder": words(None),
}


def foreign(name: str, config: dict | None = None) -> Tokenizer:
    return Tokenizer(FOREIGN[name].to_str(), config)


# Text to ids and back


def test_round_trip_of_nasty_text(tokenizer):
    ids = tokenizer.encode(NASTY)
    assert tokenizer.decode(ids) == NASTY
    assert tokenizer.eot_id not in ids  # what looks like the token in a text is text
    assert b"".join(map(tokenizer.token_bytes, ids)) == NASTY.encode()
    assert tokenizer.encode_batch([NASTY, "", "a"]) == [ids, [], tokenizer.encode("a")]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("a b\n\t.'1é ")))
def test_round_trip_of_any_text(tokenizer, text):
    if tokenizer.kind == "char":
        tokenizer = build_tokenizer("char", text or "a")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == tokenizer._backend.encode(text).ids  # the fast ways do what the library does


def test_end_of_text_has_an_id_and_is_shown(tokenizer):
    assert tokenizer.token_str(tokenizer.eot_id) == EOT
    ids = [*tokenizer.encode("a"), tokenizer.eot_id, *tokenizer.encode("t")]
    assert tokenizer.decode(ids) == f"a{EOT}t"


def test_sizes_and_kinds():
    char = build_tokenizer("char", ["ba\n", "ac"])
    assert (char.kind, char.vocab_size, char.eot_id) == ("char", 5, 4)
    assert char.encode("\nabc") == [0, 1, 2, 3]
    byte = build_tokenizer("byte", unreadable)
    assert (byte.kind, byte.vocab_size, byte.eot_id) == ("byte", 257, 256)
    assert byte.encode("é\n") == [0xC3, 0xA9, 0x0A]
    bpe = build_tokenizer("bpe:300", lambda: TEXTS)
    assert (bpe.kind, bpe.vocab_size, bpe.eot_id) == ("bpe", 300, 299)
    assert len(bpe.encode(TEXTS[1])) < len(TEXTS[1]) / 2
    assert bpe.hash == build_tokenizer("bpe:300", TEXTS).hash  # the same again, from texts in either form


def test_gpt2_ids_are_tiktokens(gpt2, tinyshakespeare):
    text = tinyshakespeare.read_bytes().decode()
    ids = gpt2.encode(text)
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eot_id, len(ids)) == ("gpt2", 50257, 50256, 338025)
    assert ids == tiktoken.get_encoding("r50k_base").encode_ordinary(text)
    assert ids == gpt2._backend.encode(text).ids
    assert gpt2.decode(ids) == text


def test_gpt2_out_of_reach_is_said(monkeypatch):
    def unreachable(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(OSError, match=r"neither cached .* nor .* downloaded \(ConnectionError\)"):
        build_tokenizer("gpt2", unreadable)


def test_fast_merging_only_where_the_merges_follow_from_the_ids():
    tokens = [*module.LETTERS, "ab", "bc"]
    merges = [["a", "b"], ["b", "c"]]
    usual, swapped = (module._build_byte_level(tokens, order) for order in (merges, merges[::-1]))
    assert (usual.kind, usual._tiktoken is None, usual.encode("abc")) == ("bpe", False, [256, ord("c")])
    assert (swapped.kind, swapped._tiktoken is None, swapped.encode("abc")) == ("bpe", True, [ord("a"), 257])


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"unk_token": "a"}},
        {"model": {"ignore_merges": True}},
        {"model": {"byte_fallback": True}},
        {"added": "the"},
    ],
    ids=str,
)
@pytest.mark.parametrize("spec", KINDS[:3])
def test_any_other_pipeline_is_left_to_the_library(spec, change):
    data = json.loads(build_tokenizer(spec, TEXTS)._json)
    data |= {key: value for key, value in change.items() if key in data and key != "model"}
    data["model"] |= change.get("model", {})
    if "added" in change:  # not special: found in plain text
        vocab = data["model"]["vocab"]
        token = {**data["added_tokens"][0], "special": False, "content": "the", "id": vocab.get("the", len(vocab))}
        data["added_tokens"].append(token)
    backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    backend.encode_special_tokens = True
    text = "the  cat don't I'LL sit\n on the mat .\n"
    assert Tokenizer(json.dumps(data)).encode(text) == backend.encode(text).ids


def test_older_spelling_of_the_file(gpt2):
    data = json.loads(gpt2._json)
    data["model"] = {key: data["model"][key] for key in ("vocab", "merges")}  # no type and no options
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    older = Tokenizer(json.dumps(data))
    assert (older.kind, older.encode(NASTY)) == ("gpt2", gpt2.encode(NASTY))


# Words to the user


@pytest.mark.parametrize(
    "spec", ["", "bpe", "bpe:257", "bpe:x", "bpe:9999999", "gpt3", "user/repo", "Char", "bpe:-300"]
)
def test_bad_spec_is_one_sentence(spec):
    with pytest.raises(ValueError, match=r"^tokenizer .* is unknown: choose char, byte, bpe:N") as error:
        build_tokenizer(spec, unreadable)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["char", "bpe:300"])
def test_nothing_to_learn_from(spec):
    with pytest.raises(ValueError, match="there is no text"):
        build_tokenizer(spec, [""])


def test_merges_are_learned_from_the_beginning_of_a_long_text(monkeypatch):
    monkeypatch.setattr(module, "LEARNED_FROM", 100)
    read = []

    def texts():
        for text in ("ab " * 30, "cd " * 30, "ef " * 30):
            read.append(text)
            yield text

    learned = build_tokenizer("bpe:300", texts)
    assert learned.hash == build_tokenizer("bpe:300", ["ab " * 30, ("cd " * 30)[:10]]).hash
    assert len(read) == 2


def test_unknown_character_names_itself():
    char = build_tokenizer("char", "abc\n")
    for text, name, position in (
        ("ab😀", r"'😀' \(U\+1F600\)", 2),
        ("a\u0301", r"U\+0301", 1),
        ("\t", r"'\\t' \(U\+0009\)", 0),
    ):
        with pytest.raises(UnknownCharacterError, match=f"{name}.* at position {position} .*byte or bpe"):
            char.encode(text)


@pytest.mark.parametrize("bad", ["a\ud800", None, b"a"])
def test_no_text(tokenizer, bad):
    for attempt in (lambda: tokenizer.encode(bad), lambda: tokenizer.encode_batch([bad])):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D800|must be a str"):
            attempt()


def test_ids_outside_the_vocabulary(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        for use in (lambda i: tokenizer.decode([0, i]), tokenizer.token_bytes, tokenizer.token_str):
            with pytest.raises(ValueError, match=f"token id {bad} is not in the tokenizer"):
                use(bad)


def test_token_str_shows_parts_of_characters():
    byte = build_tokenizer("byte", unreadable)
    ids = np.array(byte.encode("é a"))  # elements of arrays are ids too
    assert byte.decode(ids) == "é a"
    assert [byte.token_str(i) for i in ids] == [r"\xc3", r"\xa9", " ", "a"]


# Streams


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_of_any_ids_equals_decode(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", FOREIGN)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_of_foreign_tokenizers_equals_decode(name, data):
    tokenizer = foreign(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [lambda: build_tokenizer("byte", unreadable), lambda: foreign("llama")])
def test_stream_shows_characters_when_whole_and_never_before(make):
    tokenizer = make()
    shown = stream(tokenizer, tokenizer.encode("é😀"))
    assert [text for text in shown if text] == ["é", "😀"]
    broken = stream(tokenizer, tokenizer.encode("é😀")[:-1])
    assert broken[-1] == "\ufffd"
    assert "".join(broken[:-1]) == "é"


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.flush()]


# Files


@pytest.mark.parametrize("model_type", [None, "gpt2", "gpt_neox", "llama", "nanochat"])
def test_auto_tokenizer_agrees(tokenizer, model_type, tmp_path):
    tokenizer.save(tmp_path, model_max_length=64)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    plain = NASTY.replace(EOT, "")
    assert auto(plain).input_ids == tokenizer.encode(plain)
    assert auto(NASTY, split_special_tokens=True).input_ids == tokenizer.encode(NASTY)
    assert auto.decode(tokenizer.encode(NASTY)) == NASTY
    assert (len(auto), auto.model_max_length) == (tokenizer.vocab_size, 64)
    assert {auto.eos_token_id, auto.bos_token_id, auto.unk_token_id} == {tokenizer.eot_id}
    everything = list(range(tokenizer.vocab_size))[-2000:]
    assert auto.decode(everything) == tokenizer.decode(everything)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    by_folder = Tokenizer.load(tmp_path / "new" / "folder")
    by_file = build_tokenizer(str(tmp_path / "new" / "folder" / "tokenizer.json"), unreadable)
    for again in (by_folder, by_file):
        assert again.encode(NASTY) == tokenizer.encode(NASTY)
        for name in ("kind", "hash", "config", "eot_id", "vocab_size"):
            assert getattr(again, name) == getattr(tokenizer, name), name


def test_saved_again_by_transformers_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "ours")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    theirs = Tokenizer.load(tmp_path / "theirs")
    assert (theirs.hash, theirs.kind, theirs.eot_id) == (tokenizer.hash, tokenizer.kind, tokenizer.eot_id)


def test_hash_is_of_the_content_not_the_format():
    tokenizer = build_tokenizer("bpe:300", TEXTS)
    data = json.loads(tokenizer._json)
    assert Tokenizer(json.dumps(dict(reversed(data.items())), indent=4)).hash == tokenizer.hash
    data["model"]["vocab"]["one more"] = len(data["model"]["vocab"])
    assert Tokenizer(json.dumps(data)).hash != tokenizer.hash


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_sentencepiece_reads_as_the_library_does(name):
    tokenizer = foreign(name)
    assert (tokenizer.kind, tokenizer.eot_id) == ("custom", None)
    for text in ("hello world", "  hello\n  é 日本 😀", "", " ", "</s> lo"):
        ids = tokenizer.encode(text)
        assert 2 not in ids  # </s> in a text is text
        assert tokenizer.decode(ids) == FOREIGN[name].decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(ids) == ("" if name == "llama" or not text else " ") + text
    assert tokenizer.token_bytes(3 + 0x41) == b"A"


def test_foreign_byte_level_reads_as_the_library_does():
    tokenizer = foreign("nanochat")
    assert tokenizer.kind == "custom"
    assert tokenizer.decode(tokenizer.encode(NASTY)) == unicodedata.normalize("NFC", NASTY)
    ids = [*tokenizer.encode("é\n"), *range(tokenizer.vocab_size), 0xC3]
    assert tokenizer.decode(ids) == FOREIGN["nanochat"].decode(ids, skip_special_tokens=False)


def test_a_copy_in_another_process_does_the_same():
    tokenizer = foreign("llama", {"eos_token": "</s>"})
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("he </s>") == tokenizer.encode("he </s>")
    assert (again.config, again.eot_id) == (tokenizer.config, 2)


def test_nothing_is_added_cut_or_padded():
    backend = tokenizers.Tokenizer.from_str(FOREIGN["llama"].to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert Tokenizer(backend.to_str()).encode("hello") == foreign("llama").encode("hello")
    assert Tokenizer(backend.to_str()).encode_batch(["hello", "a"]) == foreign("llama").encode_batch(["hello", "a"])


@pytest.mark.parametrize(
    ("config", "eot_id"),
    [
        ({"eos_token": "</s>"}, 2),
        ({"eos_token": {"content": "</s>", "special": True}}, 2),
        ({"eos_token": "<none>"}, None),
        ({"eos_token": ["</s>"]}, None),
        ({}, None),
    ],
)
def test_foreign_end_of_text(config, eot_id):
    assert foreign("llama", config).eot_id == eot_id


def test_config_survives_and_asks_for_no_code(tmp_path):
    build_tokenizer("byte", unreadable).save(tmp_path)
    kept = {
        "chat_template": "{{ é }}",
        "eos_token": "a",
        "tokenizer_class": "GPT2Tokenizer",
        "own": [1, None],
        "model_max_length": 5,
    }
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**kept, "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    loaded = Tokenizer.load(tmp_path)
    own = {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert {k: v for k, v in loaded.config.items() if k != "pad_token"} == {**kept, **own}
    assert loaded.eot_id == ord("a")
    loaded.config["chat_template"] = "{{ new }}"
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").config == loaded.config
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == "{{ new }}"


def test_files_that_transformers_keeps_apart(tmp_path):
    foreign("llama").save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}\n")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eot_id == 2
    assert loaded.config == {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": "</s>",
        "chat_template": "{{ messages }}\n",
    }
    loaded.config["chat_template"] = "{{ new }}"
    loaded.save(tmp_path)
    assert Tokenizer.load(tmp_path).config["chat_template"] == "{{ new }}"


def broken_files() -> dict[str, bytes]:
    good = json.loads(build_tokenizer("char", "ab")._json)
    panic = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    return {
        "empty": b"",
        "no JSON": b"\x80\x04pickle",
        "cut short": json.dumps(good).encode()[:-9],
        "a list": b"[]",
        "deep": b"[" * 10**5,
        "no model": json.dumps({**good, "model": None}).encode(),
        "no tokens": json.dumps({**good, "added_tokens": [], "model": {**good["model"], "vocab": {}}}).encode(),
        "a huge id": json.dumps({**good, "model": {**good["model"], "vocab": {"a": 2**32 - 2}}}).encode(),
        "a panic": json.dumps({**good, "normalizer": panic}).encode(),
    }


@pytest.mark.parametrize(("name", "content"), broken_files().items())
def test_broken_file_is_a_sentence(name, content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="is no usable tokenizer"):
        Tokenizer.load(tmp_path)


def test_too_large_file_is_not_read(tmp_path, monkeypatch):
    build_tokenizer("byte", unreadable).save(tmp_path)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match=r"tokenizer.json has [0-9,]+ bytes; at most 100"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("config", [b"[]", b"{", b"\xff"])
def test_broken_config_is_a_sentence(config, tmp_path):
    build_tokenizer("byte", unreadable).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(ValueError, match="is no usable tokenizer"):
        Tokenizer.load(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json at"):
        Tokenizer.load(tmp_path)
