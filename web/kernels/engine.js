/**
 * The fast engine: the four operations of `plain_engine` (model.js) by kernels.js, on weights that lie in one
 * WebAssembly memory. Results equal the plain ones up to the rounding of sums.
 *
 *     const engine = await FastEngine.create(bytes_needed(config, shapes, "bf16"), "bf16");
 *     const model = new GPT(config, state_for(engine), engine);
 *
 * Weights are kept as float32, as bfloat16 (half the bytes; exact for files in bfloat16) or as int8 with a scale for
 * each row (a quarter; rounded). Norms and biases stay float32.
 */
import { attend, softmax } from "../model.js";
import { kernel_bytes, ROWS, STEP, STORAGE_BYTES, TOKENS } from "./kernels.js";

const PAGE = 65536; // bytes of a page of WebAssembly memory
const MAX_PAGES = 65535; // 4 GB
const ALIGN = 64;
const round_up = (n, to) => Math.ceil(n / to) * to;

/** Whether this browser has WebAssembly with SIMD, and allows it here. */
export function supports_kernels() {
  try {
    return WebAssembly.validate(kernel_bytes());
  } catch {
    return false;
  }
}

/** Bytes of memory that a weight (rows, columns) takes. */
export function weight_bytes(rows, columns, storage) {
  return round_up(round_up(rows, ROWS) * round_up(columns, STEP) * STORAGE_BYTES[storage], ALIGN);
}

export class FastEngine {
  /** An engine with room for `bytes` of weights and caches. Throws a RangeError where the browser has no such memory. */
  static async create(bytes, storage = "f32") {
    const pages = Math.ceil((bytes + ALIGN) / PAGE);
    if (pages > MAX_PAGES) throw new RangeError(`the model needs ${bytes.toLocaleString("en")} bytes; 4 GB is the most`);
    const memory = new WebAssembly.Memory({ initial: pages, maximum: MAX_PAGES });
    const { instance } = await WebAssembly.instantiate(kernel_bytes(), { env: { memory } });
    return new FastEngine(memory, instance.exports, storage);
  }

  constructor(memory, kernels, storage) {
    this.memory = memory;
    this.kernels = kernels;
    this.storage = storage;
    this.end = ALIGN; // of what is given out; address 0 stays unused
  }

  /** An address of so many bytes, which are 0. */
  allocate(bytes) {
    const address = this.end;
    this.end = round_up(address + bytes, ALIGN);
    if (this.end > this.memory.buffer.byteLength) throw new RangeError("the memory of the fast engine is full");
    return address;
  }

  zeros(n) {
    return new Float32Array(this.memory.buffer, this.allocate(n * 4), n);
  }

  /** Room for the inputs and outputs of `linear` and `attend`: call it last, it takes all that is left. */
  reserve_scratch() {
    this.scratch = this.allocate(0);
    this.scratch_bytes = this.memory.buffer.byteLength - this.scratch;
  }

  /** A weight (rows, columns): of numbers (Float32Array), or of the bits of bfloat16 (Uint16Array). */
  weight(data, rows, columns) {
    const storage = data instanceof Uint16Array && this.storage === "f32" ? "bf16" : this.storage;
    const stride = round_up(columns, STEP), padded_rows = round_up(rows, ROWS);
    const address = this.allocate(weight_bytes(rows, columns, storage));
    const weight = { address, rows, columns, stride, padded_rows, storage, scales: null };
    const kept = view(this.memory.buffer, storage, address, padded_rows * stride);
    if (storage === "int8") weight.scales = new Float32Array(rows);
    for (let row = 0; row < rows; row++) {
      const numbers = data.subarray(row * columns, (row + 1) * columns);
      const place = kept.subarray(row * stride, row * stride + columns);
      if (storage === "int8") weight.scales[row] = round_to_int8(to_float32(numbers), place);
      else place.set(storage === "f32" ? to_float32(numbers) : to_bfloat16(numbers));
    }
    return weight;
  }

  row({ address, columns, stride, storage, scales }, i) {
    const kept = view(this.memory.buffer, storage, address + i * stride * STORAGE_BYTES[storage], columns);
    if (storage === "f32") return kept.slice();
    return storage === "bf16" ? to_float32(kept) : Float32Array.from(kept, (n) => n * scales[i]);
  }

  linear = (weight, bias, x, T) => {
    const { address, rows, columns, stride, padded_rows, storage, scales } = weight;
    const tokens = T === 1 ? 1 : round_up(T, TOKENS);
    const x_at = this.scratch, y_at = round_up(x_at + tokens * stride * 4, ALIGN);
    this.check_scratch(y_at + tokens * padded_rows * 4);
    const inputs = new Float32Array(this.memory.buffer, x_at, tokens * stride);
    if (stride > columns || tokens > T) inputs.fill(0);
    if (stride === columns) inputs.set(x);
    else for (let t = 0; t < T; t++) inputs.set(x.subarray(t * columns, (t + 1) * columns), t * stride);
    if (T === 1) this.kernels[`linear_${storage}`](address, x_at, y_at, padded_rows, stride);
    else this.kernels[`tokens_${storage}`](address, x_at, y_at, padded_rows, stride, tokens);
    const sums = new Float32Array(this.memory.buffer, y_at, tokens * padded_rows);
    const y = new Float32Array(T * rows);
    for (let t = 0; t < T; t++) y.set(sums.subarray(t * padded_rows, t * padded_rows + rows), t * rows);
    if (scales) for (let t = 0; t < T; t++) for (let o = 0; o < rows; o++) y[t * rows + o] *= scales[o];
    if (bias) for (let t = 0; t < T; t++) for (let o = 0; o < rows; o++) y[t * rows + o] += bias[o];
    return y;
  };

  attend = (q, k, v, S) => {
    const D = q.length;
    const here = k.buffer === this.memory.buffer; // a cache that was made by this engine
    if (!here || D % STEP || k.length % (ROWS * D)) return attend(q, k, v, S); // anything else: the plain way
    const rows = round_up(S, ROWS), p_at = round_up(this.scratch + D * 4, ALIGN), y_at = round_up(p_at + rows * 4, ALIGN);
    this.check_scratch(y_at + D * 4);
    const inputs = new Float32Array(this.memory.buffer, this.scratch, D);
    const scale = 1 / Math.sqrt(D);
    for (let d = 0; d < D; d++) inputs[d] = q[d] * scale;
    this.kernels.linear_f32(k.byteOffset, this.scratch, p_at, rows, D); // scores; those beyond S are stale
    const scores = new Float32Array(this.memory.buffer, p_at, S);
    scores.set(softmax(scores));
    this.kernels[D % 32 ? "mix_8" : "mix_32"](v.byteOffset, p_at, y_at, S, D);
    return new Float32Array(this.memory.buffer, y_at, D).slice();
  };

  check_scratch(end) {
    if (end > this.memory.buffer.byteLength) throw new RangeError("the text is too long for the fast engine's memory");
  }
}

function view(buffer, storage, address, n) {
  return new { f32: Float32Array, bf16: Uint16Array, int8: Int8Array }[storage](buffer, address, n);
}

/** Numbers of bfloat16 bits; numbers stay themselves. */
export function to_float32(numbers) {
  if (numbers instanceof Float32Array) return numbers;
  const bits = new Uint32Array(numbers.length);
  for (let i = 0; i < numbers.length; i++) bits[i] = numbers[i] << 16;
  return new Float32Array(bits.buffer);
}

/** The bits of the nearest bfloat16, ties to even. */
export function to_bfloat16(numbers) {
  if (numbers instanceof Uint16Array) return numbers;
  const bits = new Uint32Array(Float32Array.from(numbers).buffer), upper = new Uint16Array(numbers.length);
  for (let i = 0; i < bits.length; i++) upper[i] = (bits[i] + 0x7fff + ((bits[i] >>> 16) & 1)) >>> 16;
  return upper;
}

/** Rounds a row to whole numbers from -127 to 127, and returns what one of them stands for. */
function round_to_int8(numbers, place) {
  let largest = 0;
  for (let i = 0; i < numbers.length; i++) largest = Math.max(largest, Math.abs(numbers[i]));
  const scale = Math.max(largest, 1e-20) / 127;
  for (let i = 0; i < numbers.length; i++) place[i] = Math.floor(numbers[i] / scale + 0.5);
  return scale;
}
