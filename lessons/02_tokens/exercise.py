"""Exercise 2: one step of byte-pair encoding."""


def most_frequent_pair(ids: list[int]) -> tuple[int, int]:
    """The pair of neighbours that occurs most often; of equally frequent ones, that which comes first in the text."""
    raise NotImplementedError("write most_frequent_pair: count zip(ids, ids[1:])")


def merge(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """`ids` with each `pair` replaced by `new_id`, from left to right; an id is part of one pair at most."""
    raise NotImplementedError("write merge: walk through ids, and step over two of them where the pair is found")
