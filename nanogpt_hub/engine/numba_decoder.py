"""The steps of generation as plain loops, compiled to machine code by Numba: for models on a CPU, in float32 or 8 bits.

    loops = Loops(model, cache)
    x = loops.hidden(idx)                        # what model.hidden(idx, cache) gives, up to rounding
    logits = loops.head(x[:, -1])                # what model.head gives

A library is called for each operation, and its threads meet after each. Here a pass through the model is one function,
read from `run` on: its threads split the outputs of each product and the heads of each attention among them. A token
alone multiplies vectors, as fast as memory gives the weights. Several tokens (of several texts, or in a row) lie side
by side in the lanes of vector registers, so that each weight that was read serves all of them.

For what is computed read model.py; this is the same, tested against it. It is compiled when first used, which takes
some seconds on a new machine and then half a one (Numba keeps the result), so compiler.py sees to that on the side.

Shape legend: that of model.py, and R rows: the tokens of a pass, B T of them. Activations are (C, lanes), where there
is 1 lane for one row and else a multiple of `LANES`; what the surplus ones hold does not count.
"""

import ctypes
import functools
import os
import threading

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor, nn

from nanogpt_hub.engine.int8 import LEVELS, OFFSET, TINY, Int8Linear
from nanogpt_hub.engine.torch_decoder import Decoder
from nanogpt_hub.model import GPT, MLP, Block, CausalSelfAttention, KVCache, Norm


def target_features() -> set[str]:
    """What the CPU that Numba compiles for can do, such as "+avx2". Not what this machine can: the two may differ."""
    return set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))


LANES = 16  # float32 numbers in the widest registers (AVX512); a CPU with narrower ones takes several
OUTPUTS = 8  # of a product, computed together: so many rows of weights are read at a time
PER_THREAD = 2**20  # bytes of weights that are worth one more thread to wait for
CLOSE = 2**18  # bytes of weights that stay in a core's second cache while all tokens of a pass meet them
SOON = 128  # keys of the head that comes next are asked for: more push out what is being read
LONG = 256  # numbers in a row of weights from which on AMD's CPUs, which follow one row best, read them one by one
ONE_BY_ONE = binding.get_host_cpu_name().startswith("znver")  # Numba keeps what it compiles by this name too
# The cache that the weights of the next outputs are asked into: 3 the first, 2 the second.
NEARNESS = 2 if ONE_BY_ONE else 3
HAS_BYTES = "+avx512vnni" in target_features()  # multiplies 64 bytes at a time
# Tokens in a pass; for more, PyTorch's products are as fast. On AMD's CPUs with the widest registers it takes hundreds.
MOST = 16 * LANES if ONE_BY_ONE and HAS_BYTES else LANES

f4 = np.float32
how = dict(error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})  # NaN must stay NaN
compiled = njit(**how)

ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu")
GELU, GELU_TANH, RELU2, SWIGLU = range(4)


def record(whole: str, **others: type) -> np.dtype:
    return np.dtype([*((name, np.int64) for name in whole.split()), *others.items()])


# Addresses of a layer's weights. 0 stands for what a model does not have; a scale, that the weights are of 8 bits.
Layer = record(
    "ln_1_weight ln_1_bias c_attn_weight c_attn_scale c_attn_bias attn_proj_weight attn_proj_scale attn_proj_bias "
    "ln_2_weight ln_2_bias c_fc_weight c_fc_scale c_fc_bias c_gate_weight c_gate_scale c_gate_bias "
    "mlp_proj_weight mlp_proj_scale mlp_proj_bias"
)
# All that a pass works with: sizes, choices, and addresses of inputs, weights, the cache, and room for what is
# computed: `x qkv y h` are shared, each thread has `room` of its own.
Pass = record(
    "R lanes C H G D F V S_max B rotated layer_norm activation parallel qk_norm embd_norm n_layer only_head "
    "tokens texts positions given wte wpe ln_emb_weight ln_emb_bias layers ln_f_weight ln_f_bias "
    "lm_head_weight lm_head_scale cos sin k v x qkv y h room room_size out state "
    "sched_yield omp_get_thread_num omp_get_num_threads",
    eps=np.float32,
)


# ---- what Python has no words for: memory at an address, atomic numbers, vector registers ----


def pointer_to(kind: types.Type):
    @intrinsic
    def pointer(typing, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), codegen

    return pointer


floats_at, whole_at = pointer_to(types.float32), pointer_to(types.int64)
layers_at, pass_at = pointer_to(from_dtype(Layer)), pointer_to(from_dtype(Pass))


def slot(context, builder, signature, args):
    """Where the number of an array is: the first two arguments."""
    return builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])


@intrinsic
def atomic_load(typing, numbers, i):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(slot(context, builder, signature, args), "seq_cst", 8)

    return types.int64(numbers, types.intp), codegen


@intrinsic
def atomic_store(typing, numbers, i, value):
    def codegen(context, builder, signature, args):
        builder.store_atomic(args[2], slot(context, builder, signature, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.int64), codegen


@intrinsic
def atomic_add(typing, numbers, i, value):
    """Adds, and tells what was there before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", slot(context, builder, signature, args), args[2], "seq_cst")

    return types.int64(numbers, types.intp, types.int64), codegen


@intrinsic
def call_at(typing, address):
    """A C function without arguments that gives an int."""

    def codegen(context, builder, signature, args):
        function = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), []).as_pointer())
        return builder.sext(builder.call(function, []), ir.IntType(64))

    return types.int64(types.int64), codegen


def prefetch(builder, place, nearness: int) -> None:
    """Asks memory for what is at a place (bytes), into the cache of a core: 3 the first, 2 the second."""
    single = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [place.type, single, single, single])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [place, single(0), single(nearness), single(1)])


@intrinsic
def ask_for(typing, address):
    """Has memory bring the numbers at an address nearer."""

    def codegen(context, builder, signature, args):
        prefetch(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), 2)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def in_all_lanes(builder, number):
    """A vector of LANES times a number."""
    undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    lone = builder.insert_element(undefined, number, ir.IntType(32)(0))
    return builder.shuffle_vector(lone, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def lanes_product(outputs: int):
    """A function `(w, i, x, out)`: out (outputs, LANES) becomes w[i : i + outputs] (outputs, I) times x (I, LANES).

    The sums stay in vector registers. Meanwhile the weights of the next outputs are asked for: the CPU cannot guess
    from so many rows at a time what will be read.
    """
    index, byte = ir.IntType(64), ir.IntType(8).as_pointer()
    vector, line = ir.VectorType(ir.FloatType(), LANES), 16  # numbers that memory gives at once

    def codegen(context, builder, signature, args):
        w, x, out = (context.make_array(signature.args[n])(context, builder, args[n]) for n in (0, 2, 3))
        width = cgutils.unpack_tuple(builder, w.shape)[1]
        rows = [builder.gep(w.data, [builder.mul(builder.add(args[1], index(o)), width)]) for o in range(outputs)]
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * LANES)) for _ in rows]
        for total in sums:  # again: this may stand in a loop
            builder.store(ir.Constant(vector, [0.0] * LANES), total)
        kind = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        count = builder.sdiv(builder.add(width, index(line - 1)), index(line))
        with cgutils.for_range(builder, count) as lines:
            start = builder.mul(lines.index, index(line))
            left = builder.sub(width, start)
            for row in rows:
                ahead = builder.gep(row, [builder.add(start, builder.mul(width, index(outputs)))])
                prefetch(builder, builder.bitcast(ahead, byte), NEARNESS)
            here = builder.select(builder.icmp_signed("<", left, index(line)), left, index(line))
            with cgutils.for_range(builder, here) as loop:
                k = builder.add(start, loop.index)
                place = builder.gep(x.data, [builder.mul(k, index(LANES))])
                inputs = builder.load(builder.bitcast(place, vector.as_pointer()), align=4)
                for row, total in zip(rows, sums, strict=True):
                    weight = in_all_lanes(builder, builder.load(builder.gep(row, [k])))
                    builder.store(builder.call(fma, [weight, inputs, builder.load(total)]), total)
        for o, total in enumerate(sums):
            place = builder.bitcast(builder.gep(out.data, [index(o * LANES)]), vector.as_pointer())
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    @intrinsic
    def product(typing, w, i, x, out):
        return types.void(w, types.intp, x, out), codegen

    return product


product_of_many, product_of_one = lanes_product(OUTPUTS), lanes_product(1)


def bytes_product(outputs: int, lanes: int):
    """A function `(weights, width, x, sums)`: sums (outputs, LANES) of the products of bytes, exact. So many rows of
    `width` unsigned weights begin at an address; x holds signed inputs.

    Four weights at a time meet four inputs of each lane: x is (width / 4, LANES, 4). With 1 lane 64 weights meet as
    many inputs (width,), and only the first of a row's sums counts.
    """
    index, single, byte = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
    vector, at_once = ir.VectorType(single, LANES), 64 if lanes == 1 else 4
    kind = ir.FunctionType(vector, [vector] * 3)
    adding, adding_name = ir.FunctionType(single, [vector]), f"llvm.vector.reduce.add.v{LANES}i32"

    def codegen(context, builder, signature, args):
        if not HAS_BYTES:  # never called there
            return context.get_dummy_value()
        weights, width = args[:2]
        x, sums = (context.make_array(signature.args[n])(context, builder, args[n]).data for n in (2, 3))
        rows = [builder.add(weights, builder.mul(width, index(o))) for o in range(outputs)]
        totals = [cgutils.alloca_once(builder, vector) for _ in rows]
        for total in totals:
            builder.store(ir.Constant(vector, [0] * LANES), total)
        with cgutils.for_range(builder, builder.sdiv(width, index(64))) as lines:
            start = builder.mul(lines.index, index(64))
            if lanes > 1:
                for row in rows:
                    ahead = builder.add(builder.add(row, start), builder.mul(width, index(outputs)))
                    prefetch(builder, builder.inttoptr(ahead, byte), NEARNESS)
            with cgutils.for_range(builder, index(64 // at_once)) as loop:
                k = builder.add(start, builder.mul(loop.index, index(at_once)))
                place = builder.gep(builder.bitcast(x, byte), [builder.mul(k, index(64 // at_once))])
                inputs = builder.load(builder.bitcast(place, vector.as_pointer()), align=1)
                for row, total in zip(rows, totals, strict=True):
                    here = builder.inttoptr(builder.add(row, k), (vector if lanes == 1 else single).as_pointer())
                    weight = builder.load(here, align=1)
                    weight = weight if lanes == 1 else in_all_lanes(builder, weight)
                    # By its name: LLVM's own function for it has other types from version to version.
                    values = [builder.load(total), weight, inputs]
                    builder.store(builder.asm(kind, "vpdpbusd $3, $2, $0", "=v,0,v,v", values, False), total)
        for o, total in enumerate(totals):
            place, total = builder.gep(sums, [index(LANES * o)]), builder.load(total)
            if lanes == 1:
                total = builder.call(cgutils.get_or_insert_function(builder.module, adding, adding_name), [total])
                builder.store(total, place)
            else:
                builder.store(total, builder.bitcast(place, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def product(typing, weights, width, x, sums):
        return types.void(types.int64, types.int64, x, sums), codegen

    return product


bytes_of_many, bytes_of_one = bytes_product(OUTPUTS, LANES), bytes_product(1, LANES)
bytes_of_vector = bytes_product(1, 1)  # one row, one stream from memory: that is fastest


# ---- a pass: what each of its threads does ----


@compiled
def run(p, thread, threads):
    """Hidden states for the pass's tokens, or logits for hidden states that are given."""
    room = p.room + 4 * thread * p.room_size
    n_1, n_2 = table(room, p.C, p.lanes), table(room + 4 * p.C * p.lanes, p.C, p.lanes)
    if p.only_head:
        given = table(p.given, p.R, p.C)
        for r in range(p.R):
            for i in range(p.C):
                n_1[i, r] = given[r, i]
        lo, hi = share(p.V, OUTPUTS, thread, threads)
        linear(p.lm_head_weight, p.lm_head_scale, 0, n_1, table(p.out, p.R, p.V).T, p.R, lo, hi, False)
        return
    x, layers = table(p.x, p.C, p.lanes), carray(layers_at(p.layers), (p.n_layer,))
    if thread == 0:
        embed(p, x)
    meet(p, threads, p.x)
    for i in range(p.n_layer):
        layer = layers[i]
        norm(x, layer.ln_1_weight, layer.ln_1_bias, p, n_1)
        if p.parallel:
            norm(x, layer.ln_2_weight, layer.ln_2_bias, p, n_2)
        attention(p, layer, i, n_1, x, thread, threads)
        if not p.parallel:
            norm(x, layer.ln_2_weight, layer.ln_2_bias, p, n_2)
        lo, _ = share((p.H + 2 * p.G) * p.D, OUTPUTS, thread, threads)
        after = layers[(i + 1) % p.n_layer]
        feed_forward(p, layer, n_2, x, thread, threads, row_at(after.c_attn_weight, after.c_attn_scale, p.C, lo))
    if thread == 0:
        norm(x, p.ln_f_weight, p.ln_f_bias, p, n_1)
        out = table(p.out, p.R, p.C)
        for r in range(p.R):
            for i in range(p.C):
                out[r, i] = n_1[i, r]


@compiled
def embed(p, x):
    tokens, positions = whole(p.tokens, p.R), whole(p.positions, p.R)
    for r in range(p.R):
        embedding = floats(p.wte + 4 * p.C * tokens[r], p.C)
        for i in range(p.C):
            x[i, r] = embedding[i]
        if p.wpe:
            embedding = floats(p.wpe + 4 * p.C * positions[r], p.C)
            for i in range(p.C):
                x[i, r] += embedding[i]
    if p.embd_norm:
        norm(x, p.ln_emb_weight, p.ln_emb_bias, p, x)


@compiled
def attention(p, layer, i, n, x, thread, threads):
    """Adds to x what attention finds, having put the keys and values of all rows into the cache of layer i."""
    H, G, D = p.H, p.G, p.D
    qkv, y = table(p.qkv, (H + 2 * G) * D, p.lanes), table(p.y, p.C, p.lanes)
    positions = whole(p.positions, p.R)
    lo, hi = share((H + 2 * G) * D, OUTPUTS, thread, threads)
    linear(layer.c_attn_weight, layer.c_attn_scale, layer.c_attn_bias, n, qkv, p.R, lo, hi, False)
    proj_lo, proj_hi = share(p.C, OUTPUTS, thread, threads)
    proj = row_at(layer.attn_proj_weight, layer.attn_proj_scale, p.C, proj_lo)
    meet(p, threads, proj)
    lo, hi = share(p.R * G, 1, thread, threads)
    for job in range(lo, hi):
        r, g = job % p.R, job // p.R
        k, v = seen(p, i, r, g)
        take_head(qkv, (H + g) * D, r, positions[r], p, k[-1])
        for j in range(D):
            v[-1, j] = qkv[(H + G + g) * D + j, r]
    meet(p, threads, proj)
    room = p.room + 4 * (thread * p.room_size + 2 * p.C * p.lanes)
    q, gathered, weights = floats(room, D), floats(room + 4 * D, D), floats(room + 8 * D, p.S_max)
    lo, hi = share(p.R * H, 1, thread, threads)
    for job in range(lo, hi):
        r, h = job % p.R, job // p.R
        take_head(qkv, h * D, r, positions[r], p, q)
        k, v = seen(p, i, r, h // (H // G))
        after = min(job + 1, hi - 1)
        attend(q, k, v, weights, gathered, *seen(p, i, after % p.R, after // p.R // (H // G)))
        for j in range(D):
            y[h * D + j, r] = gathered[j]
    meet(p, threads, proj)
    linear(layer.attn_proj_weight, layer.attn_proj_scale, layer.attn_proj_bias, y, x, p.R, proj_lo, proj_hi, True)
    fc_lo, _ = share(p.F, OUTPUTS, thread, threads)
    meet(p, threads, row_at(layer.c_fc_weight, layer.c_fc_scale, p.C, fc_lo))


@compiled
def seen(p, i, r, g):
    """What a group of a row's heads attends to in the cache of layer i: keys and values (S, D), its own the last."""
    S = whole(p.positions, p.R)[r] + 1
    place = 4 * p.D * p.S_max * ((i * p.B + whole(p.texts, p.R)[r]) * p.G + g)
    return table(p.k + place, S, p.D), table(p.v + place, S, p.D)


@compiled
def feed_forward(p, layer, n, x, thread, threads, ahead):
    lo, hi = share(p.F, OUTPUTS, thread, threads)
    start, size = 4 * lo * p.lanes, (hi - lo) * p.lanes  # this thread's part of h
    h, part = table(p.h, p.F, p.lanes), floats(p.h + start, size)
    # Into all lanes, surplus ones too: the activation goes over all, and again and again would make denormal numbers of
    # what an earlier pass left there, which are a hundred times slower.
    linear(layer.c_fc_weight, layer.c_fc_scale, layer.c_fc_bias, n, h, p.lanes, lo, hi, False)
    if p.activation == SWIGLU:
        gates = table(p.h + 4 * p.F * p.lanes, p.F, p.lanes)
        linear(layer.c_gate_weight, layer.c_gate_scale, layer.c_gate_bias, n, gates, p.lanes, lo, hi, False)
        gate = floats(p.h + 4 * p.F * p.lanes + start, size)
        for j in range(size):
            part[j] *= gate[j] / (f4(1) + exp(-gate[j]))
    else:
        activate(part, p.activation)
    lo, hi = share(p.C, OUTPUTS, thread, threads)
    meet(p, threads, row_at(layer.mlp_proj_weight, layer.mlp_proj_scale, p.F, lo))
    linear(layer.mlp_proj_weight, layer.mlp_proj_scale, layer.mlp_proj_bias, h, x, p.R, lo, hi, True)
    meet(p, threads, ahead)


# ---- the pieces ----


@compiled
def floats(address, n):
    return carray(floats_at(address), (n,))


@compiled
def whole(address, n):
    return carray(whole_at(address), (n,))


@compiled
def table(address, rows, columns):
    return carray(floats_at(address), (rows, columns))


@compiled
def share(n, unit, thread, threads):
    """The part lo to hi of n that is a thread's, in whole units."""
    each = (n + unit * threads - 1) // (unit * threads) * unit
    return min(n, thread * each), min(n, (thread + 1) * each)


@compiled
def norm(x, weight, bias, p, out):
    """Layer or RMS norm of each lane of x (C, lanes) into out (C, lanes)."""
    C, lanes = x.shape
    if lanes == 1:
        norm_of_vector(x.reshape(C), weight, bias, p, out.reshape(C))
        return
    mean, scale = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    w, b = floats(weight, C), floats(bias, C)
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


@compiled
def norm_of_vector(x, weight, bias, p, out):
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
        w = floats(weight, C)
        for i in range(C):
            out[i] *= w[i]
    if bias:
        b = floats(bias, C)
        for i in range(C):
            out[i] += b[i]


@compiled
def row_at(weight, scale, inputs, row):
    """Where a row of weights is."""
    return weight + row * (padded(inputs) if scale else 4 * inputs)


@compiled
def padded(inputs):
    """Bytes of a row of 8-bit weights: whole cache lines."""
    return (inputs + 63) // 64 * 64


@compiled
def linear(weight, scale, bias, x, out, rows, lo, hi, add):
    """Outputs lo to hi of a linear layer of x (I, lanes), put into out (O, rows or more) or added to it."""
    if scale:
        linear_of_bytes(weight, floats(scale, hi), bias, x, out, rows, lo, hi, add)
        return
    inputs, lanes = x.shape
    w, b = table(weight, hi, inputs), floats(bias, hi)
    if lanes == 1:
        product_of_vector(w, x.reshape(inputs), out, lo, hi, add)
        for i in range(lo, hi if bias else lo):
            out[i, 0] += b[i]
        return
    groups = x.reshape(1, inputs, LANES) if lanes == LANES else grouped(x)
    step = max(1, CLOSE // (4 * inputs * OUTPUTS)) * OUTPUTS
    for first in range(lo, hi, step):
        for g in range(len(groups)):
            n = min(LANES, rows - LANES * g)
            product_of_lanes(w, groups[g], b, bias, out[:, LANES * g :], n, first, min(first + step, hi), add)


@compiled
def grouped(x):
    """The lanes of x (I, lanes) as (lanes / LANES, I, LANES): those that a register holds lie together."""
    inputs, lanes = x.shape
    groups = np.empty((lanes // LANES, inputs, LANES), np.float32)
    for g in range(len(groups)):
        for i in range(inputs):
            for r in range(LANES):
                groups[g, i, r] = x[i, LANES * g + r]
    return groups


@compiled
def product_of_lanes(w, x, b, bias, out, rows, lo, hi, add):
    """Outputs lo to hi for a group of lanes, x (I, LANES), of which so many are rows."""
    sums = np.empty((OUTPUTS, LANES), np.float32)
    for i in range(lo, hi, OUTPUTS):
        n = min(OUTPUTS, hi - i)
        if n == OUTPUTS:
            product_of_many(w, i, x, sums)
        else:
            for o in range(n):
                product_of_one(w, i + o, x, sums[o:])
        for o in range(n):
            plus = b[i + o] if bias else f4(0)
            for r in range(rows):
                out[i + o, r] = sums[o, r] + plus + (out[i + o, r] if add else f4(0))


@compiled
def linear_of_bytes(weight, scales, bias, x, out, rows, lo, hi, add):
    """The same for weights of 8 bits, as in quantize.py."""
    inputs, lanes = x.shape
    width, b, sums = padded(inputs), floats(bias, hi), np.empty((OUTPUTS, LANES), np.int32)
    small, shifts = np.zeros((width // 4, lanes), np.int32), np.zeros(lanes, np.int32)
    steps = np.empty(lanes, np.float32)
    to_bytes(x, small, steps, shifts)
    for i in range(lo, hi if lanes == 1 else lo):
        bytes_of_vector(weight + i * width, width, small, sums)
        y = f4(sums[0, 0] - shifts[0]) * (scales[i] * steps[0]) + (b[i] if bias else f4(0))
        out[i, 0] = y + out[i, 0] if add else y
    for i in range(lo, lo if lanes == 1 else hi, OUTPUTS):
        n = min(OUTPUTS, hi - i)
        if n == OUTPUTS:
            bytes_of_many(weight + i * width, width, small, sums)
        else:
            for o in range(n):
                bytes_of_one(weight + (i + o) * width, width, small, sums[o:])
        for o in range(n):
            plus = b[i + o] if bias else f4(0)
            for r in range(rows):
                y = f4(sums[o, r] - shifts[r]) * (scales[i + o] * steps[r]) + plus
                out[i + o, r] = y + out[i + o, r] if add else y


@compiled
def to_bytes(x, small, steps, shifts):
    """Rounds each lane of x (I, lanes) to LEVELS steps of either sign, four numbers into each of small (I / 4, lanes).

    A weight's byte is OFFSET more than the weight, and so a sum too large by the lane's shift.
    """
    inputs, lanes = x.shape
    peak, total = np.full(lanes, TINY, np.float32), np.zeros(lanes, np.float32)
    for i in range(inputs):
        for r in range(lanes):
            peak[r] = max(peak[r], abs(x[i, r]))
            total[r] += x[i, r]
    for r in range(lanes):
        steps[r] = peak[r] / f4(LEVELS) + f4(0) * total[r]  # the last term lets NaN through
        peak[r] = f4(LEVELS) / peak[r]
    for i in range(inputs // 4):
        for r in range(lanes):
            a, b = rounded(x[4 * i, r] * peak[r]), rounded(x[4 * i + 1, r] * peak[r])
            c, d = rounded(x[4 * i + 2, r] * peak[r]), rounded(x[4 * i + 3, r] * peak[r])
            shifts[r] += a + b + c + d
            small[i, r] = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24
    for i in range(inputs // 4 * 4, inputs):
        for r in range(lanes):
            a = rounded(x[i, r] * peak[r])
            shifts[r] += a
            small[i // 4, r] |= (a & 255) << (i % 4 * 8)
    for r in range(lanes):
        shifts[r] *= OFFSET


@compiled
def rounded(x):
    return np.int32(np.rint(x))


@compiled
def product_of_vector(w, x, out, lo, hi, add):
    """w[lo:hi] times x (I,), four outputs at a time: enough sums under way that none waits for its own last step."""
    i = lo
    while i + 4 <= hi and not (ONE_BY_ONE and x.size >= LONG):
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


@compiled
def take_head(qkv, first, r, position, p, out):
    """A row's query or key, which begins at feature `first`: turned by its position, normalised; into out (D,)."""
    half = p.rotated // 2
    for j in range(p.D):
        out[j] = qkv[first + j, r]
    if half:
        cos, sin = floats(p.cos + 4 * position * half, half), floats(p.sin + 4 * position * half, half)
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


@compiled
def attend(q, k, v, weights, out, next_k, next_v):
    """softmax(q k^T / sqrt(D)) v for a query (D,) and the keys and values (S, D), into out (D,).

    Row by row asks for the keys and values of who comes next, for memory is slow at so many short pieces.
    """
    S, D = k.shape
    scale, top, total = f4(1) / np.sqrt(f4(D)), f4(-np.inf), f4(0)
    products = weights.reshape(weights.size, 1)
    for s in range(0, S, 8):
        ask_for_rows(next_k, s, s + 8)
        product_of_vector(k, q, products, s, min(s + 8, S), False)
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
        ask_for_rows(next_v, s, s + 4)
        a, b, c, d = weights[s] / total, weights[s + 1] / total, weights[s + 2] / total, weights[s + 3] / total
        for j in range(D):
            out[j] += a * v[s, j] + b * v[s + 1, j] + c * v[s + 2, j] + d * v[s + 3, j]
    for s in range(whole, S):
        a = weights[s] / total
        for j in range(D):
            out[j] += a * v[s, j]


@compiled
def ask_for_rows(x, lo, hi):
    """Has memory bring rows lo to hi of x (S, D) nearer, those that there are."""
    size = 4 * x.shape[1]
    for place in range(lo * size, min(hi, len(x), SOON) * size, 64):
        ask_for(x.ctypes.data + place)


@compiled
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


@compiled
def gelu(x):
    """x times the part of a normal distribution below x; the error function is 7.1.26 of Abramowitz and Stegun."""
    z = abs(x) * f4(0.70710678)
    t = f4(1) / (f4(1) + f4(0.3275911) * z)
    poly = f4(1.061405429) * t - f4(1.453152027)
    for coefficient in (f4(1.421413741), f4(-0.284496736), f4(0.254829592)):
        poly = poly * t + coefficient
    tail = f4(0.5) * poly * t * exp(-z * z)  # the part above |x|
    return x * (f4(1) - tail) if x > 0 else x * tail


@compiled
def gelu_tanh(x):
    return x / (f4(1) + exp(f4(-1.5957691216) * (x + f4(0.044715) * x * x * x)))


@compiled
def exp(x):
    """e^x in steps that vector registers can take: a power of 2 times a polynomial, that of the Cephes library."""
    bounded = min(max(x, f4(-87)), f4(88))
    n = np.floor(bounded * f4(1.44269504) + f4(0.5))
    r = bounded - n * f4(0.693359375) + n * f4(2.12194440e-4)
    poly = f4(1.9875691500e-4)
    for coefficient in (f4(1.3981999507e-3), f4(8.3334519073e-3), f4(4.1665795894e-2), f4(1.6666665459e-1),
                        f4(5.0000001201e-1)):  # fmt: skip
        poly = poly * r + coefficient
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (poly * r * r + r + f4(1)) * power + f4(0) * x  # the last term lets NaN through


# ---- the threads: those that PyTorch has already ----

AHEAD = 2**13  # cache lines, half a megabyte
ARRIVED, PHASE = 0, 8  # where in the shared numbers is what, each in a cache line of its own


@compiled
def meet(p, threads, ahead):
    """Waits until all threads of the pass are here. Who waits asks for what will be read next, from an address on."""
    if threads == 1:
        return
    state = whole(p.state, 16)
    phase, spins = atomic_load(state, PHASE), 0
    if atomic_add(state, ARRIVED, 1) == threads - 1:
        atomic_store(state, ARRIVED, 0)
        atomic_store(state, PHASE, phase + 1)
    while atomic_load(state, PHASE) == phase:
        spins += 1
        if spins < AHEAD:
            ask_for(ahead + 64 * spins)
        elif spins % 4096 == 0 and p.sched_yield:
            call_at(p.sched_yield)


def work(address):
    """What each thread of a team does with the pass at an address."""
    p = carray(pass_at(address), (1,))[0]
    thread, threads = place_in_team(p)
    run(p, thread, threads)


@compiled
def place_in_team(p):
    """The number of this thread, and how many there are."""
    if p.omp_get_num_threads:
        return call_at(p.omp_get_thread_num), call_at(p.omp_get_num_threads)
    return 0, 1


class Team:
    """PyTorch's own threads (OpenMP), so that theirs and ours never wait for each other. Where its OpenMP is not GNU's,
    as on macOS and Windows, a pass has one thread."""

    def __init__(self):
        self.one_pass = threading.Lock()
        pytorch, libc = ctypes.CDLL(torch._C.__file__), ctypes.CDLL(None) if os.name == "posix" else None
        self.functions = {name: function_at(pytorch, name) for name in ("omp_get_thread_num", "omp_get_num_threads")}
        self.functions["sched_yield"] = function_at(libc, "sched_yield")
        self.parallel = getattr(pytorch, "GOMP_parallel", None)  # function, its argument, threads, flags
        if self.parallel:
            self.parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        else:
            self.functions |= dict.fromkeys(self.functions, 0)

    def run(self, work, address: int, threads: int) -> None:
        """Some work, in each thread, on what lies at an address. While another has the threads, it has one."""
        function = for_threads(work)
        if threads > 1 and self.parallel and self.one_pass.acquire(blocking=False):
            try:
                self.parallel(function.address, address, threads, 0)
            finally:
                self.one_pass.release()
        else:
            function.ctypes(address)


def function_at(library: ctypes.CDLL | None, name: str) -> int:
    function = getattr(library, name, None)
    return ctypes.cast(function, ctypes.c_void_p).value if function else 0


@functools.cache
def team() -> Team:
    return Team()


@functools.cache
def for_threads(work):
    """Compiles what each thread of a team is to do, or reads what an earlier process compiled."""
    binding.initialize_native_asmparser()  # one instruction is called by its name
    return cfunc(types.void(types.int64), cache=True, **how)(work)


# ---- for Python ----


class Loops(Decoder):
    """The Decoder of a model and a cache that `suit`. More than MOST tokens at once are left to PyTorch."""

    def __init__(self, model: GPT, cache: KVCache):
        super().__init__(model, cache)
        cfg, S_max = self.config, cache.k.size(3)
        weights = sum(module.weight.nbytes for module in model.modules() if type(module) in (nn.Linear, Int8Linear))
        self.threads = max(1, min(torch.get_num_threads(), weights // PER_THREAD))
        self.most = LANES if any(type(module) is Int8Linear for module in model.modules()) else MOST
        C, room = self.most * cfg.n_embd, 2 * self.most * cfg.n_embd + 2 * cfg.head_dim + S_max
        room += -room % 16  # whole cache lines
        sizes = {"x": C, "y": C, "qkv": self.most * (cfg.n_head + 2 * cfg.kv_heads) * cfg.head_dim,
                 "h": 2 * self.most * cfg.ffn_width, "room": self.threads * room}  # fmt: skip
        self.rows = {name: np.zeros(self.most, np.int64) for name in ("tokens", "texts", "positions", "state")}
        self.places, self.record = layers_of(model), np.zeros(1, Pass)
        self.arrays = self.rows | {name: aligned_zeros(size) for name, size in sizes.items()}
        values = {name: array.ctypes.data for name, array in self.arrays.items()} | team().functions
        values |= addresses(ln_emb=model.ln_emb, ln_f=model.ln_f, lm_head=model.lm_head)
        values |= dict(
            C=cfg.n_embd, H=cfg.n_head, G=cfg.kv_heads, D=cfg.head_dim, F=cfg.ffn_width, V=cfg.vocab_size, S_max=S_max,
            layer_norm=cfg.norm == "layer", activation=ACTIVATIONS.index(cfg.activation), eps=cfg.norm_eps,
            parallel=cfg.parallel_residual, qk_norm=cfg.qk_norm, embd_norm=cfg.embd_norm, n_layer=cfg.n_layer,
            wte=model.wte.weight.data_ptr(), wpe=model.wpe.weight.data_ptr() if model.wpe else 0,
            layers=self.places.ctypes.data, room_size=room,
        )  # fmt: skip
        if self.rope is not None:
            cos, sin = self.rope  # (1, S_max, 1, rotated), of which both halves are the same but for a sign
            half = cos.size(-1) // 2
            self.angles = cos[0, :, 0, :half].contiguous(), sin[0, :, 0, half:].contiguous()
            values |= dict(rotated=2 * half, cos=self.angles[0].data_ptr(), sin=self.angles[1].data_ptr())
        self._set(**values)

    def hidden(self, idx: Tensor) -> Tensor:
        """As `Decoder.hidden`."""
        (B, T), lengths, cache = idx.shape, self.cache.lengths, self.cache
        if B * T > self.most or max(lengths) + T > cache.k.size(3):
            return super().hidden(idx)
        self.rows["tokens"][: B * T] = idx.flatten().tolist()
        self.rows["texts"][: B * T] = [text for text in range(B) for _ in range(T)]
        self.rows["positions"][: B * T] = [length + t for length in lengths for t in range(T)]
        out = torch.empty(B, T, self.config.n_embd)
        self._run(B * T, out, only_head=False, B=B, k=cache.k.data_ptr(), v=cache.v.data_ptr())
        cache.lengths = [length + T for length in lengths]
        return out

    def head(self, x: Tensor) -> Tensor:
        """As `Decoder.head`."""
        if len(x) > self.most:
            return super().head(x)
        x, logits = x.contiguous(), torch.empty(len(x), self.config.vocab_size)
        self._run(len(x), logits, only_head=True, given=x.data_ptr())
        return self.cap(logits)

    def _run(self, rows: int, out: Tensor, **values: int) -> None:
        self._set(R=rows, lanes=1 if rows == 1 else rows + -rows % LANES, out=out.data_ptr(), **values)
        team().run(work, self.record.ctypes.data, self.threads)

    def _set(self, **values: float) -> None:
        one = self.record[0]
        for name, value in values.items():
            one[name] = value


def aligned_zeros(size: int) -> np.ndarray:
    """Zeros (size,) from the beginning of a cache line on: vectors that lie across two of them take longer to read."""
    zeros = np.zeros(size + LANES, np.float32)
    first = -zeros.ctypes.data % (4 * LANES) // 4
    return zeros[first : first + size]


def layers_of(model: GPT) -> np.ndarray:
    """Where the weights of each layer are."""
    layers = np.zeros(len(model.h), Layer)
    for layer, block in zip(layers, model.h, strict=True):
        found = addresses(
            ln_1=block.ln_1, c_attn=block.attn.c_attn, attn_proj=block.attn.c_proj, ln_2=block.ln_2,
            c_fc=block.mlp.c_fc, c_gate=getattr(block.mlp, "c_gate", None), mlp_proj=block.mlp.c_proj,
        )  # fmt: skip
        for name, address in found.items():
            layer[name] = address
    return layers


def addresses(**modules: nn.Module | None) -> dict[str, int]:
    """Where the weight, its scale and the bias of each module are, of those that have them."""
    kinds = ("weight", "scale", "bias")
    found = {f"{name}_{kind}": getattr(m, kind, None) for name, m in modules.items() for kind in kinds}
    return {name: tensor.data_ptr() for name, tensor in found.items() if tensor is not None}


KINDS = {GPT, Block, CausalSelfAttention, MLP, Norm, nn.Linear, nn.Embedding, nn.Dropout, nn.Identity, nn.ModuleList}


def suit(model: GPT, cache: KVCache) -> bool:
    """Whether all is as the loops expect it: plain layers (no adapters) in float32, or in 8 bits where this CPU
    multiplies them, in a CPU's memory."""
    tensors = [cache.k, cache.v, *model.parameters()]
    return all(type(module) in KINDS or of_bytes(module) for module in model.modules()) and all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors
    )


def of_bytes(module: nn.Module) -> bool:
    """Whether it is a layer in 8 bits whose products the loops can take."""
    return HAS_BYTES and type(module) is Int8Linear and module.input_levels == LEVELS
