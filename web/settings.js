/** The sliders, and links that hold everything a text depends on. */
import { $, el } from "./dom.js";
import { check_settings, SETTINGS } from "./sampling.js";

// What a slider reaches; the field beside it takes all that is allowed.
const SLIDERS = {
  max_new_tokens: [1, 500, 1], temperature: [0, 2, 0.05], top_k: [0, 200, 1], top_p: [0, 1, 0.01], min_p: [0, 1, 0.01],
  repetition_penalty: [1, 2, 0.01],
};

/** Builds the controls; `on_change` is called whenever one of them moved. */
export function build_settings(on_change) {
  for (const [name, [low, high, step]] of Object.entries(SLIDERS)) {
    const { label, help, least, most, whole } = SETTINGS[name];
    const field = el("input", { type: "number", id: name, min: least, max: most, step: whole ? 1 : "any" });
    const slider = el("input", { type: "range", min: low, max: high, step, "aria-label": label });
    const moved = (from, to) => () => {
      to.value = from.value;
      on_change();
    };
    slider.addEventListener("input", moved(slider, field));
    field.addEventListener("input", moved(field, slider));
    field.slider = slider;
    $("sliders").append(el("div", { class: "setting", title: help }, el("label", { for: name }, label), slider, field));
  }
  const seed = el("input", { type: "number", id: "seed", min: 0, max: SETTINGS.seed.most, step: 1, placeholder: "new each time" });
  $("sliders").append(el("div", { class: "setting", title: SETTINGS.seed.help }, el("label", { for: "seed" }, "Seed"),
    el("span", { class: "hint" }, "empty: a new one each time"), seed));
  show_settings({});
}

/** Puts values into the controls; what is missing becomes the usual. */
export function show_settings(values) {
  for (const name of Object.keys(SLIDERS)) {
    $(name).value = values[name] ?? SETTINGS[name].value;
    $(name).slider.value = $(name).value;
  }
  if ("seed" in values) $("seed").value = values.seed;
}

/** The settings as they stand, checked; a seed is drawn where there is none. Throws an Error of one sentence. */
export function current_settings() {
  const given = {};
  for (const name of [...Object.keys(SLIDERS), "seed"]) {
    const { value } = $(name);
    if (value !== "") given[name] = Number(value);
    else if (name !== "seed") throw new Error(`${SETTINGS[name].label} is empty or no number; give one`);
  }
  given.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  return check_settings(given);
}

export function current_stops() {
  return $("stops").value.split("\n").filter((line) => line !== "");
}

/** An address that gives the same text again. The names are those of the app's links. */
export function make_link({ model, prompt, settings, stops, forced }) {
  const query = new URLSearchParams();
  if (model?.repo) query.set("repo", model.repo);
  if (model?.sha) query.set("rev", model.sha);
  query.set("prompt", prompt);
  for (const [name, value] of Object.entries(settings)) {
    if (["seed", "max_new_tokens", "temperature", "top_k"].includes(name) || value !== SETTINGS[name].value) query.set(name, value);
  }
  if (stops.length) query.set("stop", stops.join("\n"));
  if (forced.length) query.set("branch", forced.map(([place, id]) => `${place}:${id}`).join(","));
  return `${location.origin}${location.pathname}?${query}`;
}

/** What a link asks for, and a sentence for each value of it that cannot be used; the others count. */
export function read_link(search) {
  const query = new URLSearchParams(search), asked = { settings: {} }, problems = [];
  for (const name of ["repo", "rev", "prompt", "stop"]) if (query.has(name)) asked[name] = query.get(name);
  for (const name of Object.keys(SETTINGS)) {
    if (!query.has(name)) continue;
    try {
      const text = query.get(name);
      asked.settings[name] = check_settings({ [name]: text.trim() === "" ? NaN : Number(text) })[name];
    } catch {
      const { least, most } = SETTINGS[name];
      problems.push(`${name} is '${query.get(name).slice(0, 40)}' in this link; it must be from ${least} to ${most}`);
    }
  }
  const branch = query.get("branch") ?? "";
  if (branch && !/^\d{1,6}:\d{1,8}(,\d{1,6}:\d{1,8}){0,99}$/.test(branch)) problems.push("branch is malformed in this link");
  else if (branch) asked.forced = branch.split(",").map((pair) => pair.split(":").map(Number));
  return { asked, problems };
}
