"""Products in SIMD registers: exact, and lowered by LLVM for CPUs that this machine is not."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

binding = pytest.importorskip("llvmlite.binding", reason="Numba is not installed: the compiled engine is not tested")
pytest.importorskip("numba")

from nanogpt_hub.engine import intrinsics, tuning  # noqa: E402

# Compiles the product of bytes alone, for the CPU that the environment names, and prints the assembly. Runs nothing.
COMPILE_BYTES = """
import numpy as np
from numba import types
from numba.core.ccallback import CFunc
from nanogpt_hub.engine import intrinsics as i

def product(address):
    x, sums = i.int64_view(address, 8), np.empty((8, i.LANES), np.int32)
    i.byte_product_tile(address, 64, sums, sums)
    i.byte_product_vector(address, 64, sums, sums)
    x[0] = sums[0, 0]

function = CFunc(product, (types.void(types.int64).args, types.void), locals={}, options=dict(i.JIT_OPTIONS))
print(i.DOT, i.GROUP, i.ROW_TILE, i.LANES)
print(function._compile_uncached().library.get_asm_str())
"""
CPUS = {  # NUMBA_CPU_NAME, NUMBA_CPU_FEATURES: the instruction that the product becomes, the registers it uses
    ("generic", ""): ("pmaddwd", "xmm"),
    ("x86-64-v3", ""): ("vpmaddwd", "ymm"),
    ("x86-64-v4", ""): ("vpmaddwd", "[yz]mm"),
    ("alderlake", "+avx2,+fma,+avxvnni"): ("vpdpbusd", "ymm"),
    ("icelake-server", "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni"): ("vpdpbusd", "zmm"),
}


@pytest.mark.skipif(not tuning.target()[0].startswith("x86_64"), reason="Numba compiles for another kind of CPU here")
@pytest.mark.parametrize("cpu", CPUS, ids=lambda cpu: cpu[0])
def test_bytes_are_multiplied_by_what_the_target_has(cpu):
    instruction, registers = CPUS[cpu]
    env = {**os.environ, "NUMBA_CPU_NAME": cpu[0], "NUMBA_CPU_FEATURES": cpu[1], "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", COMPILE_BYTES], capture_output=True, text=True, env=env, timeout=250)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"{instruction}\s.*{registers}", result.stdout), result.stdout[:200]


# Lowers the IR that Numba made of every function of a pass for Arm. Numba's own reference counts, which its optimiser
# turned into an x86 intrinsic, become calls: Numba compiles those for Arm itself.
LOWER_FOR_ARM = r"""
import collections, re
from llvmlite import binding
from numba.core.ccallback import CFunc
from nanogpt_hub.engine import kernels, threads

threads.entry_point.__wrapped__(kernels.decode_pass, type("Fresh", (CFunc,), {"enable_caching": lambda self: None}))
binding.initialize_all_targets()
binding.initialize_all_asmprinters()
functions = [f for module in (kernels, threads) for f in vars(module).values() if hasattr(f, "overloads")]
irs = [ir for function in functions for ir in function.inspect_llvm().values()]
triple = "aarch64-unknown-linux-gnu"
for cpu in ("generic", "apple-m1"):
    found = collections.Counter()
    for ir in irs:
        ir = re.sub(r"^target .*\n", "", ir, flags=re.M).replace(" immarg", "")
        ir = re.sub(r"llvm\.x86\.atomic\.(\w+)\.cc\.", r"numba_atomic_\1_", ir)
        machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=2)
        module = binding.parse_assembly(ir)
        module.triple, module.data_layout = triple, str(machine.target_data)
        module.verify()
        lines = machine.emit_assembly(module).split("\n")
        found.update(line.split()[0] for line in lines if line.startswith("\t") and line[1] != ".")
    assert len(irs) > 20 and all(any(k.startswith(name) for k in found) for name in ("fmla", "smul", "prfm")), found
    print(cpu)
"""


def test_a_pass_lowers_for_arm():
    """No instruction in the IR belongs to one kind of CPU alone, but for VNNI: so on x86 a CPU without it is named."""
    name = "x86-64-v3" if tuning.target()[0].startswith("x86_64") else "generic"
    env = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", LOWER_FOR_ARM], capture_output=True, text=True, env=env, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["generic", "apple-m1"]


@pytest.mark.parametrize("group", [2, 4])
def test_the_layout_of_each_product_is_exact(group):
    """dot_4 needs VNNI; with the products written out, its layout of weights and inputs is tested on any CPU."""
    code = f"""
import numpy as np
from llvmlite import ir
from nanogpt_hub.engine import intrinsics as i
from numba import njit

def dot_4(builder, total, weights, inputs):
    bytes_, wide = ir.VectorType(i.I8, 4 * i.LANES), ir.VectorType(i.I32, 4 * i.LANES)
    a = builder.zext(builder.bitcast(weights, bytes_), wide)
    b = builder.sext(builder.bitcast(inputs, bytes_), wide)
    products = builder.mul(a, b)
    for g in range(4):
        mask = ir.Constant(i.INT_LANES, list(range(g, 4 * i.LANES, 4)))
        total = builder.add(total, builder.shuffle_vector(products, ir.Constant(wide, ir.Undefined), mask))
    return total

i.dot_4, i.GROUP, i.DOT = dot_4, {group}, {group} == 4
tile, row, vector = i.byte_product(3, i.LANES), i.byte_product(1, i.LANES), i.byte_product(1, 1)

@njit
def run(weights, many, one, sums, lone):
    tile(weights.ctypes.data, weights.shape[1], many, sums)
    row(weights.ctypes.data + weights.shape[1], weights.shape[1], many, sums[3:])
    vector(weights.ctypes.data, weights.shape[1], one, lone)

rng = np.random.default_rng(0)
weights = rng.integers(0, 256, (3, 192), np.uint8)
inputs = rng.integers(-127, 128, (192, i.LANES))
narrow = inputs.astype(np.int8 if {group} == 4 else np.int16)
many = np.ascontiguousarray(narrow.reshape(-1, {group}, i.LANES).transpose(0, 2, 1)).view(np.int32)[..., 0].copy()
one = np.ascontiguousarray(narrow[:, 5]).view(np.int32)
sums, lone = np.zeros((4, i.LANES), np.int32), np.zeros((1, i.LANES), np.int32)
run(weights, many, one, sums, lone)
expected = weights.astype(int) @ inputs
assert (sums[:3] == expected).all() and (sums[3] == expected[1]).all() and lone[0, 0] == expected[0, 5]
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=250)
    assert result.returncode == 0, result.stderr


SIZES = {  # by the beginning of Numba's triple: what is printed for each NUMBA_CPU_NAME
    "x86_64": {"generic": "16 2 None", "x86-64-v3": "32 4 None", "x86-64-v4": "64 8 None"},
    "aarch64": {"generic": "16 4 None", "cortex-a53": "16 4 None", "apple-m1": "16 4 None"},
}
SIZES["arm64"] = SIZES["aarch64"]  # as macOS says


def test_the_target_decides_and_not_the_host():
    code = "from nanogpt_hub.engine import tuning as t; print(t.vector_bytes(), t.row_tile(), t.dot_of_bytes())"
    for name, expected in SIZES[tuning.target()[0].partition("-")[0]].items():
        env = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": "", "PYTHONPATH": str(ROOT)}
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert printed.stdout.strip() == expected


def test_records_hold_numbers_by_name():
    record = intrinsics.record("one two", three=np.float32)
    assert record.names == ("one", "two", "three")
