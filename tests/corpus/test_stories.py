"""The grammar of stories: its entropy against an independent count, and each text written in one way only."""

import math
import re
from itertools import islice
from statistics import mean, stdev

import pytest

from benchmarks.stories import count, read
from nanogpt_hub.corpus import stories
from nanogpt_hub.sources import SourceError, open_source

BAG = re.compile(r"(an? [a-z ]+?)(?:,| and) (an? [a-z ]+?) (?:and set off|into a bag|and a sandwich)")
MET = re.compile(r"(?:came to|stood before) ([a-z ]+)\.")


@pytest.mark.parametrize("level", stories.LEVELS)
def test_a_stream_is_the_same_for_the_same_level_and_seed(level):
    first, again = ([*islice(stories.stories(level, 7), 20)] for _ in range(2))
    assert first == again
    assert first != [*islice(stories.stories(level, 8), 20)]
    assert all(text.isascii() and len(text) for text in first)


def test_a_level_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="levels 1, 2, 3, 4, not 5"):
        next(stories.stories(5))


def test_the_stream_stays_what_it_is():
    """What was trained and published on these stories is reproducible only while they stay the same."""
    assert next(stories.stories(1, 1)) == "Ada the bee eats cheese."
    assert next(stories.stories(4, 1)).startswith("Once upon a time there was a proud snake called Nora. More than")


@pytest.mark.parametrize("level", stories.LEVELS)
def test_each_text_is_written_in_one_way_only(level):
    for text in islice(stories.stories(level, 2), 500):
        ways, read = stories.derivations(text, level)
        assert len(ways) == 1
        assert read == len(text)
        assert stories.first_error(text, level) is None


@pytest.mark.parametrize("level", stories.LEVELS)
def test_the_entropy_is_the_mean_surprisal(level):
    texts = [*islice(stories.stories(level, 3), 2000)]
    bits = [-math.log2(stories.probability(text, level)) for text in texts]
    exact = stories.entropy(level)
    for measured, expected in (
        (bits, exact.bits),
        ([len(text) for text in texts], exact.characters),
        ([len(text.split()) for text in texts], exact.words),
    ):
        assert abs(mean(measured) - expected) < 4 * max(stdev(measured), 1e-9) / len(texts) ** 0.5 + 1e-9


def test_the_entropy_is_what_counting_without_the_grammar_finds():
    """`python -m benchmarks.stories` does it with ten million characters."""
    texts = [*islice(stories.stories(4, 6), 3000)]
    counted = count(map(read, texts))
    assert sum(counted.values()) == pytest.approx(stories.entropy(4).bits, rel=0.01)
    assert counted["happy"] == counted["sound"] == 0  # what follows from what went before


def test_probabilities_of_a_level_that_can_be_written_out_add_up_to_one():
    texts = set(islice(stories.stories(1, 4), 60_000))
    assert 0.9 < sum(stories.probability(text, 1) for text in texts) < 1


def test_the_entropy_of_level_1_is_that_of_its_independent_words():
    def bits(weights):
        return sum(-w / sum(weights) * math.log2(w / sum(weights)) for w in weights)

    names = [5, 4, 3, 2, 2, 1, 1, 1] * 2
    expected = bits(names) + math.log2(14) + bits([3, 2, 1]) + bits([4, 3, 2, 1, 1, 1])
    assert stories.entropy(1).bits == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("wrong", "at"),
    [
        ('Ada the bee says "Moo!" Some day she will marry a cloud.', 18),  # no bee says so
        ('Ada the bee says "Buzz!" Some day he will marry a cloud.', 34),
        ('Ada the bee says "Buzz!" Some day she will marry a cloud', 56),  # cut short
        ("", 0),
    ],
)
def test_the_first_error_is_where_no_story_goes_on_like_this(wrong, at):
    assert stories.probability(wrong, 2) == 0
    assert stories.first_error(wrong, 2) == at


def test_how_a_story_ends_follows_from_what_was_packed():
    for text in islice(stories.stories(4, 5), 300):
        help, _ = stories.OBSTACLES[MET.search(text)[1]]
        assert ("That very night" in text) == (help in BAG.search(text).groups())


# ---- as a source -----------------------------------------------------------------------------------------------------


def test_stories_are_a_source_of_documents_that_tells_its_entropy():
    source = open_source("stories:level=2,seed=3,size=1000")
    texts = [*source.documents()]
    assert texts == [*islice(stories.stories(2, 3), len(texts))] == [*source.documents()]
    assert sum(map(len, texts[:-1])) < 1000 <= sum(map(len, texts))
    assert source.describe()["bits_per_document"] == stories.entropy(2).bits
    assert source.name == "stories of level 2, seed 3"


def test_what_changes_the_text_changes_the_fingerprint():
    specs = ["stories", "stories:level=3", "stories:seed=2", "stories:size=9"]
    assert len({open_source(spec).fingerprint for spec in specs}) == 4
    assert open_source("stories:").fingerprint == open_source("stories:level=4,seed=1").fingerprint


@pytest.mark.parametrize(
    "spec", ["stories:5", "stories:level=5", "stories:level=x", "stories:sead=1", "stories:size=0"]
)
def test_settings_that_stories_do_not_have_are_an_error(spec):
    with pytest.raises(SourceError, match="stories"):
        open_source(spec)
