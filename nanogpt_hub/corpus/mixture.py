"""Several sources of text as one, each with its weight; deterministic, so that a pass can be cut off and gone on with.

    source = mix([(open_source("code.jsonl"), 0.7), (open_source("owner/name"), 0.3)])

The next document always comes from the source that has given the least for its weight, counted in characters; so the
shares hold from the first documents on. A source that has come to its end begins again, until each has been read once.
A document longer than PIECE_CHARS is dealt out in pieces, each as a document of its own.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from nanogpt_hub.corpus.formats import Chunks, InnerReading, Reading, SourceError
from nanogpt_hub.sources import Source

Part = tuple[Source, float]  # and its weight


def mix(parts: list[Part]) -> Source:
    """The mixture of sources by weight. Raises SourceError for a weight that is not above 0."""
    for source, weight in parts:
        if not 0 < weight < float("inf"):
            raise SourceError(f"the weight of {source.name} is {weight}; it must be above 0")
    total = sum(weight for _, weight in parts)
    shares = [{**source.describe(), "share": round(weight / total, 4)} for source, weight in parts]
    fingerprints = [(source.fingerprint, weight) for source, weight in parts]
    fingerprint = hashlib.sha256(json.dumps(["mix", fingerprints]).encode()).hexdigest()
    facts: dict[str, Any] = {"sources": shares}
    if len(licenses := {source.facts.get("license") for source, _ in parts}) == 1 and None not in licenses:
        facts["license"] = licenses.pop()
    name = " + ".join(f"{weight / total:.0%} {source.name}" for source, weight in parts)
    return Source("mix", name, fingerprint, partial(_read, parts), facts, max_bad_rows=parts[0][0].max_bad_rows)


def _read(parts: list[Part], reading: Reading) -> Chunks:
    dealt = [0.0] * len(parts)  # characters that each has given, divided by its weight
    readers: list[Iterator] = [source.pieces(_PartReading(reading)) for source, _ in parts]
    unread = set(range(len(parts)))
    while True:
        least = min(range(len(parts)), key=dealt.__getitem__)
        text, _ = next(readers[least], (None, True))
        if text is None:
            unread.discard(least)
            if not unread:
                return
            readers[least] = parts[least][0].pieces(_RepeatedReading())
            text, _ = next(readers[least])
        dealt[least] += len(text) / parts[least][1]
        if text:
            yield text, True


class _PartReading(InnerReading):
    """A part of the mixture, read for the first time: its bad rows and its duplicates count for the whole."""

    def repeat(self, kind: str) -> None:
        self.outer.repeat(kind)


class _RepeatedReading(Reading):
    """A part of the mixture that was read before: its bad rows and its duplicates are counted."""

    def skip(self, error: SourceError) -> None:
        pass

    def repeat(self, kind: str) -> None:
        pass
