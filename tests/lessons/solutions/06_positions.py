import math


def turn(pair, position, angle):
    c, s = math.cos(position * angle), math.sin(position * angle)
    return pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c
