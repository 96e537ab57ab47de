// Tables, bars, attention maps, the logit lens and the tokenizer's pieces.
(() => {
  const { views, make, percent, visible, heat, bytes, bar, table, scrollable, roving } = nanogpt;

  // --- numbers ---------------------------------------------------------------------------------------------------

  // The facts of the model in use: the first three in a line, all of them when it is opened.
  views.chips = (root, data) => {
    if (!data) return root.replaceChildren();
    const line = make("summary", "", null, ...data.slice(0, 3).map(([what, value]) => make("span", "fact " + what, value)), make("span", "more", "details"));
    const chips = data.map(([what, value]) => make("span", "chip", null, make("small", "", what), make("b", "", value)));
    root.replaceChildren(make("details", "", null, line, make("div", "chips-all", null, ...chips)));
  };

  views.table = (root, data) => root.replaceChildren(...(data ? [table(data.columns, data.rows, data.caption)] : []));

  // {columns, rows: [{name, cells: [{v: 0..1, text, cut}], note}]}
  views.bars = (root, data) => {
    if (!data) return root.replaceChildren();
    const rows = data.rows.map((row) => [
      row.plain ? row.name : make("code", "", visible(row.name)),
      ...row.cells.map((cell) => (cell.cut ? make("span", "cut", "✂ cut") : bar(cell.v, cell.text))),
      ...(data.notes ? [row.note ?? ""] : []),
    ]);
    root.replaceChildren(table(data.columns, rows, data.columns[0]));
  };

  // --- attention -------------------------------------------------------------------------------------------------
  // data: {tokens, layers, heads, maps: [[base64 of T*T bytes]]}; row t of a map is where token t looks.

  const paint = (canvas, map, T) => {
    canvas.width = canvas.height = T;
    const context = canvas.getContext("2d"), image = context.createImageData(T, T);
    const [r, g, b] = getComputedStyle(canvas).getPropertyValue("--look-rgb").split(",").map(Number);
    map.forEach((weight, n) => image.data.set([r, g, b, Math.round(255 * Math.sqrt(weight / 255))], 4 * n));
    context.putImageData(image, 0, 0);
  };

  // One head over a text, as a map and in the text itself: choose a token to see where it looks. `show` sets the map.
  const headMap = (tokens, name) => {
    const T = tokens.length, canvas = make("canvas", "large"), strip = make("div", "token-text"), says = make("p", "hint");
    let map = null, chosen = T - 1;
    const look = (n) => {
      chosen = n;
      const row = map.subarray(n * T, n * T + T), best = row.indexOf(Math.max(...row));
      spans.forEach((other, m) => {
        other.style.backgroundColor = m <= n ? `rgba(var(--look-rgb), ${(0.7 * Math.sqrt(row[m] / 255)).toFixed(3)})` : "";
        other.classList.toggle("on", m === n);
        other.classList.toggle("future", m > n);
      });
      says.textContent = `${visible(tokens[n])} (token ${n + 1}) looks most at ${visible(tokens[best])} (token ${best + 1}): ${percent(row[best] / 255)} of its attention.`;
    };
    const spans = tokens.map((text, n) => {
      const span = make("span", "token", text.replaceAll("\n", "⏎"));
      span.tabIndex = n === T - 1 ? 0 : -1;
      span.setAttribute("role", "button");
      span.setAttribute("aria-label", `${visible(text)}, token ${n + 1}`);
      for (const event of ["mouseenter", "focus", "click"]) span.addEventListener(event, () => look(n));
      return span;
    });
    strip.append(...spans);
    strip.setAttribute("role", "group");
    strip.setAttribute("aria-label", "the text as tokens; arrow keys move, and each shows where it looks");
    roving(strip, ".token");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `attention map of ${name}`);
    const made = make("div", "enlarged", null, canvas, make("div", "", null, strip, says));
    made.show = (weights) => { map = weights; paint(canvas, map, T); look(chosen); };
    return made;
  };
  nanogpt.headMap = headMap;

  const enlarge = (place, data, layer, head) => {
    const shown = headMap(data.tokens, `layer ${layer + 1}, head ${head + 1}`);
    place.replaceChildren(make("h4", "", `Layer ${layer + 1}, head ${head + 1}`), shown);
    shown.show(bytes(data.maps[layer][head]));
  };

  views.attention = (root, data) => {
    if (!data) return root.replaceChildren();
    const grid = make("div", "maps"), place = make("div", "head");
    grid.style.gridTemplateColumns = `max-content repeat(${data.heads}, minmax(34px, 84px))`;
    root.replaceChildren(scrollable(grid), place);
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
        cell.style.backgroundColor = heat(p);
        cell.title = `${visible(text)}  ${percent(p)}; undecided by ${bits.toFixed(1)} bits; the final answer is at rank ${rank}`;
        return cell;
      })),
    );
    const lens = make("table", "lens", null, make("thead", "", null, head), make("tbody", "", null, ...body));
    root.replaceChildren(scrollable(lens));
  };

  // --- experts ---------------------------------------------------------------------------------------------------
  // data: {tokens, experts: how many there are in a layer, rows: [{name, cells: [[[expert, share], ...]]}]}; none of a
  // dense model

  views.experts = (root, data) => {
    if (!data) return root.replaceChildren(make("p", "hint", "This model has one feed-forward in each layer, which all tokens go through."));
    const hue = (expert) => `hsl(${Math.round((360 * expert) / data.experts)} 65% 50% / 0.35)`;
    const head = make("tr", "", null, make("th", "", "token →"), ...data.tokens.map((text) => make("th", "", visible(text))));
    const body = data.rows.map((row) =>
      make("tr", "", null, make("th", "", row.name), ...row.cells.map((choices, n) => {
        const cell = make("td", "", choices.map(([expert]) => expert).join(" "));
        if (choices.length) cell.style.backgroundColor = hue(choices[0][0]);
        cell.title = `${visible(data.tokens[n])}, ${row.name}: ${choices.map(([expert, share]) => `${percent(share)} expert ${expert}`).join(", ")}`;
        return cell;
      })),
    );
    root.replaceChildren(scrollable(make("table", "lens", null, make("thead", "", null, head), make("tbody", "", null, ...body))));
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
})();
