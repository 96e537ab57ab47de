"""LLVM intrinsics for Numba: pointers, atomics, prefetch, products in SIMD registers; and the kernels' records.

Each is emitted as LLVM IR, no inline assembly: LLVM lowers it for whatever CPU it compiles for. Shape legend: that of
kernels.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, extending, from_dtype, njit, types
from numba.core import cgutils

from nanogpt_hub.engine.tuning import LANES, LINE_BYTES, dot_of_bytes, row_tile

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT_LANES, INT_LANES = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)
DOT = dot_of_bytes()
GROUP = 4 if DOT else 2  # inputs that share 32 bits: four bytes, or two 16-bit numbers where there is no VNNI
ROW_TILE = row_tile()

FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}  # NaN must stay NaN
JIT_OPTIONS: dict[str, Any] = dict(error_model="numpy", fastmath=FAST_MATH)
jit = njit(**JIT_OPTIONS)
# As kernels see it: they call an intrinsic without the typing context, the first argument of its Python function.
intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = extending.intrinsic

# ---- records: addresses and sizes, by name ----


def record(names: str, **others: type) -> np.dtype:
    """A record of 64-bit integers by these names, and other fields by their types."""
    return np.dtype([*((name, np.int64) for name in names.split()), *others.items()])


# Addresses of a layer's parameters. 0: the model does not have it. A scale: the weights are 8-bit.
Layer = record(
    "ln_1_weight ln_1_bias c_attn_weight c_attn_scale c_attn_bias attn_proj_weight attn_proj_scale attn_proj_bias "
    "ln_2_weight ln_2_bias c_fc_weight c_fc_scale c_fc_bias c_gate_weight c_gate_scale c_gate_bias "
    "mlp_proj_weight mlp_proj_scale mlp_proj_bias"
)
# All that a pass reads: sizes, settings, and addresses of inputs, parameters, the cache and the buffers. `x qkv y h`
# are shared by the threads, each thread has `scratch` of its own.
Pass = record(
    "R lanes C H G D F V S_max B rotated layer_norm activation parallel qk_norm embd_norm n_layer only_head levels "
    "tokens texts positions given wte wpe ln_emb_weight ln_emb_bias layers ln_f_weight ln_f_bias "
    "lm_head_weight lm_head_scale cos sin k v x qkv y h scratch scratch_size out barrier_state "
    "sched_yield omp_get_thread_num omp_get_num_threads",
    eps=np.float32,
)

# ---- memory at an address ----


def pointer_to(kind: types.Type):
    @intrinsic
    def pointer(typing, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), codegen

    return pointer


float32_at, int64_at = pointer_to(types.float32), pointer_to(types.int64)
layers_at, pass_at = pointer_to(from_dtype(Layer)), pointer_to(from_dtype(Pass))


@jit
def float32_view(address, n):
    return carray(float32_at(address), (n,))


@jit
def int64_view(address, n):
    return carray(int64_at(address), (n,))


@jit
def matrix_view(address, rows, columns):
    return carray(float32_at(address), (rows, columns))


def element(context, builder, signature, args):
    """The address of an array's element: the first two arguments."""
    return builder.gep(context.make_array(signature.args[0])(context, builder, args[0]).data, [args[1]])


@intrinsic
def atomic_load(typing, numbers, i):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(element(context, builder, signature, args), "seq_cst", 8)

    return types.int64(numbers, types.intp), codegen


@intrinsic
def atomic_store(typing, numbers, i, value):
    def codegen(context, builder, signature, args):
        builder.store_atomic(args[2], element(context, builder, signature, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(numbers, types.intp, types.int64), codegen


@intrinsic
def atomic_add(typing, numbers, i, value):
    """Adds to a number and returns what it was before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", element(context, builder, signature, args), args[2], "seq_cst")

    return types.int64(numbers, types.intp, types.int64), codegen


@intrinsic
def call_at(typing, address):
    """Calls a C function at an address that takes nothing and returns an int."""

    def codegen(context, builder, signature, args):
        function = builder.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer())
        return builder.sext(builder.call(function, []), I64)

    return types.int64(types.int64), codegen


def emit_prefetch(builder, place) -> None:
    """Prefetches what is at a place (a pointer to bytes) for reading, into all levels of the cache."""
    kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [place, I32(0), I32(3), I32(1)])


@intrinsic
def prefetch(typing, address):
    """Prefetches the cache line at an address."""

    def codegen(context, builder, signature, args):
        emit_prefetch(builder, builder.inttoptr(args[0], I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# ---- SIMD: products of a tile of rows of weights with LANES tokens ----


def broadcast(builder, number):
    """A vector of LANES times a number."""
    undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, number, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(INT_LANES, [0] * LANES))


def zeros(builder, kind, count: int) -> list:
    """`count` variables of a vector type that hold zeros. They become registers."""
    variables = [cgutils.alloca_once(builder, kind) for _ in range(count)]
    for variable in variables:  # stored here and not where they are made: this may stand in a loop
        builder.store(ir.Constant(kind, None), variable)  # zeros
    return variables


def float_product(rows: int):
    """A function `(w, i, x, out)`: out (rows, LANES) becomes w[i : i + rows] (rows, I) times x (I, LANES).

    The sums stay in registers. Meanwhile the next tile's weights are prefetched: the CPU does not guess them from so
    many streams at a time.
    """

    def codegen(context, builder, signature, args):
        w, x, out = (context.make_array(signature.args[n])(context, builder, args[n]) for n in (0, 2, 3))
        width = cgutils.unpack_tuple(builder, w.shape)[1]
        starts = [builder.gep(w.data, [builder.mul(builder.add(args[1], I64(o)), width)]) for o in range(rows)]
        sums = zeros(builder, FLOAT_LANES, rows)
        # fmuladd is one instruction where the CPU has it, else two; `fma` would be a call of a library function there.
        kind = ir.FunctionType(FLOAT_LANES, [FLOAT_LANES] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        line = LINE_BYTES // 4
        count = builder.sdiv(builder.add(width, I64(line - 1)), I64(line))
        with cgutils.for_range(builder, count) as lines:
            start = builder.mul(lines.index, I64(line))
            left = builder.sub(width, start)
            for row in starts:
                ahead = builder.gep(row, [builder.add(start, builder.mul(width, I64(rows)))])
                emit_prefetch(builder, builder.bitcast(ahead, I8.as_pointer()))
            here = builder.select(builder.icmp_signed("<", left, I64(line)), left, I64(line))
            with cgutils.for_range(builder, here) as loop:
                k = builder.add(start, loop.index)
                place = builder.gep(x.data, [builder.mul(k, I64(LANES))])
                inputs = builder.load(builder.bitcast(place, FLOAT_LANES.as_pointer()), align=4)
                for row, total in zip(starts, sums, strict=True):
                    weight = broadcast(builder, builder.load(builder.gep(row, [k])))
                    builder.store(builder.call(fma, [weight, inputs, builder.load(total)]), total)
        for o, total in enumerate(sums):
            place = builder.bitcast(builder.gep(out.data, [I64(o * LANES)]), FLOAT_LANES.as_pointer())
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    @intrinsic
    def product(typing, w, i, x, out):
        return types.void(w, types.intp, x, out), codegen

    return product


float_product_tile, float_product_row = float_product(ROW_TILE), float_product(1)


def dot_4(builder, total, weights, inputs):
    """total (n x i32) plus, in each lane, four unsigned bytes of `weights` times four signed bytes of `inputs` (the
    same 32 bits). One VNNI instruction for each register."""
    assert DOT is not None  # dot_2 is used without
    wide = 16 if ".512" in DOT else 8
    sums = ir.VectorType(I32, wide)
    operand = ir.VectorType(I8, 4 * wide) if "x i8>" in DOT else sums
    kind = ir.FunctionType(sums, [sums, operand, operand])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.vpdpbusd.{32 * wide}")
    undefined = ir.Constant(total.type, ir.Undefined)
    parts = []
    for first in range(0, LANES, wide):
        mask = ir.Constant(sums, list(range(first, first + wide)))
        total_, weights_, inputs_ = (builder.shuffle_vector(v, undefined, mask) for v in (total, weights, inputs))
        parts.append(builder.call(function, [total_, *(builder.bitcast(v, operand) for v in (weights_, inputs_))]))
    if len(parts) == 1:
        return parts[0]
    return builder.shuffle_vector(*parts, ir.Constant(INT_LANES, list(range(LANES))))


def dot_2(builder, total, weights, inputs):
    """total (LANES x i32) plus, in each lane, the two 16-bit numbers of `weights` times the two of `inputs` (the same
    32 bits). x86 has one instruction for it (pmaddwd), which LLVM finds in this pattern; others take a few."""
    halves = ir.VectorType(I16, 2 * LANES)
    wide = ir.VectorType(I32, 2 * LANES)
    a, b = (builder.sext(builder.bitcast(v, halves), wide) for v in (weights, inputs))
    products, undefined = builder.mul(a, b, flags=["nsw"]), ir.Constant(wide, ir.Undefined)
    even, odd = (
        builder.shuffle_vector(products, undefined, ir.Constant(INT_LANES, list(range(first, 2 * LANES, 2))))
        for first in (0, 1)
    )
    return builder.add(total, builder.add(even, odd))


def byte_product(rows: int, lanes: int):
    """A function `(weights, width, x, sums)`: sums (rows, LANES) of the products of integers, exact. The `rows` rows of
    `width` unsigned bytes begin at an address.

    x holds signed inputs, GROUP of them in 32 bits: (width / GROUP, LANES). With 1 lane it is (width / GROUP,): many
    inputs meet as many weights, and only the first of a row's sums counts.
    """

    def codegen(context, builder, signature, args):
        weights, width = args[:2]
        x, sums = (context.make_array(signature.args[n])(context, builder, args[n]).data for n in (2, 3))
        starts = [builder.add(weights, builder.mul(width, I64(o))) for o in range(rows)]
        totals = zeros(builder, INT_LANES, rows)
        tile = [cgutils.alloca_once(builder, ir.ArrayType(I32, LINE_BYTES // GROUP)) for _ in starts]
        with cgutils.for_range(builder, builder.sdiv(width, I64(LINE_BYTES))) as lines:
            start = builder.mul(lines.index, I64(LINE_BYTES))
            places = [builder.inttoptr(builder.add(row, start), I8.as_pointer()) for row in starts]
            first = builder.gep(x, [builder.mul(builder.sdiv(start, I64(GROUP)), I64(1 if lanes == 1 else LANES))])
            if lanes == 1:
                line_by_vector(builder, places, first, totals)
            else:
                for row in starts:
                    ahead = builder.add(builder.add(row, start), builder.mul(width, I64(rows)))
                    emit_prefetch(builder, builder.inttoptr(ahead, I8.as_pointer()))
                line_by_lanes(builder, places, tile, first, totals)
        for o, total in enumerate(totals):
            place, total = builder.gep(sums, [I64(LANES * o)]), builder.load(total)
            if lanes == 1:
                builder.store(sum_of_lanes(builder, total), place)
            else:
                builder.store(total, builder.bitcast(place, INT_LANES.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def product(typing, weights, width, x, sums):
        return types.void(types.int64, types.int64, x, sums), codegen

    return product


def vector_at(builder, place, kind, offset: int = 0):
    """The vector that begins `offset` elements of it after a pointer."""
    return builder.load(builder.gep(builder.bitcast(place, kind.as_pointer()), [I64(offset)]), align=1)


def line_by_vector(builder, places, x, totals) -> None:
    """Adds a line of 64 weights of each row times 64 inputs to the row's total."""
    for place, total in zip(places, totals, strict=True):
        value = builder.load(total)
        for part in range(4 // GROUP):
            weights = widened(builder, place, part)
            value = (dot_4 if DOT else dot_2)(builder, value, weights, vector_at(builder, x, INT_LANES, part))
        builder.store(value, total)


def widened(builder, place, part: int):
    """LANES groups of a row's weights, as the products take them: as they are, or each byte in 16 bits."""
    if DOT:
        return vector_at(builder, place, INT_LANES, part)
    weights = vector_at(builder, place, ir.VectorType(I8, 2 * LANES), part)
    return builder.bitcast(builder.zext(weights, ir.VectorType(I16, 2 * LANES)), INT_LANES)


def line_by_lanes(builder, places, tile, x, totals) -> None:
    """Adds a line of 64 weights of each row times 64 inputs of LANES tokens to the row's totals."""
    for place, words in zip(places, tile, strict=True):
        for part in range(4 // GROUP):
            there = builder.gep(builder.bitcast(words, INT_LANES.as_pointer()), [I64(part)])
            builder.store(widened(builder, place, part), there, align=4)
    with cgutils.for_range(builder, I64(LINE_BYTES // GROUP)) as loop:
        inputs = vector_at(builder, builder.gep(x, [builder.mul(loop.index, I64(LANES))]), INT_LANES)
        for words, total in zip(tile, totals, strict=True):
            weight = broadcast(builder, builder.load(builder.gep(words, [I64(0), loop.index])))
            builder.store((dot_4 if DOT else dot_2)(builder, builder.load(total), weight, inputs), total)


def sum_of_lanes(builder, total):
    kind = ir.FunctionType(I32, [INT_LANES])
    name = f"llvm.vector.reduce.add.v{LANES}i32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [total])


byte_product_tile, byte_product_row = byte_product(ROW_TILE, LANES), byte_product(1, LANES)
byte_product_vector = byte_product(1, 1)  # one row, one stream from memory: that is fastest
