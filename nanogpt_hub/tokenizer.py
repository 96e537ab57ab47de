"""Text to token ids and back, exactly: characters, bytes, byte-level BPE, GPT-2's, or any `tokenizer.json`.

    tokenizer = build_tokenizer("bpe:4096", texts)  # or char, byte, gpt2, a folder, a tokenizer.json
    ids = tokenizer.encode("Hello\\n")
    assert tokenizer.decode(ids) == "Hello\\n"
    tokenizer.save("out/model")  # transformers.AutoTokenizer.from_pretrained("out/model") gives the same ids

Whatever the kind, a tokenizer *is* its tokenizer.json: what is built here is written as such a file first and then
read like any other, and what it can do follows from the file alone.
"""

import base64
import codecs
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tqdm import tqdm

EOT = "<|endoftext|>"  # GPT-2's end of text, put between documents
MAX_FILE_BYTES = 64 * 2**20  # the largest tokenizers in use (260,000 tokens) take half of it
MAX_TOKEN_ID = 2**22  # a made-up id of four billion must not size an embedding table
LEARNED_FROM = 50_000_000  # characters from which merges are learned: more hardly change them, and a stream has no end
MAX_STEPS = 32  # of a normalizer or a decoder, those inside of others counted
UNICODE_GROWTH = {"NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "Lowercase": 3, "ByteLevel": 4, "BertNormalizer": 3}
MAX_GROWTH = 512  # how many times longer a normalizer or a decoder may make a text; honest ones stay below 100

# How GPT-2 cuts text into words before it merges bytes: what `ByteLevel` does in the tokenizers library.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FUSE = {"type": "Fuse"}  # joins tokens without spaces
TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # known to Transformers 4 and 5: does what tokenizer.json says
# tokenizer.json spells a byte as a letter: printable ones as themselves, the others as those from U+0100 on.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
LETTERS = [chr(b if b in PRINTABLE else 0x100 + len({*range(b)} - PRINTABLE)) for b in range(256)]
BYTE_OF_LETTER = {letter: b for b, letter in enumerate(LETTERS)}
GPT2_SHA256 = "7b24c988c29eb2cd4ccf3838778d27f9bdcceadc0c2f2037a209403b45bed747"  # of its vocabulary and merges


class UnknownCharacterError(ValueError):
    """A character tokenizer met a character that its training text did not have."""


class Tokenizer:
    """A tokenizer.json at work. Text is plain text: `<|endoftext|>` written in it is thirteen characters, no token.
    (AutoTokenizer takes it for the token, unless it is called with split_special_tokens=True.)

    kind: "char", "byte", "bpe" (byte-level, GPT-2's way), "gpt2" (with GPT-2's vocabulary) or "custom".
    vocab_size: the largest id + 1. eot_id: the id that ends a document, None where the tokenizer has none.
    config: what stands in tokenizer_config.json; a chat template goes into config["chat_template"].
    """

    def __init__(self, json_text: str, config: dict | None = None):
        """From the text of a tokenizer.json and the contents of a tokenizer_config.json. ValueError if it is broken."""
        self._json = json_text
        data = _json_object(json_text)
        for part in ("normalizer", "decoder"):
            _check_growth(data.get(part), part)
        with _as_value_error("read it"):
            self._backend = _backend(json_text)
            vocab = self._backend.get_vocab()
            self._tokens = {token_id: token for token, token_id in vocab.items()}
            self._bytes, self._strips_first_space = _bytes_of_tokens(data.get("decoder"), self._tokens)
            self.kind = _kind(data, vocab)
        self.vocab_size = max(self._tokens, default=-1) + 1
        if not 0 < self.vocab_size <= MAX_TOKEN_ID:
            raise ValueError(f"a tokenizer needs 1 to {MAX_TOKEN_ID} ids; this one has {self.vocab_size}")
        self.config = _complete_config(config, EOT in vocab)
        eos = _token_content(self.config.get("eos_token"))
        self.eot_id = vocab[eos] if eos in vocab else vocab.get(EOT)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Tokenizer":
        """From a folder that has a tokenizer.json, or from that file; the files beside it are read too.

        Raises FileNotFoundError where there is none, ValueError where it is broken. No code that a tokenizer's
        configuration may name is ever looked for.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"no tokenizer.json at {path}: give a folder that has one, or the file "
                "(older formats become one by AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        try:
            return cls(_read(file), _read_config(file.parent))
        except ValueError as error:
            raise ValueError(f"{file} is no usable tokenizer: {error}") from error

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers.AutoTokenizer reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config, "model_max_length": model_max_length} if model_max_length else self.config
        config_text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        for name, text in (("tokenizer.json", self._json), ("tokenizer_config.json", config_text)):
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # a stale one would win over the config's

    def __reduce__(self):  # the library's own pickle forgets that "</s>" in a text is text
        return Tokenizer, (self._json, self.config)

    @property
    def merges(self) -> list[list[str]]:
        """The pairs that a BPE joins, in order; none for a tokenizer of another kind."""
        return _pairs(json.loads(self._json)["model"].get("merges", []))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what decides ids and text in tokenizer.json, however it is formatted: names tokenised data."""
        data = json.loads(self._json)
        return _sha256([data.get(part) for part in ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")])

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added. ValueError for what is no text, UnknownCharacterError (char)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` for each text, on all cores where that pays."""
        texts = list(texts)
        for text in texts:
            _check(text)
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        if self.kind == "byte":
            return [list(text.encode()) for text in texts]
        if self._tiktoken is not None:
            return [self._tiktoken.encode_ordinary(text) for text in texts]
        with _as_value_error("encode"):
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Nothing is dropped: end-of-text reads `<|endoftext|>`; bytes that are no UTF-8 read U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = list(map(int, ids))
        if ids:
            self._known(min(ids))
            self._known(max(ids))
        if self._bytes is None:
            with _as_value_error("decode"):
                return self._backend.decode(ids, skip_special_tokens=False)
        text = b"".join([self._bytes.get(token_id, b"") for token_id in ids]).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._strips_first_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; they may be a part of a character. Empty for an id that no token has."""
        token_id = self._known(token_id)
        if self._bytes is None:
            return self._tokens.get(token_id, "").encode()
        return self._bytes.get(token_id, b"")

    def token_str(self, token_id: int) -> str:
        r"""A token for display: its text, and bytes that are only a part of a character as `\xe2`."""
        return self.token_bytes(token_id).decode("utf-8", errors="backslashreplace")

    def _known(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is not in the tokenizer: its ids are 0 to {self.vocab_size - 1}")
        return int(token_id)  # of an array's or tensor's element, too

    @cached_property
    def _id_of_code_point(self) -> np.ndarray:
        """Of a character vocabulary: the id at each code point, -1 where there is none; the last entry is spare."""
        characters = [(ord(token), token_id) for token_id, token in self._tokens.items() if len(token) == 1]
        table = np.full(max(code for code, _ in characters) + 2, -1)
        for code, token_id in characters:
            table[code] = token_id
        return table

    def _encode_characters(self, text: str) -> list[int]:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        table = self._id_of_code_point
        ids = table[np.minimum(codes, len(table) - 1)]
        if (ids < 0).any():
            at = int(np.argmax(ids < 0))
            raise UnknownCharacterError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not among the "
                f"{(table >= 0).sum()} that this tokenizer knows: leave it out, train with text that has it, "
                "or choose the tokenizer byte or bpe:N, which know every character"
            )
        return ids.tolist()

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding | None:
        """The same tokenizer four times as fast, or None where that is not certain.

        tiktoken merges whichever neighbours make the token of the lowest id; tokenizer.json lists its merges. Both do
        the same exactly if the listed merges are those that follow from the ids.
        """
        if self.kind not in ("bpe", "gpt2") or self._bytes is None:
            return None
        data = json.loads(self._json)
        special = {token["id"] for token in data.get("added_tokens", [])}
        ranks = {self._bytes[i]: i for i in sorted(self._bytes) if i not in special}
        if self.kind == "bpe" and not _follow_from_ranks(_pairs(data["model"]["merges"]), ranks):
            return None
        return tiktoken.Encoding("nanogpt_hub", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


class StreamDecoder:
    """Text as the ids come in. What is shown never changes later: joined, it equals `tokenizer.decode` of all ids.

    Push a prompt's ids first (and drop what they give) where the new text shall join on as it would in the whole.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer._strips_first_space
        self._window: list[int] = []  # of tokenizers without bytes: the last ids, enough to see how they join
        self._shown = ""  # what of the window's text has been given out

    def push(self, token_id: int) -> str:
        """The text that is certain now that this id has come; empty inside of a character."""
        if self.tokenizer._bytes is None:
            return self._push_window(token_id)
        return self._from_bytes(self.tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left when no more ids come: U+FFFD for a character that was never completed, else nothing."""
        if self.tokenizer._bytes is None:
            return self.tokenizer.decode(self._window)[len(self._shown) :]
        return self._from_bytes(b"", final=True)

    def _from_bytes(self, data: bytes, final: bool = False) -> str:
        text = self._utf8.decode(data, final)
        if self._at_start and text:
            self._at_start, text = False, text.removeprefix(" ")
        return text

    def _push_window(self, token_id: int) -> str:
        """Decoders may look at a token's neighbour (is it the first? a continuation?), so each is decoded with one."""
        token_id = self.tokenizer._known(token_id)
        if token_id not in self.tokenizer._tokens:
            return ""
        self._window.append(token_id)
        text = self.tokenizer.decode(self._window)
        if text.endswith("\ufffd") or not text.startswith(self._shown):
            return ""
        new, self._window = text[len(self._shown) :], [token_id]
        self._shown = self.tokenizer.decode(self._window)
        return new


def build_tokenizer(spec: str, texts: Iterable[str] | Callable[[], Iterable[str]]) -> Tokenizer:
    """A tokenizer by name, its vocabulary learned from `texts` where the kind has one to learn.

    spec: "char" (the characters of the texts), "byte" (256 ids), "bpe:N" (N ids, byte-level merges learned from the
    first 50 million characters of the texts; fewer if they are too small), "gpt2" (GPT-2's, by tiktoken) or the path of
    a folder or tokenizer.json. All but char and bpe leave the texts unread. Raises ValueError for another spec or texts
    without a character, OSError when GPT-2's vocabulary cannot be had.
    """
    bpe = re.fullmatch(r"bpe:(\d{1,9})", spec)
    if spec == "char":
        return _build_char(_documents(texts))
    if spec == "byte":
        return _build_byte_level(LETTERS, [])
    if spec == "gpt2":
        return _build_gpt2()
    if bpe and 258 <= int(bpe[1]) <= MAX_TOKEN_ID:
        return _build_bpe(int(bpe[1]), _documents(texts))
    if spec and not bpe and Path(spec).exists():
        return Tokenizer.load(spec)
    raise ValueError(
        f"tokenizer {spec!r} is unknown: choose char, byte, bpe:N (N from 258 to {MAX_TOKEN_ID}, such as bpe:4096), "
        "gpt2, or the path of a folder or tokenizer.json"
    )


def _documents(texts: Iterable[str] | Callable[[], Iterable[str]]) -> Iterator[str]:
    texts = texts() if callable(texts) else texts
    texts = [texts] if isinstance(texts, str) else texts
    for text in tqdm(texts, desc="reading for the vocabulary", unit="doc", delay=1):
        _check(text)
        yield text


def _build_char(documents: Iterator[str]) -> Tokenizer:
    """The characters in order of their code points, then end-of-text."""
    characters = sorted(set().union(*documents))
    if not characters:
        raise ValueError("there is no text to take characters from")
    # A BPE without merges keeps each character by itself; Fuse joins them without spaces.
    return _from_vocab([*characters, EOT], [], pre_tokenizer=None, decoder=FUSE)


def _build_bpe(vocab_size: int, documents: Iterator[str]) -> Tokenizer:
    """Learns merges of the commonest neighbours (arXiv:1508.07909) over bytes, GPT-2's way."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # end-of-text is the last one
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),  # in a log its bars are but empty lines
    )
    # Pieces of a long document: its words are all held at once otherwise, at a hundred bytes each.
    pieces = (text[i : i + 2**20] for text in _beginning(documents, LEARNED_FROM) for i in range(0, len(text), 2**20))
    learner.train_from_iterator(pieces, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    if not merges:
        raise ValueError("there is no text to learn merges from")
    vocab = learner.get_vocab()
    return _build_byte_level([*LETTERS, *sorted(vocab.keys() - {*LETTERS}, key=vocab.__getitem__)], merges)


def _beginning(documents: Iterable[str], n_characters: int) -> Iterator[str]:
    """The documents up to so many characters, the last one cut there."""
    for text in documents:
        yield text[:n_characters]
        n_characters -= len(text)
        if n_characters <= 0:
            return


def _build_gpt2() -> Tokenizer:
    """GPT-2's vocabulary as a tokenizer.json. tiktoken keeps a copy of it in TIKTOKEN_CACHE_DIR."""
    try:
        encoding = tiktoken.get_encoding("r50k_base")  # the same ids as "gpt2", in one smaller file
    except (OSError, ValueError):
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise OSError(
                "GPT-2's vocabulary is neither cached (TIKTOKEN_CACHE_DIR) nor could it be downloaded "
                f"({type(error).__name__}): connect once, or choose the tokenizer bpe:N, byte or char"
            ) from error
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    merges = _merges_of({token: i for i, token in enumerate(tokens)})
    assert merges is not None  # GPT-2's were learned as BPE
    return _build_byte_level([*map(_to_letters, tokens)], [[*map(_to_letters, pair)] for pair in merges])


def _build_byte_level(tokens: list[str], merges: list[list[str]]) -> Tokenizer:
    """GPT-2's pipeline over tokens, spelled in `LETTERS`, in the order of their ids; end-of-text is put last."""
    return _from_vocab([*tokens, EOT], merges, BYTE_LEVEL, BYTE_LEVEL)


def _from_vocab(vocab: list[str], merges: list, pre_tokenizer: dict | None, decoder: dict) -> Tokenizer:
    """The tokenizer.json of a BPE whose last token is end-of-text."""
    unset = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    off = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    ids = {token: i for i, token in enumerate(vocab)}
    model = {"type": "BPE", **unset, **off, "vocab": ids, "merges": merges}
    strips = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    eot = {"id": ids[EOT], "content": EOT, **strips, "normalized": False, "special": True}
    data: dict[str, Any] = dict(version="1.0", truncation=None, padding=None, added_tokens=[eot], normalizer=None)
    data |= dict(pre_tokenizer=pre_tokenizer, post_processor=None, decoder=decoder, model=model)
    return Tokenizer(json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def _merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]] | None:
    """The merges that a BPE of these ids stands for: a token's two parts are what BPE with all lower ids makes of it.

    None where some token falls into more parts than two, so that no list of merges says the same.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            if best >= rank:
                return None
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _follow_from_ranks(pairs: list[list[str]], ranks: dict[bytes, int]) -> bool:
    """Whether a tokenizer.json with these merges does the same as BPE by ids, and so can be done by tiktoken."""
    if any(bytes([b]) not in ranks for b in range(256)):
        return False
    if sum(len(token) ** 2 for token in ranks) > 10**8:  # made-up tokens of a megabyte would take for ever to check
        return False
    return _merges_of(ranks) == [(_to_bytes(left), _to_bytes(right)) for left, right in pairs]


def _to_letters(data: bytes) -> str:
    """Bytes as tokenizer.json spells them, a visible letter for each."""
    return "".join(LETTERS[b] for b in data)


def _to_bytes(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary; a special token may hold other letters and stands for itself."""
    try:
        return bytes([BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    """The bytes of a sentencepiece token: `<0xE2>` is a byte, a low block a space."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _bytes_of_tokens(decoder: dict | None, tokens: dict[int, str]) -> tuple[dict[int, bytes] | None, bool]:
    """What each token adds to the text, and whether the text's first space is then dropped.

    None for a decoder in which that depends on the neighbours; the three below cover GPT-2's kin, characters, Llama's.
    """
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return {i: _to_bytes(token) for i, token in tokens.items()}, False
    if kinds == ["Fuse"]:
        return {i: token.encode() for i, token in tokens.items()}, False
    replace_low_block = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    llama = steps[:1] == [replace_low_block] and kinds[1:3] == ["ByteFallback", "Fuse"]
    if llama and steps[3:] in ([], [strip_space]):
        return {i: _byte_fallback(token) for i, token in tokens.items()}, len(steps) == 4
    return None, False


def _kind(data: dict, vocab: dict[str, int]) -> str:
    """What a tokenizer.json is, from what it says, never from its name."""
    model, pre_tokenizer, decoder = data["model"], data.get("pre_tokenizer"), data.get("decoder") or {}
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    added = data.get("added_tokens", [])
    special = {token["content"] for token in added if token["special"]}
    learned = vocab.keys() - special
    if model.get("type", "BPE") != "BPE" or any(map(model.get, options)) or data.get("normalizer"):
        return "custom"
    if "merges" not in model or len(special) < len(added):  # tokens that aren't special are found in plain text
        return "custom"
    one_by_one = not model["merges"] and not model.get("unk_token")
    if pre_tokenizer is None and decoder == FUSE and one_by_one and {*map(len, learned)} == {1}:
        return "char"
    if pre_tokenizer is None or {**BYTE_LEVEL, **pre_tokenizer, "trim_offsets": True} != BYTE_LEVEL:
        return "custom"
    if decoder.get("type") != "ByteLevel" or not learned.issuperset(LETTERS):
        return "custom"
    if one_by_one and [vocab[letter] for letter in LETTERS] == [*range(256)]:
        return "byte"
    return "gpt2" if _sha256([vocab, _pairs(model["merges"])]) == GPT2_SHA256 else "bpe"


def _pairs(merges: list) -> list[list[str]]:
    """A tokenizer.json's merges; older files write a pair as one string."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _backend(text: str) -> tokenizers.Tokenizer:
    """A tokenizer.json's tokenizer that takes texts as they are."""
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "</s>" in a text is text
    return backend


def _check_growth(step: object, part: str) -> None:
    """Refuses a normalizer or decoder that makes a text too long: nine replacements of a letter by ten make a thousand
    million of it, and the library ends the process when its memory is used up."""
    steps = [*_steps(step)]
    growth = math.prod(map(_growth, steps)) if len(steps) <= MAX_STEPS else math.inf
    if growth > MAX_GROWTH:
        raise ValueError(
            f"its {part} has {len(steps)} steps that can make a text {growth:,.0f} times longer; at most {MAX_STEPS} "
            f"steps and {MAX_GROWTH} times are allowed"
        )


def _steps(step: object, depth: int = 0) -> Iterator[dict]:
    """The steps of a normalizer or decoder, in order."""
    if depth > 8:
        raise ValueError("its normalizer or decoder is nested more than 8 levels deep")
    if isinstance(step, dict):
        inside = step.get("normalizers") or step.get("decoders")
        if isinstance(inside, list):
            for part in inside:
                yield from _steps(part, depth + 1)
        else:
            yield step


def _growth(step: dict) -> float:
    """The most characters that one step makes of one character."""
    kind, content = str(step.get("type")), str(step.get("content") or "")
    if kind == "Replace":
        pattern = step.get("pattern")
        literal = str(pattern.get("String") or "") if isinstance(pattern, dict) else ""
        return max(1.0, len(content) / len(literal)) if literal else 1.0 + len(content)  # a regex may match nothing
    if kind == "Precompiled":
        return float(_longest_entry(step.get("precompiled_charsmap")))
    if kind in ("Prepend", "Metaspace", "WordPiece", "CTC", "BPEDecoder"):
        added = (step.get(name) for name in ("prepend", "replacement", "prefix", "word_delimiter_token", "suffix"))
        return 1.0 + max(0, *(len(str(text or "")) - 1 for text in added))
    return UNICODE_GROWTH.get(kind, 1.0)


def _longest_entry(charsmap: object) -> int:
    """The longest replacement in a sentencepiece table: a trie after its size, then texts, each with a NUL."""
    try:
        table = base64.b64decode(str(charsmap or ""))
    except ValueError:
        return 1  # the library refuses it
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(1, *map(len, texts.split(b"\0")))


@contextmanager
def _as_value_error(verb: str) -> Iterator[None]:
    """The tokenizers library meets what it does not expect with bare Exceptions or panics, which are not even those."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C
        raise ValueError(f"the tokenizers library cannot {verb}: {error}") from error


def _json_object(text: str) -> dict:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"not a JSON object but a {type(data).__name__}")
    return data


def _read(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{file.name} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    return file.read_bytes().decode("utf-8")  # as it is: no newline is translated


def _read_config(folder: Path) -> dict:
    """tokenizer_config.json with what older and newer versions of Transformers keep in files of their own."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= _json_object(_read(folder / name))
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = _read(folder / "chat_template.jinja")
    return config


def _complete_config(config: dict | None, has_eot: bool) -> dict:
    """A tokenizer_config.json that makes Transformers follow tokenizer.json, and never asks to run code."""
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT) if has_eot else {}
    config = dict(config or {"clean_up_tokenization_spaces": False, **special})
    if config.pop("auto_map", None) or not config.get("tokenizer_class"):
        config["tokenizer_class"] = TOKENIZER_CLASS
    for name in ("eos_token", "pad_token") if has_eot else ():  # without the second, batches cannot be padded
        config[name] = config.get(name) or EOT
    return config


def _token_content(token: object) -> str | None:
    """A special token of a config, which may be written as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _check(text: str) -> None:
    """Raises ValueError for what is no text."""
    if not isinstance(text, str):
        raise ValueError(f"a text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"position {error.start} of the text is half a character, a lone surrogate U+{ord(text[error.start]):04X}:"
            ' read the text as UTF-8, or mend it by text.encode("utf-8", "replace").decode()'
        ) from error


def _sha256(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
