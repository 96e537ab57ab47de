/** Small helpers for the page. Text goes in as text, never as HTML. */

export const $ = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text. on_* attributes are listeners. */
export function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on_")) element.addEventListener(name.slice(3), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** A probability for people. */
export function percent(p) {
  if (p >= 0.9995) return "100 %";
  if (p >= 0.1) return `${(100 * p).toFixed(1)} %`;
  return p >= 0.0001 ? `${(100 * p).toPrecision(2)} %` : "<0.01 %";
}

/** A count for people: 102 thousand, 10.7 million. */
export function short(n) {
  for (const [limit, word] of [[1e9, "billion"], [1e6, "million"], [1e3, "thousand"]]) {
    if (n >= limit) return `${Number((n / limit).toPrecision(3))} ${word}`;
  }
  return String(n);
}

/** A token so that one sees what it is: spaces, newlines and control characters get signs. */
export function visible(text) {
  if (text === "") return "(nothing)";
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\p{Cc}\p{Cf}]/gu,
    (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
}
