/** Training as one can watch it: the curve, a slider over the kept steps, and what the model wrote at each. */
import { el } from "./dom.js";
import { at_step, curve, CURVES } from "./runs.js";

const WIDTH = 640, HEIGHT = 220, LEFT = 44, BOTTOM = 26, TOP = 10, RIGHT = 10;
const STEP_SECONDS = 0.9; // of a step while playing

export class Training {
  /** callbacks: sample(path) -> Promise of text, revision(step) -> its name on the Hub or "", load(revision) */
  constructor(root, callbacks) {
    Object.assign(this, { root, callbacks, run: null, timer: 0, texts: new Map() });
  }

  /** `run` as runs.js reads it; null hides the section. */
  show(run) {
    clearInterval(this.timer);
    this.run = run;
    this.texts.clear();
    this.root.hidden = !run || !run.rows.length;
    if (this.root.hidden) return this.root.replaceChildren();
    this.steps = run.samples.length ? run.samples.map(([step]) => step) : run.rows.filter((row) => "val_loss" in row).map((row) => row.step);
    const most = Math.max(0, this.steps.length - 1);
    this.slider = el("input", { type: "range", id: "step", min: 0, max: most, value: most, "aria-label": "Kept step", on_input: () => this.update() });
    this.play = el("button", { type: "button", id: "play", on_click: () => this.toggle() }, "▶ Play");
    this.facts = el("p", { id: "step-facts", "aria-live": "polite" });
    this.sample = el("pre", { id: "sample", tabindex: 0, "aria-label": "What the model wrote at this step" });
    this.use = el("button", { type: "button", id: "use-step", on_click: () => this.callbacks.load(this.callbacks.revision(this.step)) }, "Write with the model of this step");
    this.chart = el("div", { class: "chart" });
    return this.root.replaceChildren(el("h2", {}, "How it learned"),
      el("div", { class: "columns" }, el("div", {}, this.chart, el("div", { class: "player" }, this.play, this.slider), this.facts, this.use),
        el("div", {}, this.sample)), ...this.update());
  }

  get step() {
    return this.steps[Number(this.slider.value)] ?? 0;
  }

  update() {
    const { step, run } = this, known = at_step(run.rows, step);
    this.chart.replaceChildren(chart(run.rows, step));
    const facts = [`Step ${step.toLocaleString("en")}`, ...Object.entries(CURVES).filter(([key]) => key in known)
      .map(([key, name]) => `${name} loss ${known[key].toFixed(3)}`)];
    this.facts.textContent = facts.join(" · ");
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
    this.use.disabled = !this.callbacks.revision(step);
    this.use.title = this.use.disabled ? "no revision of this step was pushed" : "";
    this.show_sample(run.samples.find(([other]) => other === step));
    return [];
  }

  async show_sample(sample) {
    if (!sample) return (this.sample.textContent = "No text was kept of this step.");
    const [step, path] = sample;
    if (!this.texts.has(path)) this.texts.set(path, await this.callbacks.sample(path).catch((error) => error.message));
    if (this.step === step) this.sample.textContent = this.texts.get(path);
    return undefined;
  }

  toggle() {
    if (this.timer) return this.stop();
    if (Number(this.slider.value) === this.steps.length - 1) this.slider.value = 0;
    this.play.textContent = "❚❚ Pause";
    this.timer = setInterval(() => {
      if (Number(this.slider.value) === this.steps.length - 1) return this.stop();
      this.slider.value = Number(this.slider.value) + 1;
      return this.update();
    }, STEP_SECONDS * 1000);
    return this.update();
  }

  stop() {
    clearInterval(this.timer);
    this.timer = 0;
    this.play.textContent = "▶ Play";
  }
}

/** The curves as one SVG, with a line at the chosen step. */
function chart(rows, step) {
  const curves = Object.entries(CURVES).map(([key, name]) => [key, name, curve(rows, key)]).filter(([, , points]) => points.length);
  const all = curves.flatMap(([, , points]) => points), last = Math.max(1, rows.at(-1).step);
  const low = Math.min(...all.map(([, value]) => value)), high = Math.max(...all.map(([, value]) => value));
  const x = (value) => LEFT + (value / last) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + ((high - value) / (high - low || 1)) * (HEIGHT - TOP - BOTTOM);
  const svg = el("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Loss over ${last} steps, from ${high.toFixed(2)} to ${low.toFixed(2)}` });
  for (const value of [low, (low + high) / 2, high]) {
    svg.append(el("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      el("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2)));
  }
  svg.append(el("text", { x: LEFT, y: HEIGHT - 6 }, "0"), el("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, `${last.toLocaleString("en")} steps`));
  curves.forEach(([key, name, points], i) => svg.append(
    el("path", { class: `curve ${key}`, d: points.map(([s, value], n) => `${n ? "L" : "M"}${x(s).toFixed(1)} ${y(value).toFixed(1)}`).join("") }),
    el("text", { class: `name ${key}`, x: WIDTH - RIGHT - 4, y: TOP + 12 + 16 * i, "text-anchor": "end" }, `${name} loss`)));
  svg.append(el("line", { class: "now", x1: x(step), x2: x(step), y1: TOP, y2: HEIGHT - BOTTOM }));
  return svg;
}
