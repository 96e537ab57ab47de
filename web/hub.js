/**
 * Models by name: a repo on the Hub at a branch, tag or commit, a folder beside this page, or one that a visitor drops
 * on it. As nanogpt_hub/hub/resolve.py, in a browser.
 *
 *     const folder = await open_repo("user/name", "step-000500", { endpoint, token, progress });
 *     await folder.read("config.json");
 *
 * A folder is { label, repo, revision, sha, sizes: Map of path -> bytes, read(path) -> Promise of Uint8Array }. Only what
 * is asked for is fetched; sizes are checked before, hashes after. Files of public repos are kept in the browser's cache
 * under the hash of their commit; what a token opened is not. Failures are an Error of one sentence.
 */
import { git_sha1, sha256 } from "./hash.js";

export const ENDPOINT = "https://huggingface.co";
const CACHE = "nanogpt_hub models";
const MAX_LISTING = 16 * 2 ** 20; // bytes of what the Hub says of a repo
const NAME = /^[A-Za-z0-9][\w.-]{0,95}\/[A-Za-z0-9][\w.-]{0,95}$/;
// What is looked for in a folder beside this page that has no files.json.
const USUAL_FILES = [
  "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
  "special_tokens_map.json", "generation_config.json", "training/metrics.jsonl", "training/run.json",
];

/** { name, revision } of "user/name", "user/name@revision" or a repo's address on the Hub. */
export function split_name(text, revision = "") {
  const address = text.trim().match(/^https?:\/\/(?:www\.)?(?:huggingface\.co|hf\.co)\/([^/?#]+\/[^/?#]+)(?:\/tree\/([^/?#]+))?/);
  const [name, inline = ""] = address ? [address[1], address[2]] : text.trim().split("@", 2);
  if (!NAME.test(name)) throw new Error(`'${text.slice(0, 120)}' is no name on the Hub: give user/name or user/name@revision`);
  if (inline && revision && decodeURIComponent(inline) !== revision) {
    throw new Error(`'${text.slice(0, 120)}' names one revision and '${revision.slice(0, 80)}' another: give one of them`);
  }
  return { name, revision: revision || decodeURIComponent(inline) || "main" };
}

/** A repo on the Hub. options: endpoint, token, progress(path, received, size), signal. */
export async function open_repo(text, wanted = "", options = {}) {
  const { name, revision } = split_name(text, wanted), endpoint = options.endpoint ?? ENDPOINT;
  const request = { ...options, endpoint, repo: name, revision };
  const info = await ask(`${endpoint}/api/models/${name}/revision/${encodeURIComponent(revision)}?blobs=true`, request);
  const { sha, siblings } = JSON.parse(new TextDecoder().decode(info));
  if (!/^[0-9a-f]{40}$/.test(sha) || !Array.isArray(siblings)) throw new Error(`the Hub's answer for ${name} makes no sense`);
  const files = new Map(siblings.map((file) => [String(file.rfilename), file]));
  const sizes = new Map([...files].map(([path, file]) => [path, file.lfs?.size ?? file.size]));
  if ([...sizes.values()].some((size) => !Number.isSafeInteger(size) || size < 0)) {
    throw new Error(`the Hub does not say how large the files of ${name} are`);
  }
  const read = (path) => {
    const { lfs, blobId } = files.get(path), where = path.split("/").map(encodeURIComponent).join("/");
    const check = { path, size: sizes.get(path), sha256: lfs?.sha256, git_sha1: lfs ? undefined : blobId };
    return fetch_checked(`${endpoint}/${name}/resolve/${sha}/${where}`, check, request);
  };
  return { label: `${name}@${revision}`, repo: name, revision, sha, sizes, read };
}

/** The branches and tags of a repo, newest steps last; empty where they cannot be had. */
export async function revisions(text, options = {}) {
  const { name } = split_name(text), endpoint = options.endpoint ?? ENDPOINT;
  try {
    const refs = JSON.parse(new TextDecoder().decode(await ask(`${endpoint}/api/models/${name}/refs`, { ...options, repo: name })));
    return [...refs.branches, ...refs.tags].map((ref) => String(ref.name));
  } catch {
    return [];
  }
}

/** A model folder that is served beside this page; files.json lists [path, bytes], and without it the usual are tried. */
export async function open_beside(address, options = {}) {
  const base = new URL(address.endsWith("/") ? address : `${address}/`, options.base ?? globalThis.location?.href);
  const sizes = (await listed(base)) ?? (await probed(base));
  if (!sizes.has("config.json")) throw new Error(`there is no model in ${address} beside this page`);
  const read = (path) => fetch_checked(new URL(path, base).href, { path, size: sizes.get(path) }, { ...options, repo: address });
  return { label: address.replace(/\/$/, ""), repo: "", revision: "", sha: "", sizes, read };
}

async function listed(base) {
  const answer = await fetch(new URL("files.json", base)).catch(() => null);
  if (!answer?.ok) return null;
  const files = await answer.json().catch(() => null);
  const valid = Array.isArray(files) && files.every((file) => Array.isArray(file) && typeof file[0] === "string"
    && Number.isSafeInteger(file[1]) && !file[0].split("/").includes(".."));
  if (!valid) throw new Error("files.json beside the model must list [path, bytes]");
  return new Map(files);
}

async function probed(base) {
  const sizes = new Map();
  for (const path of USUAL_FILES) {
    const answer = await fetch(new URL(path, base), { method: "HEAD" }).catch(() => null);
    if (answer?.ok) sizes.set(path, Number(answer.headers.get("content-length") ?? 0));
  }
  return sizes;
}

/** A folder of File objects that a visitor chose or dropped: pairs of path and File. */
export function open_files(entries) {
  const config = entries.map(([path]) => path).filter((path) => /(^|\/)config\.json$/.test(path))
    .sort((a, b) => a.split("/").length - b.split("/").length)[0];
  if (!config) throw new Error("there is no config.json among these files; give a model folder, such as out/NAME/best");
  const folder = config.slice(0, -"config.json".length);
  const files = new Map(entries.filter(([path]) => path.startsWith(folder)).map(([path, file]) => [path.slice(folder.length), file]));
  const sizes = new Map([...files].map(([path, file]) => [path, file.size]));
  const read = async (path) => new Uint8Array(await files.get(path).arrayBuffer());
  return { label: folder.replace(/\/$/, "") || "dropped files", repo: "", revision: "", sha: "", sizes, read };
}

/** Removes the files that this page keeps in the browser's cache. */
export async function forget_models() {
  await globalThis.caches?.delete(CACHE);
}

// ---- fetching ---------------------------------------------------------------------------------------------------------

/** A small answer of the Hub, fresh; where the Hub cannot be reached, what it said the last time. */
async function ask(url, request) {
  const cache = await open_cache(request);
  let answer;
  try {
    answer = await fetch(url, { headers: headers(request), signal: request.signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const kept = await cache?.match(url);
    if (kept) return new Uint8Array(await kept.arrayBuffer());
    throw new Error("the Hub cannot be reached: check the network, or drop a model folder on this page");
  }
  if (!answer.ok) throw new Error(explain(answer, request));
  const bytes = await read_body(answer, { path: "the answer", most: MAX_LISTING }, {});
  await keep(cache, url, bytes);
  return bytes;
}

/** A file, from the cache or the network, of the announced size and hash. */
async function fetch_checked(url, check, request) {
  const cache = check.sha256 || check.git_sha1 ? await open_cache(request) : null; // an address stands for its content
  const kept = await cache?.match(url);
  if (kept) {
    const bytes = new Uint8Array(await kept.arrayBuffer());
    if (await is_intact(bytes, check)) return bytes;
    await cache.delete(url);
  }
  let answer;
  try {
    answer = await fetch(url, { headers: headers(request), signal: request.signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`${check.path} cannot be fetched: check the network`);
  }
  if (!answer.ok) throw new Error(explain(answer, request));
  const bytes = await read_body(answer, { ...check, most: check.size }, request);
  if (bytes.length !== check.size || !(await is_intact(bytes, check))) {
    throw new Error(`${check.path} arrived damaged: its size or hash is not the announced one; try again`);
  }
  await keep(cache, url, bytes);
  return bytes;
}

async function is_intact(bytes, check) {
  if (check.sha256) return (await sha256(bytes)) === check.sha256;
  return !check.git_sha1 || (await git_sha1(bytes)) === check.git_sha1;
}

/** The bytes of an answer, at most `most`; one that sends more is cut off. */
async function read_body(answer, { path, most, size }, { progress }) {
  const reader = answer.body.getReader();
  let bytes = new Uint8Array(size ?? 65536), received = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return bytes.subarray(0, received);
    if (received + value.length > most) {
      await reader.cancel();
      throw new Error(`${path} is longer than the ${most.toLocaleString("en")} bytes that were announced or are allowed`);
    }
    if (received + value.length > bytes.length) {
      const larger = new Uint8Array(Math.min(most, 2 * (received + value.length)));
      larger.set(bytes.subarray(0, received));
      bytes = larger;
    }
    bytes.set(value, received);
    received += value.length;
    progress?.(path, received, most);
  }
}

function headers({ token }) {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

/** The browser's cache, for public files; null where there is none or a token was given. */
async function open_cache({ token }) {
  if (token || !globalThis.caches) return null;
  return caches.open(CACHE).catch(() => null);
}

/** Keeps bytes for the next visit; a full disk is no failure. */
async function keep(cache, url, bytes) {
  await cache?.put(url, new Response(bytes)).catch(() => {});
}

/** One sentence for an HTTP status. */
function explain(answer, { repo, revision, token }) {
  const code = answer.headers.get("x-error-code");
  if (code === "RevisionNotFound") return `${repo} has no branch, tag or commit '${revision}'`;
  if (code === "GatedRepo") return `${repo} is gated: ask for access on its page on the Hub, then give a token here`;
  const hidden = `there is no ${repo} on the Hub that this page may read: check the name, or give a token if it is private`;
  return {
    401: token ? "the Hub does not accept this token: make a new one with read access" : hidden,
    403: `this token may not read ${repo}`,
    404: hidden,
    429: "the Hub asks to slow down (429): wait some minutes",
  }[answer.status] ?? `the Hub answers ${answer.status}; try again later`;
}
