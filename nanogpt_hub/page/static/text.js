// The text as tokens: coloured by surprise, or by where the model looks. The page's main view.
//
// {run, from, tokens: [[text, name, p, q]], prompt: [[text, name, bits?]], offset, given, done, stopped, mark, panel, quiet}
// `from` says which token is the first of `tokens`: while a text grows only what is new is sent, with an overlap, and
// all of it at the end. p is the model's probability, q that after the samplers. A token is known by its number n in
// prompt and text together. A quiet view does not tell screen readers when it ended.
(() => {
  const { views, make, percent, visible, viewOf, announce, roving } = nanogpt;

  // 0 where the model was sure, 1 where it was caught out: surprise in bits, as strong as it gets at 8.
  const doubt = (bits) => Math.min(1, bits / 8);

  const start = (root, data) => {
    const text = make("div", "token-text");
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", "the text as tokens; the stronger the colour, the less the model expected it; arrow keys move");
    root.replaceChildren(text);
    root.state = { run: data.run, text, drawn: 0, spans: [] };
    (data.prompt ?? []).forEach(([shown, name, bits], n) => {
      const known = bits !== undefined && bits !== null;
      add(root, n, shown, `${visible(name)}${known ? `  ${bits.toFixed(1)} bits` : "  (prompt)"}`, known ? doubt(bits) : 0, known ? "token" : "token prompt");
    });
    text.addEventListener("click", (event) => event.target.dataset.n && root.choose(+event.target.dataset.n));
    text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") root.light(null);
      if ((event.key !== "Enter" && event.key !== " ") || !event.target.dataset.n) return;
      event.preventDefault();
      root.choose(+event.target.dataset.n);
    });
    roving(text, ".token", (span) => root.choose(+span.dataset.n, 150));
  };

  const add = (root, n, shown, title, strength, name) => {
    const { text, spans } = root.state, span = make("span", name, shown === "" ? "·" : shown);
    if (shown.includes("\n")) span.classList.add("line-end"); // gets a sign, or there would be nothing to choose
    span.dataset.n = n;
    span.tabIndex = n === 0 ? 0 : -1;
    span.setAttribute("role", "button");
    span.setAttribute("aria-pressed", "false");
    span.title = title;
    if (strength > 0.004) span.style.setProperty("--heat", strength.toFixed(3));
    text.append(span);
    spans[n] = span;
  };

  // What the panel and the branches ask of a text.
  const equip = (root) => {
    let waiting;
    root.mark = (n) => {
      const { spans, text } = root.state;
      text.querySelectorAll(".on").forEach((other) => { other.classList.remove("on"); other.setAttribute("aria-pressed", "false"); });
      const span = spans[n];
      if (!span) return;
      text.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
      span.tabIndex = 0;
      span.classList.add("on");
      span.setAttribute("aria-pressed", "true");
    };
    root.choose = (n, delay = 0) => {
      root.mark(n);
      root.light(null);
      clearTimeout(waiting);
      waiting = setTimeout(() => root.trigger("select", { n, run: root.state.run }), delay);
      if (root.panel) viewOf(root.panel)?.wait?.(root.state.spans[n]?.title ?? "");
    };
    // Lights up the tokens from `start` on by weights of 0 to 1; null shows the surprise again.
    root.light = (weights, start = 0) => {
      const { text, spans } = root.state;
      text.classList.toggle("lit", weights !== null);
      if (weights === null) return;
      spans.forEach((span, n) => {
        const weight = weights[n - start];
        span.style.setProperty("--look", weight === undefined ? 0 : Math.sqrt(weight).toFixed(3));
        span.classList.toggle("future", n >= start + weights.length);
      });
    };
    root.name = (n) => root.state.spans[n]?.textContent ?? "";
  };

  views.tokens = (root, data) => {
    if (!data?.tokens) return root.replaceChildren();
    if (!root.choose) equip(root);
    const fresh = root.state?.run !== data.run;
    root.panel = data.panel ?? root.panel;
    if (fresh && data.from > 0) return; // its beginning was missed; all of it comes at the end
    if (fresh) {
      start(root, data);
      if (root.panel) viewOf(root.panel)?.forget?.(data.run); // it showed a token of another text
    }
    const state = root.state;
    if (data.from > state.drawn) return;
    data.tokens.slice(state.drawn - data.from).forEach(([shown, name, p, q]) => {
      const chosen = state.drawn < data.given ? " given" : "";
      const title = `${visible(name)}  ${percent(p)} for the model, ${percent(q)} when drawn`;
      add(root, data.offset + state.drawn, shown, title, doubt(-Math.log2(Math.max(p, 1e-9))), "token" + chosen);
      state.drawn += 1;
    });
    if (data.given) state.spans[data.offset + data.given - 1]?.classList.add("fork");
    state.text.querySelectorAll(".differs").forEach((element) => element.classList.remove("differs"));
    for (const n of data.differs ?? []) state.spans[data.offset + n]?.classList.add("differs");
    const marked = state.spans[data.offset + (data.mark ?? -1)];
    if (marked && data.mark !== null && !marked.classList.contains("mark")) { marked.classList.add("mark"); marked.title += ", the first that differs"; }
    if (root.classList.contains("writing") && data.done && !data.quiet) announce(`${data.stopped ? "Stopped" : "The text ended"} after ${state.drawn - (data.given ?? 0)} new tokens.`);
    root.classList.toggle("writing", data.done === false);
  };

  // The branches of a text: {rows: [{number, depth, token, at, text}], current}
  views.branches = (root, data) => {
    if (!data || data.rows.length < 2) return root.replaceChildren();
    const list = make("div", "branch-list");
    list.setAttribute("role", "group");
    list.setAttribute("aria-label", "branches of the text");
    for (const row of data.rows) {
      const button = make("button", "branch");
      button.type = "button";
      button.style.marginLeft = 18 * row.depth + "px";
      if (row.at === null) button.append(make("b", "", "the first text"));
      else button.append(make("code", "chosen", visible(row.token)), make("small", "", ` at token ${row.at}`));
      button.append(make("span", "", visible(row.text).replaceAll("␣", " ")));
      if (row.number === data.current) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => root.trigger("select", { number: row.number }));
      list.append(button);
    }
    root.replaceChildren(make("p", "hint", "Branches: choose one to go back to it. Each has its own link below."), list);
  };
})();
