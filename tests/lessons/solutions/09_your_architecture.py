import math
from statistics import mean, variance


def beyond_noise(before, after):
    difference = abs(mean(before) - mean(after))
    noise = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    return difference > 4.3 * noise if noise else difference > 0
