// What the app draws by itself: coloured tokens, bars, attention maps, the logit lens.
//
// Each view is a function (root, data) that fills an element from plain JSON. Text is only ever set as text
// (textContent, title), never as HTML: what a model writes cannot become part of the page.
(() => {
  const views = {};

  // An element with a class, a text and children.
  const make = (tag, name = "", text = null, ...children) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== null) element.textContent = text;
    element.append(...children);
    return element;
  };
  const percent = (p) =>
    p >= 0.9995 ? "100 %" : p >= 0.001 ? (100 * p).toFixed(1) + " %" : p >= 1e-5 ? (100 * p).toFixed(3) + " %" : "< 0.001 %";
  // Spaces and line ends are tokens too, so they get a sign.
  const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
  const shade = (strength) => `rgba(var(--view-rgb), ${(0.75 * Math.max(0, Math.min(1, strength))).toFixed(3)})`;

  const bar = (value, text, extra = "") => {
    const cell = make("div", "bar " + extra, null, make("i"), make("span", "", text));
    cell.firstChild.style.width = 100 * Math.max(0, Math.min(1, value)) + "%";
    return cell;
  };

  const table = (columns, rows) => {
    const head = make("tr", "", null, ...columns.map((name) => make("th", "", name)));
    const body = rows.map((cells) =>
      make("tr", "", null, ...cells.map((cell) => (cell instanceof Node ? make("td", "", null, cell) : make("td", "", cell)))),
    );
    return make("table", "", null, make("thead", "", null, head), make("tbody", "", null, ...body));
  };

  // --- coloured tokens -------------------------------------------------------------------------------------------
  // Streaming only adds tokens, so only new ones are drawn. One token is in the tab order; arrows move from there.

  // 0 where the model was sure, 1 where it was caught out: surprise in bits, as strong as it gets at 8.
  const doubt = (token) => (token.bits ?? -Math.log2(Math.max(token.p, 1e-9))) / 8;

  const summary = (token) =>
    token.bits === undefined ? `${visible(token.name)}  ${percent(token.p)}`
    : token.bits === null ? `${visible(token.name)}: nothing stands before it`
    : `${visible(token.name)}  ${token.bits.toFixed(1)} bits, rank ${token.rank}`;

  const alternatives = (token) => {
    const rows = token.alts.map(([name, p, q]) => [
      make("code", name === token.name ? "chosen" : "", visible(name)),
      bar(p, percent(p)),
      q > 0 ? bar(q, percent(q)) : make("span", "cut", "✂ cut by the samplers"),
    ]);
    return table(["it could have been", "the model's probability", "probability when drawn"], rows);
  };

  const guess = (token) => {
    const [name, p] = token.best;
    const says = token.rank === 1
      ? `it is what the model expected, with ${percent(token.p)}`
      : `the model gave it ${percent(token.p)} (rank ${token.rank}) and expected ${visible(name)} with ${percent(p)}`;
    return make("p", "", says);
  };

  const detail = (panel, token, number) => {
    const title = make("p", "", `Token ${number + 1}: `, make("code", "chosen", visible(token.name)));
    if (token.alts) title.append(` had ${percent(token.p)} for the model, ${percent(token.q)} when it was drawn.`);
    else if (token.bits === null) title.append(" is the first: nothing stands before it.");
    else title.append(` cost ${token.bits.toFixed(2)} bits.`);
    panel.replaceChildren(title, ...(token.alts ? [alternatives(token)] : token.best ? [guess(token)] : []));
  };

  views.tokens = (root, data) => {
    if (!data || !data.tokens) return root.replaceChildren();
    let state = root.state;
    if (!state || state.run !== data.run || data.tokens.length < state.data.tokens.length) {
      state = root.state = { run: data.run, drawn: 0, data, text: make("div", "token-text"), panel: make("div", "token-panel") };
      state.text.setAttribute("role", "group");
      state.text.setAttribute("aria-label", "tokens, coloured by how unsure the model was; arrow keys move");
      state.panel.setAttribute("aria-live", "polite");
      if (data.prompt) state.text.append(make("span", "prompt", data.prompt));
      root.replaceChildren(state.text, state.panel);
      const choose = (element) => {
        state.text.querySelectorAll(".on").forEach((other) => other.classList.remove("on"));
        element.classList.add("on");
        detail(state.panel, state.data.tokens[+element.dataset.n], +element.dataset.n);
      };
      state.text.addEventListener("click", (event) => event.target.dataset.n && choose(event.target));
      state.text.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1, Enter: 0, " ": 0 }[event.key];
        if (step === undefined || !event.target.dataset.n) return;
        event.preventDefault();
        const next = state.text.querySelector(`[data-n="${+event.target.dataset.n + step}"]`);
        if (next) { event.target.tabIndex = -1; next.tabIndex = 0; next.focus(); choose(next); }
      });
    }
    state.data = data;
    for (const token of data.tokens.slice(state.drawn)) {
      const span = make("span", "token", token.t === "" ? "·" : token.t);
      if (token.t.includes("\n")) span.classList.add("line-end"); // gets a sign, or there would be nothing to choose
      span.dataset.n = state.drawn;
      span.tabIndex = state.drawn === 0 ? 0 : -1;
      span.setAttribute("role", "button");
      span.title = summary(token);
      span.style.backgroundColor = token.bits === null ? "" : shade(doubt(token));
      state.text.append(span);
      state.drawn += 1;
    }
    state.text.querySelectorAll(".mark").forEach((element) => element.classList.remove("mark"));
    const marked = state.text.querySelector(`[data-n="${data.mark ?? -1}"]`);
    if (marked) { marked.classList.add("mark"); marked.title += " — the first that differs"; }
    root.classList.toggle("writing", data.done === false);
    if (!state.panel.childNodes.length && data.done !== false && data.tokens.length)
      state.panel.append(make("p", "hint", data.tokens[0].alts ? "Choose a token to see what else it could have been." : "Choose a token to see what the model expected there."));
  };

  // --- numbers ---------------------------------------------------------------------------------------------------

  views.chips = (root, data) =>
    root.replaceChildren(...(data ?? []).map(([what, value]) => make("span", "chip", null, make("small", "", what), make("b", "", value))));

  views.table = (root, data) => root.replaceChildren(...(data ? [table(data.columns, data.rows)] : []));

  // {columns, rows: [{name, cells: [{v: 0..1, text, cut}], note}]}
  views.bars = (root, data) => {
    if (!data) return root.replaceChildren();
    const rows = data.rows.map((row) => [
      row.plain ? row.name : make("code", "", visible(row.name)),
      ...row.cells.map((cell) => (cell.cut ? make("span", "cut", "✂ cut") : bar(cell.v, cell.text))),
      ...(data.notes ? [row.note ?? ""] : []),
    ]);
    root.replaceChildren(table(data.columns, rows));
  };

  // --- attention -------------------------------------------------------------------------------------------------
  // data: {tokens, layers, heads, maps: [[base64 of T*T bytes]]}; row t of a map is where token t looks.

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  const paint = (canvas, map, T) => {
    canvas.width = canvas.height = T;
    const context = canvas.getContext("2d"), image = context.createImageData(T, T);
    const [r, g, b] = getComputedStyle(canvas).getPropertyValue("--view-rgb").split(",").map(Number);
    map.forEach((weight, n) => image.data.set([r, g, b, Math.round(255 * Math.sqrt(weight / 255))], 4 * n));
    context.putImageData(image, 0, 0);
  };

  const enlarge = (place, data, layer, head) => {
    const T = data.tokens.length, map = bytes(data.maps[layer][head]), canvas = make("canvas", "large");
    const strip = make("div", "token-text"), says = make("p", "hint");
    const spans = data.tokens.map((text, n) => {
      const span = make("span", "token", text.replaceAll("\n", "⏎"));
      span.tabIndex = 0;
      const look = () => {
        const row = map.subarray(n * T, n * T + T);
        spans.forEach((other, m) => {
          other.style.backgroundColor = m <= n ? shade(row[m] / 255) : "";
          other.classList.toggle("on", m === n);
          other.classList.toggle("future", m > n);
        });
        const best = row.indexOf(Math.max(...row));
        says.textContent = `${visible(text)} (token ${n + 1}) looks most at ${visible(data.tokens[best])} (token ${best + 1}): ${percent(row[best] / 255)} of its attention.`;
      };
      span.addEventListener("mouseenter", look);
      span.addEventListener("focus", look);
      span.addEventListener("click", look);
      return span;
    });
    strip.append(...spans);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `attention map of layer ${layer + 1}, head ${head + 1}`);
    place.replaceChildren(make("h4", "", `Layer ${layer + 1}, head ${head + 1}`), make("div", "enlarged", null, canvas, make("div", "", null, strip, says)));
    paint(canvas, map, T);
    spans[T - 1].click();
  };

  views.attention = (root, data) => {
    if (!data) return root.replaceChildren();
    const grid = make("div", "heads"), place = make("div", "head");
    grid.style.gridTemplateColumns = `max-content repeat(${data.heads}, minmax(34px, 84px))`;
    root.replaceChildren(make("div", "scroll", null, grid), place);
    data.maps.forEach((row, layer) => {
      grid.append(make("small", "", `layer ${layer + 1}`));
      row.forEach((map, head) => {
        const button = make("button", "", null, make("canvas"));
        button.title = `layer ${layer + 1}, head ${head + 1}`;
        button.setAttribute("aria-label", button.title);
        button.addEventListener("click", () => {
          grid.querySelectorAll(".on").forEach((other) => other.classList.remove("on"));
          button.classList.add("on");
          enlarge(place, data, layer, head);
        });
        grid.append(button);
        paint(button.firstChild, bytes(map), data.tokens.length);
      });
    });
    grid.querySelector("button").click();
  };

  // --- logit lens ------------------------------------------------------------------------------------------------
  // data: {tokens, rows: [{name, cells: [[text, probability, bits, rank of the answer]]}]}

  views.lens = (root, data) => {
    if (!data) return root.replaceChildren();
    const head = make("tr", "", null, make("th", "", "reads →"), ...data.tokens.map((text) => make("th", "", visible(text))));
    const body = data.rows.map((row) =>
      make("tr", "", null, make("th", "", row.name), ...row.cells.map(([text, p, bits, rank]) => {
        const cell = make("td", rank === 1 ? "answer" : "", visible(text));
        cell.style.backgroundColor = shade(p);
        cell.title = `${visible(text)}  ${percent(p)}; undecided by ${bits.toFixed(1)} bits; the final answer is at rank ${rank}`;
        return cell;
      })),
    );
    const lens = make("table", "lens", null, make("thead", "", null, head), make("tbody", "", null, ...body));
    root.replaceChildren(make("div", "scroll", null, lens));
  };

  // --- tokenizer -------------------------------------------------------------------------------------------------

  views.pieces = (root, data) => {
    const pieces = (data?.pieces ?? []).map((piece) => {
      const chip = make("span", "piece c" + (piece.group % 4), null, make("b", "", visible(piece.text)), make("small", "", piece.id));
      chip.title = `id ${piece.id}, bytes ${piece.bytes}`;
      return chip;
    });
    root.replaceChildren(...pieces);
  };

  // A gr.HTML component hands over its element and its value; it is drawn again whenever the value changes.
  window.drawView = (name, element, props, watch) => {
    const root = element.querySelector(".view");
    const draw = () => views[name](root, props.value || null);
    watch("value", draw);
    draw();
  };
})();
