"""Exercise 12: the advantages of a group."""


def advantages(rewards: list[float]) -> list[float]:
    """How much better than its group each text is: (reward - mean) / standard deviation.

    The standard deviation is that of the group itself (divide by n, not by n - 1). Where all rewards are the same there
    is nothing to learn: all advantages are 0.
    """
    raise NotImplementedError("write advantages: take the mean off each reward, and divide by the standard deviation")
