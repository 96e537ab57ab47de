import math


def probabilities(logits, temperature=1.0, top_k=0):
    best = max(range(len(logits)), key=lambda i: logits[i])
    if temperature == 0:
        return [int(i == best) for i in range(len(logits))]
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = set(ranked[: top_k or None])
    weights = [math.exp((x - logits[best]) / temperature) if i in kept else 0.0 for i, x in enumerate(logits)]
    return [weight / sum(weights) for weight in weights]
