def test_the_same_losses_are_no_difference(exercise):
    exercise.expect(not exercise.beyond_noise([1.0, 1.1, 0.9], [1.0, 1.1, 0.9]), "equal losses are no difference")


def test_a_large_difference_with_little_noise_counts(exercise):
    exercise.expect(
        exercise.beyond_noise([1.00, 1.01, 0.99], [0.80, 0.81, 0.79]),
        "1.00, 1.01, 0.99 against 0.80, 0.81, 0.79: t is 24, so this is beyond noise",
    )


def test_the_same_difference_in_much_noise_does_not(exercise):
    exercise.expect(
        not exercise.beyond_noise([1.0, 1.3, 0.7], [0.8, 1.1, 0.5]),
        "1.0, 1.3, 0.7 against 0.8, 1.1, 0.5: t is 0.8, so chance may be all of it. Do you divide by the noise?",
    )


def test_it_does_not_matter_which_is_first(exercise):
    exercise.expect(
        exercise.beyond_noise([0.80, 0.81, 0.79], [1.00, 1.01, 0.99]),
        "worse is a difference too: compare the size of t, not its sign",
    )


def test_sample_variance(exercise):
    exercise.expect(
        not exercise.beyond_noise([1.0, 1.1], [1.2, 1.35]),
        "t is 2.5 with sample variances (divide by n - 1); do you divide by n?",
    )


def test_no_noise_at_all(exercise):
    try:
        answer = exercise.beyond_noise([1.0, 1.0], [0.9, 0.9])
    except ZeroDivisionError:
        answer = False
    exercise.expect(answer, "without any variance, 1.0 against 0.9 is a difference (and nothing to divide by)")
