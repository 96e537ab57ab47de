"""Tokenises the text of a run ahead of it.

    python -m train.prepare configs/gpt2_124m_openwebtext.yaml --workers 8
    python -m train.prepare --data.source my.txt --data.tokenizer gpt2

(`nanogpt-hub prepare` is the same.) Takes the config and the flags of the run, and leaves the tokens in the cache where
the run finds them. It may be interrupted and killed: the same command goes on after the last shard that was ready, and
a run may begin meanwhile. How many processes encode, --workers, changes nothing in what they write.
"""

import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from jsonargparse import Namespace

from nanogpt_hub.hub.resolve import resolve
from nanogpt_hub.sources import Source
from nanogpt_hub.system.readable import reason
from nanogpt_hub.tokenizer import Tokenizer

from .commits import pinned
from .config import TrainConfig, make_parser, parse
from .data import whole_lines
from .loading import TOKENIZER_FILES, cache_folder, cached_tokenizer, text_choice, validation_choice
from .shards import prepare

PROG = f"python -m {__package__}.prepare"  # as it is typed; `nanogpt-hub` gives its own


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """The command: returns its exit status, with a sentence on standard error where it is not 0."""
    parser = make_parser(prog, "Tokenises the text of a run ahead of it.")
    parser.add_argument("--from", default="", help="of a fine-tune: the model whose tokenizer counts")
    parser.add_argument("--workers", type=int, default=0, help="processes that encode; 0: as many as data.workers says")
    config, parsed = parse(parser, argv)
    try:
        return prepare_all(config, parsed)
    except (ValueError, OSError) as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            "error: one of the processes that encode was killed, as the system does where memory runs out; the same "
            "command goes on from here, and a smaller --workers needs less memory",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def prepare_all(config: TrainConfig, parsed: Namespace) -> int:
    """Tokenises the validation text, where there is one of its own, and the training text, and says what there is."""
    if config.data.format != "text":
        raise ValueError(
            f"data.format is {config.data.format}: such rows are encoded when the run begins; only text is prepared"
        )
    if parsed.workers < 0:
        raise ValueError(f"workers is {parsed.workers}; it must be at least 1")
    config = replace(config, data=pinned(config.data, cache_folder(config), print))
    workers = parsed.workers or config.data.workers
    choices = [choice for choice in (validation_choice(config.data), text_choice(config.data)) if choice]
    sources = [choice.open() for choice in choices]
    tokenizer = tokenizer_of(config, parsed, sources[-1])
    for source in sources:
        start = time.perf_counter()
        corpus = prepare(source, tokenizer, cache_folder(config), workers=workers)
        print(f"{source.name}: {len(corpus.shards)} shards in {corpus.folder}, {time.perf_counter() - start:.1f} s")
        for line in whole_lines(corpus.manifest, tokenizer):
            print(f"  {line}")
    return 0


def tokenizer_of(config: TrainConfig, parsed: Namespace, source: Source) -> Tokenizer:
    """That of the model to start from, or the one that the config asks for."""
    if not parsed["from"]:
        return cached_tokenizer(config, source)
    return Tokenizer.load(resolve(parsed["from"], files=TOKENIZER_FILES).folder)


if __name__ == "__main__":
    sys.exit(main())
