// Elements whose texts are always text: nothing here, nor anywhere on this page, parses what people or models wrote.

/** An element with attributes; children are elements or texts. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

/** A button; `act` is called unless something runs that has to end first (see `setBusy`). */
export function button(words, act, attributes = {}) {
  const made = make("button", { type: "button", ...attributes }, words);
  made.addEventListener("click", (event) => {
    if (made.getAttribute("aria-disabled") !== "true") act(event);
  });
  return made;
}

/** Buttons that start something wait while something runs. They keep the focus, which disabled ones would lose. */
export function setBusy(busy) {
  for (const each of document.querySelectorAll(".actions button:not(.steps)")) each.setAttribute("aria-disabled", busy);
}

/** A number for a reader; a dash where there is none. */
export function shown(value, digits = 1) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

/** A count with its noun. */
export function counted(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** What a screen reader says, politely: whole sentences, not every token. */
export const speech = {
  rest: "",

  say(words) {
    const log = byId("spoken");
    log.append(make("p", {}, words));
    while (log.childElementCount > 20) log.firstElementChild.remove();
  },

  /** A part of an answer: said as soon as its sentence ends. */
  hear(text) {
    this.rest += text;
    const end = this.rest.search(/[.!?:\n]\s[^.!?:\n]*$/);
    if (end >= 0) {
      this.say(this.rest.slice(0, end + 1));
      this.rest = this.rest.slice(end + 1);
    }
  },

  /** The answer ended: what is left is said, then why it ended. */
  finish(words) {
    if (this.rest.trim()) this.say(this.rest);
    this.rest = "";
    if (words) this.say(words);
  },
};
