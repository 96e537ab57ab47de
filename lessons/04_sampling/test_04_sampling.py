import math


def close(a, b):
    return len(a) == len(b) and all(abs(x - y) < 1e-6 for x, y in zip(a, b, strict=True))


def test_temperature_1_is_softmax(exercise):
    p = exercise.probabilities([math.log(1), math.log(3)])
    exercise.expect(close(p, [0.25, 0.75]), f"logits ln 1 and ln 3 are probabilities 1/4 and 3/4; you return {p}")


def test_a_low_temperature_sharpens(exercise):
    p = exercise.probabilities([math.log(1), math.log(3)], temperature=0.5)
    exercise.expect(
        close(p, [0.1, 0.9]),
        f"at temperature 0.5 the odds 1:3 become 1:9, so 0.1 and 0.9; you return {p}. Divide the logits.",
    )


def test_temperature_0_takes_the_likeliest(exercise):
    try:
        p = exercise.probabilities([1.0, 5.0, 5.0], temperature=0)
    except ZeroDivisionError:
        p = "a division by zero"
    exercise.expect(p == [0, 1, 0], f"temperature 0 takes the first of the likeliest: [0, 1, 0]; you return {p}")


def test_top_k_keeps_the_likeliest_and_they_sum_to_one(exercise):
    p = exercise.probabilities([math.log(x) for x in (4, 1, 3, 2)], top_k=2)
    exercise.expect(
        close(p, [4 / 7, 0, 3 / 7, 0]),
        f"of 4:1:3:2 the two likeliest are 4 and 3, so 4/7 and 3/7, and nothing for the others; you return {p}",
    )


def test_top_k_may_be_larger_than_the_vocabulary(exercise):
    p = exercise.probabilities([0.0, 0.0], top_k=50)
    exercise.expect(close(p, [0.5, 0.5]), f"with two tokens, a top_k of 50 keeps both; you return {p}")
