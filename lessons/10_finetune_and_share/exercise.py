"""Exercise 10: what a chat model learns from."""

IGNORE = -100  # a target with this value carries no loss


def inputs_and_targets(prompt: list[int], answer: list[int], end: int) -> tuple[list[int], list[int]]:
    """What a model reads, and what it has to predict at each place, for one prompt and its answer.

    It reads the prompt and the answer. At each place the target is the token that follows; after the answer that is
    `end`. Only the answer and the end are learned: targets that are tokens of the prompt are IGNORE.
    """
    raise NotImplementedError(
        "write inputs_and_targets: ids = prompt + answer + [end]; inputs ids[:-1], targets ids[1:]"
    )
