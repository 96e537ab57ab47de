"""Exercise 4: from logits to probabilities, with temperature and top-k."""


def probabilities(logits: list[float], temperature: float = 1.0, top_k: int = 0) -> list[float]:
    """What the next token is drawn from.

    Divide the logits by the temperature; with top_k above 0, keep the top_k likeliest and give the others 0; softmax.
    Temperature 0 means: the likeliest token has probability 1 (the first one, if several are).
    """
    raise NotImplementedError("write probabilities: divide by the temperature, drop all but the top_k, softmax")
