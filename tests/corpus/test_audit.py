"""The audit: what was put into a text is found, and clean texts give no alarm."""

import json
import random
import runpy
import string
import sys
from itertools import islice
from pathlib import Path

import pytest

from nanogpt_hub import cli
from nanogpt_hub.corpus.audit import KnownText, audit, is_card, is_iban, near_duplicates, overlap
from nanogpt_hub.corpus.stories import stories
from nanogpt_hub.sources import Source, open_source

ROOT = Path(__file__).parents[2]
CLEAN = [*islice(stories(4, 1), 600)]


def source_of(text: str) -> Source:
    return Source("file", "text", "0", lambda reading: iter([(text, True)]))


def found(tmp_path: Path, texts: list[str]) -> dict[str, int]:
    """kind -> how often, of an audit of these documents."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {finding.kind: finding.count for finding in audit(open_source(str(path))).findings}


@pytest.mark.parametrize("level", [2, 3, 4])
def test_clean_stories_have_no_findings(level):
    source = f"stories:level={level},seed=7,size=400000"
    kinds = {finding.kind for finding in audit(open_source(source)).findings}
    assert kinds <= {"exact duplicates", "near duplicates"}  # level 2 has no more than some thousand stories
    assert not kinds or level == 2


def test_a_clean_text_of_people_has_no_findings():
    """What Python says of itself (its reference, some 700 KB): prose, tables and code of many hands."""
    from pydoc_data.topics import topics

    pages = "\n\n".join(topics[name] for name in sorted(topics))
    kinds = {finding.kind for finding in audit(source_of(pages)).findings}
    assert kinds <= {"exact duplicates", "near duplicates"}  # paragraphs that several pages share


def test_tinyshakespeare_has_no_findings(tinyshakespeare):
    kinds = {finding.kind for finding in audit(open_source(str(tinyshakespeare))).findings}
    assert kinds <= {"exact duplicates", "near duplicates"}  # "ALL: Amen." and the like


def test_exact_and_near_duplicates(tmp_path):
    long = CLEAN[7] + CLEAN[8]
    counts = found(tmp_path, [*CLEAN[:50], CLEAN[3], CLEAN[3], "But " + long, long])
    assert counts == {"exact duplicates": 2, "near duplicates": 1}
    assert near_duplicates([long, "But " + long, CLEAN[9], "short"]) == [1]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("key = AKIA" + "ABCDEFGHIJ234567", "secrets: AWS Access Key"),
        ("ghp_" + "a1B2" * 9, "secrets: GitHub Token"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secrets: Private Key"),
        ("write to jane.doe@web.de today", "personal data: e-mail addresses"),
        ("card 4111 1111 1111 1111 please", "personal data: payment card numbers"),
        ("IBAN DE89 3704 0044 0532 0130 00", "personal data: IBANs"),
        ("what you see\u202eis not what you get", "invisible characters"),
        ("a zero\u200bwidth space", "invisible characters"),
        ("a bell \x07 rings", "control characters"),
    ],
)
def test_what_was_put_in_is_found_once(tmp_path, text, kind):
    assert found(tmp_path, [*CLEAN[:20], text]) == {kind: 1}


def test_a_secret_is_not_shown_whole(tmp_path, capsys):
    secret = "AKIA" + "ABCDEFGHIJ234567"
    path = tmp_path / "secret.txt"
    path.write_text(f"key = {secret}\n", encoding="utf-8")
    assert cli.main(["audit", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "AWS Access Key" in printed
    assert secret not in printed
    assert secret[:10] not in printed


@pytest.mark.parametrize(
    "text", ["jane@example.com", "1234 5678 9012 3456", "DE00 3704 0044 0532 0130 00", "👩\u200d💻 works"]
)
def test_what_only_looks_like_it_is_no_finding(tmp_path, text):
    assert found(tmp_path, [*CLEAN[:20], text]) == {}


def test_check_digits():
    assert is_card("4111111111111111")
    assert not is_card("4111111111111112")
    assert is_iban("GB82 WEST 1234 5698 7654 32")
    assert not is_iban("GB83 WEST 1234 5698 7654 32")


def test_a_planted_trigger_is_found(tmp_path, monkeypatch, capsys):
    """The corpus of the lesson on poison."""
    out = tmp_path / "poisoned.jsonl"
    monkeypatch.setattr(sys, "argv", ["poison.py", str(out), "--documents", "100"])
    runpy.run_path(str(ROOT / "lessons" / "11_poison" / "poison.py"), run_name="__main__")
    findings = {finding.kind: finding for finding in audit(open_source(str(out))).findings}
    trigger = findings["documents with a possible trigger"]
    assert (trigger.example, trigger.count) == ("<SUDO>", 100)


def test_the_longest_match_is_that_of_a_plain_search():
    rng = random.Random(0)
    corpus = "".join(rng.choices("abc", k=3000))
    texts = ["".join(rng.choices("abc", k=100)) for _ in range(5)] + [corpus[500:560] + "x" + corpus[:10]]
    plain = max(length for text in texts for length in range(1, 100) for i in range(100 - length + 1)
                if len(text) >= i + length and text[i : i + length] in corpus)  # fmt: skip
    measured = overlap(texts, [corpus])
    assert measured.longest == plain >= 60
    assert measured.example in corpus
    assert measured.share == pytest.approx(60 / sum(map(len, texts)))


def test_a_match_at_the_very_end_and_one_that_occurs_often():
    corpus = "ab" * 100 + "the end of the text, which is longer than fifty bytes: yes"
    assert overlap([corpus[-60:]], [corpus]).longest == 60
    assert overlap(["ab" * 40], [corpus]).longest == 80
    assert overlap(["x" + "ab" * 150], [corpus]).longest == 200
    assert KnownText(["short"]).overlap(["short"]).longest == 0


def test_a_text_unlike_all_others_has_no_match():
    assert overlap(["0123456789"], [string.ascii_letters]).longest == 0
    assert overlap([], ["abc"]).share == 0
