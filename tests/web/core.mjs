/** What the tests ask of web/ in Node: reads { call, ... } from stdin, writes the answer as JSON. */
import fs from "node:fs";
import path from "node:path";
import { load_model } from "../../web/checkpoint.js";
import { config_from_hf, FAMILIES } from "../../web/families.js";
import { CachedText, encode_prompt, generate_naive, stream_tokens } from "../../web/generate.js";
import { git_sha1, sha1_plain, sha256_plain } from "../../web/hash.js";
import { open_files, split_name } from "../../web/hub.js";
import { FastEngine, supports_kernels, weight_bytes } from "../../web/kernels/engine.js";
import { look_inside } from "../../web/lens.js";
import { GPTConfig, KVCache, plain_engine } from "../../web/model.js";
import { read_rows } from "../../web/runs.js";
import { Generator, sampler_stages } from "../../web/sampling.js";
import { StreamDecoder, Tokenizer } from "../../web/tokenizer.js";

const hex = (buffer) => Buffer.from(buffer).toString("hex");
const text_of = (file) => fs.readFileSync(file, "utf8");
const as_json = (_, value) => (ArrayBuffer.isView(value) ? [...value] : value);
const infinities = (logits) => [...logits].map((x) => (Number.isFinite(x) ? x : "-inf"));

function folder_of(place) {
  const names = fs.readdirSync(place, { recursive: true }).filter((name) => fs.statSync(path.join(place, name)).isFile());
  return open_files(names.map((name) => {
    const bytes = fs.readFileSync(path.join(place, name));
    return [name, { size: bytes.length, arrayBuffer: async () => new Uint8Array(bytes).buffer }];
  }));
}

const calls = {
  /** For each settings: ids and text, with a cache that is kept between them. */
  async generate({ folder, prompt, settings, arithmetic, naive, forced, stop }) {
    const { model, tokenizer, caches, storage } = await load_model(folder_of(folder), arithmetic);
    const cached = new CachedText(model, caches), results = [];
    for (const given of settings) {
      const start = encode_prompt(tokenizer, prompt), ids = [];
      let text = "", finish = null;
      for await (const token of stream_tokens(cached, tokenizer, start, given, { forced: new Map(forced), stop: stop ?? [] })) {
        ids.push(token.id);
        text += token.text;
        finish = token.finish;
      }
      const slow = naive ? generate_naive(model, start, given, tokenizer.vocab_size).slice(0, ids.length) : ids;
      results.push({ start, ids, text, finish, slow });
    }
    return { storage, results };
  },

  async logits({ folder, ids, arithmetic }) {
    const { model, caches } = await load_model(folder_of(folder), arithmetic);
    return new CachedText(model, caches).next_logits(ids);
  },

  async look({ folder, ids, place, arithmetic }) {
    const { model, tokenizer, caches } = await load_model(folder_of(folder), arithmetic);
    return look_inside(new CachedText(model, caches), ids, place, Math.min(tokenizer.vocab_size, model.config.vocab_size));
  },

  tokenize({ folder, texts }) {
    const tokenizer = new Tokenizer(JSON.parse(text_of(path.join(folder, "tokenizer.json"))));
    return texts.map((text) => {
      const ids = tokenizer.encode(text), decoder = new StreamDecoder(tokenizer);
      const streamed = ids.map((id) => decoder.push(id)).join("") + decoder.flush();
      return { ids, decoded: tokenizer.decode(ids), streamed, names: ids.map((id) => tokenizer.token_str(id)) };
    });
  },

  random({ seeds, n }) {
    return seeds.map((seed) => {
      const generator = new Generator(seed);
      return Array.from({ length: n }, () => generator.rand());
    });
  },

  stages({ logits, settings, seen }) {
    const usual = { temperature: 1, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1 };
    return settings.map((given) => sampler_stages(Float32Array.from(logits), { ...usual, ...given }, new Set(seen))
      .map(([name, after]) => [name, infinities(after)]));
  },

  hashes({ text }) {
    const bytes = new TextEncoder().encode(text);
    return git_sha1(bytes).then((git) => ({ sha256: hex(sha256_plain(bytes)), sha1: hex(sha1_plain(bytes)), git }));
  },

  tables() {
    return { families: FAMILIES, config: { ...new GPTConfig() } };
  },

  config({ content }) {
    return { ...config_from_hf(content) };
  },

  rows({ text }) {
    return read_rows(text);
  },

  names({ texts }) {
    return texts.map((text) => {
      try {
        return split_name(text);
      } catch (error) {
        return error.message;
      }
    });
  },

  /** The largest difference between the fast and the plain way for random weights of each shape. */
  async kernels({ shapes, storage }) {
    let state = 1;
    const random = () => ((state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32) * 2 - 1;
    const differences = [];
    for (const [O, I, T] of shapes) {
      const data = Float32Array.from({ length: O * I }, random), x = Float32Array.from({ length: T * I }, random);
      const bias = Float32Array.from({ length: O }, random);
      const engine = await FastEngine.create(weight_bytes(O, I, storage) + 2 ** 20, storage);
      const weight = engine.weight(data, O, I);
      const kept = Float32Array.from({ length: O }, (_, i) => i).map(() => 0);
      const rows = Array.from(kept, (_, i) => [...engine.row(weight, i)]).flat(); // what the storage made of the weights
      engine.reserve_scratch();
      const fast = engine.linear(weight, bias, x, T);
      const plain = plain_engine.linear(plain_engine.weight(Float32Array.from(rows), O, I), bias, x, T);
      differences.push([fast.reduce((most, y, i) => Math.max(most, Math.abs(y - plain[i])), 0),
        rows.reduce((most, w, i) => Math.max(most, Math.abs(w - data[i])), 0)]);
    }
    return { supported: supports_kernels(), differences };
  },

  /** The largest difference between the engines' attention, for S keys of D numbers. */
  async attention({ shapes }) {
    const differences = [];
    for (const [S, D] of shapes) {
      const config = new GPTConfig({ n_embd: D, n_head: 1, block_size: 64, n_layer: 1, position: "learned" });
      const engine = await FastEngine.create(2 ** 20), cache = new KVCache(config, engine);
      const q = Float32Array.from({ length: D }, (_, i) => Math.sin(i)), [k, v] = cache.head(0, 0);
      k.forEach((_, i) => (k[i] = Math.sin(i * 1.7)));
      v.forEach((_, i) => (v[i] = Math.cos(i * 2.3)));
      engine.reserve_scratch();
      const fast = engine.attend(q, k, v, S), plain = plain_engine.attend(q, k, v, S);
      differences.push(fast.reduce((most, y, i) => Math.max(most, Math.abs(y - plain[i])), 0));
    }
    return differences;
  },

  /** What each folder is refused with, or "" for one that loads. */
  async refusals({ folders }) {
    const messages = [];
    for (const folder of folders) {
      messages.push(await load_model(folder_of(folder)).then(() => "", (error) => error.message));
    }
    return messages;
  },
};

const asked = JSON.parse(fs.readFileSync(0, "utf8"));
const answer = await Promise.resolve().then(() => calls[asked.call](asked)).catch((error) => ({ error: error.message, stack: error.stack }));
fs.writeSync(1, JSON.stringify(answer, as_json));
