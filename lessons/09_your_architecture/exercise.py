"""Exercise 9: is it beyond noise?"""


def beyond_noise(before: list[float], after: list[float]) -> bool:
    """Whether two sets of losses (one per seed, two or more each) differ by more than chance.

    Welch's t: the difference of the means, divided by sqrt(var(before) / n + var(after) / m), where var is the sample
    variance (divide by n - 1). Say yes where |t| is above 4.3: with three seeds each, and in the worst case two degrees
    of freedom, chance alone goes there once in twenty times. Where both sets have no variance at all, any difference
    counts.
    """
    raise NotImplementedError("write beyond_noise: means, sample variances (statistics.variance), t, |t| > 4.3")
