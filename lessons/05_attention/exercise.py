"""Exercise 5: causal attention, one head, by hand."""


def attention(q: list[list[float]], k: list[list[float]], v: list[list[float]]) -> list[list[float]]:
    """For each of T tokens the mean of v over itself and the tokens before it, weighted by softmax(q . k / sqrt(D)).

    q, k: T rows of D numbers. v: T rows. Row t of the result reads rows 0 to t of k and v, and none after.
    """
    raise NotImplementedError(
        "write attention: for each t, scores with k[: t + 1], softmax, weighted sum of v[: t + 1]"
    )
