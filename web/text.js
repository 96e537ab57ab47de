/** The text, token by token: each can be chosen, coloured and lit up. */
import { el, percent, visible } from "./dom.js";

export class TokenView {
  /** `on_choose(place)` is called with the index of a token among all, the prompt's first. */
  constructor(root, on_choose) {
    Object.assign(this, { root, on_choose, spans: [], chosen: -1 });
    root.addEventListener("click", (event) => this.choose(this.spans.indexOf(event.target.closest(".token"))));
    root.addEventListener("keydown", (event) => this.on_key(event));
  }

  clear() {
    this.root.replaceChildren();
    this.spans = [];
    this.chosen = -1;
    this.root.removeAttribute("aria-activedescendant");
  }

  /** Appends records { text, name, prob, typed, finish, forced }; only what is new touches the page. */
  append(records) {
    const spans = records.map((record, i) => make_span(record, this.spans.length + i));
    this.spans.push(...spans);
    this.root.append(...spans);
  }

  choose(place) {
    if (place < 0 || place >= this.spans.length) return;
    this.spans[this.chosen]?.setAttribute("aria-selected", "false");
    this.chosen = place;
    const span = this.spans[place];
    span.setAttribute("aria-selected", "true");
    this.root.setAttribute("aria-activedescendant", span.id);
    this.on_choose(place);
  }

  on_key(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    const place = event.key === "Home" ? 0 : event.key === "End" ? this.spans.length - 1
      : move && Math.max(0, Math.min(this.spans.length - 1, this.chosen + move));
    if (place === undefined || !this.spans.length) return;
    event.preventDefault();
    this.choose(place);
    this.spans[place]?.scrollIntoView({ block: "nearest" });
  }

  /** Lights up tokens from `start` on by weights from 0 to 1; without weights none. */
  light(weights = [], start = 0) {
    const largest = Math.max(...weights, 1e-9);
    this.spans.forEach((span, place) => {
      const weight = weights[place - start] ?? 0;
      span.classList.toggle("lit", weight / largest > 0.02);
      span.style.setProperty("--lit", (weight / largest).toFixed(3));
    });
  }
}

function make_span({ text, name, prob, typed, finish, forced }, place) {
  const shown = typed ? name : text;
  const classes = ["token", typed && "typed", shown === "" && finish !== "eot" && "empty", /\n/.test(shown) && "newline", forced && "forced",
    finish === "eot" && "end"].filter(Boolean).join(" ");
  const label = `${visible(name)}${typed ? ", typed" : `, ${percent(prob)}`}`;
  const attributes = { class: classes, id: `token-${place}`, role: "option", "aria-selected": "false", title: label };
  if (!typed) attributes["--unsure"] = (1 - prob).toFixed(3);
  return el("span", attributes, shown);
}
