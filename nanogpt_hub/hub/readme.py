"""A README.md on the Hub: metadata, one block that is generated, and around it the words of people.

The block between two comment markers is written anew each time; what a person writes above or below it, and the
metadata keys they add, stay, whether they wrote them in the folder or on the Hub's website.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import CardData, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from nanogpt_hub.hub.plain_yaml import PlainYamlError, read_mapping

MARK = "<!-- nanogpt_hub: begin of what each push rewrites; words {} -->"
BEGIN = re.compile(re.escape(MARK).replace(r"\{\}", "([0-9a-f]{12})"))
END = "<!-- nanogpt_hub: end -->"
MEASURED_ON = ", validation part"  # how the names of our measurements in the model-index end


class CardError(ValueError):
    """A README.md whose metadata cannot be read or would be refused by the Hub."""


@dataclass(frozen=True)
class Readme:
    """A README.md taken apart."""

    data: dict[str, Any]  # metadata
    before: str  # what a person wrote above the generated block
    block: str  # what is generated, without its markers; "" where there is none
    after: str  # what a person wrote below
    mark: str  # `words` as they were when we wrote last; "" where we never did

    @property
    def words(self) -> str:
        """A digest of what people wrote."""
        return hashlib.sha256(f"{self.before}\0{self.after}".encode()).hexdigest()[:12]

    @classmethod
    def parse(cls, text: str) -> "Readme":
        """Takes a README.md apart. Raises CardError when its metadata is no YAML mapping."""
        text = text.replace("\r\n", "\n")
        found = re.match(r"\s*---\n(.*?\n|)---(?:\n|\Z)", text, re.DOTALL)
        try:
            data = read_mapping(found[1], "the metadata at the top of README.md") if found else {}
        except PlainYamlError as error:
            raise CardError(str(error)) from None
        body = text[found.end() :] if found else text
        begin, end = BEGIN.search(body), body.rfind(END)
        if not begin or end < begin.end():
            return cls(data, "", "", body.strip(), "")
        before, block, after = body[: begin.start()], body[begin.end() : end], body[end + len(END) :]
        return cls(data, before.strip(), block.strip(), after.strip(), begin[1])

    def __str__(self) -> str:
        head = f"---\n{CardData(**self.data).to_yaml()}\n---"
        block = f"{MARK.format(self.mark)}\n\n{self.block}\n\n{END}" if self.block else ""
        return "\n\n".join(part for part in (head, self.before, block, self.after) if part) + "\n"


def update_readme(old: str, data: Mapping[str, Any], block: str, description: str = "") -> str:
    """A README.md with new metadata and a new block; the words around it and the keys that people added are kept.

    description: takes the place of the words above the block.
    """
    parts = Readme.parse(old)
    new = replace(parts, data=merge_metadata(parts, data), block=block.strip(), mark=parts.words)
    return str(replace(new, before=description.strip()) if description.strip() else new)


def merge_metadata(old: Readme, new: Mapping[str, Any]) -> dict[str, Any]:
    """The new keys over the old ones; tags and measurements of both, but for what our own earlier block claimed."""
    kept = dict(old.data)
    if f"[{kept.get('base_model')}]" in old.block:
        kept.pop("base_model", None)
        kept.pop("base_model_relation", None)
    tags = [tag for made in (new, kept) for tag in as_list(made.get("tags")) if isinstance(tag, str)]
    merged = {**new, **{k: v for k, v in kept.items() if k not in new}}
    if tags:
        merged["tags"] = [*dict.fromkeys(tags)]
    merged.pop("model-index", None)
    index = merge_results(kept.get("model-index"), new.get("model-index"))
    return {**merged, "model-index": index} if index else merged


def merge_results(old: Any, new: Any) -> list[dict[str, Any]]:
    """Measurements: ours as they are now, and those that a person wrote, which are on something else."""
    ours = [dict(model) for model in new or ()]
    for model in as_list(old):
        results = as_list(model.get("results")) if isinstance(model, dict) else []
        others = [result for result in results if not is_ours(result)]
        if not others:
            continue
        if ours:
            ours[0]["results"] = [*ours[0]["results"], *others]
        else:
            ours = [{**model, "results": others}]
    return ours


def is_ours(result: Any) -> bool:
    """Whether a measurement of the model-index was written here."""
    dataset = result.get("dataset") if isinstance(result, dict) else None
    return isinstance(dataset, dict) and str(dataset.get("name")).endswith(MEASURED_ON)


def merge_edits(local: str, remote: str) -> tuple[str, bool]:
    """What to push where the Hub has a README.md already: our block and metadata, and the words of people.

    The mark tells who has written since the last push. Words changed on the Hub stay; words changed only in the local
    folder are taken over. Where both were changed the Hub's stay, and True is returned beside the text.
    """
    ours, theirs = Readme.parse(local), Readme.parse(remote)
    merged = replace(ours, data=merge_metadata(theirs, ours.data), mark=ours.words)
    nothing_written = not (theirs.before or theirs.after or theirs.mark)
    if nothing_written or theirs.words in (theirs.mark, ours.words):
        return str(merged), False
    conflict = bool(ours.before or ours.after) and ours.words != theirs.mark
    mark = theirs.mark if conflict and theirs.mark else ours.words
    return str(replace(merged, before=theirs.before, after=theirs.after, mark=mark)), conflict


def validate_readme(text: str) -> None:
    """Raises CardError where the Hub would refuse a model's README.md or not understand it. Needs no network."""
    data = Readme.parse(text).data
    try:
        ModelCard(text)  # the client's own reading: YAML, types, model-index
        for base in as_list(data.get("base_model")):
            validate_repo_id(base)
    except (ValueError, TypeError, KeyError, HFValidationError) as error:
        raise CardError(f"the card's metadata is not valid: {one_line(error)}") from error
    for language in as_list(data.get("language")):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]{2,8})?|code|multilingual", str(language)):
            raise CardError(f"language is {language!r}; give ISO 639 codes such as en, or code")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(data.get("license", "mit"))):
        raise CardError(f"license is {data['license']!r}; give it as the Hub spells it, such as mit or apache-2.0")


def as_list(value: Any) -> list:
    return [*value] if isinstance(value, list | tuple) else [] if value is None else [value]


def one_line(text: object) -> str:
    return " ".join(str(text).split())
