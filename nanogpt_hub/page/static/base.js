// What every view of the page uses. A view is a function (root, data) that fills an element from plain JSON.
//
// Text is only ever set as text (textContent, title), never as HTML: what a model writes cannot become part of the page.
window.nanogpt = (() => {
  const views = {};

  // An element with a class, a text and children.
  const make = (tag, name = "", text = null, ...children) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== null) element.textContent = text;
    element.append(...children);
    return element;
  };
  const svg = (tag, attributes = {}, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const percent = (p) =>
    p >= 0.9995 ? "100 %" : p >= 0.1 ? (100 * p).toFixed(0) + " %" : p >= 0.001 ? (100 * p).toFixed(1) + " %" : p > 1e-5 ? (100 * p).toFixed(3) + " %" : p > 0 ? "< 0.001 %" : "0 %";
  // Spaces and line ends are tokens too, so they get a sign.
  const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
  // Surprise (warm) and attention (cool) lie over the text as transparent colours; page.css has both for light and dark.
  const heat = (strength) => `rgba(var(--heat-rgb), ${(0.7 * Math.max(0, Math.min(1, strength))).toFixed(3)})`;
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  const bar = (value, text, extra = "") => {
    const cell = make("div", "bar " + extra, null, make("i"), make("span", "", text));
    cell.firstChild.style.width = 100 * Math.max(0, Math.min(1, value)) + "%";
    return cell;
  };
  const table = (columns, rows, caption) => {
    const head = make("tr", "", null, ...columns.map((name) => make("th", "", name)));
    const body = rows.map((cells) =>
      make("tr", "", null, ...cells.map((cell) => (cell instanceof Node ? make("td", "", null, cell) : make("td", "", cell)))),
    );
    const made = make("table", "", null, make("tbody", "", null, ...body));
    if (columns.length) made.prepend(make("thead", "", null, head));
    if (caption) made.setAttribute("aria-label", caption);
    return scrollable(made);
  };
  // What is wider than its place scrolls by itself, by keyboard too.
  const scrollable = (child) => {
    const frame = make("div", "scroll", null, child);
    frame.tabIndex = 0;
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", child.getAttribute("aria-label") ?? "table");
    return frame;
  };

  // One line that screen readers read out; nobody sees it.
  let announcer;
  const announce = (text) => {
    if (!announcer) {
      announcer = make("div", "only-heard");
      announcer.setAttribute("role", "status");
      announcer.setAttribute("aria-live", "polite");
      document.body.append(announcer);
    }
    announcer.textContent = text;
  };

  // The view inside the component with an id.
  const viewOf = (id) => document.querySelector(`#${CSS.escape(id)} .view`);

  // In a group of elements, one is in the tab order and the arrow keys move from there.
  const roving = (group, selector, move, columns = 1) =>
    group.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
      if (step === undefined) return;
      const all = [...group.querySelectorAll(selector)], at = all.indexOf(event.target.closest(selector));
      const next = at < 0 ? undefined : all[at + step];
      if (!next) return;
      event.preventDefault();
      all[at].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      move?.(next);
    });

  // A gr.HTML component hands over its element and its value; it is drawn again whenever the value changes.
  window.drawView = (name, element, props, watch, trigger) => {
    const root = element.querySelector(".view");
    root.trigger = trigger;
    const draw = () => views[name](root, props.value || null);
    watch("value", draw);
    draw();
  };

  // Error messages of the page appear as toasts that are not read out by themselves.
  new MutationObserver((changes) => {
    for (const { addedNodes } of changes)
      for (const node of addedNodes) {
        const toast = node.nodeType === 1 && (node.matches?.("[data-testid=toast-body]") ? node : node.querySelector?.("[data-testid=toast-body]"));
        if (toast) announce(toast.textContent);
      }
  }).observe(document.documentElement, { childList: true, subtree: true });

  return { views, make, svg, percent, visible, heat, bytes, bar, table, scrollable, announce, viewOf, roving };
})();
