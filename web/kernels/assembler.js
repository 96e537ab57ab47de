/**
 * A small assembler for WebAssembly: what kernels.js needs and no more.
 *
 * Instructions are functions that take their operands first and return code (arrays of bytes, nested as they come), so
 * a kernel reads like an expression: `set(sum, f32x4.add(get(sum), f32x4.mul(get(x), get(w))))`. `module_bytes` puts
 * functions into a module that imports one memory ("env", "memory") and exports each function by its name.
 * Numbers are those of the specification: https://webassembly.github.io/spec/core/binary/instructions.html
 */

const I32 = 0x7f, F32 = 0x7d, V128 = 0x7b, VOID = 0x40;
export const types = { i32: I32, f32: F32, v128: V128 };

/** An unsigned number in LEB128: seven bits a byte, the lowest first. */
function unsigned(n) {
  const bytes = [];
  do {
    bytes.push((n & 0x7f) | (n > 0x7f ? 0x80 : 0));
    n >>>= 7;
  } while (n);
  return bytes;
}

/** A signed one. */
function signed(n) {
  const bytes = [];
  for (;;) {
    const byte = n & 0x7f;
    n >>= 7;
    if ((n === 0 && !(byte & 0x40)) || (n === -1 && byte & 0x40)) return [...bytes, byte];
    bytes.push(byte | 0x80);
  }
}

// ---- instructions -----------------------------------------------------------------------------------------------------
export const get = (local) => [0x20, unsigned(local)];
export const set = (local, value) => [value, 0x21, unsigned(local)];

const plain = (code) => (...operands) => [operands, code];
const simd = (code) => (...operands) => [operands, 0xfd, unsigned(code)];
const simd_load = (code, align) => (address, offset = 0) => [address, 0xfd, unsigned(code), align, unsigned(offset)];

export const i32 = {
  const: (n) => [0x41, signed(n)],
  add: plain(0x6a),
  sub: plain(0x6b),
  mul: plain(0x6c),
  lt: plain(0x49), // unsigned: addresses
};
export const f32 = {
  add: plain(0x92),
  load: (address, offset = 0) => [address, 0x2a, 2, unsigned(offset)],
  store: (address, value, offset = 0) => [address, value, 0x38, 2, unsigned(offset)],
};
export const v128 = {
  zero: () => [0xfd, unsigned(12), new Array(16).fill(0)],
  load: simd_load(0, 4),
  store: (address, value, offset = 0) => [address, value, 0xfd, unsigned(11), 4, unsigned(offset)],
  load8x8_s: simd_load(1, 3), // eight signed bytes as i16x8
  load16x4_u: simd_load(4, 3), // four unsigned 16-bit numbers as i32x4
};
export const i32x4 = {
  shl: simd(171),
  extend_low_i16x8_s: simd(167),
  extend_high_i16x8_s: simd(168),
};
export const f32x4 = {
  splat: simd(19),
  extract_lane: (value, lane) => [value, 0xfd, unsigned(31), lane],
  add: simd(228),
  mul: simd(230),
  convert_i32x4_s: simd(250),
};

/** Repeats `body` while `condition` holds at its end; the body runs at least once. */
export const do_while = (body, condition) => [0x03, VOID, body, condition, 0x0d, 0, 0x0b];

// ---- the module -------------------------------------------------------------------------------------------------------

/** A function: names of its i32 parameters, then `body(locals)`, which may ask for more locals by `locals.new("v128")`. */
export function define(name, parameters, body) {
  const locals = [];
  const take = (type) => parameters.length + locals.push(types[type]) - 1;
  const places = Object.fromEntries(parameters.map((parameter, i) => [parameter, i]));
  const code = body({ ...places, new: take });
  const declared = vector(locals.map((type) => [1, type]));
  const bytes = [declared, code, 0x0b].flat(Infinity);
  return { name, parameters: parameters.length, bytes: [unsigned(bytes.length), bytes] };
}

/** The bytes of a module with these functions; all of them return nothing. */
export function module_bytes(functions) {
  const signatures = functions.map(({ parameters }) => [0x60, vector(new Array(parameters).fill(I32)), vector([])]);
  const memory = [text("env"), text("memory"), 0x02, 0x00, 1]; // of at least one page
  return Uint8Array.from([
    [0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0], // "\0asm", version 1
    section(1, signatures),
    section(2, [memory]),
    section(3, functions.map((_, i) => unsigned(i))),
    section(7, functions.map(({ name }, i) => [text(name), 0x00, unsigned(i)])),
    section(10, functions.map(({ bytes }) => bytes)),
  ].flat(Infinity));
}

const vector = (items) => [unsigned(items.length), items];
const text = (string) => vector([...string].map((letter) => letter.charCodeAt(0)));
const section = (id, items) => {
  const bytes = vector(items).flat(Infinity);
  return [id, unsigned(bytes.length), bytes];
};
