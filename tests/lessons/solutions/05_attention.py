import math


def attention(q, k, v):
    rows = []
    for t, query in enumerate(q):
        scores = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query)) for key in k[: t + 1]]
        weights = [math.exp(score - max(scores)) for score in scores]
        total = sum(weights)
        rows.append([sum(w * row[i] for w, row in zip(weights, v, strict=False)) / total for i in range(len(v[0]))])
    return rows
