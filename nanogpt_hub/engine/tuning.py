"""What the CPU that Numba compiles for can do, and the sizes that the compiled code takes from it.

A feature counts if Numba's *target* has it: `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` change that, and code for a CPU
that this machine is not would end the process. Some targets are named without a list of features ("x86-64-v3"), so
LLVM is asked what it would emit, instead of reading the list.
"""

import functools

from llvmlite import binding
from numba.core.registry import cpu_target

LANES = 16  # tokens that lie side by side: one AVX512 register of float32, two of AVX, four of SSE or NEON
PER_THREAD_BYTES = 2**20  # of weights that are worth one more thread, which has to be waited for
L2_TILE_BYTES = 2**18  # of weights that stay in the second-level cache while all tokens of a pass are multiplied
PREFETCH_ROWS = 128  # keys of the next head that are prefetched: more would push out what is being read
LONG_ROW = 256  # numbers in a row of weights from which rows are read one by one, as hardware prefetchers like best
LINE_BYTES = 64  # that memory gives at once
SPIN_LINES = 2**13  # cache lines, half a megabyte, that a thread prefetches while it waits at a barrier
MAX_ROWS = LANES  # tokens in a pass; for more, PyTorch's matrix products are as fast


@functools.cache
def target() -> tuple[str, str, str]:
    """Numba's target: LLVM triple, CPU name, features ("+avx2,-avx512f,...")."""
    return cpu_target.target_context.codegen().magic_tuple()


@functools.cache
def assembly(ir: str) -> str:
    """What LLVM emits for a module on Numba's target. RuntimeError where LLVM does not know an intrinsic of it."""
    module = binding.parse_assembly(ir)
    module.verify()
    triple, name, features = target()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=2)
    return machine.emit_assembly(module)


@functools.cache
def vector_bytes() -> int:
    """Width of the target's vector registers in bytes, as LLVM uses them for integers: 64, 32 or 16."""
    text = assembly(
        "define <16 x i32> @f(<16 x i32> %a, <16 x i32> %b) {\n%c = add <16 x i32> %a, %b\nret <16 x i32> %c\n}"
    )
    return next((width for name, width in (("%zmm", 64), ("%ymm", 32)) if name in text), 16)


@functools.cache
def vector_registers() -> int:
    """How many of them there are."""
    return 32 if vector_bytes() == 64 or target()[0].startswith(("aarch64", "arm64")) else 16


@functools.cache
def row_tile() -> int:
    """Rows of weights that are multiplied together: the largest power of two up to 8 whose sums for LANES tokens, one
    row of inputs and one weight fit the registers."""
    per_row = 4 * LANES // vector_bytes()
    return next(n for n in (8, 4, 2, 1) if (n + 1) * per_row + 1 <= vector_registers() or n == 1)


@functools.cache
def dot_of_bytes() -> str | None:
    """The declaration of the instruction that adds products of four bytes to each 32-bit lane (VNNI), or None.

    Its operands changed their types between versions of LLVM, so both spellings are tried.
    """
    triple, _, features = target()
    has = set(features.split(","))
    bits = 512 if "+avx512vnni" in has and vector_bytes() == 64 else 256 if "+avxvnni" in has else 0
    if not triple.startswith("x86_64") or not bits:
        return None
    sums = f"<{bits // 32} x i32>"
    for operand in (f"<{bits // 8} x i8>", sums):
        name = f"@llvm.x86.avx512.vpdpbusd.{bits}"
        declaration = f"declare {sums} {name}({sums}, {operand}, {operand})"
        call = (
            f"%r = call {sums} {name}({sums} %a, {operand} %b, {operand} %b)"  # of a mere declaration LLVM 20 takes any
        )
        try:
            module = binding.parse_assembly(
                f"{declaration}\ndefine {sums} @f({sums} %a, {operand} %b) {{\n{call}\nret {sums} %r\n}}"
            )
            module.verify()
        except RuntimeError:
            continue
        if operand in str(module):  # not rewritten to another spelling
            return declaration
    return None
