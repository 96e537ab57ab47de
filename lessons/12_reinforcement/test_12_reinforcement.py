def close(a, b):
    return len(a) == len(b) and all(abs(x - y) < 1e-6 for x, y in zip(a, b, strict=True))


def test_two_texts(exercise):
    found = exercise.advantages([1.0, 0.0])
    exercise.expect(
        close(found, [1, -1]),
        f"of the rewards 1 and 0 the mean and the deviation are 1/2, so 1 and -1; you return {found}. "
        "Do you divide by n - 1?",
    )


def test_a_rare_success_counts_more(exercise):
    found = exercise.advantages([1.0, 0.0, 0.0, 0.0])
    exercise.expect(
        close(found, [3**0.5, *[-(3**-0.5)] * 3]),
        f"one success among four has the advantage sqrt(3) = 1.732, the others -0.577 each; you return {found}",
    )


def test_the_size_of_rewards_does_not_matter(exercise):
    found = exercise.advantages([100.0, 0.0])
    exercise.expect(close(found, [1, -1]), f"100 and 0 teach what 1 and 0 do: 1 and -1; you return {found}")


def test_where_all_are_alike_there_is_nothing_to_learn(exercise):
    try:
        found = exercise.advantages([1.0, 1.0, 1.0])
    except ZeroDivisionError:
        found = "a division by zero"
    exercise.expect(found == [0, 0, 0], f"three successes of three: all advantages are 0; you return {found}")
