import torch
import torch.nn.functional as F


def test_the_first_token_sees_only_itself(exercise):
    y = exercise.attention([[1.0], [1.0]], [[5.0], [9.0]], [[2.0], [4.0]])
    exercise.expect(
        abs(y[0][0] - 2.0) < 1e-6,
        f"the first token has nothing to look at but itself, so it gets its own v, 2.0; you return {y[0]}. "
        "Do later tokens leak in?",
    )


def test_equal_scores_are_a_plain_mean(exercise):
    y = exercise.attention([[0.0]] * 3, [[1.0], [2.0], [3.0]], [[3.0], [6.0], [9.0]])
    exercise.expect(abs(y[2][0] - 6.0) < 1e-6, f"with q = 0 all scores are equal: the mean of 3, 6, 9 is 6; not {y[2]}")


def test_it_is_what_pytorch_computes(exercise):
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 4) for _ in range(3))
    y = torch.tensor(exercise.attention(q.tolist(), k.tolist(), v.tolist()))
    right = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    exercise.expect(
        torch.allclose(y, right, atol=1e-5),
        f"PyTorch computes something else (largest difference {(y - right).abs().max():.3f}). "
        "Are the scores divided by sqrt(D), D = 4 here?",
    )
