/**
 * The inner loops of a GPT for WebAssembly SIMD, written with assembler.js: no toolchain, no binary in the tree.
 *
 * linear_*  weights (rows, columns) times one token:      y[row] = sum over columns of w[row, column] x[column]
 * tokens_*  the same for 4 tokens at a time, so that each weight is read once for all of them
 * mix_*     attention's weighted mean of values:           y[d] = sum over s of p[s] v[s, d]
 *
 * The loops have no remainders: engine.js pads columns to STEP and rows to ROWS with zeros, tokens to TOKENS. Weights
 * are float32, bfloat16 (the upper half of a float32) or int8 (its row's scale is applied by engine.js).
 */
import { define, do_while, f32, f32x4, get, i32, i32x4, module_bytes, set, v128 } from "./assembler.js";

export const STEP = 8; // columns in one round of a loop
export const ROWS = 4; // rows of weights that share what is loaded of x
export const TOKENS = 4;
const ROW_PAIR = 2; // rows in the kernel for several tokens: 2 x 4 sums, and 16 registers on x86

/** How each storage gives STEP weights at an address as two vectors of 4 floats. */
const STORAGES = {
  f32: { bytes: 4, load: (at) => [v128.load(at, 0), v128.load(at, 16)] },
  bf16: {
    bytes: 2,
    load: (at) => [0, 8].map((offset) => i32x4.shl(v128.load16x4_u(at, offset), i32.const(16))),
  },
  int8: {
    bytes: 1,
    load: (at) => [i32x4.extend_low_i16x8_s, i32x4.extend_high_i16x8_s]
      .map((extend) => f32x4.convert_i32x4_s(extend(v128.load8x8_s(at)))),
  },
};

const step = (pointer, bytes) => set(pointer, i32.add(get(pointer), i32.const(bytes)));
const multiply_add = (sum, a, b) => set(sum, f32x4.add(get(sum), f32x4.mul(a, b)));
const sum_of_lanes = (v) => [1, 2, 3].reduce((sum, lane) => f32.add(sum, f32x4.extract_lane(get(v), lane)),
  f32x4.extract_lane(get(v), 0));
const several = (n, make) => Array.from({ length: n }, (_, i) => make(i));

/** linear_*(w, x, y, rows, columns): ROWS rows of weights at a time, each with its own sum. */
function linear_kernel(storage) {
  const { bytes, load } = STORAGES[storage];
  return define(`linear_${storage}`, ["w", "x", "y", "rows", "columns"], (local) => {
    const { w, x, y, rows, columns } = local;
    const at = several(ROWS, () => local.new("i32")), sum = several(ROWS, () => local.new("v128"));
    const x_at = local.new("i32"), x_end = local.new("i32"), y_end = local.new("i32"), stride = local.new("i32");
    const low = local.new("v128"), high = local.new("v128");
    return [
      set(stride, i32.mul(get(columns), i32.const(bytes))),
      set(y_end, i32.add(get(y), i32.mul(get(rows), i32.const(4)))),
      set(x_end, i32.add(get(x), i32.mul(get(columns), i32.const(4)))),
      do_while([
        several(ROWS, (r) => [
          set(at[r], r ? i32.add(get(at[r - 1]), get(stride)) : get(w)),
          set(sum[r], v128.zero()),
        ]),
        set(x_at, get(x)),
        do_while([
          set(low, v128.load(get(x_at), 0)),
          set(high, v128.load(get(x_at), 16)),
          several(ROWS, (r) => {
            const [first, second] = load(get(at[r]));
            return [multiply_add(sum[r], get(low), first), multiply_add(sum[r], get(high), second),
              step(at[r], STEP * bytes)];
          }),
          step(x_at, STEP * 4),
        ], i32.lt(get(x_at), get(x_end))),
        several(ROWS, (r) => f32.store(get(y), sum_of_lanes(sum[r]), r * 4)),
        set(w, get(at[ROWS - 1])), // where the last of these rows ended
        step(y, ROWS * 4),
      ], i32.lt(get(y), get(y_end))),
    ];
  });
}

/**
 * tokens_*(w, x, y, rows, columns, tokens): x (tokens, columns), y (tokens, rows). For each pair of rows all tokens are
 * gone through, TOKENS at a time, so that weights come from memory once and x from the cache.
 */
function tokens_kernel(storage) {
  const { bytes, load } = STORAGES[storage];
  return define(`tokens_${storage}`, ["w", "x", "y", "rows", "columns", "tokens"], (local) => {
    const { w, x, y, rows, columns, tokens } = local;
    const at = several(ROW_PAIR, () => local.new("i32")), x_at = several(TOKENS, () => local.new("i32"));
    const sum = several(ROW_PAIR * TOKENS, () => local.new("v128")), weight = several(ROW_PAIR, () => local.new("v128"));
    const stride = local.new("i32"), x_stride = local.new("i32"), y_stride = local.new("i32"), x_end = local.new("i32");
    const y_end = local.new("i32"), y_at = local.new("i32"), left = local.new("i32");
    const half = (part) => [ // 4 of the STEP columns
      several(ROW_PAIR, (r) => set(weight[r], load(get(at[r]))[part])),
      several(TOKENS, (t) => several(ROW_PAIR, (r) =>
        multiply_add(sum[t * ROW_PAIR + r], v128.load(get(x_at[t]), part * 16), get(weight[r])))),
    ];
    return [
      set(stride, i32.mul(get(columns), i32.const(bytes))),
      set(x_stride, i32.mul(get(columns), i32.const(4))),
      set(y_stride, i32.mul(get(rows), i32.const(4))),
      set(y_end, i32.add(get(y), get(y_stride))),
      do_while([
        set(left, get(tokens)),
        set(x_at[0], get(x)),
        set(y_at, get(y)),
        do_while([
          several(TOKENS - 1, (t) => set(x_at[t + 1], i32.add(get(x_at[t]), get(x_stride)))),
          set(x_end, get(x_at[1])),
          several(ROW_PAIR, (r) => set(at[r], r ? i32.add(get(w), get(stride)) : get(w))),
          sum.map((s) => set(s, v128.zero())),
          do_while([
            half(0),
            half(1),
            at.map((pointer) => step(pointer, STEP * bytes)),
            x_at.map((pointer) => step(pointer, STEP * 4)),
          ], i32.lt(get(x_at[0]), get(x_end))),
          several(TOKENS, (t) => [
            several(ROW_PAIR, (r) => f32.store(get(y_at), sum_of_lanes(sum[t * ROW_PAIR + r]), r * 4)),
            set(y_at, i32.add(get(y_at), get(y_stride))),
          ]),
          set(x_at[0], get(x_at[TOKENS - 1])), // where the last of these tokens ended
          set(left, i32.sub(get(left), i32.const(TOKENS))),
        ], i32.lt(i32.const(0), get(left))),
        set(w, i32.add(get(w), i32.mul(get(stride), i32.const(ROW_PAIR)))),
        step(y, ROW_PAIR * 4),
      ], i32.lt(get(y), get(y_end))),
    ];
  });
}

/** mix_*(v, p, y, count, columns): `vectors` x 4 dimensions at a time, so that enough sums are on their way at once. */
function mix_kernel(vectors) {
  return define(`mix_${vectors * 4}`, ["v", "p", "y", "count", "columns"], (local) => {
    const { v, p, y, count, columns } = local;
    const sum = several(vectors, () => local.new("v128")), prob = local.new("v128");
    const v_at = local.new("i32"), p_at = local.new("i32"), p_end = local.new("i32"), y_end = local.new("i32");
    const stride = local.new("i32");
    return [
      set(stride, i32.mul(get(columns), i32.const(4))),
      set(p_end, i32.add(get(p), i32.mul(get(count), i32.const(4)))),
      set(y_end, i32.add(get(y), get(stride))),
      do_while([
        sum.map((s) => set(s, v128.zero())),
        set(v_at, get(v)),
        set(p_at, get(p)),
        do_while([
          set(prob, f32x4.splat(f32.load(get(p_at)))),
          several(vectors, (i) => multiply_add(sum[i], v128.load(get(v_at), i * 16), get(prob))),
          set(v_at, i32.add(get(v_at), get(stride))),
          step(p_at, 4),
        ], i32.lt(get(p_at), get(p_end))),
        several(vectors, (i) => v128.store(get(y), get(sum[i]), i * 16)),
        step(v, vectors * 16),
        step(y, vectors * 16),
      ], i32.lt(get(y), get(y_end))),
    ];
  });
}

/** The bytes of the module; about 3 kB. */
export function kernel_bytes() {
  const storages = Object.keys(STORAGES);
  return module_bytes([...storages.map(linear_kernel), ...storages.map(tokens_kernel), mix_kernel(8), mix_kernel(2)]);
}

export const STORAGE_BYTES = Object.fromEntries(Object.entries(STORAGES).map(([name, { bytes }]) => [name, bytes]));
