import math


def adamw_step(w, grad, m, v, step, lr=0.001, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    w -= lr * weight_decay * w
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    return w - lr * (m / (1 - beta1**step)) / (math.sqrt(v / (1 - beta2**step)) + eps), m, v
