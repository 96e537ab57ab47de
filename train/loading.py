"""What a run reads: its source, its tokenizer, and its batches as soon as enough of the text is tokenised."""

import math
import re
from pathlib import Path

from accelerate import PartialState
from filelock import FileLock
from tqdm import tqdm

from nanogpt_hub.evaluate import token_lengths
from nanogpt_hub.hub.resolve import resolve
from nanogpt_hub.model import GPT
from nanogpt_hub.sources import Source, cache_root
from nanogpt_hub.tokenizer import Tokenizer, build_tokenizer

from .config import DataConfig, TrainConfig
from .data import (
    FIRST_GROUP,
    SMALL_TOKENS,
    Batches,
    Data,
    EvalWindows,
    StreamBatches,
    content,
    summary,
    tokens_sha256,
    unigram_loss,
)
from .report import EVEN, FLOOR, UNIGRAM
from .rows import RowSource, load_rows, open_rows_of
from .shards import Corpus, TokenRange, corpus_folder
from .tokenizing import SourceChoice, Tokenizing, wait_for

TOKENIZER_FILES = re.compile(r"(tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template\.jinja")


def open_source_of(config: TrainConfig) -> Source | RowSource:
    """What the run trains on. One process of the run looks at its beginning."""
    if config.data.format != "text":
        return open_rows_of(config.data)
    return text_choice(config.data).open(look=PartialState().is_main_process)


def text_choice(d: DataConfig) -> SourceChoice:
    """The training text."""
    return SourceChoice(
        d.source, d.text_column, d.config, d.split, d.revision, d.encoding, d.max_bad_rows, d.mix, d.duplicates
    )  # fmt: skip


def validation_choice(d: DataConfig) -> SourceChoice | None:
    """The validation text, where it is not a part of the training text."""
    apart = d.validation()
    return text_choice(apart) if apart else None


def cache_folder(config: TrainConfig) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else cache_root() / "tokens"


def cached_tokenizer(config: TrainConfig, source: Source) -> Tokenizer:
    """The tokenizer that the config asks for; one that has to be learned from the text is learned once and kept."""
    spec = config.data.tokenizer
    if "/" in spec and not Path(spec).expanduser().exists():
        spec = str(resolve(spec, files=TOKENIZER_FILES).folder)
    if spec != "char" and not spec.startswith("bpe:"):
        return build_tokenizer(spec, source.texts)
    folder = cache_folder(config) / "tokenizers" / f"{source.fingerprint[:24]}-{spec.replace(':', '')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):  # of all processes one learns it, and the others wait
        if not (folder / "tokenizer.json").is_file():
            part = folder.with_name(f"{folder.name}.part")
            build_tokenizer(spec, source.texts).save(part)
            part.rename(folder)
    return Tokenizer.load(folder)


def load_data(
    config: TrainConfig, source: Source | RowSource, tokenizer: Tokenizer, gpt: GPT, quiet: bool
) -> tuple[Data, list[str]]:
    """Batches and what every evaluation reads, for a model, and lines that describe them."""
    if isinstance(source, RowSource):
        return load_rows(config, source, tokenizer, gpt.config.block_size, quiet)
    tokenizing = start_tokenizing(config, source, tokenizer)
    try:
        return load_text(config, source, tokenizer, gpt, tokenizing, quiet)
    except BaseException:
        for one in tokenizing:
            one.close()
        raise


def start_tokenizing(config: TrainConfig, source: Source, tokenizer: Tokenizer) -> list[Tokenizing]:
    """The processes that make the corpora of a run, on the first process of each machine; the others only read."""
    if not PartialState().is_local_main_process:
        return []
    d, cache = config.data, cache_folder(config)
    apart = validation_choice(d)
    others = [Tokenizing(apart, apart.open(look=PartialState().is_main_process), tokenizer, cache)] if apart else []
    return [*others, Tokenizing(text_choice(d), source, tokenizer, cache, d.workers)]


def load_text(
    config: TrainConfig, source: Source, tokenizer: Tokenizer, gpt: GPT, tokenizing: list[Tokenizing], quiet: bool
) -> tuple[Data, list[str]]:
    """The data of a text, as soon as enough of it is tokenised for validation and the first steps."""
    d, vocab_size, block_size = config.data, tokenizer.vocab_size, gpt.config.block_size
    corpus = first_part(source, tokenizer, config, tokenizing, quiet)
    corpus.check_vocab(gpt.config.vocab_size)
    source_facts, stream, first = corpus.manifest["source"], is_stream(corpus), 0
    if choice := validation_choice(d):
        apart = first_part(choice.open(look=False), tokenizer, config, tokenizing, quiet)
        train, val = corpus.tokens(), validation_of(apart, d)
    elif stream:
        train, val, first = corpus.tokens().part(d.val_tokens), corpus.tokens().part(0, d.val_tokens), d.val_tokens
        train.check("the training part", block_size, f"lower data.val_tokens ({d.val_tokens})")
    else:
        train, val = corpus.split(d.val_fraction, block_size)
    windows = EvalWindows(val, block_size, config.eval.max_windows)
    floor = known_floor(apart if choice else corpus, d)
    batches: Batches | StreamBatches
    identity: dict[str, object]  # what must be the same when the run goes on
    facts: dict[str, object]
    if stream:
        batches = StreamBatches(corpus, first, block_size, config.seed)
        known = train.part(0, FIRST_GROUP)  # whatever is ready beyond it
        identity, facts = {"order": "stream", "val_tokens": len(val)}, {}
    else:
        batches, known = Batches(train, block_size, config.seed), train
        identity = facts = {"train_tokens": len(train)}
    data = Data(
        batches=batches,
        val=windows.read(),
        bytes_per_token=windows.bytes_per_token(token_lengths(tokenizer)),
        baselines={EVEN: math.log(vocab_size), UNIGRAM: unigram_loss(known, val, vocab_size), **floor},
        facts={"source": source_facts, **facts, "val_tokens": len(val)},
        identity={**identity, **content(source_facts, d.duplicates, tokens_sha256(known, val))},
        tokenizing=tokenizing,
    )
    return data, summary(corpus, train, val)


def known_floor(corpus: Corpus, d: DataConfig) -> dict[str, float]:
    """The entropy of a text in nats per token as a baseline, where its source knows it: no model can do better.

    Documents are independent of each other, and each is one sequence of tokens that ends with end-of-text: so the
    entropy of a document, times the documents per token in what is tokenised so far.
    """
    bits, end = corpus.manifest["source"].get("bits_per_document"), corpus.tokenizer.eot_id
    if not bits or end is None or d.duplicates not in ("ignore", "count"):
        return {}
    counts = corpus.tokens().counts(corpus.tokenizer.vocab_size)
    return {FLOOR: bits * math.log(2) * int(counts[end]) / int(counts.sum())}


def first_part(
    source: Source, tokenizer: Tokenizer, config: TrainConfig, tokenizing: list[Tokenizing], quiet: bool
) -> Corpus:
    """The corpus of a source as soon as it is complete, or known to be long and ready for the first steps."""
    corpus = Corpus(corpus_folder(source, tokenizer, cache_folder(config)), tokenizer)
    needed = max(SMALL_TOKENS + 1, config.data.val_tokens + FIRST_GROUP + 1)
    with tqdm(
        total=source.text_bytes, unit="B", unit_scale=True, desc="tokenize", disable=quiet, mininterval=1, delay=1
    ) as bar:

        def ready() -> bool:
            corpus.refresh()
            if corpus.bytes > bar.n:
                bar.update(corpus.bytes - bar.n)
            return corpus.complete or len(corpus) >= needed

        wait_for(ready, tokenizing)
    return corpus


def is_stream(corpus: Corpus) -> bool:
    """Whether a corpus is so long that it is trained on in the order of a stream, complete or not."""
    return len(corpus) > SMALL_TOKENS


def validation_of(corpus: Corpus, config: DataConfig) -> TokenRange:
    """What is read of a validation text of its own: all of it, or the first val_tokens of a long one."""
    return corpus.tokens().part(0, config.val_tokens) if is_stream(corpus) else corpus.tokens()
