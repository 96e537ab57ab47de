/**
 * What happens inside a GPT when it chooses a token: next-token distribution, attention, logit lens. As
 * nanogpt_hub/lens.py, for one place of a text.
 *
 *     const inside = await look_inside(cached, tokens, place, vocab_size);   // how tokens[place] came about
 */
import { attention_probs, Context, softmax } from "./model.js";
import { usable_logits } from "./sampling.js";

/**
 * The pass that foretold the token at `place` (at least 1), from the tokens before it:
 * { start: index of the first token that the model saw, logits (V), attention: for each layer and head the weights (S)
 *   over the S tokens from `start` on, lens: what each depth would have answered }.
 */
export async function look_inside(cached, tokens, place, vocab_size) {
  const { model } = cached, before = tokens.slice(0, place);
  const cache = await cached.prepare(before);
  const context = new Context(model.config, 1, cache);
  const stream = [model.embed(before.slice(-1), context)], attention = [];
  for (const block of model.h) {
    const x = stream.at(-1);
    const next = block.forward(x, context); // keys first: it puts this token's into the cache
    attention.push(attention_weights(block.attn, block.ln_1.forward(x), context));
    stream.push(next);
  }
  cache.length += 1;
  cache.ids.push(before.at(-1));
  const start = before.length - cache.length;
  const depths = read_stream(model, stream, vocab_size); // L + 1 times (V)
  return { start, logits: depths.at(-1), attention, lens: logit_lens(depths, tokens[place]) };
}

/** For each head the weights (S) with which `attn` averages values for the one token x (1, C); its key is cached. */
export function attention_weights(attn, x, context) {
  const { n_head: H, kv_heads: G, head_dim: D } = attn.config;
  const qkv = attn.queries_keys_values(x, context);
  return Array.from({ length: H }, (_, h) => {
    const [keys] = context.kv_cache.head(attn.layer, Math.floor((h * G) / H));
    return attention_probs(qkv.subarray(h * D, (h + 1) * D), keys, context.kv_cache.length + 1);
  });
}

/** Logits (V) that the residual stream (C) would give at each depth, if it were the last. */
function read_stream(model, stream, vocab_size) {
  const C = model.config.n_embd, V = model.config.vocab_size;
  const rows = new Float32Array(stream.length * C);
  stream.forEach((x, depth) => rows.set(model.ln_f.forward(x), depth * C));
  const logits = model.head(rows);
  return stream.map((_, depth) => usable_logits(logits.subarray(depth * V, (depth + 1) * V), vocab_size));
}

/**
 * At each depth (0 is before the first block): the likeliest token and its probability, the probability and the rank of
 * the token that came, and how undecided it still is, in bits (nostalgebraist 2020, logit lens).
 */
export function logit_lens(depths, came) {
  return depths.map((logits) => {
    const probs = softmax(logits);
    let id = 0, rank = 1, entropy = 0;
    probs.forEach((prob, other) => {
      if (prob > probs[id]) id = other;
      if (prob > probs[came]) rank++;
      if (prob > 0) entropy -= prob * Math.log2(prob);
    });
    return { id, prob: probs[id], came: probs[came], rank, entropy };
  });
}
