/**
 * The model's own thread: loads a folder, writes, and shows what happens inside, so that the page never stands still.
 *
 * Messages from the page: { type, job, ... }, where `handlers` has the types and what each is given; the answers carry
 * the same `job`. A stop is heard between two tokens, and between the chunks of a long prompt, some 60 times a second.
 */
import { load_model } from "./checkpoint.js";
import { count_parameters } from "./families.js";
import { CachedText, encode_prompt, stream_tokens } from "./generate.js";
import { forget_models, open_beside, open_files, open_repo, revisions } from "./hub.js";
import { look_inside } from "./lens.js";
import { read_run, read_sample } from "./runs.js";

const REPORT_EVERY = 40; // milliseconds between two messages with new tokens
const LISTEN_EVERY = 16; // milliseconds between two looks for messages, which take longer than a token of a small model
let loaded = null; // { folder, model, tokenizer, cached, ... }
let writing = null; // the job of the generation that goes on
let loading = null; // the AbortController of the load that goes on
let turn = Promise.resolve();

/** Runs `work` after what came before it: a look and a token must not use the cache at the same time. */
function in_turn(work) {
  const result = turn.then(work);
  turn = result.catch(() => {});
  return result;
}

/** Lets messages in. A timer would wait for milliseconds; a message to ourselves does not. */
const channel = new MessageChannel();
const waiting = [];
channel.port1.onmessage = () => waiting.shift()();
function breathe() {
  return new Promise((resolve) => {
    waiting.push(resolve);
    channel.port2.postMessage(null);
  });
}

class Stopped extends Error {}

const handlers = {
  async load({ job, source, arithmetic }) {
    writing = null;
    loading?.abort();
    loading = new AbortController();
    const { signal } = loading;
    const progress = (path, received, size) => post_now_and_then({ type: "progress", job, path, received, size });
    const options = { ...source, progress, signal };
    const folder =
      source.kind === "files"
        ? open_files(source.entries)
        : source.kind === "repo"
          ? await open_repo(source.name, source.revision, options)
          : await open_beside(source.address, options);
    const parts = await load_model(folder, arithmetic);
    if (signal.aborted) return null;
    const run = await read_run(folder).catch(() => null);
    await in_turn(() => (loaded = { ...parts, folder, cached: new CachedText(parts.model, parts.caches) }));
    return describe(loaded, run);
  },

  async generate({ job, prompt, settings, forced, stop, alternatives }) {
    writing = job;
    const { cached, tokenizer } = need_model(),
      ids = encode_prompt(tokenizer, prompt);
    let listened = 0;
    const pause = async () => {
      if (performance.now() - listened < LISTEN_EVERY) return;
      await breathe();
      listened = performance.now();
      if (writing !== job) throw new Stopped();
    };
    post({ type: "prompt", job, tokens: ids.map((id) => ({ id, text: tokenizer.token_str(id) })) });
    const options = { forced: new Map(forced), stop, alternatives, pause };
    const stream = stream_tokens(cached, tokenizer, ids, settings, options);
    return write(job, stream, tokenizer);
  },

  stop() {
    writing = null;
    loading?.abort();
  },

  /** How the token at `place` of `ids` came about. */
  async look({ ids, place }) {
    const { cached, tokenizer, model } = need_model();
    const vocab_size = Math.min(model.config.vocab_size, tokenizer.vocab_size);
    const inside = await in_turn(() => look_inside(cached, ids, place, vocab_size));
    return { ...inside, lens: inside.lens.map((depth) => ({ ...depth, text: tokenizer.token_str(depth.id) })) };
  },

  async names({ ids }) {
    return ids.map((id) => need_model().tokenizer.token_str(id));
  },

  async decode({ ids }) {
    return need_model().tokenizer.decode(ids);
  },

  async encode({ text }) {
    return need_model().tokenizer.encode(text).length;
  },

  async sample({ path }) {
    return read_sample(need_model().folder, path);
  },

  async revisions({ name, endpoint, token }) {
    return revisions(name, { endpoint, token });
  },

  forget: forget_models,
};

/** Sends the tokens of a stream as they come, some at a time. */
async function write(job, stream, tokenizer) {
  let records = [],
    sent = performance.now(),
    count = 0;
  const started = sent;
  const send = () => {
    post({ type: "tokens", job, records });
    [records, sent] = [[], performance.now()];
  };
  try {
    for (;;) {
      const { value, done } = await in_turn(() => stream.next());
      if (done) break;
      count++;
      const alternatives = value.alternatives.map(([id, prob]) => ({ id, prob, text: tokenizer.token_str(id) }));
      records.push({ ...value, name: tokenizer.token_str(value.id), alternatives });
      if (count === 1 || performance.now() - sent > REPORT_EVERY) send();
    }
  } catch (error) {
    if (!(error instanceof Stopped)) throw error;
  }
  const stopped = writing !== job;
  if (!stopped) writing = null;
  if (records.length) send();
  return { count, seconds: (performance.now() - started) / 1000, stopped };
}

function need_model() {
  if (!loaded) throw new Error("no model is loaded yet; choose one above");
  return loaded;
}

function describe({ folder, config, tokenizer, defaults, storage }, run) {
  const weights = [...folder.sizes].filter(([path]) => path.endsWith(".safetensors"));
  const bytes = weights.reduce((sum, [, size]) => sum + size, 0);
  return {
    label: folder.label,
    repo: folder.repo,
    revision: folder.revision,
    sha: folder.sha,
    defaults,
    storage,
    run,
    config: { ...config },
    parameters: count_parameters(config),
    bytes,
    tokenizer: { kind: tokenizer.kind, vocab_size: tokenizer.vocab_size },
  };
}

let last_progress = 0;
function post_now_and_then(message) {
  if (performance.now() - last_progress < REPORT_EVERY && message.received < message.size) return;
  last_progress = performance.now();
  post(message);
}

function post(message) {
  globalThis.postMessage(message);
}

globalThis.onmessage = async ({ data }) => {
  try {
    post({ type: "answer", job: data.job, value: await handlers[data.type](data) });
  } catch (error) {
    if (error.name === "AbortError") return post({ type: "answer", job: data.job, value: null });
    post({ type: "failure", job: data.job, message: sentence(error) });
  }
};

/** What a visitor reads of an error. */
function sentence(error) {
  if (error instanceof RangeError)
    return "there is not enough memory in this browser for this model: try a smaller one";
  return String(error.message).slice(0, 500);
}
