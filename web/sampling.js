/**
 * From logits to a token, as nanogpt_hub/sampling.py does it: the samplers in their order, and the draw.
 *
 *     const generator = new Generator(seed);
 *     const { probs } = distribution(logits, settings, seen);
 *     const id = pick(probs, generator.rand());
 *
 * A token that is cut has the logit -Infinity. Numbers are float32 where PyTorch has float32, and random numbers come
 * from the same generator, so a seed gives the same text as in Python wherever rounding allows.
 */
import { softmax } from "./model.js";

const GREEDY_BELOW = 1e-5; // a temperature under this counts as 0
const LARGEST_LOGIT = Math.fround(1e30); // infinite logits become this: never inf - inf

/** The settings, with what they are without being set, their bounds, and a sentence for each. */
export const SETTINGS = {
  max_new_tokens: { value: 200, least: 1, most: 4000, whole: true, label: "Tokens", help: "How many new tokens to write." },
  temperature: { value: 0.8, least: 0, most: 1e6, label: "Temperature",
    help: "Below 1 sharpens the distribution, above 1 flattens it; 0 always takes the likeliest token." },
  top_k: { value: 200, least: 0, most: 1e7, whole: true, label: "Top-k", help: "Only the k likeliest tokens; 0 for all." },
  top_p: { value: 1, least: 0, most: 1, label: "Top-p",
    help: "Only the likeliest tokens that together reach this probability." },
  min_p: { value: 0, least: 0, most: 1, label: "Min-p",
    help: "Only tokens at least this likely, relative to the likeliest." },
  repetition_penalty: { value: 1, least: 1e-6, most: 1e6, label: "Repetition penalty",
    help: "Above 1 disfavours the tokens that the text has already." },
  seed: { value: 0, least: 0, most: 2 ** 53, whole: true, label: "Seed",
    help: "The same seed gives the same text again." },
};

/** Settings with the rest filled in. Throws an Error that names the first value that is not allowed. */
export function check_settings(given) {
  const settings = {};
  for (const [name, { value, least, most, whole }] of Object.entries(SETTINGS)) {
    settings[name] = given[name] ?? value;
    const number = settings[name];
    if (typeof number !== "number" || !(number >= least && number <= most) || (whole && !Number.isInteger(number))) {
      throw new Error(`${name} is ${JSON.stringify(number)}; it must be ${whole ? "a whole number" : "a number"} from ${least} to ${most}`);
    }
  }
  return settings;
}

/** The defaults of a model folder, from the content of its generation_config.json; what is not allowed is passed over. */
export function defaults_of(content) {
  const defaults = {};
  for (const name of ["max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"]) {
    try {
      if (Object.hasOwn(content, name)) defaults[name] = check_settings({ [name]: content[name] })[name];
    } catch {
      // not a value of ours: the usual one stays
    }
  }
  if (content.do_sample === false) defaults.temperature = 0;
  return defaults;
}

/** Logits (V) without infinities, the ids from `vocab_size` on masked: what is surplus has no text. */
export function usable_logits(logits, vocab_size) {
  const usable = new Float32Array(logits.length).fill(-Infinity);
  for (let id = 0; id < Math.min(vocab_size, logits.length); id++) {
    if (Number.isNaN(logits[id])) throw new Error("the model gives no numbers (NaN): its weights are damaged");
    usable[id] = Math.max(-LARGEST_LOGIT, Math.min(LARGEST_LOGIT, logits[id]));
  }
  return usable;
}

/** Moves the logits of `seen` tokens (a Set of ids) down: positive ones are divided by `penalty`, others multiplied. */
function apply_repetition_penalty(logits, penalty, seen) {
  return logits.map((logit, id) => (!seen.has(id) ? logit : logit > 0 ? logit / penalty : logit * penalty));
}

/** Divides by `temperature`, the largest logit moved to 0 first; at 0 only the likeliest token is left. */
function apply_temperature(logits, temperature) {
  const best = argmax(logits), largest = logits[best];
  if (temperature < GREEDY_BELOW) return logits.map((_, id) => (id === best ? 0 : -Infinity));
  return logits.map((logit) => Math.fround(logit - largest) / temperature);
}

/** Cuts all but the `k` likeliest tokens; those that tie with the last of them stay too. */
function apply_top_k(logits, k) {
  const threshold = logits.slice().sort().at(-k);
  return logits.map((logit) => (logit < threshold ? -Infinity : logit));
}

/** Cuts the tokens before which, from the likeliest down, probability `p` is reached. The likeliest stays. */
function apply_top_p(logits, p) {
  const probs = softmax(logits), kept = new Float32Array(logits.length).fill(-Infinity);
  let reached = 0, first = true;
  for (const id of likeliest(logits, logits.length)) {
    if (!first && Math.fround(Math.fround(reached + probs[id]) - probs[id]) >= Math.fround(p)) break;
    kept[id] = logits[id];
    reached += probs[id];
    first = false;
  }
  return kept;
}

/** Cuts the tokens less likely than `p` times the likeliest. */
function apply_min_p(logits, p) {
  const threshold = Math.fround(logits[argmax(logits)] + Math.log(p));
  return logits.map((logit) => (logit < threshold ? -Infinity : logit));
}

/**
 * The logits as the model gives them ("model") and after each sampler that is on, by its setting's name: a list of
 * [name, logits]. The order is that of Transformers.
 */
export function sampler_stages(logits, settings, seen) {
  const stages = [["model", logits]];
  const apply = (name, stage) => stages.push([name, stage(stages.at(-1)[1])]);
  const { repetition_penalty, temperature, top_k, top_p, min_p } = settings;
  if (repetition_penalty !== 1) apply("repetition_penalty", (x) => apply_repetition_penalty(x, repetition_penalty, seen));
  if (temperature !== 1) apply("temperature", (x) => apply_temperature(x, temperature));
  if (top_k && top_k < logits.length) apply("top_k", (x) => apply_top_k(x, top_k));
  if (top_p < 1) apply("top_p", (x) => apply_top_p(x, top_p));
  if (min_p > 0) apply("min_p", (x) => apply_min_p(x, min_p));
  return stages;
}

/** The probabilities (V) with which a token is drawn. */
export function distribution(logits, settings, seen) {
  return softmax(sampler_stages(logits, settings, seen).at(-1)[1]);
}

/**
 * Inverse-CDF sampling: the token whose share of probs (V), laid end to end, holds `uniform` in [0, 1). A token of
 * probability zero is never chosen, whatever the rounding of the sums.
 */
export function pick(probs, uniform) {
  let total = 0;
  for (const prob of probs) total += prob;
  const sought = Math.fround(uniform * Math.fround(total));
  let reach = 0, last = 0;
  for (let id = 0; id < probs.length; id++) {
    if (!(probs[id] > 0)) continue;
    reach += probs[id]; // PyTorch adds in double precision too, and rounds each sum
    if (Math.fround(reach) > sought) return id;
    last = id;
  }
  return last;
}

/** The first of the largest. */
export function argmax(numbers) {
  let best = 0;
  for (let i = 1; i < numbers.length; i++) if (numbers[i] > numbers[best]) best = i;
  return best;
}

/** The n ids of the largest numbers, largest first; of equal ones the lower id. */
export function likeliest(numbers, n) {
  if (n > 100) return Uint32Array.from(numbers, (_, id) => id).sort((a, b) => numbers[b] - numbers[a] || a - b).slice(0, n);
  const ids = [];
  for (let id = 0; id < numbers.length; id++) {
    if (ids.length === n && !(numbers[id] > numbers[ids[n - 1]])) continue;
    let place = ids.length;
    while (place > 0 && numbers[id] > numbers[ids[place - 1]]) place--;
    ids.splice(place, 0, id);
    ids.length = Math.min(ids.length, n);
  }
  return ids;
}

/** PyTorch's random numbers on the CPU: torch.Generator().manual_seed(seed), a Mersenne Twister (mt19937). */
export class Generator {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
    for (let i = 1; i < 624; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, before) + i;
    }
    this.next = 624; // all used up
  }

  /** torch.rand(1): a float32 in [0, 1) from 24 random bits. */
  rand() {
    return (this.random() & 0xffffff) / 2 ** 24;
  }

  /** 32 random bits. */
  random() {
    if (this.next === 624) this.twist();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  twist() {
    const { state } = this;
    for (let i = 0; i < 624; i++) {
      const bits = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }
}
