/**
 * The core, a second time: nanogpt_hub/model.py in JavaScript, from token ids to logits, read top to bottom.
 *
 * Names and order are those of model.py, letter for letter, so that the two can be read side by side. Three things
 * differ, because this file only generates: one text at a time (no B), no dropout and no training, and weights that are
 * loaded instead of drawn.
 *
 *     const model = new GPT(config, state);                   // state: checkpoint.js reads it from a model folder
 *     const logits = model.forward([15496, 11], new KVCache(config));
 *
 * Shape legend, used in every comment of this file; (T, C) is a Float32Array of T rows of C numbers:
 *     T tokens of this call   S tokens seen so far, the cached ones included   C n_embd
 *     H n_head                G key/value heads   D head_dim = C / H           V vocab_size   E n_expert
 */

/** The shape of a GPT: a field for each thing in which the lineages differ. Checked when made (Error). */
export class GPTConfig {
  vocab_size = 50304; // token ids the model knows; may exceed the tokenizer's
  block_size = 1024; // longest context in tokens
  n_layer = 12; // decoder blocks
  n_head = 12; // query heads; divides n_embd
  n_kv_head = 0; // key/value heads shared by groups of query heads (arXiv:2305.13245); 0 means n_head
  n_embd = 768; // width of the residual stream
  n_inner = 0; // width of the feed-forward; 0 means 4 n_embd (swiglu: 8/3 n_embd, rounded up to 64)
  position = "rotary"; // rotary (arXiv:2104.09864), or learned: GPT-2's table wpe
  rope_theta = 10000; // base of the rotary frequencies; larger turns slower, for longer contexts
  rotary_fraction = 1; // part of each head that is rotated (Pythia: 0.25)
  norm = "layer"; // layer or rms (arXiv:1910.07467)
  norm_weight = true; // the norms have a learned scale
  norm_bias = true; // the norms have a learned shift (layer norm only)
  norm_eps = 1e-5; // added under the root of the norms
  activation = "gelu"; // gelu (exact), gelu_tanh (GPT-2's), relu2 (arXiv:2109.08668) or swiglu (2002.05202)
  attn_bias = true; // biases in the linear layers of attention
  mlp_bias = true; // biases in the linear layers of the feed-forward
  n_expert = 0; // feed-forwards of a block, of which a token takes a few (arXiv:2401.04088); 0 means a single one
  n_expert_per_tok = 2; // how many of them a token takes
  router_aux_loss_coef = 0.01; // training only; read and not used here
  parallel_residual = false; // attention and feed-forward read the same input (NeoX), not one after the other
  qk_norm = false; // RMS-normalise queries and keys (arXiv:2010.04245)
  embd_norm = false; // normalise the embeddings before the first block
  tie_word_embeddings = true; // the head is the embedding table, transposed (arXiv:1608.05859)
  logit_softcap = 0; // squeeze logits into (-cap, cap) by tanh; 0 leaves them alone
  dropout = 0; // training only; read and not used here

  constructor(values = {}) {
    Object.assign(this, values);
    const rotated = this.head_dim * this.rotary_fraction;
    for (const [holds, message] of [
      [this.n_embd % this.n_head === 0, `n_embd ${this.n_embd} is not a multiple of n_head ${this.n_head}`],
      [this.n_head % this.kv_heads === 0, `n_head ${this.n_head} is not a multiple of n_kv_head ${this.n_kv_head}`],
      [0 < this.rotary_fraction && this.rotary_fraction <= 1,
        `rotary_fraction is ${this.rotary_fraction}; it must be in (0, 1]`],
      [this.position === "learned" || (Math.floor(rotated) % 2 === 0 && Math.floor(rotated) >= 2),
        `rotary positions turn pairs: head size ${this.head_dim} * ${this.rotary_fraction} = ${rotated}, not even`],
      [!this.norm_bias || (this.norm === "layer" && this.norm_weight),
        "norm_bias needs norm=layer with norm_weight; set norm_bias to false"],
      [this.rope_theta > 0 && this.norm_eps > 0, "rope_theta and norm_eps must be above 0"],
      [!this.n_expert || this.n_expert_per_tok <= this.n_expert, `n_expert_per_tok > n_expert (${this.n_expert})`],
      [this.logit_softcap >= 0, `logit_softcap is ${this.logit_softcap}; give a cap above 0, or 0 for none`],
    ]) {
      if (!holds) throw new Error(message);
    }
  }

  get head_dim() {
    return this.n_embd / this.n_head;
  }

  get kv_heads() {
    return this.n_kv_head || this.n_head;
  }

  get ffn_width() {
    const usual = this.activation === "swiglu" ? 64 * Math.ceil((this.n_embd * 8) / 3 / 64) : 4 * this.n_embd;
    return this.n_inner || usual;
  }
}

// ---- arithmetic: what PyTorch does for model.py -----------------------------------------------------------------------
// JavaScript computes in double precision; each result is rounded to float32 where it is stored in a Float32Array.

/**
 * The plain engine: the operations that take nearly all the time, in their plainest form. kernels/engine.js has the
 * same four, faster, and is checked against this one.
 */
export const plain_engine = {
  /** A weight (rows, columns) of float32 numbers, as this engine keeps it. */
  weight: (data, rows, columns) => ({ data, rows, columns }),
  /** Memory for n numbers of a cache. */
  zeros: (n) => new Float32Array(n),
  /** Row i of a weight: an embedding. */
  row: (weight, i) => weight.data.slice(i * weight.columns, (i + 1) * weight.columns),
  linear,
  attend,
};

/** x (T, I) times a weight (O, I) transposed, plus a bias (O) where there is one: (T, O). */
export function linear(weight, bias, x, T) {
  const { data: w, rows: O, columns: I } = weight;
  const y = new Float32Array(T * O);
  for (let t = 0; t < T; t++) {
    const from = t * I;
    let o = 0;
    for (; o + 3 < O; o += 4) { // four outputs at a time, so that each number of x is read once for all of them
      let at = o * I, a = 0, b = 0, c = 0, d = 0;
      for (let i = 0; i < I; i++, at++) {
        const number = x[from + i];
        a += w[at] * number;
        b += w[at + I] * number;
        c += w[at + 2 * I] * number;
        d += w[at + 3 * I] * number;
      }
      y[t * O + o] = a;
      y[t * O + o + 1] = b;
      y[t * O + o + 2] = c;
      y[t * O + o + 3] = d;
    }
    for (; o < O; o++) {
      let sum = 0;
      for (let i = 0; i < I; i++) sum += w[o * I + i] * x[from + i];
      y[t * O + o] = sum;
    }
    if (bias) for (o = 0; o < O; o++) y[t * O + o] += bias[o];
  }
  return y;
}

/** softmax(q k^T / sqrt(D)) v for one query q (D) of one head, over S keys and values (S, D): (D). */
export function attend(q, k, v, S) {
  const D = q.length;
  const y = new Float64Array(D);
  const probs = attention_probs(q, k, S);
  for (let s = 0; s < S; s++) {
    for (let d = 0; d < D; d++) y[d] += probs[s] * v[s * D + d];
  }
  return Float32Array.from(y);
}

/** The weights (S) with which `attend` averages the values. */
export function attention_probs(q, k, S) {
  const D = q.length;
  const scores = new Float32Array(S);
  for (let s = 0; s < S; s++) {
    let sum = 0;
    for (let d = 0; d < D; d++) sum += q[d] * k[s * D + d];
    scores[s] = sum / Math.sqrt(D);
  }
  return softmax(scores);
}

/** Probabilities of the same length, for logits of which some may be -Infinity (probability 0). */
export function softmax(logits) {
  let largest = -Infinity, sum = 0;
  for (const logit of logits) largest = Math.max(largest, logit);
  const probs = new Float32Array(logits.length);
  for (let i = 0; i < logits.length; i++) sum += probs[i] = Math.exp(logits[i] - largest);
  for (let i = 0; i < logits.length; i++) probs[i] /= sum;
  return probs;
}

/** RMS norm of the n numbers of x that begin at `from`, written to `out` at the same place. */
function rms_norm(x, from, n, eps, weight, out) {
  let sum = 0;
  for (let i = 0; i < n; i++) sum += x[from + i] ** 2;
  const scale = 1 / Math.sqrt(sum / n + eps);
  for (let i = 0; i < n; i++) out[from + i] = x[from + i] * scale * (weight ? weight[i] : 1);
}

/** Layer norm, likewise. */
function layer_norm(x, from, n, eps, weight, bias, out) {
  let mean = 0, variance = 0;
  for (let i = 0; i < n; i++) mean += x[from + i] / n;
  for (let i = 0; i < n; i++) variance += (x[from + i] - mean) ** 2 / n;
  const scale = 1 / Math.sqrt(variance + eps);
  for (let i = 0; i < n; i++) {
    out[from + i] = (x[from + i] - mean) * scale * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
  }
}

/** The error function, by the Chebyshev fit of Numerical Recipes (erfcc): off by at most 1.2e-7 of erfc. */
function erf(x) {
  const t = 1 / (1 + 0.5 * Math.abs(x));
  let sum = 0;
  for (const c of ERFC) sum = sum * t + c;
  const erfc = t * Math.exp(-x * x + sum);
  return x >= 0 ? 1 - erfc : erfc - 1;
}
const ERFC = [
  0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368,
  -1.26551223,
];

export const ACTIVATIONS = {
  gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x))),
  relu2: (x) => (x > 0 ? x * x : 0),
  swiglu: (x) => x / (1 + Math.exp(-x)), // SiLU, of the gate
};

function add(a, b) {
  const sum = new Float32Array(a.length);
  for (let i = 0; i < a.length; i++) sum[i] = a[i] + b[i];
  return sum;
}

// ---- the model --------------------------------------------------------------------------------------------------------

/** Layer or RMS norm over the last dimension, with the learned parts that the config asks for. */
export class Norm {
  constructor(config, state, name) {
    this.layer = config.norm === "layer";
    this.eps = config.norm_eps;
    this.weight = config.norm_weight ? state.get(`${name}.weight`) : null;
    this.bias = config.norm_bias ? state.get(`${name}.bias`) : null;
    this.C = config.n_embd;
  }

  forward(x) {
    const y = new Float32Array(x.length);
    for (let from = 0; from < x.length; from += this.C) {
      if (this.layer) layer_norm(x, from, this.C, this.eps, this.weight, this.bias, y);
      else rms_norm(x, from, this.C, this.eps, this.weight, y);
    }
    return y;
  }
}

/** Keys and values of the tokens already seen, so that the next token costs one step instead of a whole pass. */
export class KVCache {
  constructor(config, engine = plain_engine, max_len = 0) {
    this.max_len = max_len || config.block_size;
    this.D = config.head_dim;
    const each = config.kv_heads * this.max_len * this.D;
    this.k = Array.from({ length: config.n_layer }, () => engine.zeros(each)); // n_layer times (G, S_max, D)
    this.v = Array.from({ length: config.n_layer }, () => engine.zeros(each));
    this.length = 0;
  }

  /** Stores the key and value (G, D) of one token, which are given as parts of the rows `k` and `v`. */
  update(layer, k, v, position, G) {
    for (let g = 0; g < G; g++) {
      const slot = (g * this.max_len + position) * this.D;
      this.k[layer].set(k.subarray(g * this.D, (g + 1) * this.D), slot);
      this.v[layer].set(v.subarray(g * this.D, (g + 1) * this.D), slot);
    }
  }

  /** All keys and values (S_max, D) of a layer's head g; those from `length` on are stale. */
  head(layer, g) {
    const from = g * this.max_len * this.D, to = from + this.max_len * this.D;
    return [this.k[layer].subarray(from, to), this.v[layer].subarray(from, to)];
  }
}

/** Cosines and sines (T, R / 2) of a head's R rotated dimensions. */
export function rotary_angles(config, positions) {
  const half = Math.floor(config.head_dim * config.rotary_fraction) / 2;
  const cos = new Float32Array(positions.length * half), sin = new Float32Array(positions.length * half);
  positions.forEach((position, t) => {
    for (let i = 0; i < half; i++) {
      const frequency = Math.fround(1 / Math.fround(config.rope_theta ** (i / half)));
      const angle = Math.fround(position * frequency); // in float32, as PyTorch has it: late positions turn far
      cos[t * half + i] = Math.cos(angle);
      sin[t * half + i] = Math.sin(angle);
    }
  });
  return { cos, sin, half };
}

/** Rotates the `heads` (D each) of x that begin at `from`, by the position of token t, in place. Pairs are dimension i
 * of the first half with i of the second. */
export function rotate(x, from, heads, D, { cos, sin, half }, t) {
  for (let head = 0; head < heads; head++) {
    for (let i = 0; i < half; i++) {
      const a = from + head * D + i, b = a + half;
      const c = cos[t * half + i], s = sin[t * half + i];
      const x1 = x[a], x2 = x[b];
      x[a] = x1 * c - x2 * s;
      x[b] = x2 * c + x1 * s;
    }
  }
}

/** What all blocks of one pass share: where the tokens stand, what is remembered. */
export class Context {
  constructor(config, T, kv_cache) {
    const S = kv_cache.length + T;
    if (S > kv_cache.max_len) throw new Error(`${S} tokens do not fit ${kv_cache.max_len}: crop to the last ones`);
    this.kv_cache = kv_cache;
    this.T = T;
    this.positions = Array.from({ length: T }, (_, t) => kv_cache.length + t); // (T)
    this.rope = config.position === "rotary" ? rotary_angles(config, this.positions) : null;
  }
}

/** Each token gathers from itself and the tokens before it, by as many heads as n_head. */
export class CausalSelfAttention {
  constructor(config, layer, state, engine) {
    this.config = config;
    this.layer = layer;
    this.engine = engine;
    this.c_attn = layer_of(state, engine, `h.${layer}.attn.c_attn`); // queries, keys and values in one matrix
    this.c_proj = layer_of(state, engine, `h.${layer}.attn.c_proj`);
  }

  forward(x, context) {
    const { n_head: H, kv_heads: G, head_dim: D, n_embd: C } = this.config;
    const { kv_cache, positions, T } = context;
    const qkv = this.queries_keys_values(x, context); // (T, H+2G, D)
    const width = (H + 2 * G) * D;
    const y = new Float32Array(T * C);
    for (let t = 0; t < T; t++) {
      const row = qkv.subarray(t * width, (t + 1) * width);
      const k = row.subarray(H * D, (H + G) * D), v = row.subarray((H + G) * D);
      kv_cache.update(this.layer, k, v, positions[t], G);
    }
    for (let h = 0; h < H; h++) {
      const [keys, values] = kv_cache.head(this.layer, Math.floor((h * G) / H)); // a key head serves H / G query heads
      for (let t = 0; t < T; t++) {
        const q = qkv.subarray(t * width + h * D, t * width + (h + 1) * D);
        y.set(this.engine.attend(q, keys, values, positions[t] + 1), t * C + h * D); // causal: none after itself
      }
    }
    return this.c_proj(y, T);
  }

  /** (T, H+2G, D): what each token asks, how it is found and what it gives, rotated and normalised. */
  queries_keys_values(x, { T, rope }) {
    const { n_head: H, kv_heads: G, head_dim: D, qk_norm, norm_eps } = this.config;
    const qkv = this.c_attn(x, T);
    const width = (H + 2 * G) * D;
    for (let t = 0; t < T; t++) {
      if (rope) rotate(qkv, t * width, H + G, D, rope, t);
      if (!qk_norm) continue;
      for (let head = 0; head < H + G; head++) rms_norm(qkv, t * width + head * D, D, norm_eps, null, qkv);
    }
    return qkv;
  }
}

/** The feed-forward layer: what each token computes by itself from what it gathered. */
export class MLP {
  constructor(config, name, state, engine) {
    this.activation = ACTIVATIONS[config.activation];
    this.c_fc = layer_of(state, engine, `${name}.c_fc`);
    this.c_gate = config.activation === "swiglu" ? layer_of(state, engine, `${name}.c_gate`) : null;
    this.c_proj = layer_of(state, engine, `${name}.c_proj`);
  }

  forward(x, T) {
    const h = this.c_fc(x, T);
    if (this.c_gate) {
      const gate = this.c_gate(x, T);
      for (let i = 0; i < h.length; i++) h[i] *= this.activation(gate[i]);
    } else {
      for (let i = 0; i < h.length; i++) h[i] = this.activation(h[i]);
    }
    return this.c_proj(h, T);
  }
}

/** Several feed-forwards: a token takes the weighted mean of the few that the router chooses (arXiv:2401.04088). */
export class MixtureOfExperts {
  constructor(config, name, state, engine) {
    this.k = config.n_expert_per_tok;
    this.router = layer_of(state, engine, `${name}.router`);
    this.experts = Array.from({ length: config.n_expert }, (_, e) => new MLP(config, `${name}.experts.${e}`, state, engine));
  }

  /** The numbers of the experts that one token's logits (E) choose, and their weights, k each. */
  choose(logits) {
    const probs = softmax(logits);
    const chosen = [...probs.keys()].sort((a, b) => probs[b] - probs[a]).slice(0, this.k);
    const sum = chosen.reduce((sum, e) => sum + probs[e], 0);
    return { chosen, weights: chosen.map((e) => probs[e] / sum) };
  }

  forward(x, T) {
    const C = x.length / T, E = this.experts.length;
    const logits = this.router(x, T), y = new Float32Array(x.length);
    const routes = Array.from({ length: T }, (_, t) => this.choose(logits.subarray(t * E, (t + 1) * E)));
    this.experts.forEach((expert, e) => {
      const tokens = [...routes.keys()].filter((t) => routes[t].chosen.includes(e));
      if (!tokens.length) return;
      const rows = new Float32Array(tokens.length * C);
      tokens.forEach((t, row) => rows.set(x.subarray(t * C, (t + 1) * C), row * C));
      const part = expert.forward(rows, tokens.length);
      tokens.forEach((t, row) => {
        const weight = routes[t].weights[routes[t].chosen.indexOf(e)];
        for (let c = 0; c < C; c++) y[t * C + c] += weight * part[row * C + c];
      });
    });
    return y;
  }
}

/** Communicate, then think: attention and feed-forward, each a branch added to the residual stream. */
export class Block {
  constructor(config, layer, state, engine) {
    this.parallel = config.parallel_residual;
    this.ln_1 = new Norm(config, state, `h.${layer}.ln_1`);
    this.attn = new CausalSelfAttention(config, layer, state, engine);
    this.ln_2 = new Norm(config, state, `h.${layer}.ln_2`);
    this.mlp = new (config.n_expert ? MixtureOfExperts : MLP)(config, `h.${layer}.mlp`, state, engine);
  }

  forward(x, context) {
    if (this.parallel) {
      const gathered = add(x, this.attn.forward(this.ln_1.forward(x), context));
      return add(gathered, this.mlp.forward(this.ln_2.forward(x), context.T));
    }
    x = add(x, this.attn.forward(this.ln_1.forward(x), context));
    return add(x, this.mlp.forward(this.ln_2.forward(x), context.T));
  }
}

/** Token ids in, logits for the next token out. */
export class GPT {
  /** `state`: name -> Float32Array (norms, biases) or a weight of `engine`, by the names of model.py. */
  constructor(config, state, engine = plain_engine) {
    this.config = config;
    this.engine = engine;
    this.wte = state.get("wte.weight");
    this.wpe = config.position === "learned" ? state.get("wpe.weight") : null;
    this.ln_emb = config.embd_norm ? new Norm(config, state, "ln_emb") : null;
    this.h = Array.from({ length: config.n_layer }, (_, layer) => new Block(config, layer, state, engine));
    this.ln_f = new Norm(config, state, "ln_f");
    this.lm_head = config.tie_word_embeddings ? this.wte : state.get("lm_head.weight");
  }

  /** Logits (V) of what follows the last of the ids, which continue what the cache has seen. */
  forward(idx, kv_cache) {
    const x = this.hidden(idx, kv_cache); // (T, C)
    return this.head(x.subarray(x.length - this.config.n_embd));
  }

  /** The residual stream (T, C) after the last norm: what the head reads. */
  hidden(idx, kv_cache) {
    const context = new Context(this.config, idx.length, kv_cache);
    let x = this.embed(idx, context);
    for (const block of this.h) x = block.forward(x, context);
    kv_cache.length += idx.length;
    return this.ln_f.forward(x);
  }

  /** (T, C): what enters the first block. */
  embed(idx, { positions }) {
    const C = this.config.n_embd;
    const x = new Float32Array(idx.length * C);
    idx.forEach((id, t) => x.set(this.engine.row(this.wte, id), t * C));
    if (this.wpe) positions.forEach((position, t) => x.set(add(x.subarray(t * C, (t + 1) * C),
      this.engine.row(this.wpe, position)), t * C));
    return this.ln_emb ? this.ln_emb.forward(x) : x;
  }

  /** Logits (T, V) for hidden states x (T, C). */
  head(x) {
    const cap = this.config.logit_softcap;
    const logits = this.engine.linear(this.lm_head, null, x, x.length / this.config.n_embd);
    return cap ? logits.map((logit) => cap * Math.tanh(logit / cap)) : logits;
  }
}

/** A linear layer by its name: a function of x (T, I) and T that gives (T, O). */
function layer_of(state, engine, name) {
  const weight = state.get(`${name}.weight`), bias = state.get(`${name}.bias`) ?? null;
  return (x, T) => engine.linear(weight, bias, x, T);
}
