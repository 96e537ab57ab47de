"""Exercise 1: look back two tokens instead of one."""


def triple_loss(train: list[int], val: list[int], vocab_size: int) -> float:
    """The loss on `val`, in nats per token, of a model that has counted triples in `train`.

    It predicts each token of val from the third on. The probability of token c after a, b is

        (count of a, b, c in train + 0.01) / (count of a, b, followed by anything, in train + 0.01 * vocab_size)

    and the loss is the mean of -ln(probability).
    """
    raise NotImplementedError("write triple_loss: count (a, b, c) with a collections.Counter, then average -ln(p)")
