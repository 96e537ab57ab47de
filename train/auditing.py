"""What a run's text holds that it should not, told before training and in the card, and what its samples have by heart.

By itself a run looks through texts of its user's own that are short enough to take a moment; `data.audit always` looks
through any, as far as `nanogpt_hub.corpus.audit` does, and `never` through none.
"""

from typing import NamedTuple

from nanogpt_hub.corpus.audit import KnownText, Report, audit
from nanogpt_hub.hub.card import AuditFacts
from nanogpt_hub.sources import Source

from .config import TrainConfig
from .rows import RowSource

AUTO_BYTES = 2 * 10**6  # some seconds on one core
KNOWN_BYTES = 32 * 10**6  # what samples are looked for in takes 13 bytes of memory for each of the text
OWN = ("file", "folder", "url")  # kinds of sources; others are Python's, our own, or large


class Audited(NamedTuple):
    """What a look through a text gives a run."""

    lines: list[str]
    facts: AuditFacts
    known: KnownText | None  # the text itself, to look for samples in


def look_through(config: TrainConfig, source: Source | RowSource) -> Audited | None:
    """Looks through the training text; None where that is not wanted. Raises ValueError for rows, where it is asked
    for, and where the library for secrets is missing."""
    asked = config.data.audit
    if isinstance(source, RowSource):
        if asked == "always":
            raise ValueError(f"data.audit always is for data.format text, not {config.data.format}: leave it out")
        return None
    size = source.text_bytes or source.facts.get("bytes") or KNOWN_BYTES + 1
    if asked == "never" or (asked == "auto" and (source.kind not in OWN or size > AUTO_BYTES)):
        return None
    report = audit(source)
    known = KnownText(source.documents()) if size <= KNOWN_BYTES else None
    return Audited(lines_of(report), facts_of(report), known)


def lines_of(report: Report) -> list[str]:
    seen = f"{report.documents:,} documents or paragraphs" + (", which are not all of it" if report.cut_short else "")
    if not report.findings:
        return [f"audit: nothing found in {seen} (duplicates, secrets, personal data, odd characters, triggers)"]
    found = [f"audit: {f.count:,} {f.kind}; for example in number {f.document}: {f.example}" for f in report.findings]
    return [*found, f"audit: of {seen}; a finding is a place to look at, and --data.audit never looks for none"]


def facts_of(report: Report) -> AuditFacts:
    """For a card: no examples, which may be private."""
    findings = {finding.kind: finding.count for finding in report.findings}
    return {"documents": report.documents, "whole": not report.cut_short, "findings": findings}
