"""How far counting gets: losses of models that know nothing, frequencies, and pairs of words.

    python lessons/01_pairs/run.py [--level 1] [--seed 1]

Words and the end of a story are the tokens. The counts are of the first 9/10 of the stories, the losses of the rest.
"""

import argparse
import math
import re

import numpy as np

from nanogpt_hub.corpus.stories import entropy
from nanogpt_hub.sources import open_source

END = "<end>"


def tokens(source: str) -> list[str]:
    """All stories as words and punctuation, each with the space before it, and END after each story."""
    return [word for text in open_source(source).documents() for word in [*re.findall(r" ?\w+|[^\w]", text), END]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    words = tokens(f"stories:level={args.level},seed={args.seed},size=400000")
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    ids, V = np.array([vocabulary[word] for word in words]), len(vocabulary)
    train, val = np.split(ids, [len(ids) * 9 // 10])
    singles = np.bincount(train, minlength=V) + 1.0
    pairs = np.bincount(train[:-1] * V + train[1:], minlength=V * V).reshape(V, V) + 0.01
    print(f"different words: {V}")
    print(f"knowing nothing: {math.log(V):.4f}")
    print(f"knowing frequencies: {-np.log(singles / singles.sum())[val].mean():.4f}")
    print(f"knowing pairs: {-np.log(pairs / pairs.sum(1, keepdims=True))[val[:-1], val[1:]].mean():.4f}")
    print(f"entropy of the text: {entropy(args.level).nats_per_token(len(ids) / words.count(END)):.4f}")


if __name__ == "__main__":
    main()
