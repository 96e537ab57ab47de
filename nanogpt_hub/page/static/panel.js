// The panel beside a text: one token from inside. Next-token bars that follow the sliders at once, the heads that look
// back into the text, and the logit lens as a path from the embedding to the answer.
//
// data: {n, name, id, start, heads: [L, H], attention, depths: [{top, p, rank, bits}], logits, largest, shown: [[id,
// name, q]], seen, samplers, run, text, branches}, or {n, name, first: true} for a token before which nothing stands.
(() => {
  const { views, make, svg, percent, visible, bytes, viewOf, roving, samplers } = nanogpt;
  const BARS = 12; // shown of the likeliest tokens
  const panels = new Set();
  let sliders = null; // [[name, neutral, value]] as the page has them now, once one was moved

  views.panel = (root, data) => {
    panels.add(root);
    root.wait = (text) => {
      root.classList.add("waiting");
      const title = root.querySelector(".panel-title");
      if (title) title.replaceChildren(make("span", "muted", `reading … ${text}`));
    };
    root.classList.remove("waiting");
    const hint = () => root.replaceChildren(make("p", "hint", "Choose any token of the text to see how the model came to it."));
    root.forget = (run) => run !== data?.run && hint();
    if (!data) return hint();
    const text = viewOf(data.text);
    text?.state && text.mark(data.n);
    if (data.first) {
      const title = make("h2", "panel-title", "", make("code", "chosen", visible(data.name)), " is the first token");
      return root.replaceChildren(title, make("p", "hint", "Nothing stands before it, so the model did not predict it. Choose a later one."));
    }
    const parts = [heading(data), bars(root, data), attention(root, data, text), path(data)];
    root.replaceChildren(...parts);
  };

  // From one position's data: what the samplers are applied to.
  const unpack = (data) => {
    const logits = samplers.halves(bytes(data.logits)).map((logit) => logit + data.largest);
    return { logits, probs: samplers.softmax(logits), seen: new Set(data.seen) };
  };

  const heading = (data) => {
    const title = make("h2", "panel-title");
    if (data.id === null) {
      title.append("What comes next?");
      return make("div", "", null, title);
    }
    const row = data.depths[data.depths.length - 1];
    title.append(make("code", "chosen", visible(data.name)), ` token ${data.n + 1}`);
    const says = `${(-Math.log2(Math.max(row.p, 1e-30))).toFixed(1)} bits of surprise: the model gave it ${percent(row.p)}, ` + (row.rank === 1 ? "more than any other." : `and ${row.rank - 1} other${row.rank > 2 ? "s" : ""} more.`);
    return make("div", "", null, title, make("p", "", says));
  };

  // ---- the next token, and what the samplers make of it ----

  const bars = (root, data) => {
    const { logits, probs, seen } = unpack(data);
    const shown = data.shown.slice(0, BARS);
    const own = data.shown.find(([id]) => id === data.id);
    if (own && !shown.includes(own)) shown.push(own);
    const section = make("section", "", null, make("h3", "", "What could come here"));
    const list = make("div", "choices"), note = make("p", "hint");
    list.setAttribute("role", "group");
    list.setAttribute("aria-label", "tokens that could come here");
    const rows = shown.map(([id, name], place) => {
      const row = make(data.branches ? "button" : "div", "choice", null, make("code", id === data.id ? "chosen" : "", visible(name)), make("span", "track", null, make("i", "model"), make("i", "drawn")), make("span", "figure"));
      if (data.branches) {
        row.type = "button";
        row.tabIndex = place ? -1 : 0;
        row.addEventListener("click", () => root.trigger("select", { n: data.n, id, run: data.run }));
      }
      list.append(row);
      return { id, name, row };
    });
    if (data.branches) roving(list, ".choice");
    let timer;
    root.reshape = () => {
      const settings = sliders ?? data.samplers;
      let after = samplers.distribution(logits, settings, seen);
      if (!after) { // a sampler that only the server knows
        after = new Float64Array(probs.length);
        for (const [id, , q] of data.shown) after[id] = q;
        if (sliders && JSON.stringify(sliders) !== JSON.stringify(data.samplers)) {
          clearTimeout(timer);
          timer = setTimeout(() => root.trigger("input", { n: data.n, run: data.run }), 300);
        }
      }
      const most = Math.max(...rows.map(({ id }) => Math.max(probs[id], after[id])), 1e-9);
      for (const { id, name, row } of rows) {
        const [, track, figure] = row.children, cut = after[id] === 0;
        track.children[0].style.width = (100 * probs[id]) / most + "%";
        track.children[1].style.width = (100 * after[id]) / most + "%";
        row.classList.toggle("cut", cut);
        figure.textContent = cut ? "✂ cut" : percent(after[id]);
        const what = `${visible(name)}: ${percent(probs[id])} for the model, ${cut ? "cut by the samplers" : percent(after[id]) + " when drawn"}`;
        row.title = data.branches ? `${what}. Go on with this one.` : what;
        if (data.branches) row.setAttribute("aria-label", row.title);
      }
      const kept = after.reduce((n, p) => n + (p > 0), 0);
      note.textContent = `Filled: drawn with the settings above, from ${kept.toLocaleString("en")} of ${after.length.toLocaleString("en")} tokens. Outlined: the model alone. ${data.branches ? "Choose one, and the text goes on from it." : ""}`;
    };
    root.reshape();
    section.append(list, note);
    return section;
  };

  // The page's sliders: [[name, neutral, value]]. Every panel follows.
  nanogpt.setSamplers = (settings) => {
    sliders = settings;
    for (const root of panels) if (root.isConnected) root.reshape?.();
  };

  // ---- where it looks ----

  const attention = (root, data, text) => {
    const [L, H] = data.heads, weights = bytes(data.attention), T = weights.length / (L * H);
    const row = (n) => Array.from(weights.subarray(n * T, (n + 1) * T), (weight) => weight / 255);
    const mean = () => {
      const sum = new Float64Array(T);
      weights.forEach((weight, n) => (sum[n % T] += weight / 255 / (L * H)));
      return Array.from(sum);
    };
    const section = make("section", "", null, make("h3", "", "Where it looks"));
    const grid = make("div", "atts"), note = make("p", "hint steady", "Each square is a head, each row a layer; darker looks at fewer tokens. Point at one, and the tokens it looks at light up in the text.");
    grid.style.gridTemplateColumns = `repeat(${H}, minmax(0, 26px))`;
    grid.setAttribute("role", "group");
    grid.setAttribute("aria-label", `attention: ${L} layers of ${H} heads`);
    const look = (weights, name) => {
      const best = weights.indexOf(Math.max(...weights)), back = data.n - 1 - (data.start + best);
      const where = back === 0 ? "the token right before" : `${back + 1} tokens back`;
      note.textContent = `${name} looks most at ${visible(text?.name(data.start + best) ?? "")} (${where}): ${percent(weights[best])} of its attention.`;
      text?.light(weights, data.start);
    };
    for (let n = 0; n < L * H; n++) {
      const button = make("button", "att"), weights = row(n), name = `Layer ${Math.floor(n / H) + 1}, head ${(n % H) + 1}`;
      button.type = "button";
      button.tabIndex = n ? -1 : 0;
      button.style.setProperty("--look", Math.max(...weights).toFixed(3));
      button.setAttribute("aria-label", name);
      button.title = name;
      const chosen = () => {
        grid.querySelectorAll(".on").forEach((other) => other.classList.remove("on"));
        button.classList.add("on");
        look(weights, name);
      };
      for (const event of ["mouseenter", "focus", "click"]) button.addEventListener(event, chosen);
      grid.append(button);
    }
    roving(grid, ".att", null, H);
    const all = make("button", "plain", "all heads together"), none = make("button", "plain", "show surprise again");
    all.type = none.type = "button";
    all.addEventListener("click", () => look(mean(), "The mean of all heads"));
    none.addEventListener("click", () => { text?.light(null); grid.querySelectorAll(".on").forEach((other) => other.classList.remove("on")); });
    section.append(grid, make("div", "small-buttons", null, all, none), note);
    section.addEventListener("keydown", (event) => event.key === "Escape" && none.click());
    return section;
  };

  // ---- from the embedding to the answer ----

  const path = (data) => {
    const section = make("section", "", null, make("h3", "", "From the embedding to the answer"));
    const answer = data.id === null ? data.depths[data.depths.length - 1].top[0][0] : data.name;
    const grid = make("div", "path"), rows = data.depths.length, line = svg("svg", { viewBox: `0 0 100 ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const points = data.depths.map((depth, n) => `${(100 * depth.p).toFixed(2)},${n + 0.5}`).join(" ");
    line.append(svg("polyline", { points, fill: "none", "vector-effect": "non-scaling-stroke" }));
    data.depths.forEach((depth, n) => {
      const name = n === 0 ? "embedding" : n === rows - 1 ? `layer ${n}, answer` : `layer ${n}`;
      const [top, p] = depth.top[0], cell = make("code", top === answer ? "chosen" : "", visible(top));
      const says = `${name}: likeliest ${depth.top.map(([token, p]) => `${visible(token)} ${percent(p)}`).join(", ")}; ${visible(answer)} has ${percent(depth.p)}, rank ${depth.rank}`;
      const shape = make("span", "level", null, make("i"));
      shape.firstChild.style.left = 100 * depth.p + "%";
      const row = make("div", "path-row", null, make("small", "", name), cell, shape);
      row.title = says;
      row.setAttribute("role", "img");
      row.setAttribute("aria-label", says);
      grid.append(row);
    });
    const frame = make("div", "path-line", null, line);
    grid.append(frame);
    section.append(grid, make("p", "hint", `After each layer the model could already answer: its likeliest token there, and on the line how much it gives to ${visible(answer)}, from 0 on the left to 100 % on the right.`));
    return section;
  };
})();
