def test_a_loss_that_only_falls_never_stops(exercise):
    result = tuple(exercise.stop_at([3.0, 2.0, 1.0], 1))
    exercise.expect(result == (2, 2), f"3, 2, 1 only falls: training ends at index 2 and keeps it; you return {result}")


def test_patience_1_stops_at_the_first_rise(exercise):
    result = tuple(exercise.stop_at([3.0, 2.0, 2.5, 1.0], 1))
    exercise.expect(result == (2, 1), f"3, 2, 2.5 rises at index 2, the best was at 1: (2, 1); you return {result}")


def test_patience_2_sees_what_comes_after(exercise):
    result = tuple(exercise.stop_at([3.0, 2.0, 2.5, 1.0], 2))
    exercise.expect(result == (3, 3), f"with patience 2, index 3 is reached and is the best: (3, 3); not {result}")


def test_a_new_best_starts_the_count_anew(exercise):
    result = tuple(exercise.stop_at([3.0, 3.5, 2.0, 2.5, 2.6, 1.0], 2))
    exercise.expect(
        result == (4, 2),
        f"the rise at index 1 is forgotten with the new best at 2; two in a row are 3 and 4: (4, 2); not {result}",
    )


def test_as_good_as_before_is_no_new_best(exercise):
    result = tuple(exercise.stop_at([2.0, 2.0, 2.0], 2))
    exercise.expect(result == (2, 0), f"2, 2, 2 has its best at index 0 and stops at 2; you return {result}")
