// A first minute with the page: five steps over what is there. Offered once, skippable, remembered in the browser.
(() => {
  const { make, announce } = nanogpt;
  const KEY = "nanogpt-hub-tour";
  const openTab = (name) => [...document.querySelectorAll('[role="tab"]')].find((tab) => tab.textContent.trim() === name)?.click();
  const STEPS = [
    ["Tokens", "#output", "Generate", "A model reads and writes tokens: letters here, or pieces of words in larger models. Each was drawn from what the model expected. Strong colour: it did not expect it."],
    ["Probabilities", "#panel .choices", "Generate", "Choose any token, and this shows what could have come in its place. The model gives every token of its vocabulary a probability; that is all it ever does."],
    ["Choosing", "#temperature", "Generate", "Move the temperature and watch the bars: low makes the likeliest win, high gives the others a chance. Choose another bar, and the text goes on from there, as a branch."],
    ["Attention", "#panel .atts", "Generate", "To expect something, the model looks back. Each square is one head; point at it, and the tokens it looks at light up in the text."],
    ["Training", "#training .play", "Training", "It was not born with this. Press Play to see the same model learn, from gibberish to language, while its loss falls."],
  ];
  const remembered = () => { try { return localStorage.getItem(KEY); } catch { return "blocked"; } };
  const remember = () => { try { localStorage.setItem(KEY, "seen"); } catch { /* then it is offered again */ } };

  let card, here, back;
  const close = () => {
    card?.remove();
    here?.classList.remove("tour-here");
    card = here = null;
    remember();
    back?.focus?.();
  };
  const button = (text, name, act) => {
    const made = make("button", name, text);
    made.type = "button";
    made.addEventListener("click", act);
    return made;
  };
  const open = (...children) => {
    card?.remove();
    card = make("div", "tour", null, ...children);
    card.setAttribute("role", "dialog");
    card.setAttribute("aria-label", "a tour of the page");
    card.addEventListener("keydown", (event) => event.key === "Escape" && close());
    document.querySelector(".gradio-container").append(card);
    return card;
  };

  const show = (n, tries = 40) => {
    const [title, selector, tab, text] = STEPS[n];
    const anchor = document.querySelector(selector);
    if (!anchor?.getClientRects().length) { // its tab has to be drawn first
      if (tries === 40) openTab(tab);
      if (tries > 0) return setTimeout(() => show(n, tries - 1), 150);
    }
    here?.classList.remove("tour-here");
    here = anchor;
    here?.classList.add("tour-here");
    here?.scrollIntoView({ block: "center", behavior: "smooth" });
    const last = n === STEPS.length - 1;
    const next = button(last ? "Done" : "Next", "play", () => (last ? close() : show(n + 1)));
    open(
      make("p", "tour-count", `${n + 1} of ${STEPS.length}`), make("h2", "", title), make("p", "", text),
      make("div", "tour-buttons", null, next, ...(n ? [button("Back", "plain", () => show(n - 1))] : []), button("Skip", "plain", close)),
    );
    next.focus({ preventScroll: true });
    announce(`${title}. ${text}`);
  };

  nanogpt.tour = () => { back = document.activeElement; show(0); };

  const offer = () => {
    if (remembered()) return;
    if (!document.querySelector("#output .token")) return setTimeout(offer, 400);
    open(make("p", "", "New here? Five steps show what happens when a model writes."), make("div", "tour-buttons", null, button("Show me", "play", nanogpt.tour), button("No, thanks", "plain", close)));
    card.classList.add("offer");
  };
  const soon = () => setTimeout(offer, 800);
  if (document.readyState === "complete") soon(); // the page may be there before this script is
  else window.addEventListener("load", soon);
})();
