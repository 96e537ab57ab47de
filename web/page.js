/**
 * The page: connects its controls to the worker, in which the model runs. site.json says which model it opens with;
 * a link may ask for another.
 */
import { $, el, short, visible } from "./dom.js";
import { Panel } from "./panel.js";
import { build_settings, current_settings, current_stops, make_link, read_link, show_settings } from "./settings.js";
import { TokenView } from "./text.js";
import { Training } from "./training.js";

const FALLBACK_PROMPT = "Once upon a time";

// ---- the worker -------------------------------------------------------------------------------------------------------
// Made from a blob, so that it inherits this page's content policy: it can ask nobody but this server and the Hub.
const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
const worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });
const jobs = new Map(); // job -> { resolve, reject, on_message }
let last_job = 0;

/** Asks the worker; the promise is that of its answer, `on_message` gets what comes before. */
function ask(message, on_message = () => {}) {
  const job = ++last_job;
  const answer = new Promise((resolve, reject) => jobs.set(job, { resolve, reject, on_message }));
  worker.postMessage({ ...message, job });
  return Object.assign(answer, { job });
}

worker.onmessage = ({ data }) => {
  const waiting = jobs.get(data.job);
  if (!waiting) return;
  if (data.type === "answer") waiting.resolve(data.value);
  else if (data.type === "failure") waiting.reject(new Error(data.message));
  else return void waiting.on_message(data);
  jobs.delete(data.job);
};
worker.onerror = () =>
  notice("this browser cannot run the page's worker: use a current Chrome, Edge, Firefox or Safari");

// ---- state ------------------------------------------------------------------------------------------------------------
const state = {
  site: {},
  token: "",
  model: null,
  revisions: [],
  source: null, // where the model came from
  writing: null, // the job of the generation that goes on
  text: null, // { prompt, settings, stops, forced, ids, records, written: place of the first written token }
  branches: [], // [{ forced, label, parent }]: the texts that one came through
};
const view = new TokenView($("text"), choose_token);
const panel = new Panel($("panel"), {
  settings: current_settings,
  names: (ids) => ask({ type: "names", ids }),
  branch: branch_at,
  light: (weights, start) => view.light(weights, start),
  step: (by) => view.choose(view.chosen + by),
});
const training = new Training($("training"), {
  sample: (path) => ask({ type: "sample", path }),
  revision: (step) => state.revisions.find((name) => name === `step-${String(step).padStart(6, "0")}`) ?? "",
  load: (revision) => load({ kind: "repo", name: state.model.repo, revision }),
});

function notice(message) {
  $("notice").hidden = !message;
  $("notice").firstElementChild.textContent = message;
}

function fail(error) {
  notice(error.message);
}

// ---- loading ----------------------------------------------------------------------------------------------------------

/** Loads a model; the one that was there stays if that fails. */
async function load(source, { write: write_after = true } = {}) {
  notice("");
  $("loading").hidden = false;
  $("loading-text").textContent = "looking for the model";
  $("progress").removeAttribute("value");
  try {
    const message = {
      type: "load",
      source: { ...source, endpoint: state.site.endpoint, token: state.token, base: document.baseURI },
      arithmetic: $("arithmetic").value,
    };
    const model = await ask(message, show_progress);
    if (model) {
      state.source = source;
      await show_model(model, write_after);
    }
    return Boolean(model);
  } catch (error) {
    fail(error);
    return false;
  } finally {
    $("loading").hidden = true;
  }
}

function show_progress({ path, received, size }) {
  $("progress").max = size;
  $("progress").value = received;
  $("loading-text").textContent = `${path}: ${short_bytes(received)} of ${short_bytes(size)}`;
}

async function show_model(model, write_after) {
  state.model = model;
  state.revisions = [];
  state.branches = [];
  $("model-name").textContent = model.label;
  document.title = `${model.label.split("/").at(-1)} in your browser`;
  const c = model.config;
  $("facts").textContent = `${short(model.parameters)} parameters`;
  const facts = {
    parameters: model.parameters.toLocaleString("en"),
    "layers × heads × width": `${c.n_layer} × ${c.n_head} × ${c.n_embd}`,
    context: `${c.block_size.toLocaleString("en")} tokens`,
    tokenizer: `${model.tokenizer.kind}, ${model.tokenizer.vocab_size.toLocaleString("en")} tokens`,
    weights: short_bytes(model.bytes),
    arithmetic: { plain: "plain JavaScript", f32: "SIMD, float32", bf16: "SIMD, bfloat16", int8: "SIMD, 8 bits" }[
      model.storage
    ],
    commit: model.sha.slice(0, 7),
  };
  $("all-facts").replaceChildren(
    ...Object.entries(facts)
      .filter(([, value]) => value)
      .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
  );
  show_settings(model.defaults);
  $("top_k").slider.max = Math.min(200, model.tokenizer.vocab_size);
  $("generate").disabled = false;
  clear_text();
  training.show(model.run);
  if (model.repo)
    ask({ type: "revisions", name: model.repo, endpoint: state.site.endpoint, token: state.token }).then((names) => {
      state.revisions = names;
      $("revisions").replaceChildren(...names.map((name) => el("option", { value: name })));
      if (!training.root.hidden) training.update();
    });
  if ($("prompt").value === "") $("prompt").value = await first_prompt(model);
  if (write_after) await write();
}

/** The first words of what the model wrote last in training: a prompt that its tokenizer knows. */
async function first_prompt({ run }) {
  const sample = run?.samples.at(-1);
  const text = sample ? await ask({ type: "sample", path: sample[1] }).catch(() => "") : "";
  const words = text
    .trimStart()
    .slice(0, 24)
    .replace(/\s\S*$/, "");
  for (const prompt of [words, FALLBACK_PROMPT]) {
    if (prompt && (await ask({ type: "encode", text: prompt }).catch(() => 0))) return prompt;
  }
  return "";
}

function short_bytes(n) {
  return n >= 1e6 ? `${(n / 1e6).toFixed(n >= 1e8 ? 0 : 1)} MB` : `${Math.ceil(n / 1e3)} kB`;
}

// ---- writing ----------------------------------------------------------------------------------------------------------

function clear_text() {
  view.clear();
  panel.clear();
  state.text = null;
  $("status").textContent = "";
  $("continue").disabled = true;
}

/** Writes what follows the prompt. `forced`: the tokens at which a branch leaves the drawn text. */
async function write(forced = [], settings = null) {
  if (!state.model) return;
  try {
    settings ??= current_settings();
  } catch (error) {
    fail(error);
    return;
  }
  const text = { prompt: $("prompt").value, settings, stops: current_stops(), forced, ids: [], written: 0 };
  notice("");
  clear_text();
  state.text = text;
  const here = (work) => (message) => state.text === text && work(message);
  const job = ask(
    { type: "generate", prompt: text.prompt, settings, forced, stop: text.stops, alternatives: 0 },
    here((message) => show_tokens(text, message)),
  );
  set_writing(job.job);
  $("status").textContent = "reading the prompt …";
  try {
    const result = await job;
    if (state.text === text) finish(text, result);
  } catch (error) {
    if (state.text === text) fail(error);
    $("status").textContent = "";
  } finally {
    if (state.writing === job.job) set_writing(null);
  }
}

function show_tokens(text, { type, tokens, records }) {
  const forced = new Set(text.forced.map(([place]) => text.written + place));
  const shown =
    type === "prompt"
      ? tokens.map((token) => ({ ...token, name: token.text, typed: true }))
      : records.map((record, i) => ({ ...record, forced: forced.has(text.ids.length + i) }));
  view.append(shown);
  text.ids.push(...shown.map(({ id }) => id));
  if (type === "prompt") text.written = text.ids.length;
  else $("status").textContent = `writing: ${text.ids.length - text.written} tokens`;
  const finish_reason = shown.at(-1)?.finish;
  if (finish_reason) text.finish = finish_reason;
}

function finish(text, { count, seconds, stopped }) {
  const reason = stopped
    ? "stopped"
    : { eot: "the model ended the text", stop: "a stop string came", length: "as many as asked for" }[text.finish];
  $("status").textContent =
    `${count} tokens, ${reason ?? "done"}; ${(count / Math.max(seconds, 1e-3)).toFixed(0)} a second; seed ${text.settings.seed}`;
  $("continue").disabled = text.ids.length === text.written;
  history.replaceState(null, "", make_link({ ...text, model: state.model }));
}

function set_writing(job) {
  state.writing = job;
  $("stop").disabled = job === null;
}

async function continue_text() {
  const { text } = state;
  const end = text.ids.slice(text.written);
  $("prompt").value = text.prompt + (await ask({ type: "decode", ids: end }));
  state.branches = [];
  show_branches();
  await write();
}

// ---- one token --------------------------------------------------------------------------------------------------------

async function choose_token(place) {
  const { text } = state;
  if (!text || place === 0) {
    panel.clear("Nothing stands before the first token, so the model foretold nothing here. Choose a later one.");
    return;
  }
  const ids = text.ids.slice(0, place + 1);
  try {
    const [inside, [name]] = await Promise.all([
      ask({ type: "look", ids, place }),
      ask({ type: "names", ids: [ids[place]] }),
    ]);
    if (state.text === text && view.chosen === place)
      await panel.show({ place, name, id: ids[place], ids, written: text.written, inside });
  } catch (error) {
    fail(error);
  }
}

/** Goes on from another token than the one that came. In the prompt, the prompt ends there. */
async function branch_at(place, id) {
  const { text } = state;
  const [name] = await ask({ type: "names", ids: [id] });
  const at = place - text.written;
  if (at < 0) {
    $("prompt").value = await ask({ type: "decode", ids: text.ids.slice(0, place) });
    state.branches = [];
  }
  if (!state.branches.length) state.branches.push({ forced: at < 0 ? [] : text.forced, label: "first text", depth: 0 });
  const kept = at < 0 ? [] : text.forced.filter(([other]) => other < at);
  const forced = [...kept, [Math.max(0, at), id]];
  const known = state.branches.findIndex((branch) => same_branch(branch.forced, forced));
  if (known < 0) state.branches.push({ forced, label: `${visible(name)} at token ${place + 1}`, depth: forced.length });
  await write(forced, text.settings);
  show_branches();
}

const same_branch = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** The branches as a small tree to walk. */
function show_branches() {
  $("branches").hidden = state.branches.length < 2;
  const current = state.text?.forced ?? [];
  $("branches").replaceChildren(
    el("span", { class: "hint" }, "Branches: "),
    ...state.branches.map(({ forced, label, depth }) =>
      el(
        "button",
        {
          type: "button",
          class: "branch",
          "--depth": depth,
          "aria-current": same_branch(forced, current) ? "true" : null,
          on_click: async () => {
            await write(forced, state.text.settings);
            show_branches();
          },
        },
        `${depth ? "↳ " : ""}${label}`,
      ),
    ),
  );
}

// ---- controls ---------------------------------------------------------------------------------------------------------

function write_anew() {
  state.branches = [];
  show_branches();
  return write();
}

async function load_chosen() {
  const name = $("repo").value.trim(),
    files = [...$("folder").files];
  state.token = $("token").value.trim();
  if (files.length)
    await load({ kind: "files", entries: files.map((file) => [file.webkitRelativePath || file.name, file]) });
  else if (name) await load({ kind: "repo", name, revision: $("revision").value.trim() });
  else if (state.source)
    await load({ ...state.source, revision: $("revision").value.trim() || state.source.revision }); // arithmetic
  else notice("give a name on the Hub, such as user/name, or choose a folder");
  $("folder").value = "";
}

/** All files below what was dropped: pairs of path and File. */
async function dropped_files(items) {
  const files = [];
  const visit = async (entry, path) => {
    if (files.length > 2000) throw new Error("there are more than 2,000 files in this folder; drop a model folder");
    if (entry.isFile)
      return files.push([path + entry.name, await new Promise((resolve, reject) => entry.file(resolve, reject))]);
    const reader = entry.createReader();
    for (;;) {
      const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!entries.length) return undefined;
      for (const inner of entries) await visit(inner, `${path}${entry.name}/`);
    }
  };
  for (const entry of [...items].map((item) => item.webkitGetAsEntry()).filter(Boolean)) await visit(entry, "");
  return files;
}

async function load_dropped(event) {
  event.preventDefault();
  try {
    await load({ kind: "files", entries: await dropped_files(event.dataTransfer.items) });
  } catch (error) {
    fail(error);
  }
}

async function copy_link() {
  if (!state.text) return;
  const link = make_link({ ...state.text, model: state.model });
  const copied = await navigator.clipboard?.writeText(link).then(
    () => true,
    () => false,
  );
  $("link-note").replaceChildren(copied ? "copied" : el("a", { href: link }, "the link, to copy by hand"));
}

function connect() {
  build_settings(() => panel.update_bars());
  $("generate").addEventListener("click", write_anew);
  $("stop").addEventListener("click", () => ask({ type: "stop" }));
  $("continue").addEventListener("click", continue_text);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("generate").disabled) write_anew();
  });
  $("choose").addEventListener("click", () => $("chooser").showModal());
  $("chooser").addEventListener("close", () => $("chooser").returnValue === "load" && load_chosen());
  $("forget").addEventListener("click", async () => {
    await ask({ type: "forget" });
    $("forget").textContent = "Removed";
  });
  $("notice").lastElementChild.addEventListener("click", () => notice(""));
  $("colours").addEventListener("change", () => $("text").classList.toggle("plain", !$("colours").checked));
  $("copy-link").addEventListener("click", copy_link);
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", load_dropped);
}

/** Opens with the model of the link or of site.json. */
async function start() {
  connect();
  state.site = await fetch("site.json")
    .then((answer) => answer.json())
    .catch(() => ({}));
  const { asked, problems } = read_link(location.search);
  if ("prompt" in asked) $("prompt").value = asked.prompt;
  if (asked.stop) $("stops").value = asked.stop;
  const own = state.site.model ?? "";
  const beside = { kind: "beside", address: own };
  const source = asked.repo
    ? { kind: "repo", name: asked.repo, revision: asked.rev ?? "" }
    : own.startsWith("./")
      ? beside
      : own && { kind: "repo", name: own, revision: asked.rev ?? state.site.revision };
  if (!source) return notice("choose a model by its name on the Hub, or drop a model folder on this page");
  if (await load(source, { write: false })) {
    show_settings({ ...state.model.defaults, ...asked.settings });
    await write(asked.forced ?? []);
  }
  if (problems.length) notice(problems.join("; "));
  return undefined;
}

start();
