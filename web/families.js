/**
 * From the files of the families that Transformers has (gpt2, gpt_neox, llama, mixtral, nanochat) to our core: the reading
 * half of nanogpt_hub/families.py, with the same tables. Pure functions; files are checkpoint.js's business.
 *
 *     const config = config_from_hf(JSON.parse(text));        // GPTConfig; an Error names the first thing that is wrong
 *     const plan = tensors_from_hf(config, shapes);           // where each of our tensors is found in the file
 */
import { GPTConfig } from "./model.js";

export const OWN_TYPE = "nanogpt_hub"; // model_type of the combinations that no stock family expresses

const GELUS = {
  gelu_new: "gelu_tanh", gelu: "gelu", relu2: "relu2", gelu_pytorch_tanh: "gelu_tanh", gelu_fast: "gelu_tanh",
  gelu_python: "gelu",
};
const SHAPE_KEYS = {
  vocab_size: ["vocab_size"], block_size: ["max_position_embeddings"], n_layer: ["num_hidden_layers"],
  n_head: ["num_attention_heads"], n_embd: ["hidden_size"], n_inner: ["intermediate_size"],
  activation: ["hidden_act"], tie_word_embeddings: ["tie_word_embeddings"], attn_bias: ["attention_bias"],
};
const LLAMA_NAMES = {
  "wte": ["embed_tokens"],
  "h.*.attn.c_attn": ["layers.*.self_attn.q_proj", "layers.*.self_attn.k_proj", "layers.*.self_attn.v_proj"],
  "h.*.attn.c_proj": ["layers.*.self_attn.o_proj"],
  "lm_head": ["lm_head"],
};
const LLAMA_NORMS = {
  "h.*.ln_1": ["layers.*.input_layernorm"],
  "h.*.ln_2": ["layers.*.post_attention_layernorm"],
  "ln_f": ["norm"],
};
const same = (...names) => Object.fromEntries(names.map((name) => [name, [name]]));

/**
 * fixed: our fields that the family never varies.  stored: our fields whose parameters it stores even where we have
 * none.  keys: our field -> their keys, the first one present is read.  rope_keys: our field -> its spelling before
 * Transformers 5.  missing: what a config without the key means.  activations: their name -> ours.  layout: conv1d has
 * matrices as (in, out); of c_attn's rows, per_head has q, k, v of one head after the other, split has q, k, v in three
 * tensors, and turned exchanges the halves of each q and k head besides.  prefix: of all tensors but the head.
 * names: our module -> theirs, * for the layer, then the expert; several hold our rows one after the other.
 */
export const FAMILIES = {
  gpt2: {
    fixed: { position: "learned", norm: "layer", parallel_residual: false },
    stored: ["attn_bias", "mlp_bias", "norm_weight", "norm_bias"],
    keys: {
      vocab_size: ["vocab_size"], block_size: ["n_positions", "n_ctx"], n_layer: ["n_layer"], n_head: ["n_head"],
      n_embd: ["n_embd"], n_inner: ["n_inner"], norm_eps: ["layer_norm_epsilon"], activation: ["activation_function"],
      tie_word_embeddings: ["tie_word_embeddings"], attn_bias: ["attn_bias"], mlp_bias: ["mlp_bias"],
      norm_weight: ["norm_weight"], norm_bias: ["norm_bias"],
    },
    rope_keys: {},
    missing: { vocab_size: 50257, activation: "gelu_new" },
    activations: GELUS,
    layout: "conv1d",
    prefix: "transformer.",
    head: "lm_head",
    names: same("wte", "wpe", "h.*.ln_1", "h.*.attn.c_attn", "h.*.attn.c_proj", "h.*.ln_2", "h.*.mlp.c_fc",
      "h.*.mlp.c_proj", "ln_f", "lm_head"),
  },
  gpt_neox: {
    fixed: { position: "rotary", norm: "layer" },
    stored: ["mlp_bias", "norm_weight", "norm_bias"],
    keys: {
      ...SHAPE_KEYS, norm_eps: ["layer_norm_eps"], parallel_residual: ["use_parallel_residual"],
      mlp_bias: ["mlp_bias"], norm_weight: ["norm_weight"], norm_bias: ["norm_bias"],
    },
    rope_keys: { rope_theta: "rotary_emb_base", rotary_fraction: "rotary_pct" },
    missing: {
      vocab_size: 50432, block_size: 2048, n_layer: 44, n_head: 64, n_embd: 6144, n_inner: 24576, activation: "gelu",
      tie_word_embeddings: false, parallel_residual: true, rotary_fraction: 0.25,
    },
    activations: GELUS,
    layout: "per_head",
    prefix: "gpt_neox.",
    head: "embed_out",
    names: {
      "wte": ["embed_in"],
      "h.*.ln_1": ["layers.*.input_layernorm"],
      "h.*.attn.c_attn": ["layers.*.attention.query_key_value"],
      "h.*.attn.c_proj": ["layers.*.attention.dense"],
      "h.*.ln_2": ["layers.*.post_attention_layernorm"],
      "h.*.mlp.c_fc": ["layers.*.mlp.dense_h_to_4h"],
      "h.*.mlp.c_proj": ["layers.*.mlp.dense_4h_to_h"],
      "ln_f": ["final_layer_norm"],
      "lm_head": ["embed_out"],
    },
  },
  llama: {
    fixed: { position: "rotary", rotary_fraction: 1, norm: "rms", norm_bias: false, parallel_residual: false },
    stored: ["norm_weight"],
    keys: {
      ...SHAPE_KEYS, n_kv_head: ["num_key_value_heads"], norm_eps: ["rms_norm_eps"], mlp_bias: ["mlp_bias"],
      norm_weight: ["norm_weight"],
    },
    rope_keys: { rope_theta: "rope_theta" },
    missing: {
      vocab_size: 32000, block_size: 2048, n_layer: 32, n_head: 32, n_embd: 4096, n_inner: 11008, norm_eps: 1e-6,
      activation: "silu", tie_word_embeddings: false, attn_bias: false, mlp_bias: false,
    },
    activations: { silu: "swiglu", swish: "swiglu" },
    layout: "split",
    prefix: "model.",
    head: "lm_head",
    names: {
      ...LLAMA_NAMES,
      ...LLAMA_NORMS,
      "h.*.mlp.c_fc": ["layers.*.mlp.up_proj"],
      "h.*.mlp.c_gate": ["layers.*.mlp.gate_proj"],
      "h.*.mlp.c_proj": ["layers.*.mlp.down_proj"],
    },
  },
  mixtral: {
    fixed: {
      position: "rotary", rotary_fraction: 1, norm: "rms", norm_bias: false, attn_bias: false, mlp_bias: false,
      parallel_residual: false,
    },
    stored: ["norm_weight"],
    keys: {
      ...Object.fromEntries(Object.entries(SHAPE_KEYS).filter(([name]) => name !== "attn_bias")),
      n_kv_head: ["num_key_value_heads"], norm_eps: ["rms_norm_eps"], norm_weight: ["norm_weight"],
      n_expert: ["num_local_experts"], n_expert_per_tok: ["num_experts_per_tok"],
      router_aux_loss_coef: ["router_aux_loss_coef"],
    },
    rope_keys: { rope_theta: "rope_theta" },
    missing: {
      vocab_size: 32000, block_size: 131072, n_layer: 32, n_head: 32, n_kv_head: 8, n_embd: 4096, n_inner: 14336,
      norm_eps: 1e-5, activation: "silu", tie_word_embeddings: false, rope_theta: 1e6, n_expert: 8, n_expert_per_tok: 2,
      router_aux_loss_coef: 0.001,
    },
    activations: { silu: "swiglu", swish: "swiglu" },
    layout: "split",
    prefix: "model.",
    head: "lm_head",
    names: {
      ...LLAMA_NAMES,
      ...LLAMA_NORMS,
      "h.*.mlp.router": ["layers.*.block_sparse_moe.gate"],
      "h.*.mlp.experts.*.c_gate": ["layers.*.block_sparse_moe.experts.*.w1"],
      "h.*.mlp.experts.*.c_proj": ["layers.*.block_sparse_moe.experts.*.w2"],
      "h.*.mlp.experts.*.c_fc": ["layers.*.block_sparse_moe.experts.*.w3"],
    },
  },
  nanochat: {
    fixed: {
      position: "rotary", rotary_fraction: 1, norm: "rms", norm_weight: false, norm_bias: false, mlp_bias: false,
      parallel_residual: false, qk_norm: true, embd_norm: true,
    },
    stored: [],
    keys: {
      ...SHAPE_KEYS, n_kv_head: ["num_key_value_heads"], norm_eps: ["rms_norm_eps"],
      logit_softcap: ["final_logit_softcapping"],
    },
    rope_keys: { rope_theta: "rope_theta" },
    missing: {
      vocab_size: 50304, block_size: 2048, n_head: 6, n_inner: 8192, norm_eps: 1e-6, activation: "relu2",
      attn_bias: false, tie_word_embeddings: false, logit_softcap: 15,
    },
    activations: GELUS,
    layout: "turned",
    prefix: "model.",
    head: "lm_head",
    names: { ...LLAMA_NAMES, "h.*.mlp.c_fc": ["layers.*.mlp.fc1"], "h.*.mlp.c_proj": ["layers.*.mlp.fc2"] },
  },
};

// Keys of a foreign config that change what is computed, with the values that leave it alone. Anything else is refused:
// a model must never load as something that it is not.
const HARMLESS = {
  scale_attn_weights: [true], scale_attn_by_inverse_layer_idx: [false], add_cross_attention: [false],
  is_encoder_decoder: [false], quantization_config: [null], per_layer_config: [null, "{}"], pruned_heads: [null, "{}"],
  partial_rotary_factor: [null, 1],
};
// Bounds that no model which a browser can run reaches; a config from anywhere is checked before anything is built.
const LIMITS = {
  vocab_size: [1, 1e7], block_size: [1, 2 ** 24], n_layer: [1, 1000], n_head: [1, 65536], n_kv_head: [0, 65536],
  n_embd: [1, 65536], n_inner: [0, 2 ** 20], rope_theta: [1e-3, 1e12], rotary_fraction: [0, 1], norm_eps: [1e-30, 1],
  logit_softcap: [0, 1e6], dropout: [0, 1], n_expert: [0, 1024], n_expert_per_tok: [1, 1024],
  router_aux_loss_coef: [0, 1e6],
};
const CHOICES = {
  position: ["rotary", "learned"], norm: ["layer", "rms"], activation: ["gelu", "gelu_tanh", "relu2", "swiglu"],
};
const FRACTIONS = ["rope_theta", "rotary_fraction", "norm_eps", "logit_softcap", "dropout",
  "router_aux_loss_coef"]; // the other numbers are whole
const BUFFERS = /\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$/;

// Configs --------------------------------------------------------------------------------------------------------------

/** The GPTConfig that the content of a config.json means. Throws an Error for what this project does not have. */
export function config_from_hf(content) {
  const type = get(content, "model_type");
  if (type === OWN_TYPE) return own_config(content);
  if (typeof type !== "string" || !Object.hasOwn(FAMILIES, type)) {
    throw new Error(`model_type is ${show(type)}; this page loads ${[...Object.keys(FAMILIES), OWN_TYPE].join(", ")}`);
  }
  const family = FAMILIES[type];
  refuse_foreign_features(content);
  const usual = new GPTConfig();
  const values = { ...family.fixed };
  for (const [name, keys] of Object.entries(family.keys)) {
    const key = keys.find((key) => Object.hasOwn(content, key));
    values[name] = key ? content[key] : family.missing[name] ?? usual[name];
    if (values[name] === null && ["n_inner", "n_kv_head", "logit_softcap"].includes(name)) values[name] = 0;
  }
  Object.assign(values, rope_values(content, family, usual));
  if (typeof values.activation !== "string" || !Object.hasOwn(family.activations, values.activation)) {
    const known = Object.keys(family.activations).join(", ");
    throw new Error(`${family.keys.activation[0]} is ${show(values.activation)}; this project knows ${known}`);
  }
  values.activation = family.activations[values.activation];
  const config = checked_config(values, family.keys);
  const head_dim = get(content, "head_dim") ?? config.head_dim;
  if (head_dim !== config.head_dim) {
    throw new Error(`head_dim is ${show(head_dim)}; this project has heads of width / heads, here ${config.head_dim}`);
  }
  return config;
}

/** The family whose names a file of this config has, or null for our own. */
export function family_of(content) {
  return content.model_type === OWN_TYPE ? null : FAMILIES[content.model_type];
}

/** Our own model type: the fields of GPTConfig by their names. A field we do not know may change the computation. */
function own_config(content) {
  if ("core" in content) throw new Error("this model was trained with an edited model.py, and this page has the unedited one");
  const ours = Object.keys(new GPTConfig());
  const housekeeping = ["model_type", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
    "torch_dtype", "use_cache", "transformers_version", "_name_or_path"];
  const unknown = Object.keys(content).find((key) => !ours.includes(key) && !housekeeping.includes(key));
  if (unknown !== undefined) throw new Error(`config.json has ${show(unknown)}, which this page does not know; update it`);
  return checked_config(Object.fromEntries(Object.entries(content).filter(([key]) => ours.includes(key))), {});
}

function refuse_foreign_features(content) {
  for (const [key, harmless] of Object.entries(HARMLESS)) {
    if (!Object.hasOwn(content, key)) continue;
    const value = content[key] !== null && typeof content[key] === "object" ? JSON.stringify(content[key]) : content[key];
    if (!harmless.includes(value)) throw new Error(`${key} is ${show(value)}; this project has only ${harmless[0]}`);
  }
  const window = get(content, "sliding_window") ?? null, used = get(content, "use_sliding_window") ?? null;
  const types = get(content, "layer_types") ?? [];
  if ((used !== null && used !== false) || (window !== null && used !== false)) {
    throw new Error(`sliding_window is ${show(window)}; this project attends to all tokens`);
  }
  if (!Array.isArray(types) || types.some((type) => type !== "full_attention")) {
    throw new Error(`layer_types is ${show(types)}; this project has only full_attention`);
  }
}

/** rope_theta and rotary_fraction, from the nested spelling or the older flat one. Scaled rotary is refused. */
function rope_values(content, family, usual) {
  let nested = {};
  for (const key of ["rope_scaling", "rope_parameters"]) { // the first one given counts, as in Transformers
    const given = get(content, key) ?? {};
    const type = typeof given === "object" ? given.rope_type ?? given.type ?? "default" : null;
    if (type !== "default") throw new Error(`${key} is ${show(given)}; this project has plain rotary positions only`);
    if (!Object.keys(nested).length) nested = given;
  }
  const values = {};
  for (const [name, old_key] of Object.entries(family.rope_keys)) {
    const key = { rope_theta: "rope_theta", rotary_fraction: "partial_rotary_factor" }[name];
    values[name] = nested[key] ?? get(content, old_key) ?? family.missing[name] ?? usual[name];
  }
  if (!family.rope_keys.rotary_fraction && (nested.partial_rotary_factor ?? 1) !== 1) {
    throw new Error(`partial_rotary_factor is ${show(nested.partial_rotary_factor)}; this family rotates whole heads`);
  }
  return values;
}

/** A GPTConfig of untrusted `values`: types and bounds first, then its own checks. */
function checked_config(values, keys) {
  const usual = new GPTConfig();
  for (const [name, value] of Object.entries(values)) {
    check_value(keys[name]?.[0] ?? name, value, name, typeof usual[name]);
  }
  return new GPTConfig(values);
}

function check_value(key, value, name, kind) {
  const wanted = { boolean: "true or false", number: "a number", string: "a string" }[kind];
  if (typeof value !== kind) throw new Error(`${key} is ${show(value)}; it must be ${wanted}`);
  if (CHOICES[name] && !CHOICES[name].includes(value)) {
    throw new Error(`${key} is ${show(value)}; it must be one of ${CHOICES[name].join(", ")}`);
  }
  if (kind !== "number") return;
  const [low, high] = LIMITS[name];
  if (!FRACTIONS.includes(name) && !Number.isInteger(value)) {
    throw new Error(`${key} is ${show(value)}; it must be an integer`);
  }
  if (!(value >= low && value <= high)) throw new Error(`${key} is ${show(value)}; it must be from ${low} to ${high}`);
}

/** A value from a foreign file as an error may show it. */
export function show(value) {
  const text = typeof value === "string" ? `'${value}'` : JSON.stringify(value) ?? "missing";
  return text.length <= 80 ? text : `${text.slice(0, 77)}...`;
}

function get(content, key) {
  return Object.hasOwn(content, key) ? content[key] : undefined;
}

// Tensors --------------------------------------------------------------------------------------------------------------

/** Our tensors and their shapes (Map of name -> [rows, columns] or [length]), a tied head left out. */
export function parameter_shapes(config) {
  const { n_embd: C, vocab_size: V, ffn_width: F } = config;
  const shapes = new Map([["wte.weight", [V, C]]]);
  const norm = (name) => {
    if (config.norm_weight) shapes.set(`${name}.weight`, [C]);
    if (config.norm_bias) shapes.set(`${name}.bias`, [C]);
  };
  const linear = (name, O, I, bias) => {
    shapes.set(`${name}.weight`, [O, I]);
    if (bias) shapes.set(`${name}.bias`, [O]);
  };
  if (config.position === "learned") shapes.set("wpe.weight", [config.block_size, C]);
  if (config.embd_norm) norm("ln_emb");
  for (let layer = 0; layer < config.n_layer; layer++) {
    const h = `h.${layer}.`;
    norm(`${h}ln_1`);
    linear(`${h}attn.c_attn`, (config.n_head + 2 * config.kv_heads) * config.head_dim, C, config.attn_bias);
    linear(`${h}attn.c_proj`, C, C, config.attn_bias);
    norm(`${h}ln_2`);
    if (config.n_expert) linear(`${h}mlp.router`, config.n_expert, C, false);
    const experts = Array.from({ length: config.n_expert }, (_, e) => `${h}mlp.experts.${e}`);
    for (const mlp of config.n_expert ? experts : [`${h}mlp`]) {
      linear(`${mlp}.c_fc`, F, C, config.mlp_bias);
      if (config.activation === "swiglu") linear(`${mlp}.c_gate`, F, C, config.mlp_bias);
      linear(`${mlp}.c_proj`, C, F, config.mlp_bias);
    }
  }
  norm("ln_f");
  if (!config.tie_word_embeddings) shapes.set("lm_head.weight", [V, C]);
  return shapes;
}

/** Parameters of a model of this config, a tied head counted once. */
export function count_parameters(config) {
  let count = 0;
  for (const shape of parameter_shapes(config).values()) count += shape.reduce((a, b) => a * b, 1);
  return count;
}

/**
 * Where each of our tensors is in a file whose tensors have these `shapes` (Map of name -> shape): a Map of our name ->
 * their names. `absent` holds our names of what the config declares absent and the family stores all the same, `copy`
 * the file's name of a head that is tied. Strict: an Error for any tensor that is missing, unknown or misshapen.
 */
export function tensors_from_hf(config, family, shapes) {
  const stored = new GPTConfig({ ...config, ...Object.fromEntries((family?.stored ?? []).map((field) => [field, true])) });
  const ours = parameter_shapes(config), plan = new Map(), absent = new Map(), expected = new Map();
  for (const [name, shape] of parameter_shapes(stored)) {
    const theirs = family ? their_names(family, name) : [name];
    (ours.has(name) ? plan : absent).set(name, theirs);
    their_shapes(config, family, name, shape).forEach((part, i) => expected.set(theirs[i], part));
  }
  const head = `${family ? family.head : "lm_head"}.weight`;
  const tied = config.tie_word_embeddings ? [config.vocab_size, config.n_embd] : null;
  const found = new Map();
  for (const [name, shape] of shapes) {
    if (family && is_buffer(name)) continue;
    const full = full_name(family, name);
    const wanted = expected.get(full) ?? (full === head ? tied : null);
    if (!wanted || found.has(full)) {
      throw new Error(`tensor ${show(name)} is ${wanted ? "there twice" : "not part of the model in config.json"}`);
    }
    if (shape.length !== wanted.length || shape.some((n, i) => n !== wanted[i])) {
      throw new Error(`tensor ${show(name)} has shape [${shape}]; config.json asks for [${wanted}]`);
    }
    found.set(full, name);
  }
  const lacking = [...expected.keys()].filter((name) => !found.has(name)).sort();
  if (lacking.length) {
    const more = lacking.length > 1 ? ` (and ${lacking.length - 1} more)` : "";
    throw new Error(`tensor ${show(lacking[0])}${more} is missing from the weights`);
  }
  const by_file = (names) => new Map([...names].map(([name, theirs]) => [name, theirs.map((full) => found.get(full))]));
  return { plan: by_file(plan), absent: by_file(absent), copy: tied ? found.get(head) : undefined };
}

/** Whether older files have a mask or a rotary table under this name: no weight, and of any dtype. */
export function is_buffer(name) {
  return BUFFERS.test(name);
}

/** h.3.mlp.c_fc.weight -> h.*.mlp.c_fc, h.3.mlp.experts.0.c_fc.weight -> h.*.mlp.experts.*.c_fc */
export function module_of(name) {
  return name.replace(/\.\d+\./g, ".*.").replace(/\.[a-z]+$/, "");
}

/** A name as the family writes it now: with its prefix, and the head by its usual name. */
function full_name(family, name) {
  if (!family || name.startsWith(family.prefix)) return name;
  if (name === `${family.head}.weight` || name === "lm_head.weight") return `${family.head}.weight`;
  return family.prefix + name;
}

/** The family's names of our tensor `name`, in the order in which its rows are split. */
function their_names(family, name) {
  const module = module_of(name), kind = name.split(".").at(-1);
  const numbers = [...name.matchAll(/\.(\d+)(?=\.)/g)].map((found) => found[1]); // of the layer, then of the expert
  const prefix = module === "lm_head" ? "" : family.prefix;
  const spelled = (theirs) => numbers.reduce((text, number) => text.replace("*", number), theirs);
  return family.names[module].map((theirs) => `${prefix}${spelled(theirs)}.${kind}`);
}

/** The shapes of those parts in the file. */
function their_shapes(config, family, name, shape) {
  if (family?.layout === "conv1d" && name.startsWith("h.") && shape.length === 2) return [[shape[1], shape[0]]];
  if (!["split", "turned"].includes(family?.layout) || module_of(name) !== "h.*.attn.c_attn") return [shape];
  const { n_head: H, kv_heads: G, head_dim: D } = config;
  return [H, G, G].map((heads) => [heads * D, ...shape.slice(1)]);
}

/**
 * Copies the family's `parts` of one of our tensors (typed arrays of one kind, of numbers or of their bits) into `out`,
 * which is ours: rows in our order.
 */
export function join_tensors(config, family, name, parts, out) {
  const { n_head: H, kv_heads: G, head_dim: D } = config;
  const module = module_of(name);
  if (family?.layout === "conv1d" && name.startsWith("h.") && is_matrix(name)) {
    return transpose(parts[0], out, module === "h.*.attn.c_attn" ? (H + 2 * G) * D : out_features(config, module));
  }
  if (module !== "h.*.attn.c_attn" || !family || family.layout === "conv1d") return out.set(parts[0]);
  if (family.layout === "per_head") return join_per_head(parts[0], out, H, D);
  let at = 0;
  parts.forEach((part, i) => {
    out.set(part, at);
    if (family.layout === "turned" && i < 2) swap_halves(out.subarray(at, at + part.length), [H, G][i]);
    at += part.length;
  });
}

function is_matrix(name) {
  return name.endsWith(".weight") && !/ln_\w+\.weight$/.test(name);
}

function out_features(config, module) {
  return module.endsWith("c_fc") ? config.ffn_width : config.n_embd;
}

/** (in, out) to (out, in), in tiles, so that neither side is read across the whole of memory. */
function transpose(from, out, O) {
  const I = from.length / O, TILE = 32;
  for (let i0 = 0; i0 < I; i0 += TILE) {
    for (let o0 = 0; o0 < O; o0 += TILE) {
      for (let o = o0; o < Math.min(O, o0 + TILE); o++) {
        for (let i = i0; i < Math.min(I, i0 + TILE); i++) out[o * I + i] = from[i * O + o];
      }
    }
  }
}

/** Rows of q, k, v of head 0, then of head 1 ..., to all of q, all of k, all of v. */
function join_per_head(from, out, H, D) {
  const rows = D * (from.length / (3 * H * D)); // numbers of one head's q
  for (let h = 0; h < H; h++) {
    for (let part = 0; part < 3; part++) {
      out.set(from.subarray((h * 3 + part) * rows, (h * 3 + part + 1) * rows), (part * H + h) * rows);
    }
  }
}

/**
 * Exchanges the halves of each head's rows, in place. NanoChat turns its pairs the other way round than we do:
 * (x1 cos + x2 sin, x2 cos - x1 sin), which is our rotation of (x2, x1). Queries and keys alike, so their products stay.
 */
function swap_halves(heads, count) {
  const half = heads.length / count / 2; // numbers in half a head
  for (let head = 0; head < count; head++) {
    const first = heads.slice(head * 2 * half, (head * 2 + 1) * half);
    heads.copyWithin(head * 2 * half, (head * 2 + 1) * half, (head * 2 + 2) * half);
    heads.set(first, (head * 2 + 1) * half);
  }
}
