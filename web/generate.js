/**
 * Text from a model, one token at a time: nanogpt_hub/generate.py for one text.
 *
 *     for await (const token of stream_tokens(text, tokenizer, ids, settings)) console.log(token.text);
 *
 * Read `generate_naive` first: it is all there is to generation, at the price of one whole pass for each token.
 * `stream_tokens` gives the same tokens with a key/value cache.
 */
import { KVCache, softmax } from "./model.js";
import { check_settings, distribution, Generator, likeliest, pick, usable_logits } from "./sampling.js";
import { StreamDecoder } from "./tokenizer.js";

export const MAX_TOKENS = 4096; // of a text, the prompt included: what the memory for keys and values holds
const CHUNK = 32; // prompt tokens that go through the model at once; between chunks a stop is heard

/**
 * Index of the first of `n_tokens` tokens that the model still sees. A full context loses its older half and grows
 * again: dropping one token at each step would make the cache worthless.
 */
export function window_start(n_tokens, block_size) {
  const drop = Math.floor((block_size + 1) / 2);
  return drop * Math.max(0, Math.ceil((n_tokens - block_size) / drop));
}

/** The new token ids after `ids`, by one whole pass for each: what everything below must equal. */
export function generate_naive(model, ids, given, vocab_size = model.config.vocab_size) {
  const settings = check_settings(given), tokens = [...ids], generator = new Generator(settings.seed);
  for (let i = 0; i < settings.max_new_tokens; i++) {
    const window = tokens.slice(window_start(tokens.length, model.config.block_size));
    const logits = usable_logits(model.forward(window, new KVCache(model.config)), vocab_size);
    tokens.push(pick(distribution(logits, settings, new Set(tokens)), generator.rand()));
  }
  return tokens.slice(ids.length);
}

/** A text in the model's memory: what follows it costs one step, as long as it only grows or an end of it changes. */
export class CachedText {
  /** `memories`: buffers { k, v } of load_model; without them caches of their own are made. */
  constructor(model, memories = null) {
    this.model = model;
    const max_len = Math.min(model.config.block_size, MAX_TOKENS);
    this.caches = (memories ?? [null, null]).map((memory) => {
      const cache = memory ? Object.create(KVCache.prototype) : new KVCache(model.config, model.engine, max_len);
      if (memory) Object.assign(cache, memory, { max_len: memory.k[0].length / (model.config.kv_heads * model.config.head_dim),
        D: model.config.head_dim, length: 0 });
      return Object.assign(cache, { ids: [] }); // the tokens whose keys and values it holds
    });
  }

  /** Logits (V) of the token that follows `tokens`. */
  async next_logits(tokens, pause = async () => {}) {
    const cache = await this.prepare(tokens, pause);
    const logits = this.model.forward(tokens.slice(-1), cache);
    cache.ids.push(tokens.at(-1));
    return logits;
  }

  /** The cache that holds the window of `tokens` but for its last token, which is left to be fed. */
  async prepare(tokens, pause = async () => {}) {
    const window = tokens.slice(window_start(tokens.length, this.model.config.block_size));
    const shared = (cache) => Math.min(common_prefix(cache.ids, window), window.length - 1);
    const cache = this.caches.reduce((best, other) => (shared(other) > shared(best) ? other : best), this.caches.at(-1));
    this.caches = [cache, ...this.caches.filter((other) => other !== cache)]; // the last is the one unused for longest
    cache.length = shared(cache);
    cache.ids.length = cache.length;
    while (cache.length < window.length - 1) {
      const chunk = window.slice(cache.length, Math.min(cache.length + CHUNK, window.length - 1));
      this.model.hidden(chunk, cache);
      cache.ids.push(...chunk);
      await pause();
    }
    return cache;
  }
}

function common_prefix(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n++;
  return n;
}

/**
 * Token records as they come: { id, text, prob, sampled_prob, alternatives, finish }. `text` is what became certain of
 * the text; `prob` what the model itself gave the token, `sampled_prob` with which probability it was drawn;
 * `alternatives` the likeliest [id, prob]; `finish` is "length", "eot" or "stop" on the last record.
 *
 * options: `forced` (Map of place -> id: the tokens of a branch, taken instead of the drawn ones), `stop` (strings before
 * which the text ends), `alternatives` (how many), `pause` (an async function that is called between the steps).
 */
export async function* stream_tokens(cached, tokenizer, ids, given, options = {}) {
  const { forced = new Map(), stop = [], alternatives = 0, pause = async () => {} } = options;
  const settings = check_settings(given), { model } = cached;
  const tokens = [...ids], vocab_size = Math.min(model.config.vocab_size, tokenizer.vocab_size);
  check_prompt(ids, vocab_size, settings);
  const generator = new Generator(settings.seed), writer = new Writer(tokenizer, ids, stop);
  for (let place = 0; place < settings.max_new_tokens; place++) {
    const logits = usable_logits(await cached.next_logits(tokens, pause), vocab_size);
    const probs = softmax(logits), drawn = distribution(logits, settings, new Set(tokens));
    const uniform = generator.rand(); // one for each token, of a forced one too: what comes after it does not shift
    const id = forced.has(place) ? forced.get(place) : pick(drawn, uniform);
    tokens.push(id);
    const last = place + 1 === settings.max_new_tokens;
    yield {
      id, prob: probs[id], sampled_prob: drawn[id], ...writer.push(id, last),
      alternatives: [...likeliest(probs, alternatives)].map((other) => [other, probs[other]]),
    };
    if (writer.finish) return;
    await pause();
  }
}

function check_prompt(ids, vocab_size, settings) {
  if (!ids.length) throw new Error("the prompt has no tokens; write at least one character");
  const most = MAX_TOKENS - settings.max_new_tokens;
  if (ids.length > most) {
    throw new Error(`the prompt has ${ids.length} tokens; with ${settings.max_new_tokens} new ones at most ${most} are allowed here`);
  }
  const unknown = ids.find((id) => !(Number.isInteger(id) && id >= 0 && id < vocab_size));
  if (unknown !== undefined) throw new Error(`the prompt holds token id ${unknown}; the model's are 0 to ${vocab_size - 1}`);
}

/** Token ids to start from. An empty prompt starts at end-of-text or, where the tokenizer has none, at a new line. */
export function encode_prompt(tokenizer, prompt) {
  if (prompt) return tokenizer.encode(prompt);
  return tokenizer.eot_id !== null ? [tokenizer.eot_id] : tokenizer.encode("\n");
}

/** The text of one row: what a token makes certain of it, and whether it ended there. */
class Writer {
  constructor(tokenizer, prompt, stop) {
    Object.assign(this, { tokenizer, stop, held: "", finish: null, decoder: new StreamDecoder(tokenizer) });
    for (const id of prompt.slice(-8)) if (id !== tokenizer.eot_id) this.decoder.push(id); // an open character, maybe
  }

  push(id, last) {
    const eot = id === this.tokenizer.eot_id;
    let text = eot ? "" : this.decoder.push(id);
    if (eot || last) {
      this.finish = eot ? "eot" : "length";
      text += this.decoder.flush();
    }
    return { text: this.until_stop(text), finish: this.finish };
  }

  /** Lets text through up to the first stop string, holding back what may still become one. */
  until_stop(text) {
    text = this.held + text;
    this.held = "";
    const places = this.stop.map((stop) => text.indexOf(stop)).filter((place) => place >= 0);
    if (places.length) {
      this.finish = "stop";
      return text.slice(0, Math.min(...places));
    }
    if (this.finish) return text;
    const held = Math.max(0, ...this.stop.map((stop) => overlap(text, stop)));
    this.held = text.slice(text.length - held);
    return text.slice(0, text.length - held);
  }
}

/** Length of the longest end of `text` with which `stop` begins. */
function overlap(text, stop) {
  for (let n = Math.min(text.length, stop.length - 1); n > 0; n--) if (text.endsWith(stop.slice(0, n))) return n;
  return 0;
}
