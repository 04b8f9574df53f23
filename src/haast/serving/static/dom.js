// Helpers for DOM elements. Text of users and models is always inserted as text, never parsed as HTML.

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

/** A button; clicks call `act`, except while the page is busy (see `setBusy`). */
export function button(words, act, attributes = {}) {
  const made = make("button", { type: "button", ...attributes }, words);
  made.addEventListener("click", (event) => {
    if (made.getAttribute("aria-disabled") !== "true") act(event);
  });
  return made;
}

/** Block action buttons while a request runs. They keep the focus, which disabled buttons would lose. */
export function setBusy(busy) {
  for (const each of document.querySelectorAll(".actions button:not(.steps)")) each.setAttribute("aria-disabled", busy);
}

/** Format a number; a dash if there is none. */
export function shown(value, digits = 1) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

/** A count with its noun. */
export function counted(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** Announcements for screen readers: whole sentences, not single tokens. */
export const speech = {
  rest: "",

  say(words) {
    const log = byId("spoken");
    log.append(make("p", {}, words));
    while (log.childElementCount > 20) log.firstElementChild.remove();
  },

  /** Add a part of an answer; announced at the end of its sentence. */
  hear(text) {
    this.rest += text;
    const end = this.rest.search(/[.!?:\n]\s[^.!?:\n]*$/);
    if (end >= 0) {
      this.say(this.rest.slice(0, end + 1));
      this.rest = this.rest.slice(end + 1);
    }
  },

  /** End an answer: announce the rest, then `words`. */
  finish(words) {
    if (this.rest.trim()) this.say(this.rest);
    this.rest = "";
    if (words) this.say(words);
  },
};
