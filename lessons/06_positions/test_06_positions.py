import math


def dot(a, b):
    return a[0] * b[0] + a[1] * b[1]


def test_position_0_changes_nothing(exercise):
    turned = exercise.turn((3.0, 4.0), 0, 0.7)
    exercise.expect(math.dist(turned, (3, 4)) < 1e-9, f"at position 0 nothing is turned; you return {turned}")


def test_a_quarter_turn(exercise):
    turned = exercise.turn((1.0, 0.0), 1, math.pi / 2)
    exercise.expect(
        math.dist(turned, (0, 1)) < 1e-9,
        f"(1, 0) turned counter-clockwise by a quarter is (0, 1); you return {turned}. Is the sign of a sine wrong?",
    )


def test_the_length_stays(exercise):
    turned = exercise.turn((3.0, 4.0), 11, 0.3)
    exercise.expect(abs(math.hypot(*turned) - 5) < 1e-9, f"turning keeps the length of (3, 4), 5; yours: {turned}")


def test_scores_depend_on_the_distance_alone(exercise):
    q, k = (0.5, -1.2), (2.0, 0.3)
    near = dot(exercise.turn(q, 7, 0.2), exercise.turn(k, 4, 0.2))
    far = dot(exercise.turn(q, 107, 0.2), exercise.turn(k, 104, 0.2))
    exercise.expect(
        abs(near - far) < 1e-9,
        f"a query at 7 and a key at 4 must score what they do at 107 and 104, {near:.4f}, but there it is {far:.4f}: "
        "the angle must be position * angle, nothing else",
    )
