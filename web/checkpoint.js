/**
 * A model folder, read strictly: the reading half of nanogpt_hub/checkpoint.py.
 *
 *     const { config, model, tokenizer, defaults } = await load_model(folder);
 *
 * A folder is what hub.js gives for a repo on the Hub, for files beside this page and for a folder that was dropped on
 * it: { label, sizes: Map of name -> bytes, read(name) -> Promise of Uint8Array }. Safetensors and JSON only: nothing in
 * a folder is ever run, whoever made it. What does not fit is refused in one sentence before memory is taken for it.
 */
import {
  config_from_hf, count_parameters, family_of, is_buffer, join_tensors, parameter_shapes, show, tensors_from_hf,
} from "./families.js";
import { FastEngine, supports_kernels, to_float32, weight_bytes } from "./kernels/engine.js";
import { GPT, plain_engine } from "./model.js";
import { defaults_of } from "./sampling.js";
import { Tokenizer } from "./tokenizer.js";

export const WEIGHTS = "model.safetensors", INDEX = "model.safetensors.index.json";
const PLAIN_NAME = /^[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors$/;
const WEIGHT_BYTES = { F32: 4, BF16: 2, F16: 2 }; // of the dtypes that are loaded
const BUFFER_BYTES = { ...WEIGHT_BYTES, BOOL: 1, U8: 1 }; // of those that masks may have, which are skipped
const MAX_JSON = 16 * 2 ** 20; // bytes of a JSON file, and of the header of a safetensors file
export const MAX_WEIGHTS = 2_000_000_000; // bytes: more does not fit into one array of a browser
export const MAX_CACHED = 4096; // tokens that the memory for keys and values holds, however long the context may be
export const CACHES = 2; // the window that is written in, and the one before it
const FAST_FROM = 2_000_000; // parameters; below it the plain engine is as fast as one can read
const SCRATCH_TOKENS = 512; // tokens that go through a layer at once, at most

/**
 * The model of a folder and its tokenizer. `arithmetic`: auto, plain (model.js alone), f32, bf16 or int8 (the fast
 * engine's storages). Throws an Error whose message is one sentence.
 */
export async function load_model(folder, arithmetic = "auto") {
  const content = await read_json(folder, "config.json", "give a model folder, such as out/NAME/best");
  const config = config_from_hf(content);
  const files = await weight_files(folder);
  check_sizes(folder, files, config);
  const tokenizer = await read_tokenizer(folder);
  check_vocabulary(config, tokenizer);
  const tensors = new Map();
  for (const file of files) {
    for (const [name, tensor] of read_tensors(file, await folder.read(file))) {
      if (tensors.has(name)) throw new Error(`tensor ${show(name)} is in ${file} and in another file`);
      tensors.set(name, tensor);
    }
  }
  const engine = await choose_engine(config, tensors, arithmetic);
  const model = new GPT(config, assemble(config, family_of(content), tensors, engine), engine);
  const caches = Array.from({ length: CACHES }, () => new_cache_memory(config, engine));
  engine.reserve_scratch?.();
  const generation = folder.sizes.has("generation_config.json") ? await read_json(folder, "generation_config.json") : {};
  return { config, model, tokenizer, caches, defaults: defaults_of(generation), storage: engine.storage ?? "plain" };
}

/** The object in a JSON file from anywhere. */
export async function read_json(folder, name, advice = "") {
  if (!folder.sizes.has(name)) throw new Error(`there is no ${name}${advice ? `; ${advice}` : ""}`);
  const size = folder.sizes.get(name);
  if (size > MAX_JSON) throw new Error(`${name} has ${commas(size)} bytes; at most ${commas(MAX_JSON)} are read`);
  return parse_json(await folder.read(name), name);
}

function parse_json(bytes, name) {
  let content;
  try {
    content = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new Error(`${name} is not valid JSON (${String(error.message).slice(0, 80)})`);
  }
  if (content === null || typeof content !== "object" || Array.isArray(content)) {
    throw new Error(`${name} does not hold a JSON object`);
  }
  return content;
}

/** The names of the safetensors files that make up a folder's weights. */
async function weight_files(folder) {
  if (folder.sizes.has(WEIGHTS)) return [WEIGHTS];
  if (!folder.sizes.has(INDEX)) {
    const pickled = [...folder.sizes.keys()].some((name) => /\.(bin|pt|pth|ckpt)$/.test(name));
    throw new Error(pickled
      ? "there are only pickled weights, which may run code when opened and are never read; it needs safetensors"
      : `there are no weights; ${WEIGHTS} or ${INDEX} must be in the folder`);
  }
  const map = (await read_json(folder, INDEX)).weight_map;
  const names = map && typeof map === "object" ? [...new Set(Object.values(map).map(String))].sort() : [];
  const bad = names.find((name) => !PLAIN_NAME.test(name));
  if (!names.length || bad) throw new Error(`${INDEX} must name safetensors files in its own folder, not ${show(bad ?? "none")}`);
  const missing = names.find((name) => !folder.sizes.has(name));
  if (missing) throw new Error(`${show(missing)} is missing, which ${INDEX} names`);
  return names;
}

/** Refuses weights that a browser cannot hold, or that cannot be this config's, before they are fetched. */
function check_sizes(folder, files, config) {
  const total = files.reduce((sum, name) => sum + folder.sizes.get(name), 0);
  const numbers = count_parameters(config);
  if (total > MAX_WEIGHTS || numbers * 2 > MAX_WEIGHTS) {
    const most = commas(MAX_WEIGHTS);
    throw new Error(`the weights have ${commas(Math.max(total, numbers * 2))} bytes; a browser holds at most ${most}`);
  }
  if (total < numbers * 2) {
    throw new Error(`the weights have ${commas(total)} bytes, too few for the ${commas(numbers)} parameters in config.json`);
  }
}

async function read_tokenizer(folder) {
  if (!folder.sizes.has("tokenizer.json")) throw new Error("there is no tokenizer.json, so no text can be given to it");
  const configs = [];
  for (const name of ["special_tokens_map.json", "tokenizer_config.json"]) {
    if (folder.sizes.has(name)) configs.push(await read_json(folder, name));
  }
  const size = folder.sizes.get("tokenizer.json");
  if (size > 4 * MAX_JSON) throw new Error(`tokenizer.json has ${commas(size)} bytes; at most ${commas(4 * MAX_JSON)} are read`);
  return new Tokenizer(parse_json(await folder.read("tokenizer.json"), "tokenizer.json"), Object.assign({}, ...configs));
}

/** More model ids than tokenizer ids are padding; the reverse would index past the embedding. */
function check_vocabulary(config, tokenizer) {
  if (tokenizer.vocab_size > config.vocab_size) {
    throw new Error(`the tokenizer (${tokenizer.kind}) has ${tokenizer.vocab_size} ids, but the model's vocab_size is ` +
      `${config.vocab_size}: they do not belong together`);
  }
}

/** name -> { dtype, shape, data } of a safetensors file; `data` holds numbers (F32) or bits, and shares the file's bytes. */
export function read_tensors(file, bytes) {
  const length = bytes.length >= 8 ? Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true)) : 0;
  if (!(length >= 2 && length <= Math.min(MAX_JSON, bytes.length - 8))) {
    throw new Error(`${file} is no complete safetensors file: fetch or save it again`);
  }
  const header = parse_json(bytes.subarray(8, 8 + length), `the header of ${file}`);
  const start = 8 + length, tensors = new Map(), places = [];
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const size = tensor_bytes(file, name, entry), [from, to] = entry.data_offsets ?? [];
    if (!Number.isInteger(from) || from < 0 || to - from !== size) {
      throw new Error(`${file} has a malformed entry for tensor ${show(name)}`);
    }
    places.push([from, to]);
    if (is_buffer(name)) continue;
    const kind = entry.dtype === "F32" ? Float32Array : Uint16Array;
    tensors.set(name, { dtype: entry.dtype, shape: entry.shape, data: typed(bytes, start + from, size, kind) });
  }
  let end = 0;
  for (const [from, to] of places.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    if (from !== end) throw new Error(`${file} has tensors that overlap or leave gaps; save it again`);
    end = to;
  }
  if (start + end !== bytes.length) {
    throw new Error(`${file} has ${commas(bytes.length)} bytes where its header announces ${commas(start + end)}; fetch or save it again`);
  }
  return tensors;
}

/** The bytes that a header's entry stands for. */
function tensor_bytes(file, name, entry) {
  const shape = entry?.shape;
  if (!Array.isArray(shape) || shape.length > 8 || !shape.every((n) => Number.isInteger(n) && n >= 0 && n < 2 ** 40)) {
    throw new Error(`${file} has a malformed entry for tensor ${show(name)}`);
  }
  const sizes = is_buffer(name) ? BUFFER_BYTES : WEIGHT_BYTES;
  if (!Object.hasOwn(sizes, entry.dtype)) {
    throw new Error(`tensor ${show(name)} is ${show(entry.dtype)}; ${Object.keys(sizes).join(", ")} can be loaded`);
  }
  return shape.reduce((a, b) => a * b, 1) * sizes[entry.dtype];
}

/** A view of the bytes, or a copy where they do not lie at a multiple of the numbers' size. */
function typed(bytes, from, size, kind) {
  const at = bytes.byteOffset + from, n = size / kind.BYTES_PER_ELEMENT;
  if (at % kind.BYTES_PER_ELEMENT === 0) return new kind(bytes.buffer, at, n);
  return new kind(bytes.buffer.slice(at, at + size));
}

async function choose_engine(config, tensors, arithmetic) {
  const fast = arithmetic !== "plain" && supports_kernels();
  if (!fast || (arithmetic === "auto" && count_parameters(config) < FAST_FROM)) return plain_engine;
  const half = [...tensors.values()].every((tensor) => tensor.dtype === "BF16");
  const storage = arithmetic !== "auto" ? arithmetic : half ? "bf16" : "f32";
  return FastEngine.create(bytes_needed(config, storage), storage);
}

/** Bytes that a model takes in the fast engine: weights, caches and the largest layer's inputs and outputs. */
export function bytes_needed(config, storage) {
  let bytes = 2 ** 20;
  for (const shape of parameter_shapes(config).values()) if (shape.length === 2) bytes += weight_bytes(...shape, storage) + 64;
  const length = cache_length(config);
  bytes += CACHES * config.n_layer * 2 * (config.kv_heads * length * config.head_dim * 4 + 64);
  const widest = Math.max(config.ffn_width, (config.n_head + 2 * config.kv_heads) * config.head_dim);
  const rows = Math.min(SCRATCH_TOKENS, length) + 8;
  return bytes + Math.max(rows * (widest + config.n_embd + 32) * 4 * 2, (config.vocab_size + config.n_embd) * 8, length * 8);
}

/** Tokens that a cache has room for, a multiple of 4 for the kernels. */
export function cache_length(config) {
  return Math.ceil(Math.min(config.block_size, MAX_CACHED) / 4) * 4;
}

function new_cache_memory(config, engine) {
  const each = config.kv_heads * cache_length(config) * config.head_dim;
  const layers = () => Array.from({ length: config.n_layer }, () => engine.zeros(each));
  return { k: layers(), v: layers() };
}

/** name -> weight of the engine (matrices) or Float32Array (norms and biases), by the names of model.js. */
export function assemble(config, family, tensors, engine) {
  const shapes = new Map([...tensors].map(([name, { shape }]) => [name, shape]));
  const { plan, absent, copy } = tensors_from_hf(config, family, shapes);
  const state = new Map();
  for (const [name, shape] of parameter_shapes(config)) {
    const data = join(config, family, name, plan.get(name).map((theirs) => checked(theirs, tensors.get(theirs))));
    state.set(name, shape.length === 2 ? engine.weight(for_engine(data, engine), ...shape) : numbers_of(data));
  }
  for (const [name, theirs] of absent) {
    const neutral = name.endsWith("weight") ? 1 : 0; // what a norm or a bias that is not there would be
    const there = theirs.some((part) => numbers_of(tensors.get(part)).some((number) => number !== neutral));
    if (there) throw new Error(`the config declares ${name} absent, but the file's is not all ${neutral}`);
  }
  if (copy !== undefined) check_tied(copy, tensors.get(copy), tensors.get(plan.get("wte.weight")[0]));
  return state;
}

function check_tied(name, head, embedding) {
  const a = numbers_of(head), b = numbers_of(embedding);
  if (a.some((number, i) => number !== b[i])) {
    throw new Error(`${name} differs from the embedding, but the config ties them (tie_word_embeddings)`);
  }
}

/** Parts of one tensor in one array, rows in our order. Bits stay bits where all parts have the same dtype. */
function join(config, family, name, parts) {
  const same = parts.every((part) => part.dtype === parts[0].dtype);
  const dtype = same ? parts[0].dtype : "F32";
  const arrays = same ? parts.map((part) => part.data) : parts.map(numbers_of);
  const n = arrays.reduce((sum, array) => sum + array.length, 0);
  const data = dtype === "F32" ? new Float32Array(n) : new Uint16Array(n);
  join_tensors(config, family, name, arrays, data);
  return { dtype, data };
}

/** What `engine.weight` takes: numbers, or the bits of bfloat16 for an engine that keeps them. */
function for_engine({ dtype, data }, engine) {
  return dtype === "BF16" && engine !== plain_engine ? data : numbers_of({ dtype, data });
}

/** The numbers of a tensor as a Float32Array. */
function numbers_of({ dtype, data }) {
  if (dtype !== "F16") return to_float32(data);
  const numbers = new Float32Array(data.length);
  for (let i = 0; i < data.length; i++) numbers[i] = half_to_number(data[i]);
  return numbers;
}

function half_to_number(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return exponent ? sign * (1 + fraction / 1024) * 2 ** (exponent - 15) : sign * fraction * 2 ** -24;
}

/** The tensor, if all of its values are finite. */
function checked(name, tensor) {
  const exponent = { BF16: 0x7f80, F16: 0x7c00 }[tensor.dtype];
  const { data } = tensor;
  for (let i = 0; i < data.length; i++) {
    const finite = exponent ? (data[i] & exponent) !== exponent : data[i] - data[i] === 0;
    if (!finite) throw new Error(`tensor ${show(name)} holds values that are not finite; the training had diverged`);
  }
  return tensor;
}

const commas = (n) => n.toLocaleString("en");
