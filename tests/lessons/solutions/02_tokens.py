import itertools
from collections import Counter


def most_frequent_pair(ids):
    return Counter(itertools.pairwise(ids)).most_common(1)[0][0]  # of equals, the one that was seen first


def merge(ids, pair, new_id):
    merged, i = [], 0
    while i < len(ids):
        found = tuple(ids[i : i + 2]) == tuple(pair)
        merged.append(new_id if found else ids[i])
        i += 2 if found else 1
    return merged
