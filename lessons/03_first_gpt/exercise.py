"""Exercise 3: the loss, by hand."""


def cross_entropy(logits: list[list[float]], targets: list[int]) -> float:
    """Mean over the rows of -ln softmax(row)[target], in nats.

    Logits may be as large as 1000, where exp() overflows: take the row's largest value off first.
    """
    raise NotImplementedError("write cross_entropy: for each row ln(sum(exp(logits))) - logits[target], then the mean")
