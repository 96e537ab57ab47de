"""A pass through the model as one function, compiled by Numba: float32 or 8-bit weights, on a CPU.

A library is called for each operation, and its threads wait for each other after each. Here a pass (prefill or decode
of a few tokens) is one function, read from `run` on: its threads split the outputs of each product and the heads of
each attention. A lone token multiplies vectors, as fast as memory delivers the weights. Several tokens (of several
texts, or in a row) lie side by side in the lanes of SIMD registers, so that each weight that was read serves all.

For what is computed read model.py: this is the same, checked against it before it is used.

Shape legend: that of model.py, and R rows: the tokens of a pass, B T of them. Activations are (C, lanes): 1 lane for
one row, else a multiple of `LANES`, of which those beyond R do not count.
"""

import numpy as np
from numba import carray

from nanogpt_hub.engine.int8 import OFFSET, TINY
from nanogpt_hub.engine.intrinsics import (
    GROUP,
    ROW_TILE,
    byte_product_row,
    byte_product_tile,
    byte_product_vector,
    float32_view,
    float_product_row,
    float_product_tile,
    int64_view,
    jit,
    layers_at,
    matrix_view,
    pass_at,
    prefetch,
)
from nanogpt_hub.engine.threads import barrier, thread_id, thread_range
from nanogpt_hub.engine.tuning import L2_TILE_BYTES, LANES, LONG_ROW, PREFETCH_ROWS

f4 = np.float32
BITS, MASK = 32 // GROUP, 2 ** (32 // GROUP) - 1  # of an input in a group
ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu")
GELU, GELU_TANH, RELU2, SWIGLU = range(4)


def decode_pass(address):
    """What each thread of a team does with the `Pass` at an address."""
    p = carray(pass_at(address), (1,))[0]
    thread, threads = thread_id(p)
    run(p, thread, threads)


@jit
def run(p, thread, threads):
    """Hidden states for the pass's tokens, or logits for hidden states that are given."""
    scratch = p.scratch + 4 * thread * p.scratch_size
    n_1, n_2 = matrix_view(scratch, p.C, p.lanes), matrix_view(scratch + 4 * p.C * p.lanes, p.C, p.lanes)
    if p.only_head:
        given = matrix_view(p.given, p.R, p.C)
        for r in range(p.R):
            for i in range(p.C):
                n_1[i, r] = given[r, i]
        lo, hi = thread_range(p.V, ROW_TILE, thread, threads)
        linear(p.lm_head_weight, p.lm_head_scale, 0, n_1, matrix_view(p.out, p.R, p.V).T, p.R, lo, hi, False, p.levels)
        return
    x, layers = matrix_view(p.x, p.C, p.lanes), carray(layers_at(p.layers), (p.n_layer,))
    if thread == 0:
        embed(p, x)
    barrier(p, threads, p.x)
    for i in range(p.n_layer):
        layer = layers[i]
        norm(x, layer.ln_1_weight, layer.ln_1_bias, p, n_1)
        if p.parallel:
            norm(x, layer.ln_2_weight, layer.ln_2_bias, p, n_2)
        attention(p, layer, i, n_1, x, thread, threads)
        if not p.parallel:
            norm(x, layer.ln_2_weight, layer.ln_2_bias, p, n_2)
        lo, _ = thread_range((p.H + 2 * p.G) * p.D, ROW_TILE, thread, threads)
        after = layers[(i + 1) % p.n_layer]
        feed_forward(p, layer, n_2, x, thread, threads, row_address(after.c_attn_weight, after.c_attn_scale, p.C, lo))
    if thread == 0:
        norm(x, p.ln_f_weight, p.ln_f_bias, p, n_1)
        out = matrix_view(p.out, p.R, p.C)
        for r in range(p.R):
            for i in range(p.C):
                out[r, i] = n_1[i, r]


@jit
def embed(p, x):
    tokens, positions = int64_view(p.tokens, p.R), int64_view(p.positions, p.R)
    for r in range(p.R):
        embedding = float32_view(p.wte + 4 * p.C * tokens[r], p.C)
        for i in range(p.C):
            x[i, r] = embedding[i]
        if p.wpe:
            embedding = float32_view(p.wpe + 4 * p.C * positions[r], p.C)
            for i in range(p.C):
                x[i, r] += embedding[i]
    if p.embd_norm:
        norm(x, p.ln_emb_weight, p.ln_emb_bias, p, x)


@jit
def attention(p, layer, i, n, x, thread, threads):
    """Stores the keys and values of all rows in the cache of layer i and adds the attention's output to x."""
    H, G, D = p.H, p.G, p.D
    qkv, y = matrix_view(p.qkv, (H + 2 * G) * D, p.lanes), matrix_view(p.y, p.C, p.lanes)
    positions = int64_view(p.positions, p.R)
    lo, hi = thread_range((H + 2 * G) * D, ROW_TILE, thread, threads)
    linear(layer.c_attn_weight, layer.c_attn_scale, layer.c_attn_bias, n, qkv, p.R, lo, hi, False, p.levels)
    proj_lo, proj_hi = thread_range(p.C, ROW_TILE, thread, threads)
    proj = row_address(layer.attn_proj_weight, layer.attn_proj_scale, p.C, proj_lo)
    barrier(p, threads, proj)
    lo, hi = thread_range(p.R * G, 1, thread, threads)
    for job in range(lo, hi):
        r, g = job % p.R, job // p.R
        k, v = cached_kv(p, i, r, g)
        load_head(qkv, (H + g) * D, r, positions[r], p, k[-1])
        for j in range(D):
            v[-1, j] = qkv[(H + G + g) * D + j, r]
    barrier(p, threads, proj)
    scratch = p.scratch + 4 * (thread * p.scratch_size + 2 * p.C * p.lanes)
    q, gathered, weights = (float32_view(scratch, D), float32_view(scratch + 4 * D, D),
                             float32_view(scratch + 8 * D, p.S_max))  # fmt: skip
    lo, hi = thread_range(p.R * H, 1, thread, threads)
    for job in range(lo, hi):
        r, h = job % p.R, job // p.R
        load_head(qkv, h * D, r, positions[r], p, q)
        k, v = cached_kv(p, i, r, h // (H // G))
        after = min(job + 1, hi - 1)
        attend(q, k, v, weights, gathered, *cached_kv(p, i, after % p.R, after // p.R // (H // G)))
        for j in range(D):
            y[h * D + j, r] = gathered[j]
    barrier(p, threads, proj)
    weight, scale, bias = layer.attn_proj_weight, layer.attn_proj_scale, layer.attn_proj_bias
    linear(weight, scale, bias, y, x, p.R, proj_lo, proj_hi, True, p.levels)
    fc_lo, _ = thread_range(p.F, ROW_TILE, thread, threads)
    barrier(p, threads, row_address(layer.c_fc_weight, layer.c_fc_scale, p.C, fc_lo))


@jit
def cached_kv(p, i, r, g):
    """Keys and values (S, D) that a group of a row's heads attends to in layer i's cache, the row's own the last."""
    S = int64_view(p.positions, p.R)[r] + 1
    place = 4 * p.D * p.S_max * ((i * p.B + int64_view(p.texts, p.R)[r]) * p.G + g)
    return matrix_view(p.k + place, S, p.D), matrix_view(p.v + place, S, p.D)


@jit
def feed_forward(p, layer, n, x, thread, threads, ahead):
    lo, hi = thread_range(p.F, ROW_TILE, thread, threads)
    start, size = 4 * lo * p.lanes, (hi - lo) * p.lanes  # this thread's part of h
    h, part = matrix_view(p.h, p.F, p.lanes), float32_view(p.h + start, size)
    # Into all lanes, surplus ones too: the activation is applied to all, and applied again and again it would turn what
    # an earlier pass left there into denormal numbers, which are a hundred times slower.
    linear(layer.c_fc_weight, layer.c_fc_scale, layer.c_fc_bias, n, h, p.lanes, lo, hi, False, p.levels)
    if p.activation == SWIGLU:
        gates = matrix_view(p.h + 4 * p.F * p.lanes, p.F, p.lanes)
        linear(layer.c_gate_weight, layer.c_gate_scale, layer.c_gate_bias, n, gates, p.lanes, lo, hi, False, p.levels)
        gate = float32_view(p.h + 4 * p.F * p.lanes + start, size)
        for j in range(size):
            part[j] *= gate[j] / (f4(1) + exp(-gate[j]))
    else:
        activate(part, p.activation)
    lo, hi = thread_range(p.C, ROW_TILE, thread, threads)
    barrier(p, threads, row_address(layer.mlp_proj_weight, layer.mlp_proj_scale, p.F, lo))
    linear(layer.mlp_proj_weight, layer.mlp_proj_scale, layer.mlp_proj_bias, h, x, p.R, lo, hi, True, p.levels)
    barrier(p, threads, ahead)


# ---- layers: norm, linear, attention of one head, activation ----


@jit
def norm(x, weight, bias, p, out):
    """Layer or RMS norm of each lane of x (C, lanes) into out (C, lanes)."""
    C, lanes = x.shape
    if lanes == 1:
        vector_norm(x.reshape(C), weight, bias, p, out.reshape(C))
        return
    mean, scale = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    w, b = float32_view(weight, C), float32_view(bias, C)
    if p.layer_norm:
        for i in range(C):
            for r in range(lanes):
                mean[r] += x[i, r] / f4(C)
    for i in range(C):
        for r in range(lanes):
            scale[r] += (x[i, r] - mean[r]) * (x[i, r] - mean[r])
    for r in range(lanes):
        scale[r] = f4(1) / np.sqrt(scale[r] / f4(C) + p.eps)
    for i in range(C):
        by, plus = w[i] if weight else f4(1), b[i] if bias else f4(0)
        for r in range(lanes):
            out[i, r] = (x[i, r] - mean[r]) * scale[r] * by + plus


@jit
def vector_norm(x, weight, bias, p, out):
    C, mean, square = x.size, f4(0), f4(0)
    if p.layer_norm:
        for i in range(C):
            mean += x[i]
        mean /= f4(C)
    for i in range(C):
        square += (x[i] - mean) * (x[i] - mean)
    scale = f4(1) / np.sqrt(square / f4(C) + p.eps)
    for i in range(C):
        out[i] = (x[i] - mean) * scale
    if weight:
        w = float32_view(weight, C)
        for i in range(C):
            out[i] *= w[i]
    if bias:
        b = float32_view(bias, C)
        for i in range(C):
            out[i] += b[i]


@jit
def row_address(weight, scale, inputs, row):
    """The address of a row of weights."""
    return weight + row * (padded_row_bytes(inputs) if scale else 4 * inputs)


@jit
def padded_row_bytes(inputs):
    """Bytes of a row of 8-bit weights: whole cache lines."""
    return (inputs + 63) // 64 * 64


@jit
def linear(weight, scale, bias, x, out, rows, lo, hi, add, levels):
    """Outputs lo to hi of a linear layer of x (I, lanes), put into out (O, rows or more) or added to it. With a scale
    the weights are 8-bit, and inputs are rounded to so many `levels`."""
    if scale:
        linear_int8(weight, float32_view(scale, hi), bias, x, out, rows, lo, hi, add, levels)
        return
    inputs, lanes = x.shape
    w, b = matrix_view(weight, hi, inputs), float32_view(bias, hi)
    if lanes == 1:
        vector_product(w, x.reshape(inputs), out, lo, hi, add)
        for i in range(lo, hi if bias else lo):
            out[i, 0] += b[i]
        return
    groups = x.reshape(1, inputs, LANES) if lanes == LANES else grouped(x)
    step = max(1, L2_TILE_BYTES // (4 * inputs * ROW_TILE)) * ROW_TILE
    for first in range(lo, hi, step):
        for g in range(len(groups)):
            n = min(LANES, rows - LANES * g)
            lanes_product(w, groups[g], b, bias, out[:, LANES * g :], n, first, min(first + step, hi), add)


@jit
def grouped(x):
    """x (I, lanes) as (lanes / LANES, I, LANES): the lanes that are multiplied together lie together."""
    inputs, lanes = x.shape
    groups = np.empty((lanes // LANES, inputs, LANES), np.float32)
    for g in range(len(groups)):
        for i in range(inputs):
            for r in range(LANES):
                groups[g, i, r] = x[i, LANES * g + r]
    return groups


@jit
def lanes_product(w, x, b, bias, out, rows, lo, hi, add):
    """Outputs lo to hi for a group of lanes, x (I, LANES), of which the first `rows` count."""
    sums = np.empty((ROW_TILE, LANES), np.float32)
    for i in range(lo, hi, ROW_TILE):
        n = min(ROW_TILE, hi - i)
        if n == ROW_TILE:
            float_product_tile(w, i, x, sums)
        else:
            for o in range(n):
                float_product_row(w, i + o, x, sums[o:])
        for o in range(n):
            plus = b[i + o] if bias else f4(0)
            for r in range(rows):
                out[i + o, r] = sums[o, r] + plus + (out[i + o, r] if add else f4(0))


@jit
def linear_int8(weight, scales, bias, x, out, rows, lo, hi, add, levels):
    """The same for 8-bit weights, as `Int8Linear` in int8.py has them."""
    inputs, lanes = x.shape
    width, b, sums = padded_row_bytes(inputs), float32_view(bias, hi), np.empty((ROW_TILE, LANES), np.int32)
    packed, shifts = np.zeros((width // GROUP, lanes), np.int32), np.zeros(lanes, np.int32)
    steps = np.empty(lanes, np.float32)
    quantize_inputs(x, levels, packed, steps, shifts)
    for i in range(lo, hi if lanes == 1 else lo):
        byte_product_vector(weight + i * width, width, packed, sums)
        y = f4(sums[0, 0] - shifts[0]) * (scales[i] * steps[0]) + (b[i] if bias else f4(0))
        out[i, 0] = y + out[i, 0] if add else y
    for i in range(lo, lo if lanes == 1 else hi, ROW_TILE):
        n = min(ROW_TILE, hi - i)
        if n == ROW_TILE:
            byte_product_tile(weight + i * width, width, packed, sums)
        else:
            for o in range(n):
                byte_product_row(weight + (i + o) * width, width, packed, sums[o:])
        for o in range(n):
            plus = b[i + o] if bias else f4(0)
            for r in range(rows):
                y = f4(sums[o, r] - shifts[r]) * (scales[i + o] * steps[r]) + plus
                out[i + o, r] = y + out[i + o, r] if add else y


@jit
def quantize_inputs(x, levels, packed, steps, shifts):
    """Rounds each lane of x (I, lanes) to `levels` steps of either sign, GROUP numbers into each of packed (I / GROUP,
    lanes).

    A stored byte is weight + OFFSET (its zero point), so each sum of products is too large by the lane's shift.
    """
    inputs, lanes = x.shape
    peak, total = np.full(lanes, TINY, np.float32), np.zeros(lanes, np.float32)
    for i in range(inputs):
        for r in range(lanes):
            peak[r] = max(peak[r], abs(x[i, r]))
            total[r] += x[i, r]
    for r in range(lanes):
        steps[r] = peak[r] / f4(levels) + f4(0) * total[r]  # the last term lets NaN through
        peak[r] = f4(levels) / peak[r]
    for i in range(inputs // GROUP):
        for r in range(lanes):
            word = np.int32(0)
            for g in range(GROUP):
                a = rounded(x[GROUP * i + g, r] * peak[r])
                shifts[r] += a
                word |= (a & MASK) << (BITS * g)
            packed[i, r] = word
    for i in range(inputs // GROUP * GROUP, inputs):
        for r in range(lanes):
            a = rounded(x[i, r] * peak[r])
            shifts[r] += a
            packed[i // GROUP, r] |= (a & MASK) << (BITS * (i % GROUP))
    for r in range(lanes):
        shifts[r] *= OFFSET


@jit
def rounded(x):
    return np.int32(np.rint(x))


@jit
def vector_product(w, x, out, lo, hi, add):
    """w[lo:hi] times x (I,). Short rows go four at a time, so that no sum waits for its own last addition."""
    i = lo
    while i + 4 <= hi and x.size < LONG_ROW:
        a, b, c, d = f4(0), f4(0), f4(0), f4(0)
        for j in range(x.size):
            a += w[i, j] * x[j]
            b += w[i + 1, j] * x[j]
            c += w[i + 2, j] * x[j]
            d += w[i + 3, j] * x[j]
        if add:
            a, b, c, d = a + out[i, 0], b + out[i + 1, 0], c + out[i + 2, 0], d + out[i + 3, 0]
        out[i, 0], out[i + 1, 0], out[i + 2, 0], out[i + 3, 0] = a, b, c, d
        i += 4
    while i < hi:
        a = out[i, 0] if add else f4(0)
        for j in range(x.size):
            a += w[i, j] * x[j]
        out[i, 0] = a
        i += 1


@jit
def load_head(qkv, first, r, position, p, out):
    """A row's query or key, which begins at feature `first`: rotated by its position, normalised; into out (D,)."""
    half = p.rotated // 2
    for j in range(p.D):
        out[j] = qkv[first + j, r]
    if half:
        cos, sin = float32_view(p.cos + 4 * position * half, half), float32_view(p.sin + 4 * position * half, half)
        for j in range(half):
            a, b = out[j], out[half + j]
            out[j], out[half + j] = a * cos[j] - b * sin[j], b * cos[j] + a * sin[j]
    if p.qk_norm:
        square = f4(0)
        for j in range(p.D):
            square += out[j] * out[j]
        scale = f4(1) / np.sqrt(square / f4(p.D) + p.eps)
        for j in range(p.D):
            out[j] *= scale


@jit
def attend(q, k, v, weights, out, next_k, next_v):
    """softmax(q k^T / sqrt(D)) v for a query (D,) and the keys and values (S, D), into out (D,).

    Meanwhile the next head's keys and values are prefetched row by row: memory is slow at so many short pieces.
    """
    S, D = k.shape
    scale, top, total = f4(1) / np.sqrt(f4(D)), f4(-np.inf), f4(0)
    products = weights.reshape(weights.size, 1)
    for s in range(0, S, 8):
        prefetch_rows(next_k, s, s + 8)
        vector_product(k, q, products, s, min(s + 8, S), False)
    for s in range(S):
        top = max(top, weights[s])
    for s in range(S):
        weights[s] = exp((weights[s] - top) * scale)
    for s in range(S):
        total += weights[s]
    for j in range(D):
        out[j] = f4(0)
    whole = S - S % 4
    for s in range(0, whole, 4):
        prefetch_rows(next_v, s, s + 4)
        a, b, c, d = weights[s] / total, weights[s + 1] / total, weights[s + 2] / total, weights[s + 3] / total
        for j in range(D):
            out[j] += a * v[s, j] + b * v[s + 1, j] + c * v[s + 2, j] + d * v[s + 3, j]
    for s in range(whole, S):
        a = weights[s] / total
        for j in range(D):
            out[j] += a * v[s, j]


@jit
def prefetch_rows(x, lo, hi):
    """Prefetches rows lo to hi of x (S, D), those that there are."""
    size = 4 * x.shape[1]
    for place in range(lo * size, min(hi, len(x), PREFETCH_ROWS) * size, 64):
        prefetch(x.ctypes.data + place)


@jit
def activate(h, kind):
    """The activation of h (n,), in place."""
    if kind == GELU:
        for i in range(h.size):
            h[i] = gelu(h[i])
    elif kind == GELU_TANH:
        for i in range(h.size):
            h[i] = gelu_tanh(h[i])
    else:
        for i in range(h.size):
            h[i] = max(h[i], f4(0)) * h[i]


@jit
def gelu(x):
    """x times the normal CDF at x; the error function is approximation 7.1.26 of Abramowitz and Stegun."""
    z = abs(x) * f4(0.70710678)
    t = f4(1) / (f4(1) + f4(0.3275911) * z)
    poly = f4(1.061405429) * t - f4(1.453152027)
    for coefficient in (f4(1.421413741), f4(-0.284496736), f4(0.254829592)):
        poly = poly * t + coefficient
    tail = f4(0.5) * poly * t * exp(-z * z)  # the part above |x|
    return x * (f4(1) - tail) if x > 0 else x * tail


@jit
def gelu_tanh(x):
    return x / (f4(1) + exp(f4(-1.5957691216) * (x + f4(0.044715) * x * x * x)))


@jit
def exp(x):
    """e^x without a library call, so that it vectorises: a power of 2 times the polynomial of the Cephes library."""
    bounded = min(max(x, f4(-87)), f4(88))
    n = np.floor(bounded * f4(1.44269504) + f4(0.5))
    r = bounded - n * f4(0.693359375) + n * f4(2.12194440e-4)
    poly = f4(1.9875691500e-4)
    for coefficient in (f4(1.3981999507e-3), f4(8.3334519073e-3), f4(4.1665795894e-2), f4(1.6666665459e-1),
                        f4(5.0000001201e-1)):  # fmt: skip
        poly = poly * r + coefficient
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (poly * r * r + r + f4(1)) * power + f4(0) * x  # the last term lets NaN through
