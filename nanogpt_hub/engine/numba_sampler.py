"""Choosing a token as one compiled function: the softmax, the top k and the draw of `draw` in sampling.py.

    for id, logprob, prob, likeliest in choose(logits, vocab_size, uniform, n, temperature=0.8, top_k=200): ...

PyTorch needs some twenty calls for it, each over the whole vocabulary: longer than a small model takes for a pass, and
a twentieth of one of GPT-2's. For what is computed read `sampler_stages` and `pick` in sampling.py; this is the same,
checked against them before it is used.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numba import carray, from_dtype, njit
from torch import Tensor

from nanogpt_hub.engine.intrinsics import FAST_MATH, float32_view, jit, matrix_view, pointer_to, record
from nanogpt_hub.engine.kernels import exp, f4
from nanogpt_hub.engine.threads import team, thread_id, thread_range

SAMPLERS = {"temperature", "top_k", "min_p"}  # those it knows: any other is drawn the plain way
f8 = np.float64
LARGEST = f4(1e30)  # LARGEST_LOGIT of sampling.py: infinite logits become this, so that there is never inf - inf
without_nan = njit(error_model="numpy", fastmath=FAST_MATH | {"nnan"})  # the largest of several at a time

# A token, its probability for the model itself (of the one that is chosen the logarithm), and that after the samplers.
Found = np.dtype([("id", np.int64), ("own", np.float32), ("sampled", np.float32)])
# `logits` (R, V) and `uniform` (R,) come in, Found goes out: `chosen` (R,) and `likeliest` (R, n). All are addresses.
Choice = record(
    "R V vocab top_k n logits uniform chosen likeliest omp_get_thread_num omp_get_num_threads",
    temperature=np.float32, least=np.float32,
)  # fmt: skip
choice_at, found_at = pointer_to(from_dtype(Choice)), pointer_to(from_dtype(Found))


# ---- what each thread does: some of the rows ----


def sample_rows(address):
    """What each thread of a team does with the choices at an address."""
    p = carray(choice_at(address), (1,))[0]
    thread, threads = thread_id(p)
    lo, hi = thread_range(p.R, 1, thread, threads)
    for r in range(lo, hi):
        choose_for_row(p, r)


@jit
def choose_for_row(p, r):
    given, logits = matrix_view(p.logits, p.R, p.V)[r], np.empty(p.vocab, np.float32)
    for i in range(p.vocab):
        logits[i] = finite(given[i])
    size = max(1, p.vocab // max(256, 4 * p.top_k))
    peaks = peaks_of(logits, size)
    top, total = largest_of(peaks), f4(0)
    for b in range(peaks.size):
        peaks[b] -= top
    for i in range(p.vocab):
        logits[i] -= top
        total += exp(logits[i])
    threshold = kth_largest(logits, peaks, size, p.top_k) if 0 < p.top_k < p.vocab else f4(-np.inf)
    if p.temperature == 0:
        id, weight, weights = first_of_largest(logits), f4(1), f4(1)
    else:
        id, weight, weights = draw(logits, peaks, size, threshold, p, float32_view(p.uniform, p.R)[r])
    chosen = carray(found_at(p.chosen), (p.R,))[r]
    chosen.id, chosen.own, chosen.sampled = id, logits[id] - np.log(total), weight / weights
    likeliest = carray(found_at(p.likeliest), (p.R, p.n))[r]
    find_likeliest(logits, peaks, size, likeliest)
    for one in likeliest:
        drawn = weight_of(one.own, threshold, p) / weights if p.temperature > 0 else f4(one.id == id)
        one.own, one.sampled = exp(one.own) / total, drawn


@jit
def finite(x):
    """x, or where it is infinite the largest number that is used. NaN stays."""
    if x > LARGEST:
        return LARGEST
    return -LARGEST if x < -LARGEST else x


@jit
def first_of_largest(logits):
    """The id of the first logit that is 0, as the largest is."""
    id = 0
    while id < logits.size - 1 and logits[id] < 0:
        id += 1
    return id


@without_nan
def peaks_of(logits, size):
    """The largest of each `size` logits, side by side."""
    peaks = np.empty((logits.size + size - 1) // size, np.float32)
    for b in range(peaks.size):
        peaks[b] = largest_of(logits[b * size : (b + 1) * size])
    return peaks


@without_nan
def largest_of(logits):
    top = logits[0]
    for logit in logits:
        top = max(top, logit)
    return top


@jit
def below(b, size, logits):
    """The ids of the logits of which peak b is the largest."""
    return range(b * size, min(logits.size, (b + 1) * size))


@jit
def kth_largest(logits, peaks, size, k):
    """The k-th largest logit. It is no less than the k-th largest peak, so that few logits have to be looked at."""
    bound = select(peaks.copy(), k)
    if size == 1:
        return bound
    found, n = np.empty(logits.size, np.float32), 0
    for b in range(peaks.size):
        if peaks[b] >= bound:
            for i in below(b, size, logits):
                if logits[i] >= bound:
                    found[n] = logits[i]
                    n += 1
    return select(found[:n], k)


@jit
def select(a, k):
    """The k-th largest of a, by Hoare's quickselect; a is left in another order."""
    lo, hi, place = 0, a.size - 1, a.size - k
    while lo < hi:
        pivot, i, j = a[(lo + hi) // 2], lo, hi
        while i <= j:
            while a[i] < pivot:
                i += 1
            while a[j] > pivot:
                j -= 1
            if i <= j:
                a[i], a[j] = a[j], a[i]
                i, j = i + 1, j - 1
        if place <= j:
            hi = j
        elif place >= i:
            lo = i
        else:
            break
    return a[place]


@jit
def weight_of(logit, threshold, p):
    """A token's probability after the samplers, but for a factor that all have in common."""
    scaled = logit / p.temperature
    return exp(scaled) if logit >= threshold and scaled >= p.least and scaled > f4(-87) else f4(0)


@jit
def draw(logits, peaks, size, threshold, p, uniform):
    """Inverse-CDF sampling: the token at which the cumulative weight passes the random number; its weight; the sum."""
    weights, total = np.zeros(peaks.size, np.float64), f8(0)  # of the logits below each peak
    for b in range(peaks.size):
        if peaks[b] >= threshold:
            for i in below(b, size, logits):
                weights[b] += weight_of(logits[i], threshold, p)
        total += weights[b]
    goal, reach, found = uniform * total, f8(0), 0
    for b in range(peaks.size):
        if reach + weights[b] > goal:
            for i in below(b, size, logits):
                weight = weight_of(logits[i], threshold, p)
                if weight > 0:
                    found = i
                    reach += weight
                    if reach > goal:
                        break
            break
        reach += weights[b]
    return found, weight_of(logits[found], threshold, p), f4(total)


@jit
def find_likeliest(logits, peaks, size, found):
    """The largest logits (as `own`) and their ids, in their order."""
    n, held = found.size, 0
    for b in range(peaks.size):
        if n == 0 or (held == n and peaks[b] <= found[n - 1].own):
            continue
        for i in below(b, size, logits):
            if held == n and logits[i] <= found[n - 1].own:
                continue
            held = min(held + 1, n)
            j = held - 1
            while j > 0 and found[j - 1].own < logits[i]:
                found[j].id, found[j].own = found[j - 1].id, found[j - 1].own
                j -= 1
            found[j].id, found[j].own = i, logits[i]


# ---- for Python ----


def choose(
    logits: Tensor,
    vocab_size: int,
    uniform: Tensor,
    n: int = 0,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> Iterator[tuple[int, float, float, list[tuple[int, float, float]]]]:
    """A token for each row of logits (B, V) by its random number in uniform (B, 1), of the ids below `vocab_size`.

    A temperature of 0 takes the likeliest; 0 turns `top_k` and `min_p` off. Gives for each row the id, its
    log-probability for the model (NaN where a logit is), the probability with which it was drawn, and the `n` likeliest
    tokens: id and probabilities, for the model and for the draw.
    """
    B, V = logits.shape
    vocab_size = min(vocab_size, V)
    logits, uniform, n = logits.float().contiguous(), uniform.float().contiguous(), min(n, vocab_size)
    chosen, likeliest, one = np.empty(B, Found), np.empty((B, n), Found), np.empty(1, Choice)
    functions = (team().functions[name] for name in ("omp_get_thread_num", "omp_get_num_threads"))
    one[0] = (
        B, V, vocab_size, min(top_k, vocab_size), n, logits.data_ptr(), uniform.data_ptr(), chosen.ctypes.data,
        likeliest.ctypes.data, *functions, temperature, math.log(min_p) if min_p else -math.inf,
    )  # fmt: skip
    team().run(sample_rows, one.ctypes.data, min(B, torch.get_num_threads()))
    return ((*row, others) for row, others in zip(chosen.tolist(), likeliest.tolist(), strict=True))
