"""The entropy of stories by counting: ten million characters, against the figure computed from the grammar.

    python -m benchmarks.stories [--characters 10000000] [--model out/stories/best]

Stories of level 4 are cut into their choices by a regular expression that knows the words between them and nothing of
the grammar's weights. Each choice's entropy is counted: its frequencies given what it depends on, with the bias of
counting taken off (Miller and Madow: (different values - 1) / 2N nats). Takes half a minute.

--model measures a model trained on stories of level 4 instead: on new stories, each read from its beginning, the loss
less what the grammar says of these very stories, and how many of 200 stories that it writes itself are flawless.
"""

import argparse
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice

import torch

from benchmarks.common import table
from nanogpt_hub import generate, load_model
from nanogpt_hub.corpus.stories import entropy, first_error, probability, stories
from nanogpt_hub.sources import open_source

STORY = re.compile(
    r"""
    (?: (?P<opening>Once)\ upon\ a\ time\ there\ was\ a\ (?P<trait1>\w+)\ (?P<animal1>\w+)\ called\ (?P<name1>\w+)\.
      | (?:In\ (?P<place2>[a-z ]+)\ lived\ (?P<name2>\w+),\ a\ (?P<trait2>\w+)\ (?P<animal2>\w+)\.)
      | (?:This\ is\ the\ story\ of\ (?P<name3>\w+),\ a\ (?P<trait3>\w+)\ (?P<animal3>\w+)\ from\ (?P<place3>[a-z ]+)\.)
    )\ (?P<wanting>More\ than\ anything|\w+\ had\ only|Every\ night).+?to:?\ (?P<wish>[a-z ]+)\.
    \ (?P<packing>So\ \w+\ packed|One\ (?P<weather>\w+)\ morning|(?:She|He)\ took).+?
      (?P<thing>an?\ [a-z ]+?)(?:,|\ and)\ (?P<other>an?\ [a-z ]+?)\ (?:and\ set|into|and\ a\ sandwich).*?\.
    \ (?:(?P<meeting>Soon)\ \w+\ came\ to|After\ (?P<number>\w+)\ days\ \w+\ stood\ before)\ (?P<obstacle>[a-z ]+)\.
    \ "(?P<sound>\w+)(?P<saying>!|,)"\ said\ (?:\w+\.|the\ \w+,\ "what\ now\?")
    \ (?P<failure>\w+\ looked\ at|What\ good)?.*,\ (?P<end>[a-z ,A-Z]+)\.
    """,
    re.VERBOSE,
)
DEPENDS = {  # each choice, and what it depends on
    "opening": (), "name": (), "trait": (), "animal": (), "place": ("opening",), "wanting": (), "wish": (),
    "packing": (), "weather": ("packing",), "thing": (), "other": ("thing",), "meeting": (), "number": ("meeting",),
    "obstacle": ("thing", "other"), "sound": ("animal",), "saying": (), "happy": ("thing", "other", "obstacle"),
    "failure": ("happy",), "end": ("happy", "trait"),
}  # fmt: skip


def read(text: str) -> dict[str, str]:
    """The choices of a story, as words of its text."""
    found = STORY.fullmatch(text)
    if found is None:
        raise ValueError(f"not read: {text}")
    parts = {key: value or "" for key, value in found.groupdict().items()}
    for name in ("name", "trait", "animal", "place"):
        parts[name] = "".join(parts.pop(f"{name}{form}", "") for form in "123")
    parts["opening"] = text.split()[0]
    parts["packing"] = parts["packing"].split()[0].replace("She", "He")
    parts["wanting"] = parts["wanting"].split()[0].replace("She", "He")
    parts["failure"] = parts["failure"].split()[-1] if parts["failure"] else ""
    parts["happy"] = str("That very night" in text)
    parts["end"] = re.sub(r"^.*went home, |^.*That very night [^,]*, ", "", text)
    return parts


def count(found: Iterable[dict[str, str]]) -> dict[str, float]:
    """The entropy of each choice, bits per story."""
    seen: dict[str, dict[tuple, Counter]] = {choice: defaultdict(Counter) for choice in DEPENDS}
    total = 0
    for parts in found:
        total += 1
        for choice, keys in DEPENDS.items():
            seen[choice][tuple(parts[key] for key in keys)][parts[choice]] += 1
    return {choice: sum(map(bits, counts.values())) / total for choice, counts in seen.items()}


def bits(counter: Counter) -> float:
    """Entropy times observations, the bias of counting taken off."""
    n = counter.total()
    plain = sum(-k * math.log2(k / n) for k in counter.values())
    return plain + (len(counter) - 1) / 2 / math.log(2)


def measure_model(folder: str) -> list[dict[str, object]]:
    """Loss and entropy of new stories, nats per token, and shares of the stories that the model writes."""
    model, tokenizer = load_model(folder)
    texts, loss, surprisal, tokens = [*islice(stories(4, seed=10_000), 300)], 0.0, 0.0, 0
    for text in texts:
        ids = [tokenizer.eot_id, *tokenizer.encode(text), tokenizer.eot_id][: model.config.block_size + 1]
        idx = torch.tensor([ids])
        with torch.inference_mode():
            loss += model(idx[:, :-1], idx[:, 1:])[1].item() * (len(ids) - 1)
        surprisal -= math.log(probability(text))
        tokens += len(ids) - 1
    written = generate(model, tokenizer, [""] * 200, max_new_tokens=200, temperature=1.0, seed=1)
    flawless = [result.text for result in written if first_error(result.text) is None]
    return [
        {"measure": "loss on new stories, nats per token", "value": loss / tokens},
        {"measure": "the same by the grammar", "value": surprisal / tokens},
        {"measure": "distance", "value": (loss - surprisal) / tokens},
        {"measure": "flawless of 200 written", "value": len(flawless)},
        {"measure": "different ones", "value": len(set(flawless))},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=10_000_000)
    parser.add_argument("--model", help="a model folder to measure")
    args = parser.parse_args()
    if args.model:
        print(table(measure_model(args.model)))
        return
    texts = [*open_source(f"stories:size={args.characters}").documents()]
    counted = count(map(read, texts))
    print(table([{"choice": choice, "bits": value} for choice, value in counted.items()]))
    exact, characters = entropy(4), sum(map(len, texts))
    print(f"\n{characters:,} characters, {len(texts):,} stories")
    print(f"counted  {sum(counted.values()):.3f} bits per story, {characters / len(texts):.2f} characters")
    print(f"computed {exact.bits:.3f} bits per story, {exact.characters:.2f} characters")
    print(f"ratio    {sum(counted.values()) / exact.bits:.5f}")


if __name__ == "__main__":
    main()
