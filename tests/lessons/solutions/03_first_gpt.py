import math


def cross_entropy(logits, targets):
    losses = []
    for row, target in zip(logits, targets, strict=True):
        top = max(row)
        losses.append(math.log(sum(math.exp(x - top) for x in row)) + top - row[target])
    return sum(losses) / len(losses)
