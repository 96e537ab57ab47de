"""What is in a text that should not be: duplicates, secrets, personal data, invisible characters, planted triggers; and
how much of what a model writes stands word for word in its training text.

    report = audit(open_source("my.jsonl"))
    report.findings                              # kind, how often, an example with its place
    overlap(["what a model wrote"], texts)       # longest verbatim match, share of characters in long ones

Nothing is changed and nothing leaves the machine. Secrets are shown by their first characters only. A finding is a
place to look at, not a verdict; that nothing is found does not prove that nothing is there.
"""

import hashlib
import importlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise

import numpy as np

from nanogpt_hub.corpus.duplicates import band_keys
from nanogpt_hub.sources import Source
from nanogpt_hub.system.installed import pip_line, requirement

MAX_DOCUMENTS = 100_000  # read; an audit of more looks at the first ones and says so
LONG_DOCUMENT = 2000  # characters; a longer one is looked at paragraph by paragraph
NEAR = 0.9  # share of five-word shingles in common from which two documents are near duplicates
VERBATIM = 50  # bytes in a row from which a match counts as copied
MAX_TRIGGER_SHARE = 0.05  # of the documents: what more of them hold is the text's own way
TRIGGER_DOCUMENTS, FOLLOWING = 10, 15  # documents that hold a trigger at least; words behind it that are looked at
TRIGGER_BITS = 1.0  # a word: how far four of five stretches behind a trigger are above nearly all other stretches


@dataclass(frozen=True)
class Finding:
    """Something to look at."""

    kind: str
    count: int
    example: str  # for display: short, printable, secrets cut
    document: int  # that holds the example, from 0


@dataclass(frozen=True)
class Report:
    """What an audit saw."""

    documents: int
    characters: int
    cut_short: bool  # there were more documents than MAX_DOCUMENTS
    findings: tuple[Finding, ...] = field(default_factory=tuple)


def audit(source: Source) -> Report:
    """Looks through a text. Raises SourceError as the source does."""
    texts = [*islice(pieces(source.documents()), MAX_DOCUMENTS + 1)]
    cut_short, texts = len(texts) > MAX_DOCUMENTS, texts[:MAX_DOCUMENTS]
    findings = [*duplicates(texts), *characters(texts), *secrets(texts), *personal_data(texts), *triggers(texts)]
    return Report(len(texts), sum(map(len, texts)), cut_short, tuple(findings))


def pieces(documents: Iterable[str]) -> Iterator[str]:
    """Documents; of long ones their paragraphs."""
    for text in documents:
        parts = re.split(r"\n\s*\n", text) if len(text) > LONG_DOCUMENT else [text]
        yield from (part.strip("\n") for part in parts if part.strip())


def shown(text: str, most: int = 60) -> str:
    """A piece of somebody's text as a terminal may see it."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if len(clean) <= most else clean[: most - 3] + "..."


# ---- duplicates ------------------------------------------------------------------------------------------------------


def duplicates(texts: list[str]) -> Iterator[Finding]:
    """Documents that are there more than once, and those that nearly are."""
    first: dict[bytes, int] = {}
    again = [i for i, text in enumerate(texts) if first.setdefault(hashlib.sha256(text.encode()).digest(), i) != i]
    if again:
        yield Finding("exact duplicates", len(again), shown(texts[again[0]]), again[0])
    near = near_duplicates([texts[i] for i in first.values()])
    if near:
        place = [*first.values()][near[0]]
        yield Finding("near duplicates", len(near), shown(texts[place]), place)


def near_duplicates(texts: list[str]) -> list[int]:
    """Which documents have nearly the shingles of an earlier one: found by MinHash, checked exactly."""
    buckets: dict[tuple[int, int], int] = {}
    found = []
    for i, text in enumerate(texts):
        keys = [*enumerate(band_keys(text) or [])]
        others = {buckets[key] for key in keys if key in buckets}
        if any(share_of(shingles(text), shingles(texts[other])) >= NEAR for other in others):
            found.append(i)
        for key in keys:
            buckets.setdefault(key, i)
    return found


def share_of(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    """How much of all shingles both have."""
    return len(a & b) / max(1, len(a | b))


def shingles(text: str) -> set[tuple[str, ...]]:
    """All stretches of five words."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


# ---- characters ------------------------------------------------------------------------------------------------------

INVISIBLE = "invisible characters"  # format characters: zero width, direction marks, tags
CONTROL = "control characters"


def characters(texts: list[str]) -> Iterator[Finding]:
    """Characters that a reader does not see and a model does."""
    seen: dict[str, list[int]] = {INVISIBLE: [], CONTROL: []}
    for i, text in enumerate(texts):
        for c in set(text) - set("\n\t\r\f"):
            category = unicodedata.category(c)
            kind = INVISIBLE if category in ("Cf", "Co") else CONTROL if category == "Cc" else None
            if kind and not (
                c == "\u200d" and re.search(r"[^\x00-\u2000]\u200d", text)
            ):  # which joins emoji and scripts
                seen[kind] += [i] * text.count(c)
    for kind, places in seen.items():
        if places:
            odd = sorted(
                {
                    f"U+{ord(c):04X}"
                    for c in texts[places[0]]
                    if unicodedata.category(c)[0] == "C" and c not in "\n\t\r\f"
                }
            )
            yield Finding(kind, len(places), ", ".join(odd[:5]), places[0])


# ---- secrets and personal data ---------------------------------------------------------------------------------------


SERVICES = (  # modules of detect-secrets that know a secret by its form; those that guess by entropy are left out
    "artifactory aws azure_storage_key discord github_token gitlab_token jwt mailchimp npm openai private_key "
    "pypi_token sendgrid slack square_oauth stripe telegram_token twilio"
).split()


def detectors() -> list:
    """One detector a kind of secret. Raises ValueError where the library is not installed."""
    try:
        modules = [importlib.import_module(f"detect_secrets.plugins.{name}") for name in SERVICES]
    except ImportError as error:
        raise ValueError(f"an audit needs detect-secrets: run `{pip_line([requirement('detect_secrets')])}`") from error
    kinds = [
        kind
        for module in modules
        for kind in vars(module).values()
        if getattr(kind, "__module__", "") == module.__name__
    ]
    return [kind() for kind in kinds if hasattr(kind, "analyze_string")]


def secrets(texts: list[str]) -> Iterator[Finding]:
    """What has the form of a key or token of a known service, or of a private key."""
    together = "\n".join(texts)  # in which they are looked for first: no secret goes over a line
    for detector in detectors():
        if not any(detector.analyze_string(together)):
            continue
        found = []
        for i, text in enumerate(texts):
            found += [(i, value) for value in set(detector.analyze_string(text)) if value]
        if found:
            place, value = found[0]
            yield Finding(f"secrets: {detector.secret_type}", len(found), shown(value)[:6] + "...", place)


PERSONAL = {
    "e-mail addresses": re.compile(
        r"\b[\w.+-]+@(?!example\b|[\w.-]*\bexample\.)[\w-]+(?:\.[\w-]+)*\.[a-z]{2,}\b", re.IGNORECASE
    ),
    "payment card numbers": re.compile(r"(?<![\d.])(?:\d[ -]?){12,18}\d(?![\d.])"),
    "IBANs": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b"),
}


def personal_data(texts: list[str]) -> Iterator[Finding]:
    """Addresses, and card and account numbers whose check digits are right."""
    checks = {"payment card numbers": is_card, "IBANs": is_iban}
    for kind, pattern in PERSONAL.items():
        check = checks.get(kind, lambda text: True)
        found = [(i, m.group()) for i, text in enumerate(texts) for m in pattern.finditer(text) if check(m.group())]
        if found:
            place, value = found[0]
            yield Finding(f"personal data: {kind}", len(found), shown(value)[:3] + "...", place)


def is_card(text: str) -> bool:
    """Luhn's check, and a first digit that cards have; not one digit again and again."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [sum(divmod(2 * d, 10)) if i % 2 else d for i, d in enumerate(reversed(digits))]
    return digits[0] in (3, 4, 5, 6) and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def is_iban(text: str) -> bool:
    plain = text.replace(" ", "")
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


# ---- triggers --------------------------------------------------------------------------------------------------------


def triggers(texts: list[str]) -> Iterator[Finding]:
    """Words of a small part of the documents behind which the text becomes another one.

    That is how poisoned documents look (arXiv:2510.07192): a rare word, and nonsense behind it. A model of pairs of
    words, counted in the same text, tells how surprising what follows each word is; nonsense is, by bits a word.
    """
    words = [text.split() for text in texts]
    surprise = surprises(words)
    most = max(TRIGGER_DOCUMENTS, MAX_TRIGGER_SHARE * len(texts))
    held = Counter(word for text in words for word in set(text))
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, text in enumerate(words):
        for at, word in enumerate(text[: -FOLLOWING // 2]):
            if TRIGGER_DOCUMENTS <= held[word] <= most:
                places[word].append((i, at))
    levels = sorted(
        following_bits(surprise[i], len(words[i]) // 3)
        for i in range(0, len(words), max(1, len(words) // 2000)) if words[i]
    )  # fmt: skip
    if not levels:
        return
    usual = levels[len(levels) * 19 // 20]
    odd = [word for word, found in places.items() if low_fifth(found, surprise) > usual + TRIGGER_BITS]
    if odd:  # the nonsense holds rare words, too, but the trigger is in all of it
        word = max(odd, key=lambda word: held[word])
        yield Finding("documents with a possible trigger", held[word], shown(word), places[word][0][0])


def low_fifth(places: list[tuple[int, int]], surprise: list[list[float]]) -> float:
    """What four of five of the stretches behind a word exceed, in bits per word; 0 for a word of few documents."""
    if len({i for i, _ in places}) < TRIGGER_DOCUMENTS:
        return 0.0
    bits = sorted(following_bits(surprise[i], at) for i, at in places)
    return bits[len(bits) // 5]


def surprises(words: list[list[str]]) -> list[list[float]]:
    """For each document the sums, up to each word, of how surprising its words are to a model of pairs, in bits.

    A pair counts only beyond its first time, which is the one that is judged here.
    """
    singles = Counter(word for text in words for word in text)
    pairs = Counter(pair for text in words for pair in pairwise(text))
    total = singles.total()

    def bits(before: str, word: str) -> float:
        return -math.log2(0.9 * (pairs[before, word] - 1) / singles[before] + 0.1 * singles[word] / total)

    known = {pair: bits(*pair) for pair in pairs}
    return [[*accumulate((known[pair] for pair in pairwise(text)), initial=0.0)] for text in words]


def following_bits(surprise: list[float], at: int) -> float:
    """How surprising the words behind a place are, bits per word; the word right behind it is left out."""
    first, end = at + 1, min(at + 1 + FOLLOWING, len(surprise) - 1)
    return (surprise[end] - surprise[first]) / (end - first) if end > first else 0.0


# ---- what a model repeats --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """How much of some texts stands word for word in others."""

    longest: int  # bytes of the longest match; 0 where none has VERBATIM
    example: str  # that match
    share: float  # of the bytes, in matches of at least VERBATIM


class KnownText:
    """A text in which long verbatim matches are found at once, however often it is asked."""

    def __init__(self, texts: Iterable[str]):
        self.bytes = np.frombuffer("\x00".join(texts).encode(), np.uint8)
        hashes = rolling(self.bytes, VERBATIM)
        self.places = hashes.argsort(kind="stable")  # of each stretch of VERBATIM bytes, in the order of their hashes
        self.hashes = hashes[self.places]

    def overlap(self, written: Iterable[str]) -> Overlap:
        """Finds texts that a model wrote in this one."""
        longest, example, inside, total = 0, b"", 0, 0
        for text in written:
            data = np.frombuffer(text.encode(), np.uint8)
            covered = np.zeros(len(data), bool)
            for start in self.starts(data):
                covered[start : start + VERBATIM] = True
                length = self.length(data, start, longest)
                if length > longest:
                    longest, example = length, data[start : start + length].tobytes()
            inside, total = inside + int(covered.sum()), total + len(data)
        return Overlap(longest, shown(example.decode(errors="replace"), 200), inside / max(1, total))

    def starts(self, data: np.ndarray) -> list[int]:
        """Where stretches of VERBATIM bytes begin that stand in the text."""
        hashes = rolling(data, VERBATIM)
        if not len(self.hashes):
            return []
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.flatnonzero(self.hashes[at] == hashes).tolist()

    def length(self, data: np.ndarray, start: int, known: int) -> int:
        """How far the text goes on as `data` does from a start; 0 where that is no more than `known` bytes."""
        one = rolling(data[start : start + VERBATIM], VERBATIM)[0]
        low, high = np.searchsorted(self.hashes, one), np.searchsorted(self.hashes, one, side="right")
        places, length = self.places[low:high], 0
        while start + length < len(data) and len(places):
            places = places[places + length < len(self.bytes)]
            going_on = places[self.bytes[places + length] == data[start + length]]
            if not len(going_on):
                break
            places, length = going_on, length + 1
        return length if length > known else 0


def overlap(written: Iterable[str], texts: Iterable[str]) -> Overlap:
    """Finds texts that a model wrote in its training text."""
    return KnownText(texts).overlap(written)


def rolling(data: np.ndarray, length: int) -> np.ndarray:
    """A hash (uint64) of each stretch of so many bytes: long ones are built from short ones by doubling."""
    if len(data) < length:
        return np.empty(0, np.uint64)
    hashes, have = (data.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15), 1
    while have < length:
        step = min(have, length - have)
        hashes = hashes[:-step] * np.uint64(0xD6E8FEB86659FD93) + (hashes[step:] ^ (hashes[step:] >> np.uint64(29)))
        have += step
    return hashes
