"""Very short stories from a probabilistic grammar of our own: a corpus that never ends and whose entropy is known.

    for text in stories(level=4, seed=1):   # endless; the same for the same level and seed, on any machine
        ...
    entropy(4).bits                         # exactly how many bits a story holds: no model can do with less
    probability(text, 4)                    # of a text as a story; 0.0 where it is none
    first_error(text, 4)                    # where no story goes on like this; None where it is one

The grammar is context-free, with a memory. Each symbol stands for one of several texts, and texts mention symbols in
braces. A symbol is expanded where it is mentioned first and *remembered*: `{name}` is the same name from then on, and
costs no more bits. Which texts a symbol may stand for can depend on what others were expanded to (`Given`): a duck says
quack, and only who packed a lamp gets through the dark cave. `{He}` is `{he}` with a capital.

What a model has to do to reach the entropy grows with the level:

    1  one sentence; each word depends on the one before it alone: counting pairs is enough
    2  two sentences; words depend on words some places back
    3  a little story; names, things and wishes come back word for word, from far away
    4  a story with a plot: how it ends follows from who the hero is, what was packed and what stood in the way
"""

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import NamedTuple

# ---- the grammar -----------------------------------------------------------------------------------------------------

Options = list[str] | Mapping[str, float]  # texts that are equally likely, or texts and their weights


@dataclass(frozen=True)
class Given:
    """Options that depend on what other symbols, mentioned before, were expanded to."""

    keys: tuple[str, ...]  # in the order of their first mentions; the keys of a key come before it
    options: Callable[..., Options]  # of the texts of the keys


def by(key: str, table: Mapping[str, str | Options]) -> Given:
    """Options looked up by the text of one other symbol."""

    def options(text: str) -> Options:
        found = table[text]
        return [found] if isinstance(found, str) else found

    return Given((key,), options)


SHE = {"Mia": 5, "Ada": 4, "Nora": 3, "Rosa": 2, "Lily": 2, "Emma": 1, "Greta": 1, "Zoe": 1}
HE = {"Tom": 5, "Otto": 4, "Max": 3, "Finn": 2, "Hugo": 2, "Ben": 1, "Oscar": 1, "Igor": 1}
SOUNDS = {
    "duck": "Quack", "cat": "Meow", "dog": "Woof", "cow": "Moo", "pig": "Oink", "owl": "Hoot", "frog": "Croak",
    "mouse": "Squeak", "sheep": "Baa", "lion": "Roar", "snake": "Hiss", "bee": "Buzz", "hen": "Cluck", "crow": "Caw",
}  # fmt: skip
WISHES = {
    "dance on the moon": "danced on the moon",
    "marry a cloud": "married a cloud",
    "find the end of the rainbow": "found the end of the rainbow",
    "teach a stone to sing": "taught a stone to sing",
    "win the great snail race": "won the great snail race",
    "sleep in a giant shoe": "slept in a giant shoe",
    "catch a falling star": "caught a falling star",
    "build a castle of jam": "built a castle of jam",
    "kiss a crocodile": "kissed a crocodile",
    "meet the queen of spoons": "met the queen of spoons",
    "paint the sea green": "painted the sea green",
    "buy a very small volcano": "bought a very small volcano",
}
OBSTACLES = {  # what stands in the way: what helps against it, and how
    "a dark cave": ("a lamp", "{name} lit the lamp, and the dark was gone."),
    "a deep river": ("a boat", "{name} got into the boat and was across before tea."),
    "a locked gate": ("a key", "{name} turned the key, and the gate swung open."),
    "a high wall": ("a ladder", "{name} put up the ladder and climbed over."),
    "a hungry giant": ("a pie", "{name} gave the giant the pie, and the giant wept for joy."),
    "a sleeping troll": ("a trumpet", "{name} blew the trumpet, and the troll ran for his life."),
    "a lonely ghost": ("a joke book", "{name} read from the joke book, and the ghost laughed itself to pieces."),
    "an angry goose": ("an umbrella", "{name} opened the umbrella, and the goose fled."),
}
THINGS = [thing for thing, _ in OBSTACLES.values()]
HAPPY = {  # how a wish comes true, by character
    "kind": ["and took everybody along", "and brought everybody a little of it"],
    "greedy": ["and told nobody", "and asked for more"],
    "lazy": ["lying down", "and needed a long nap afterwards"],
    "brave": ["with both eyes open", "and then did it again, backwards"],
    "shy": ["when nobody was looking", "and turned as red as a tomato"],
    "proud": ["and had it printed in the newspaper", "and put up a statue of the day"],
}
SAD = {  # and how one goes home when it does not
    "kind": ["and made soup for everybody", "and wrote the others a warning"],
    "greedy": ["and ate the sandwich alone", "and sold the map for twice the price"],
    "lazy": ["and was secretly glad", "but only after a nap"],
    "brave": ["and tried again on Monday", "but came back with a cannon"],
    "shy": ["and never spoke of it", "and hid under the bed"],
    "proud": ["and said that this had been the plan", "and blamed the weather"],
}


def met(thing: str, other: str) -> Options:
    """What stands in the way: thrice as likely where the bag holds what helps, so that half of all stories end well."""
    return {obstacle: 3 if help in (thing, other) else 1 for obstacle, (help, _) in OBSTACLES.items()}


def solved(thing: str, other: str, obstacle: str) -> Options:
    """What comes of it: the wish, if the bag holds what helps."""
    help, solution = OBSTACLES[obstacle]
    return [solution + " {happy}"] if help in (thing, other) else ["{failure} {sad}"]


GRAMMAR: dict[str, Options | Given] = {
    # words
    "name": SHE | HE,
    "he": Given(("name",), lambda name: ["she" if name in SHE else "he"]),
    "trait": list(HAPPY),
    "animal": list(SOUNDS),
    "sound": by("animal", SOUNDS),
    "food": {"cheese": 4, "soup": 3, "cake": 2, "socks": 1, "thunder": 1, "homework": 1},
    "likes": {"likes": 3, "eats": 2, "dreams of": 1},
    "place": ["an old boot", "a teapot", "a hollow tree", "the middle of nowhere", "a house of cheese", "a drawer"],
    "weather": ["sunny", "rainy", "windy", "foggy"],
    "number": ["two", "three", "seven", "ninety"],
    "wish": list(WISHES),
    "did": by("wish", WISHES),
    "thing": THINGS,
    "other": Given(("thing",), lambda thing: [other for other in THINGS if other != thing]),
    "obstacle": Given(("thing", "other"), met),
    # sentences
    "opening": {
        "Once upon a time there was a {trait} {animal} called {name}.": 3,
        "In {place} lived {name}, a {trait} {animal}.": 2,
        "This is the story of {name}, a {trait} {animal} from {place}.": 1,
    },
    "wanting": {
        "More than anything {he} wanted to {wish}.": 2,
        "{He} had only one dream: to {wish}.": 1,
        "Every night {he} prayed to {wish}.": 1,
    },
    "packing": {
        "So {he} packed {thing} and {other} and set off.": 2,
        "One {weather} morning {he} put {thing} and {other} into a bag.": 1,
        "{He} took {thing}, {other} and a sandwich, and off {he} went.": 1,
    },
    "meeting": {
        "Soon {he} came to {obstacle}.": 2,
        "After {number} days {he} stood before {obstacle}.": 1,
    },
    "saying": {
        '"{sound}!" said {name}.': 2,
        '"{sound}," said the {animal}, "what now?"': 1,
    },
    "return": {
        "In the evening {name} came home with {thing} and {other}.": 2,
        "Nobody ever saw {thing} or {other} again, but {name} {did}.": 1,
    },
    "ending": Given(("thing", "other", "obstacle"), solved),
    "failure": {
        "{name} looked at {thing} and at {other}. Neither was any help.": 2,
        "What good are {thing} and {other} against {obstacle}?": 1,
    },
    "happy": ["That very night {name} {did}, {joy}."],
    "sad": ["So {he} went home, {sorrow}."],
    "joy": by("trait", HAPPY),
    "sorrow": by("trait", SAD),
    # stories
    "story 1": ["{name} the {animal} {likes} {food}."],
    "story 2": ['{name} the {animal} says "{sound}!" Some day {he} will {wish}.'],
    "story 3": ["{opening} {wanting} {packing} {saying} {return}"],
    "story 4": ["{opening} {wanting} {packing} {meeting} {saying} {ending}"],
}
LEVELS = (1, 2, 3, 4)


# ---- choices ---------------------------------------------------------------------------------------------------------


class Mention(NamedTuple):
    """A symbol in a text."""

    symbol: str
    capital: bool


class Choice(NamedTuple):
    """One of the texts that a symbol may stand for."""

    probability: float
    text: str
    parts: tuple[str | Mention, ...]  # the text, cut at its mentions


def cut(text: str) -> tuple[str | Mention, ...]:
    """ "So {he} ran" as ("So ", Mention("he", False), " ran")."""
    pieces = re.split(r"\{([\w ]+)\}", text)  # text, symbol, text, symbol, ..., text
    parts = [Mention(p.lower(), p[0].isupper()) if i % 2 else p for i, p in enumerate(pieces)]
    return tuple(part for part in parts if part)


@cache
def _choices(symbol: str, key_texts: tuple[str, ...]) -> tuple[Choice, ...]:
    rule = GRAMMAR[symbol]
    options = rule.options(*key_texts) if isinstance(rule, Given) else rule
    weights = options if isinstance(options, Mapping) else dict.fromkeys(options, 1)
    total = sum(weights.values())
    return tuple(Choice(weight / total, text, cut(text)) for text, weight in weights.items())


@cache
def keys_of(symbol: str) -> tuple[str, ...]:
    """The symbols whose texts decide what this one may stand for."""
    rule = GRAMMAR[symbol]
    return rule.keys if isinstance(rule, Given) else ()


def choices(symbol: str, known: dict[str, str]) -> tuple[Choice, ...]:
    """What a symbol may stand for, by what the ones before it were expanded to."""
    return _choices(symbol, tuple([known[key] for key in keys_of(symbol)]))


def spelled(text: str, mention: Mention) -> str:
    return text[0].upper() + text[1:] if mention.capital else text


def start(level: int) -> Mention:
    """The symbol of a whole story. Raises ValueError for a level that there is not."""
    if level not in LEVELS:
        raise ValueError(f"stories have the levels {', '.join(map(str, LEVELS))}, not {level!r}")
    return Mention(f"story {level}", capital=False)


# ---- writing ---------------------------------------------------------------------------------------------------------


def stories(level: int = 4, seed: int = 1) -> Iterator[str]:
    """Story after story, without end; the same for the same level and seed. ValueError for an unknown level."""
    story = start(level)
    draw = random.Random(seed).random  # the one generator whose numbers Python promises to keep the same
    return (expand(story, {}, draw) for _ in iter(int, 1))


@cache
def _cumulative(options: tuple[Choice, ...]) -> list[float]:
    return list(accumulate(choice.probability for choice in options))


def expand(mention: Mention, known: dict[str, str], draw: Callable[[], float]) -> str:
    """The text of a mention. What is expanded for the first time is drawn, and kept in `known`."""
    symbol = mention.symbol
    if symbol not in known:
        options = choices(symbol, known)
        at = bisect_right(_cumulative(options), draw()) if len(options) > 1 else 0
        parts = options[min(at, len(options) - 1)].parts  # the last sum may be a rounding short of 1
        known[symbol] = "".join([part if isinstance(part, str) else expand(part, known, draw) for part in parts])
    return spelled(known[symbol], mention)


# ---- how much there is to know ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entropy:
    """What a story holds, exactly: expected values over all stories of a level. A character is a byte."""

    bits: float  # per story
    characters: float  # per story
    words: float  # per story, cut at spaces

    @property
    def bits_per_character(self) -> float:
        return self.bits / self.characters

    @property
    def bits_per_word(self) -> float:
        return self.bits / self.words

    def nats_per_token(self, tokens_per_story: float) -> float:
        """The lowest loss of any model in the long run; end-of-text is one of the tokens."""
        return self.bits * math.log(2) / tokens_per_story


@cache
def entropy(level: int = 4) -> Entropy:
    """Entropy and expected length of a story, computed from the grammar, not measured.

    Entropy is a sum over the choices that are made (the chain rule: no story can be written in two ways), and length is
    a sum over the texts that are written. The expected value of a sum is the sum of the expected values: each symbol's
    part is computed by itself, and only what decides about this one symbol has to be followed.
    """
    story = start(level)
    parts = [_expected((story,), frozenset(), _followed(symbol)) for symbol in sorted(reachable(story.symbol))]
    bits, characters, spaces = (sum(column) for column in zip(*parts, strict=True))
    return Entropy(bits, characters, spaces + 1)


@cache
def all_choices(symbol: str) -> tuple[Choice, ...]:
    """What a symbol may stand for, whatever its keys were expanded to."""
    known: list[dict[str, str]] = [{}]
    for key in keys_of(symbol):
        known = [{**before, key: choice.text} for before in known for choice in choices(key, before)]
    return tuple({choice.text: choice for texts in known for choice in choices(symbol, texts)}.values())


@cache
def reachable(symbol: str) -> frozenset[str]:
    """A symbol and all that may be mentioned in its texts."""
    mentions = {part.symbol for choice in all_choices(symbol) for part in choice.parts if isinstance(part, Mention)}
    return frozenset({symbol}).union(*map(reachable, mentions))


class Followed(NamedTuple):
    """A symbol, and all that decides about it: who may mention it, the keys of these, who may mention those, ..."""

    symbol: str
    deciding: frozenset[str]


def _followed(symbol: str) -> Followed:
    deciding: set[str] = {symbol}
    before: set[str] = set()
    while deciding != before:
        before = set(deciding)
        deciding |= {other for other in GRAMMAR if reachable(other) & before}
        deciding |= {key for other in deciding for key in keys_of(other)}
    return Followed(symbol, frozenset(deciding))


@lru_cache(maxsize=2**20)
def _expected(agenda: tuple[Mention, ...], known: frozenset[tuple[str, str]], followed: Followed) -> tuple[float, ...]:
    """Expected (bits, characters, spaces) that one symbol adds to what is still to be written.

    agenda: the deciding mentions that are still to come. known: (symbol, text) of what was mentioned; the text is ""
    where nothing depends on it any more.
    """
    if not agenda:
        return 0.0, 0.0, 0.0
    mention, rest, texts = agenda[0], agenda[1:], dict(known)
    mine = mention.symbol == followed.symbol
    if mention.symbol in texts:
        here = measure(0.0, texts[mention.symbol]) if mine else (0.0, 0.0, 0.0)
        return plus(here, _expected(rest, _needed(rest, texts, followed), followed))
    total: tuple[float, ...] = (0.0, 0.0, 0.0)
    for p, text, parts in choices(mention.symbol, texts):
        here = measure(-math.log2(p), *(part for part in parts if isinstance(part, str))) if mine else (0.0, 0.0, 0.0)
        mentions = tuple(part for part in parts if isinstance(part, Mention) and part.symbol in followed.deciding)
        then = (*mentions, *rest)
        after = _expected(then, _needed(then, {**texts, mention.symbol: text}, followed), followed)
        total = plus(total, tuple(p * x for x in plus(here, after)))
    return total


def _needed(agenda: tuple[Mention, ...], texts: dict[str, str], followed: Followed) -> frozenset[tuple[str, str]]:
    """Of what is known, what the rest depends on: the texts of keys, and that a symbol was mentioned."""
    ahead = _ahead(frozenset(mention.symbol for mention in agenda))
    keys = {key for symbol in ahead & followed.deciding for key in keys_of(symbol)} | {followed.symbol}
    return frozenset(
        (symbol, text if symbol in keys else "") for symbol, text in texts.items() if symbol in ahead | keys
    )


@cache
def _ahead(symbols: frozenset[str]) -> frozenset[str]:
    return frozenset().union(*map(reachable, symbols))


def measure(bits: float, *texts: str) -> tuple[float, ...]:
    """(bits, characters, spaces) of texts."""
    return bits, float(sum(map(len, texts))), float(sum(text.count(" ") for text in texts))


def plus(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


# ---- reading ---------------------------------------------------------------------------------------------------------


def derivations(text: str, level: int = 4) -> tuple[list[float], int]:
    """The probability of each way to write a text, and how far the text begins as a story does, in characters."""
    found: list[float] = []
    furthest = 0
    # Still to be read, place in the text, what is known, probability.
    ahead: list[tuple[tuple[str | Mention, ...], int, dict[str, str], float]] = [((start(level),), 0, {}, 1.0)]
    while ahead:
        agenda, at, known, p = ahead.pop()
        if not agenda:
            furthest = max(furthest, at)
            found += [p] if at == len(text) else []
            continue
        part, rest = agenda[0], agenda[1:]
        if isinstance(part, Mention) and part.symbol not in known:
            for choice in choices(part.symbol, known):
                parts = (spelled(choice.text, part),) if part.capital else choice.parts
                ahead.append(((*parts, *rest), at, {**known, part.symbol: choice.text}, p * choice.probability))
            continue
        expected = part if isinstance(part, str) else spelled(known[part.symbol], part)
        if text.startswith(expected, at):
            ahead.append((rest, at + len(expected), known, p))
        else:
            furthest = max(furthest, at + shared(expected, text[at : at + len(expected)]))
    return found, furthest


def shared(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def probability(text: str, level: int = 4) -> float:
    """How likely the grammar writes this very story; 0.0 for what is none."""
    return sum(derivations(text, level)[0])


def first_error(text: str, level: int = 4) -> int | None:
    """The first character at which no story of this level goes on as `text` does, or its length where it is cut short.
    None where it is a whole story."""
    found, furthest = derivations(text, level)
    return None if found else furthest
