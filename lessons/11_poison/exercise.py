"""Exercise 11: the longest passage that a model repeats word for word."""


def longest_match(text: str, corpus: str) -> str:
    """The longest part of `text` that stands in `corpus`; of equally long ones the first in `text`; "" for none.

    It takes less than a second for 300 characters in 100,000, if you see that where a part is not in the corpus, no
    longer part that holds it is: so move two ends through the text, and never back.
    """
    raise NotImplementedError("write longest_match: while text[start:end] is in the corpus move end, else move start")
