"""Exercise 6: rotary positions, for one pair of numbers."""


def turn(pair: tuple[float, float], position: int, angle: float) -> tuple[float, float]:
    """The point (x, y), turned counter-clockwise around the origin by position * angle (radians)."""
    raise NotImplementedError("write turn: x cos a - y sin a, x sin a + y cos a, with a = position * angle")
