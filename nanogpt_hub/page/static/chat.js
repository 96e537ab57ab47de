// A conversation.
//
// {run, done, messages: [[role, text]]} shows all of it; {run, done, from, text} what is new of the last answer, from its
// character `from` on, with an overlap. The whole comes first and last.
(() => {
  const { views, make, announce } = nanogpt;
  const NAMES = { user: "You", assistant: "The model", system: "System text" };

  const bubble = (role, text) => make("div", `said ${role}`, null, make("small", "", NAMES[role] ?? role), make("p", "", text));

  const start = (root, data) => {
    const log = make("div", "chat-log", null, ...data.messages.map(([role, text]) => bubble(role, text)));
    log.setAttribute("role", "log");
    log.setAttribute("aria-live", "off"); // an answer is read out when it is there, not letter by letter
    log.setAttribute("aria-label", "the conversation");
    log.tabIndex = 0;
    root.replaceChildren(log);
    root.state = { run: data.run, answer: log.lastChild.lastChild, log };
  };

  views.chat = (root, data) => {
    if (!data) {
      root.state = null;
      root.classList.remove("writing");
      return root.replaceChildren(make("p", "hint", "Nothing was said yet. Write a message, and the model answers as it has learned from conversations."));
    }
    if (data.messages) start(root, data);
    else if (root.state?.run !== data.run || data.from > root.state.answer.textContent.length) return; // missed: all of it comes at the end
    else root.state.answer.textContent = root.state.answer.textContent.slice(0, data.from) + data.text;
    const { answer, log } = root.state;
    answer.parentNode.classList.toggle("writing", !data.done);
    log.scrollTop = log.scrollHeight;
    if (root.classList.contains("writing") && data.done) announce(`The model answered: ${answer.textContent.slice(0, 500) || "nothing"}`);
    root.classList.toggle("writing", !data.done);
  };
})();
