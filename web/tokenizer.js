/**
 * Text to token ids and back, exactly as nanogpt_hub/tokenizer.py does it: characters, bytes, byte-level BPE, GPT-2's.
 *
 *     const tokenizer = new Tokenizer(JSON.parse(text));
 *     const ids = tokenizer.encode("Hello\n");
 *     tokenizer.decode(ids) === "Hello\n"
 *
 * Whatever the kind, a tokenizer is its tokenizer.json. Text is plain text: `<|endoftext|>` written in it is thirteen
 * characters, no token.
 */
import { show } from "./families.js";

export const EOT = "<|endoftext|>"; // GPT-2's end of text, put between documents
const MAX_TOKEN_ID = 2 ** 22;
const MAX_CHARACTERS = 100_000; // of a text that is encoded here

// How GPT-2 cuts text into words before it merges bytes. White_Space is what Python's and Rust's \s mean; JavaScript's
// own \s has a byte order mark more and a next-line character less.
const GPT2_PATTERN =
  /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}/gu;

// tokenizer.json spells a byte as a letter: printable ones as themselves, the others as those from U+0100 on.
const printable = (b) => (b > 0x20 && b < 0x7f) || (b > 0xa0 && b < 0xad) || b > 0xad;
const LETTERS = [];
for (let b = 0, others = 0; b < 256; b++) LETTERS.push(String.fromCharCode(printable(b) ? b : 0x100 + others++));
const BYTE_OF_LETTER = new Map(LETTERS.map((letter, b) => [letter, b]));

export class Tokenizer {
  /** From the contents of a tokenizer.json and a tokenizer_config.json. Throws an Error for what it cannot do exactly. */
  constructor(data, config = {}) {
    const { vocab, merges } = read_model(data);
    this.ids = vocab; // Map of token -> id, as spelled in the file
    this.kind = kind_of(data, vocab, merges);
    this.tokens = new Map([...vocab].map(([token, id]) => [id, token]));
    this.vocab_size = Math.max(...this.tokens.keys()) + 1;
    this.ranks = this.kind === "bpe" ? rank_merges(merges, vocab) : new Map();
    this.words = new Map(); // of the BPE, remembered
    const eos = typeof config.eos_token === "object" ? config.eos_token?.content : config.eos_token;
    this.eot_id = vocab.get(eos) ?? vocab.get(EOT) ?? null;
  }

  /** The ids of a text, nothing added. Throws an Error for a character that it does not know, or half of one. */
  encode(text) {
    check_text(text);
    if (this.kind === "char") return [...text].map((character, at) => this.character_id(character, at));
    if (this.kind === "byte") return [...utf8(text)];
    return (text.match(GPT2_PATTERN) ?? []).flatMap((word) => this.encode_word(word));
  }

  /** The text of ids. Bytes that are no UTF-8 read U+FFFD. */
  decode(ids) {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(ids.flatMap((id) => [...this.token_bytes(id)])));
  }

  /** The bytes a token stands for; they may be a part of a character. Empty for an id that no token has. */
  token_bytes(id) {
    const token = this.tokens.get(id) ?? "";
    if (this.kind === "char") return utf8(token);
    const bytes = [...token].map((letter) => BYTE_OF_LETTER.get(letter));
    return bytes.includes(undefined) ? utf8(token) : Uint8Array.from(bytes); // special tokens stand for themselves
  }

  /** A token for display: its text, and bytes that are only a part of a character as `\xe2`. */
  token_str(id) {
    const bytes = this.token_bytes(id);
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    try {
      return decoder.decode(bytes);
    } catch {
      return [...bytes].map((b) => (b < 0x80 ? String.fromCharCode(b) : `\\x${b.toString(16).padStart(2, "0")}`)).join("");
    }
  }

  character_id(character, at) {
    const id = this.ids.get(character);
    if (id !== undefined) return id;
    const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    const known = [...this.ids.keys()].filter((token) => token !== EOT).length;
    throw new Error(`character ${JSON.stringify(character)} (U+${code}) at position ${at} is not among the ${known} that ` +
      "this model knows: leave it out");
  }

  /** Merges the neighbours that were learned first until none is left (arXiv:1508.07909). */
  encode_word(word) {
    const known = this.words.get(word);
    if (known) return known;
    let parts = [...utf8(word)].map((b) => this.ids.get(LETTERS[b]));
    for (;;) {
      let best = null;
      for (let i = 0; i + 1 < parts.length; i++) {
        const merge = this.ranks.get(pair(parts[i], parts[i + 1]));
        if (merge && (!best || merge.rank < best.rank)) best = merge;
      }
      if (!best) break;
      parts = merge_all(parts, best);
    }
    if (this.words.size > 50_000) this.words.clear();
    this.words.set(word, parts);
    return parts;
  }
}

/** Text as the ids come in. What is shown never changes later: joined, it equals `tokenizer.decode` of all ids. */
export class StreamDecoder {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  }

  /** The text that is certain now that this id has come; empty inside of a character. */
  push(id) {
    return this.decoder.decode(this.tokenizer.token_bytes(id), { stream: true });
  }

  /** What is left when no more ids come: U+FFFD for a character that was never completed, else nothing. */
  flush() {
    return this.decoder.decode();
  }
}

// ---- reading a tokenizer.json -----------------------------------------------------------------------------------------

function read_model(data) {
  const model = data.model, added = data.added_tokens ?? [];
  if (model === null || typeof model !== "object" || model.vocab === null || typeof model.vocab !== "object"
    || Array.isArray(model.vocab) || !Array.isArray(added)) throw new Error("tokenizer.json has no vocabulary");
  const vocab = new Map(Object.entries(model.vocab));
  for (const token of added) vocab.set(token?.content, token?.id);
  for (const [token, id] of vocab) {
    if (typeof token !== "string" || !Number.isInteger(id) || id < 0 || id >= MAX_TOKEN_ID) {
      throw new Error(`tokenizer.json gives the token ${show(token)} the id ${show(id)}; ids are 0 to ${MAX_TOKEN_ID - 1}`);
    }
  }
  if (!vocab.size) throw new Error("tokenizer.json has no tokens");
  if (new Set(vocab.values()).size < vocab.size) throw new Error("tokenizer.json gives two tokens the same id");
  return { vocab, merges: model.merges ?? [] };
}

/** "char", "byte" or "bpe", from what a tokenizer.json says; an Error for any other. */
function kind_of(data, vocab, merges) {
  const { model, pre_tokenizer, decoder } = data;
  const other = (what) => new Error(`this tokenizer ${what}; this page has characters, bytes and byte-level BPE`);
  const options = ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"];
  if ((model.type ?? "BPE") !== "BPE" || !Array.isArray(merges)) throw other(`is a ${show(model.type)}`);
  if (data.normalizer) throw other("changes the text (normalizer)");
  const option = options.find((name) => model[name] && !(name === "unk_token" && model[name] === EOT));
  if (option) throw other(`has ${option} ${show(model[option])}`);
  const special = new Set((data.added_tokens ?? []).filter((token) => token.special).map((token) => token.content));
  if (special.size < (data.added_tokens ?? []).length) throw other("has added tokens that are found in plain text");
  const learned = [...vocab.keys()].filter((token) => !special.has(token));
  if (!pre_tokenizer) {
    const characters = !merges.length && decoder?.type === "Fuse" && learned.every((token) => [...token].length === 1);
    if (!characters) throw other("does not cut text into words");
    return "char";
  }
  if (pre_tokenizer.type !== "ByteLevel" || pre_tokenizer.add_prefix_space || pre_tokenizer.use_regex === false
    || decoder?.type !== "ByteLevel") throw other(`cuts text by ${show(pre_tokenizer.type)}`);
  if (!LETTERS.every((letter) => vocab.has(letter))) throw other("does not have all bytes");
  return !merges.length && LETTERS.every((letter, b) => vocab.get(letter) === b) ? "byte" : "bpe";
}

const pair = (a, b) => a * MAX_TOKEN_ID + b;

/** Map of a pair of ids -> { rank, left, right, id } of the token that it becomes. */
function rank_merges(merges, vocab) {
  const ranks = new Map();
  merges.forEach((merge, rank) => {
    const [left, right, ...more] = typeof merge === "string" ? merge.split(" ") : Array.isArray(merge) ? merge : [];
    const ids = [vocab.get(left), vocab.get(right), vocab.get(`${left}${right}`)];
    if (more.length || ids.includes(undefined)) throw new Error(`tokenizer.json has a merge ${show(merge)} of unknown tokens`);
    const key = pair(ids[0], ids[1]);
    if (!ranks.has(key)) ranks.set(key, { rank, left: ids[0], right: ids[1], id: ids[2] });
  });
  return ranks;
}

/** All places, from the left, where the two neighbours of a merge stand. */
function merge_all(parts, { left, right, id }) {
  const merged = [];
  for (let i = 0; i < parts.length; i++) {
    const here = parts[i] === left && parts[i + 1] === right;
    merged.push(here ? id : parts[i]);
    if (here) i++;
  }
  return merged;
}

const utf8 = (text) => new TextEncoder().encode(text);

/** Throws an Error for what is no text, or more than is encoded here. */
function check_text(text) {
  if (typeof text !== "string") throw new Error(`a text must be a string, not ${show(text)}`);
  if (text.length > MAX_CHARACTERS) throw new Error(`the text has ${text.length.toLocaleString("en")} characters; at most ${MAX_CHARACTERS.toLocaleString("en")} are taken`);
  const lone = text.match(/\p{Surrogate}/u);
  if (lone) throw new Error(`position ${lone.index} of the text is half a character; type or paste it again`);
}
