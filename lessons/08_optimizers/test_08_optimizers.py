import torch


def test_the_first_step_has_the_size_of_the_learning_rate(exercise):
    for grad in (0.001, 1000.0):
        w, _, _ = exercise.adamw_step(0.0, grad, 0.0, 0.0, 1, lr=0.1)
        exercise.expect(
            abs(w + 0.1) < 1e-3,
            f"whatever the gradient's size ({grad:g} here), the first step is -lr = -0.1; yours goes to {w}. "
            "Are m and v divided by 1 - beta ** step?",
        )


def test_weight_decay_does_not_go_through_the_gradient(exercise):
    w, m, v = exercise.adamw_step(10.0, 0.0, 0.0, 0.0, 1, lr=0.1, weight_decay=0.5)
    exercise.expect(
        abs(w - 9.5) < 1e-9 and m == 0 == v,
        f"with a gradient of 0, only decay acts: 10 - 0.1 * 0.5 * 10 = 9.5, and m = v = 0; you return {w, m, v}",
    )


def test_ten_steps_are_those_of_pytorch(exercise):
    weight = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.999), weight_decay=0.01)
    w, m, v = 3.0, 0.0, 0.0
    for step in range(1, 11):
        weight.grad = 2 * weight.detach()  # of weight ** 2
        w, m, v = exercise.adamw_step(w, 2 * w, m, v, step, lr=0.1)
        optimizer.step()
        exercise.expect(
            abs(w - weight.item()) < 1e-9, f"after step {step} PyTorch is at {weight.item():.6f} and you are at {w:.6f}"
        )
