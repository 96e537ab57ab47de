"""Exercise 8: AdamW for one number."""


def adamw_step(
    w: float, grad: float, m: float, v: float, step: int,
    lr: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01,
) -> tuple[float, float, float]:  # fmt: skip
    """(w, m, v) after a step; step is 1 for the first one.

    w = w - lr * weight_decay * w                 decay, apart from the gradient: the W of AdamW
    m = beta1 * m + (1 - beta1) * grad            running mean of the gradient
    v = beta2 * v + (1 - beta2) * grad ** 2       running mean of its square
    w = w - lr * (m / (1 - beta1 ** step)) / (sqrt(v / (1 - beta2 ** step)) + eps)
    """
    raise NotImplementedError("write adamw_step: the four lines of its docstring")
