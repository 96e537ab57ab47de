// How a model learned: loss curves with a cursor, a slider over the kept steps, and the sample of each; play runs through.
//
// The view `growth` below shows where one head looks at each of these steps; it follows the same slider and play button.
//
// {runs: [{name, curves: {train_loss: [[step, value]], val_loss, learning_rate, tokens_per_second, expert_evenness}, floor}],
// steps: [{step, note, text, usable}], live, last, max}
// floor: the entropy of the run's text in nats per token, which no loss falls below in the long run; null where it is not known.
(() => {
  const { views, make, svg, bytes, announce, viewOf, roving, headMap } = nanogpt;
  const NAMES = { train_loss: "training", val_loss: "validation", learning_rate: "learning rate", tokens_per_second: "tokens/s" };
  const floorName = (floor) => `entropy of the text, the best possible: ${floor.toFixed(3)}`;
  const LEFT = 46, BOTTOM = 24, TOP = 10;
  const short = (n) => (n !== 0 && Math.abs(n) < 0.01 ? n.toExponential(1) : n >= 1e6 ? (n / 1e6).toFixed(1) + "M" : n >= 1e3 ? (n / 1e3).toFixed(1) + "k" : String(+n.toFixed(n < 1 ? 3 : 2)));

  // Lines over steps: [{points: [[step, value]], name, style}], as one SVG with axes. `cursor` marks a step, `floors` are
  // values with a line across the chart and a label.
  const chart = (lines, title, H, W, floors) => {
    const points = lines.flatMap((line) => line.points);
    if (!points.length) return null;
    const last = Math.max(...points.map(([step]) => step), 1), values = [...points.map(([, value]) => value), ...floors];
    let least = Math.min(...values), most = Math.max(...values);
    if (most === least) [least, most] = [least - Math.abs(least) * 0.1 - 1e-9, most + Math.abs(most) * 0.1 + 1e-9];
    const x = (step) => LEFT + ((W - LEFT - 12) * step) / last, y = (value) => TOP + ((H - TOP - BOTTOM) * (most - value)) / (most - least);
    const label = (text, at) => { const t = svg("text", { class: "axis", ...at }); t.textContent = text; return t; };
    const drawing = svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img", "aria-label": `${title}: ${lines.map((line) => `${line.name} from ${short(line.points[0][1])} to ${short(line.points.at(-1)[1])}`).concat(floors.map(floorName)).join("; ")}` });
    for (let n = 0; n <= 3; n++) {
      const value = least + ((most - least) * n) / 3;
      drawing.append(svg("line", { class: "rule", x1: LEFT, x2: W - 12, y1: y(value), y2: y(value) }), label(short(value), { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }));
    }
    drawing.append(label("step 0", { x: LEFT, y: H - 6 }), label(last.toLocaleString("en"), { x: W - 12, y: H - 6, "text-anchor": "end" }));
    for (const line of lines) drawing.append(svg("polyline", { class: `line ${line.style}`, points: line.points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }));
    for (const floor of floors) drawing.append(svg("line", { class: "floor", x1: LEFT, x2: W - 12, y1: y(floor), y2: y(floor) }), label(floorName(floor), { x: LEFT + 6, y: y(floor) - 5, class: "axis floor-name" })); // at the left, where the loss is still high
    const cursor = svg("line", { class: "cursor", y1: TOP, y2: H - BOTTOM });
    drawing.append(cursor);
    drawing.moveTo = (step) => { cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); };
    return drawing;
  };

  const linesOf = (runs, keys) =>
    runs.flatMap((run, r) => keys.map((key, k) => ({ points: run.curves[key] ?? [], name: [runs.length > 1 || keys.length === 1 ? run.name : "", keys.length > 1 ? NAMES[key] : ""].filter(Boolean).join(": "), style: `run${r % 3} ${k === 0 && run.curves[keys[1]]?.length ? "thin" : ""}` })))
      .filter((line) => line.points.length);

  // The floors of the runs, each value once.
  const floorsOf = (runs) => [...new Map(runs.filter((run) => Number.isFinite(run.floor)).map((run) => [run.floor.toFixed(3), run.floor])).values()];

  const figure = (lines, title, H = 240, W = 640, floors = []) => {
    const drawing = chart(lines, title, H, W, floors);
    if (!drawing) return null;
    const keys = lines.map((line) => make("span", "key", null, make("i", line.style), line.name));
    const made = make("figure", "", null, make("figcaption", "", null, make("b", "", title), ...keys), drawing);
    made.moveTo = drawing.moveTo;
    return made;
  };

  views.training = (root, data) => {
    clearInterval(root.playing);
    if (!data?.runs.length) return root.replaceChildren(...(data ? [make("p", "hint", "There is no training log beside this model.")] : []));
    const { runs, steps } = data, before = root.shown;
    const atEnd = !before || before.name !== runs[0].name || before.at >= before.count - 1;
    const loss = figure(linesOf(runs, ["train_loss", "val_loss"]), "Loss, nats per token", 240, 640, floorsOf(runs));
    const others = [figure(linesOf(runs, ["learning_rate"]), "Learning rate", 130, 320), figure(linesOf(runs, ["tokens_per_second"]), "Throughput, tokens per second", 130, 320), figure(linesOf(runs, ["expert_evenness"]), "Use of the experts, 1 is even", 130, 320)].filter(Boolean);
    const parts = [];
    if (data.live) parts.push(make("p", "live", `This run is going on: step ${data.last.toLocaleString("en")}${data.max ? " of " + data.max.toLocaleString("en") : ""}. The page follows it.`));
    const stage = make("div", "learning");
    if (loss) stage.append(make("div", "", null, loss, make("div", "learning small", null, ...others)));
    if (steps.length) stage.append(player(root, data, atEnd ? steps.length - 1 : Math.min(before.at, steps.length - 1), [loss, ...others].filter(Boolean)));
    parts.push(stage);
    root.replaceChildren(...parts);
  };

  const player = (root, { runs, steps }, at, figures) => {
    const slider = make("input"), play = make("button", "play", "▶ Play"), use = make("button", "plain", "Generate with this one");
    const note = make("p", "figures-line"), text = make("div", "token-text sample");
    play.type = use.type = "button";
    Object.assign(slider, { type: "range", min: 0, max: steps.length - 1, step: 1, value: at, id: "step" });
    slider.setAttribute("aria-label", "kept step");
    const show = (n) => {
      const { step, note: says, text: sample, usable } = steps[n];
      slider.value = n;
      slider.setAttribute("aria-valuetext", `step ${step}`);
      note.textContent = says;
      text.textContent = sample;
      use.disabled = !usable;
      use.title = usable ? "" : "its weights were not kept; a run that pushes to the Hub can keep each step";
      figures.forEach((figure) => figure.moveTo(step));
      viewOf("growth")?.moveTo?.(step);
      root.shown = { name: runs[0].name, at: n, count: steps.length, step };
    };
    const label = (text) => [play, ...document.querySelectorAll("#growth .play")].forEach((button) => (button.textContent = text));
    const stop = () => { clearInterval(root.playing); root.playing = null; label("▶ Play"); };
    play.addEventListener("click", () => {
      if (root.playing) return stop();
      let n = +slider.value >= steps.length - 1 ? 0 : +slider.value;
      label("❚❚ Pause");
      show(n);
      const pause = Math.max(160, Math.min(900, 9000 / steps.length)); // the whole run takes some nine seconds
      root.playing = setInterval(() => {
        n += 1;
        show(n);
        if (n >= steps.length - 1) { stop(); announce("The run was played to its last step."); }
      }, pause);
    });
    slider.addEventListener("input", () => { stop(); show(+slider.value); });
    use.addEventListener("click", () => root.trigger("select", { step: steps[+slider.value].step }));
    use.id = "use-step";
    text.id = "sample";
    note.id = "step-facts";
    show(at);
    return make("div", "", null, make("div", "controls", null, play, slider), note, text, use);
  };

  // {run, tokens, heads: [L, H], layer, head, changes: [0..1 for each head], steps: [[step, base64 of T*T bytes]]}
  views.growth = (root, data) => {
    root.moveTo = null;
    if (!data) return root.replaceChildren();
    const { layer, head, steps } = data, [L, H] = data.heads;
    const grid = make("div", "atts"), play = make("button", "play", "▶ Play"), at = make("span", "figures-line");
    play.type = "button";
    play.addEventListener("click", () => document.querySelector("#training .play")?.click());
    grid.style.gridTemplateColumns = `repeat(${H}, minmax(0, 26px))`;
    grid.setAttribute("role", "group");
    grid.setAttribute("aria-label", `attention: ${L} layers of ${H} heads`);
    for (let n = 0; n < L * H; n++) {
      const button = make("button", "att"), on = n === layer * H + head;
      button.type = "button";
      button.tabIndex = on ? 0 : -1;
      button.classList.toggle("on", on);
      button.setAttribute("aria-pressed", on);
      button.title = `layer ${Math.floor(n / H) + 1}, head ${(n % H) + 1}`;
      button.setAttribute("aria-label", button.title);
      button.style.setProperty("--look", data.changes[n].toFixed(3));
      button.addEventListener("click", () => root.trigger("input", { layer: Math.floor(n / H), head: n % H, run: data.run }));
      grid.append(button);
    }
    roving(grid, ".att", null, H);
    const shown = headMap(data.tokens, `layer ${layer + 1}, head ${head + 1}`);
    const hint = make("p", "hint", "Each square is a head, each row a layer; the darker ones changed most in this run. Choose one, and play: it begins by looking everywhere, and finds out where it pays to look.");
    root.replaceChildren(make("h3", "", `Where layer ${layer + 1}, head ${head + 1} looks`), make("div", "growth-row", null, make("div", "", null, grid, make("div", "controls", null, play, at), hint), shown));
    const playing = viewOf("training")?.playing;
    play.textContent = playing ? "❚❚ Pause" : "▶ Play";
    root.moveTo = (step) => {
      const [kept, map] = steps.findLast(([other]) => other <= step) ?? steps[0];
      at.textContent = `step ${kept.toLocaleString("en")}`;
      shown.show(bytes(map));
    };
    root.moveTo(viewOf("training")?.shown?.step ?? Infinity);
  };
})();
