"""Several sources as one, and documents that repeat: by weight, by hash, the same in each pass."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_hub.corpus.duplicates import HashSet, band_keys, without_duplicates
from nanogpt_hub.corpus.formats import Reading
from nanogpt_hub.corpus.mixture import mix
from nanogpt_hub.sources import Source, SourceError, open_source


def rows(path: Path, texts: list) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return open_source(str(path), max_bad_rows=5)


# ---- mixing ----------------------------------------------------------------------------------------------------------


def test_the_shares_hold_from_the_first_documents_on(tmp_path):
    a = rows(tmp_path / "a.jsonl", ["a" * 10] * 600)
    b = rows(tmp_path / "b.jsonl", ["b" * 30] * 100)
    mixed = list(mix([(a, 3.0), (b, 1.0)]).documents())
    for n in (20, 100, len(mixed)):
        size = sum(len(text) for text in mixed[:n] if text[0] == "b") / sum(map(len, mixed[:n]))
        assert size == pytest.approx(0.25, abs=30 / sum(map(len, mixed[:n])))
    assert sum(text[0] == "a" for text in mixed) == pytest.approx(900, abs=2)  # read again until b has been read once
    assert sum(text[0] == "b" for text in mixed) == 100
    assert list(mix([(a, 3.0), (b, 1.0)]).documents()) == mixed


def test_each_source_is_read_whole_whatever_the_weights(tmp_path):
    a = rows(tmp_path / "a.jsonl", ["one", "two", "three"])
    b = rows(tmp_path / "b.jsonl", [str(i) for i in range(50)])
    for weight in (0.01, 1.0, 50.0):
        assert {*a.documents(), *b.documents()} == set(mix([(a, 1.0), (b, weight)]).documents())


def test_a_mixture_tells_what_is_in_it_and_counts_its_bad_rows_once(tmp_path):
    a = rows(tmp_path / "a.jsonl", ["one", 3, "two"])
    b = rows(tmp_path / "b.jsonl", ["long " * 20] * 9 + [None, 4.5])
    mixed = mix([(a, 1.0), (b, 3.0)])
    assert mixed.name == "25% a.jsonl + 75% b.jsonl"
    assert [part["share"] for part in mixed.describe()["sources"]] == [0.25, 0.75]
    reading = Reading(5)
    assert len(list(mixed.pieces(reading))) > 11
    assert reading.bad_rows == 2
    assert mix([(a, 1.0), (b, 2.0)]).fingerprint != mixed.fingerprint
    with pytest.raises(SourceError, match="is 0; it must be above 0"):
        mix([(a, 1.0), (b, 0)])


# ---- duplicates ------------------------------------------------------------------------------------------------------

LONG = " ".join(f"word{i % 97}of{i}" for i in range(400))
NEAR = LONG.replace("word5of5 ", "")
FAR = " ".join(f"word{i % 89}of{i}" for i in range(400))


@pytest.mark.parametrize(
    ("choice", "kept", "counts"),
    [
        ("ignore", "one,LONG,one,NEAR,FAR,two,LONG", (0, 0)),
        ("count", "one,LONG,one,NEAR,FAR,two,LONG", (2, 1)),
        ("drop_exact", "one,LONG,NEAR,FAR,two", (2, 0)),
        ("drop", "one,LONG,FAR,two", (2, 1)),
    ],
)
def test_duplicates_are_counted_and_dropped_as_asked(tmp_path, choice, kept, counts):
    source = rows(tmp_path / "a.jsonl", ["one", LONG, "one", NEAR, FAR, "two", LONG])
    names = {"LONG": LONG, "NEAR": NEAR, "FAR": FAR}
    for _ in range(2):  # each pass forgets the one before
        reading = Reading()
        unique = without_duplicates(source, choice)
        texts = [text for text, _ in unique.pieces(reading)]
        assert texts == [names.get(name, name) for name in kept.split(",")]
        assert tuple(reading.duplicates.values()) == counts
    assert (unique.fingerprint == source.fingerprint) == (choice == "ignore")


def test_a_document_in_chunks_is_looked_at_whole_and_a_very_long_one_not_at_all(monkeypatch):
    texts = [
        ("a", False),
        ("b", True),
        ("ab", True),
        ("c" * 30, False),
        ("d", True),
        ("c" * 30 + "d", True),
        ("ab", True),
    ]
    monkeypatch.setattr("nanogpt_hub.corpus.duplicates.LONGEST", 20)
    source = without_duplicates(Source("file", "x", "0", lambda reading: iter(texts)), "drop")
    assert list(source.documents()) == ["ab", "c" * 30 + "d", "c" * 30 + "d"]


def test_nearness_follows_the_shared_5_grams():
    def found(replaced: int) -> bool:
        words = LONG.split()
        words[:replaced] = [f"other{i}" for i in range(replaced)]
        return any(a == b for a, b in zip(band_keys(LONG), band_keys(" ".join(words)), strict=True))

    assert [found(n) for n in (0, 10, 20, 300, 400)] == [True, True, True, False, False]
    assert band_keys(LONG.upper().replace(" ", ", ")) == band_keys(LONG)
    assert band_keys("too few words here") is None


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 50)))
def test_a_set_of_hashes_is_a_set(values):
    ours, theirs = HashSet(), set()
    for value in [*values, *range(1, 1500)]:
        assert ours.add(value) == ((value or 1) not in theirs)
        theirs.add(value or 1)
    assert len(ours) == len(theirs)
