/**
 * What a training run left to look at: its curves and the samples of its kept steps, from the training/ folder of a
 * model. As nanogpt_hub/runs.py. Logs may come from anywhere: what is in them is taken only where it is what it should be.
 */
export const CURVES = { train_loss: "training", val_loss: "validation" };
const MAX_LOG = 16 * 2 ** 20; // bytes
const MAX_POINTS = 400; // of a curve that is drawn
const MAX_SAMPLE = 16_000; // bytes of a sample that is shown
const decode = (bytes) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);

/** { rows, samples } of a folder, or null where it has no log. `samples` are [step, path], by step. */
export async function read_run(folder) {
  const root = ["training/", ""].find((place) => folder.sizes.has(`${place}metrics.jsonl`));
  if (root === undefined || folder.sizes.get(`${root}metrics.jsonl`) > MAX_LOG) return null;
  const rows = read_rows(decode(await folder.read(`${root}metrics.jsonl`)));
  const samples = [];
  for (const path of folder.sizes.keys()) {
    const step = path.startsWith(`${root}samples/`) && path.match(/\/step-(\d{1,12})\.txt$/);
    if (step && folder.sizes.get(path) <= MAX_LOG) samples.push([Number(step[1]), path]);
  }
  return { rows, samples: samples.sort((a, b) => a[0] - b[0]) };
}

/** The text that was written at a kept step. */
export async function read_sample(folder, path) {
  return decode((await folder.read(path)).subarray(0, MAX_SAMPLE));
}

/** The rows of a log, by step: numbers only. */
export function read_rows(text) {
  const rows = [];
  for (const line of text.split("\n")) {
    let row = null;
    try {
      row = JSON.parse(line);
    } catch {
      continue; // a line that is not whole
    }
    if (row === null || typeof row !== "object" || !Number.isInteger(row.step)) continue;
    rows.push(Object.fromEntries(Object.entries(row).filter(([, value]) => Number.isFinite(value) && Math.abs(value) < 1e15)));
  }
  return rows.sort((a, b) => a.step - b.step);
}

/** [step, value] of one measure, thinned evenly to what a screen can show; both ends stay. */
export function curve(rows, key) {
  const points = rows.filter((row) => key in row).map((row) => [row.step, row[key]]);
  const every = Math.max(1, Math.ceil(points.length / MAX_POINTS));
  return points.filter((_, i) => i % every === 0 || i === points.length - 1);
}

/** What was measured last, up to a step. */
export function at_step(rows, step) {
  return Object.assign({}, ...rows.filter((row) => row.step <= step));
}
