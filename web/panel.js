/**
 * What happened when one token was chosen: the bars of what could have come, attention of each layer and head, and the
 * logit lens. All figures come from one pass of the worker; moving a slider reshapes the bars here, at once.
 */
import { el, percent, visible } from "./dom.js";
import { softmax } from "./model.js";
import { likeliest, sampler_stages } from "./sampling.js";

const BARS = 10;
const STAGE_NAMES = {
  repetition_penalty: "the repetition penalty", temperature: "temperature", top_k: "top-k", top_p: "top-p", min_p: "min-p",
};

export class Panel {
  /** callbacks: settings(), names(ids), branch(place, id), light(weights, start), step(by) */
  constructor(root, callbacks) {
    Object.assign(this, { root, callbacks, view: null, head: null });
    this.clear();
  }

  clear(text = "Choose any token of the text, typed or written, to see how the model came to it.") {
    this.view = null;
    this.root.replaceChildren(el("p", { class: "hint" }, text));
    this.callbacks.light();
  }

  /** `view`: { place, name, id, ids, written: the first place after the prompt, inside: what the worker's look gave }. */
  async show(view) {
    this.view = view;
    const { inside, id } = view;
    const probs = softmax(inside.logits);
    const shown = [...likeliest(probs, BARS)];
    if (!shown.includes(id)) shown.push(id);
    this.names = new Map((await this.callbacks.names(shown)).map((name, i) => [shown[i], name]));
    if (this.view !== view) return;
    this.shown = shown;
    this.bars = el("div", { class: "bars" });
    this.root.replaceChildren(this.title(probs[id], likeliest_rank(probs, id)), el("h3", {}, "What could have come"),
      this.bars, this.attention(), this.lens());
    this.update_bars();
    this.light();
  }

  title(prob, rank) {
    const { place, name } = this.view;
    return el("div", { class: "panel-title" },
      el("button", { type: "button", class: "quiet", "aria-label": "The token before", on_click: () => this.callbacks.step(-1) }, "‹"),
      el("div", {}, el("h2", {}, el("code", {}, visible(name))),
        el("p", {}, `Token ${place + 1}: the model gave it ${percent(prob)}, rank ${rank}; surprise ${(-Math.log2(prob)).toFixed(2)} bits.`)),
      el("button", { type: "button", class: "quiet", "aria-label": "The next token", on_click: () => this.callbacks.step(1) }, "›"));
  }

  /** Draws the bars as the samplers now stand. */
  update_bars() {
    if (!this.view || !this.bars) return;
    const { inside, id, ids, place } = this.view;
    let stages;
    try {
      stages = sampler_stages(inside.logits, this.callbacks.settings(), new Set(ids.slice(0, place)));
    } catch {
      return; // a field is being typed in
    }
    const probs = stages.map(([, logits]) => softmax(logits)), last = probs.at(-1);
    const kept = last.reduce((count, prob) => count + (prob > 0), 0);
    const largest = Math.max(...this.shown.map((other) => Math.max(probs[0][other], last[other])));
    const rows = this.shown.map((other) => {
      const cut = stages.find(([, logits]) => logits[other] === -Infinity)?.[0];
      return this.bar(other, probs[0][other], last[other], largest, cut, other === id);
    });
    const after = stages.length > 1 ? `${kept.toLocaleString("en")} of ${last.length.toLocaleString("en")} tokens may be drawn.` : "No sampler is on.";
    this.bars.replaceChildren(
      el("p", { class: "legend" }, el("span", { class: "key model" }), "the model ", el("span", { class: "key drawn" }), "after the settings"),
      el("ol", {}, ...rows), el("p", { class: "hint" }, `${after} Choose another one to go on from it.`));
  }

  bar(id, prob, drawn, largest, cut, came) {
    const name = this.names.get(id);
    const note = cut ? `cut by ${STAGE_NAMES[cut]}` : percent(drawn);
    return el("li", { class: came ? "came" : "" },
      el("button", { type: "button", disabled: came, on_click: () => this.callbacks.branch(this.view.place, id),
        title: came ? "this one came" : `go on from ${visible(name)}`,
        "aria-label": `${visible(name)}: ${percent(prob)} by the model, ${note}${came ? "; this one came" : "; go on from it"}` },
      el("code", {}, visible(name)),
      el("span", { class: "track" }, el("span", { class: "fill model", "--share": prob / largest }),
        el("span", { class: "fill drawn", "--share": drawn / largest })),
      el("span", { class: cut ? "cut" : "" }, cut ? note : `${percent(prob)} → ${percent(drawn)}`)));
  }

  attention() {
    const { inside } = this.view, heads = inside.attention[0].length;
    const choose = (head) => {
      this.head = head;
      this.light();
    };
    const button = (label, head, weights, title) => el("button", { type: "button", class: "head", title, "aria-label": title,
      on_click: () => choose(head), "data-head": JSON.stringify(head) }, weights ? strip(weights) : label);
    const rows = inside.attention.map((layer, l) => el("div", { class: "layer" }, el("span", {}, `${l + 1}`),
      ...layer.map((weights, h) => button("", [l, h], weights, `Layer ${l + 1}, head ${h + 1}`))));
    if (this.head && !inside.attention[this.head[0]]?.[this.head[1]]) this.head = null;
    this.looks = el("p", { class: "hint", "aria-live": "polite" });
    return el("div", {}, el("h3", {}, "Where it looked"),
      el("p", { class: "hint" }, `One strip for each of ${inside.attention.length} layers and ${heads} heads: earlier tokens from left to right. ` +
        "Choose one, and the text lights up where that head looked."),
      el("div", { class: "heads" }, ...rows), el("p", {}, button("all heads together", null, null, "The mean of all heads")), this.looks);
  }

  /** Lights up the text by the chosen head, or the mean of all. */
  light() {
    const { inside, ids } = this.view;
    const maps = this.head ? [inside.attention[this.head[0]][this.head[1]]] : inside.attention.flat();
    const weights = Array.from(maps[0], (_, s) => maps.reduce((sum, map) => sum + map[s], 0) / maps.length);
    this.callbacks.light(weights, inside.start);
    for (const button of this.root.querySelectorAll(".head")) {
      button.setAttribute("aria-pressed", String(button.dataset.head === JSON.stringify(this.head)));
    }
    const top = [...likeliest(weights, 4)];
    const view = this.view;
    this.callbacks.names(top.map((s) => ids[inside.start + s])).then((names) => {
      if (this.view !== view) return;
      const seen = top.map((s, i) => `${visible(names[i])} (token ${inside.start + s + 1}) ${percent(weights[s])}`);
      this.looks.textContent = `${this.head ? `Layer ${this.head[0] + 1}, head ${this.head[1] + 1}` : "All heads together"}: ${seen.join(", ")}.`;
    });
  }

  /** How the answer grew: what each depth would have said, and what it gave the token that came. */
  lens() {
    const { inside, name } = this.view, largest = Math.max(...inside.lens.map(({ came }) => came));
    const rows = inside.lens.map(({ text, prob, came, rank }, depth) => el("tr", {},
      el("th", { scope: "row" }, depth ? `layer ${depth}` : "embedding"),
      el("td", {}, el("code", {}, visible(text)), ` ${percent(prob)}`),
      el("td", {}, el("span", { class: "track" }, el("span", { class: "fill drawn", "--share": came / largest })),
        el("span", {}, `${percent(came)}, rank ${rank}`))));
    return el("div", { class: "lens" }, el("h3", {}, "From embedding to answer"),
      el("p", { class: "hint" }, "If the model stopped after each layer and read its answer off (logit lens)."),
      el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "after"), el("th", { scope: "col" }, "it would say"),
        el("th", { scope: "col" }, `and give ${visible(name)}`))), el("tbody", {}, ...rows)));
  }
}

function likeliest_rank(probs, id) {
  return 1 + probs.reduce((count, prob) => count + (prob > probs[id]), 0);
}

/** Attention over the last tokens as a row of bars on a small canvas. */
function strip(weights) {
  const canvas = el("canvas", { width: 64, height: 20, "aria-hidden": "true" }), context = canvas.getContext("2d");
  const shown = weights.slice(-64), width = 64 / shown.length;
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--attention");
  shown.forEach((weight, s) => context.fillRect(s * width, 20 - 20 * Math.sqrt(weight), Math.max(width - 0.5, 0.5), 20 * Math.sqrt(weight)));
  return canvas;
}
