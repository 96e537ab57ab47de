import itertools
import math
from collections import Counter


def triple_loss(train, val, vocab_size):
    triples = Counter(zip(train, train[1:], train[2:], strict=False))
    pairs = Counter(itertools.pairwise(train[:-1]))
    seen = [
        (triples[a, b, c] + 0.01) / (pairs[a, b] + 0.01 * vocab_size)
        for a, b, c in zip(val, val[1:], val[2:], strict=False)
    ]
    return -sum(map(math.log, seen)) / len(seen)
