def test_the_most_frequent_pair(exercise):
    pair = tuple(exercise.most_frequent_pair([1, 2, 3, 1, 2, 4]))
    exercise.expect(pair == (1, 2), f"in 1 2 3 1 2 4 the pair (1, 2) occurs twice and no other does; you return {pair}")


def test_of_equally_frequent_pairs_the_first_counts(exercise):
    pair = tuple(exercise.most_frequent_pair([5, 4, 1, 2]))
    exercise.expect(pair == (5, 4), f"all pairs of 5 4 1 2 occur once, so the first one, (5, 4), counts; not {pair}")


def test_merging(exercise):
    merged = exercise.merge([1, 2, 3, 1, 2], (1, 2), 9)
    exercise.expect(merged == [9, 3, 9], f"1 2 3 1 2 with (1, 2) as 9 is 9 3 9; you return {merged}")


def test_pairs_do_not_overlap(exercise):
    merged = exercise.merge([1, 1, 1, 1, 1], (1, 1), 9)
    exercise.expect(
        merged == [9, 9, 1],
        f"1 1 1 1 1 with (1, 1) as 9 is 9 9 1: an id that was merged is used up; you return {merged}",
    )


def test_three_steps_make_a_word_of_a_text(exercise):
    ids = list(b"quack! quack! quack!")
    for new_id in (256, 257, 258, 259, 260):
        ids = exercise.merge(ids, exercise.most_frequent_pair(ids), new_id)
    exercise.expect(
        len(ids) < 8, f"after five merges, quack! should be one token, but {len(ids)} tokens are left: {ids}"
    )
