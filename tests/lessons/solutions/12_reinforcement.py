from statistics import mean, pstdev


def advantages(rewards):
    middle, deviation = mean(rewards), pstdev(rewards)
    return [(reward - middle) / deviation if deviation else 0.0 for reward in rewards]
