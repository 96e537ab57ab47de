import math


def test_triples_that_were_never_seen_are_as_good_as_guessing(exercise):
    loss = exercise.triple_loss([0, 1, 2], [3, 3, 3, 3], 4)
    exercise.expect(
        abs(loss - math.log(4)) < 1e-6,
        f"nothing in train looks like val, so the loss is ln 4 = 1.3863, but you return {loss}. "
        "Is the 0.01 added to each count, and 0.01 * vocab_size to their sum?",
    )


def test_triples_that_were_seen_are_likely(exercise):
    loss = exercise.triple_loss([0, 1, 2] * 50, [0, 1, 2, 0, 1, 2], 3)
    exercise.expect(
        loss < 0.01, f"0, 1 is always followed by 2 in train, so the loss must be near 0, but you return {loss}. "
        "Which tokens does your count of (a, b) stand for?",
    )  # fmt: skip


def test_looking_back_two_tells_what_one_does_not(exercise):
    train = [0, 1, 2, 3, 1, 4] * 40  # after 1 comes 2 or 4: which of them depends on what was before the 1
    loss = exercise.triple_loss(train, train, 5)
    exercise.expect(
        loss < 0.05,
        f"0, 1 is followed by 2, and 3, 1 by 4, always; your loss of {loss:.3f} is that of a model that does not see "
        "the token before the last (0.693 / 3 = 0.231 or more). Do you look up both tokens?",
    )
