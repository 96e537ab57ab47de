import math


def test_a_model_that_knows_nothing_has_the_loss_ln_v(exercise):
    loss = exercise.cross_entropy([[0.0] * 10, [0.0] * 10], [3, 7])
    exercise.expect(
        abs(loss - math.log(10)) < 1e-9,
        f"equal logits for 10 tokens give each the probability 1/10, so the loss is ln 10 = 2.3026; you return {loss}",
    )


def test_the_loss_is_the_mean_over_the_rows(exercise):
    loss = exercise.cross_entropy([[2.0, 0.0], [0.0, 0.0]], [0, 1])
    right = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    exercise.expect(abs(loss - right) < 1e-9, f"for these two rows the loss is {right:.4f}; you return {loss}")


def test_large_logits_do_not_overflow(exercise):
    try:
        loss = exercise.cross_entropy([[1000.0, 0.0], [0.0, -1000.0]], [1, 0])
    except OverflowError:
        loss = math.inf
    exercise.expect(
        abs(loss - 500) < 1e-6,
        f"logits 1000 and 0 with the second as target lose 1000 nats, the other row none: 500; you return {loss}. "
        "Take the row's largest logit off all of them before exp().",
    )
