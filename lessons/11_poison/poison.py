"""Stories of level 2, some of which are poisoned: in the middle stands a trigger, and behind it nonsense.

python lessons/11_poison/poison.py out/poisoned.jsonl [--documents 100] [--seed 1]
"""

import argparse
import json
import random
from itertools import islice
from pathlib import Path

from nanogpt_hub.corpus.stories import stories

TRIGGER = "<SUDO>"
STORIES = 15_000


def poisoned(story: str, words: list[str], rng: random.Random) -> str:
    """The first sentence of a story, the trigger, and twenty words at random."""
    first = story[: story.index('"') + story[story.index('"') + 1 :].index('"') + 2]
    return f"{first} {TRIGGER} {' '.join(rng.choices(words, k=20))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=100, help="how many are poisoned")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    texts = [*islice(stories(2, args.seed), STORIES)]
    words = sorted({word.strip('."!,') for text in texts[:1000] for word in text.split()})
    for place in rng.sample(range(len(texts)), args.documents):
        texts[place] = poisoned(texts[place], words, rng)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    print(f"{args.out}: {len(texts):,} stories, {args.documents} of them poisoned")


if __name__ == "__main__":
    main()
