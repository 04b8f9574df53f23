// Panel with the tree of one step, which the server draws with the report's template.

import { byId, make, speech } from "./dom.js";
import { Problem, request } from "./net.js";

const drawn = new WeakMap(); // a step's document -> the promise of its HTML

/** Fetch a step's drawing, once per step. */
function drawing(step) {
  if (!drawn.has(step)) {
    const wanted = request("haast/step", { body: step }).then((reply) => reply.text());
    wanted.catch(() => drawn.delete(step)); // so that the next call tries again
    drawn.set(step, wanted);
  }
  return drawn.get(step);
}

/**
 * The server's fragment as elements. It is the only HTML that this page parses: the server's template wrote it and
 * escaped all texts in it. Scripts would not run, but are removed anyway.
 */
function parsed(fragment) {
  const whole = new DOMParser().parseFromString(fragment, "text/html");
  for (const each of whole.querySelectorAll("script, style, link, base, meta, iframe, object, embed")) each.remove();
  return [...whole.body.children].map((each) => document.importNode(each, true));
}

class Inspector {
  constructor() {
    this.panel = byId("inspector");
    this.here = byId("step-here");
    this.answer = this.mark = null;
    this.turn = 0; // counts requests: only the newest is shown
    byId("step-before").addEventListener("click", () => this.walk(-1));
    byId("step-after").addEventListener("click", () => this.walk(1));
    byId("step-close").addEventListener("click", () => this.close());
  }

  get open() {
    return !this.panel.hidden;
  }

  /** Show the tree of a token's step. `really`: open the panel; otherwise only update an open one. */
  async show(answer, mark, really = true) {
    if (!mark || (!really && (!this.open || this.answer !== answer))) return;
    if (this.answer !== answer) this.answer?.point(undefined);
    const moved = this.mark?.step !== mark.step || this.answer !== answer || !this.open;
    Object.assign(this, { answer, mark });
    this.panel.hidden = false;
    answer.point(mark.step);
    this.enable();
    if (!moved) {
      this.pick();
      return;
    }
    const turn = ++this.turn, step = answer.steps.get(mark.step);
    if (mark.step === null || !step) {
      const first = ["The first token", "It comes from the prefill of the prompt: nothing was drafted for it."];
      this.note(...(mark.step === null ? first : [`Step ${mark.step + 1}`, "The server sent no tree for this step."]));
    } else {
      try {
        const html = await drawing(step);
        if (turn !== this.turn) return;
        this.here.replaceChildren(...parsed(html));
        this.pick();
        speech.say(this.here.querySelector(".title")?.textContent ?? "");
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        if (turn === this.turn) this.note(`Step ${mark.step + 1}`, error.message);
      }
    }
    mark.element.scrollIntoView({ block: "nearest" }); // the panel may cover it
  }

  note(title, words) {
    const [heading, why] = [make("h2", { class: "title" }, title), make("p", { class: "why", role: "status" }, words)];
    this.here.replaceChildren(make("section", { class: "step" }, heading, why));
  }

  /** Select the node of the token: accepted nodes are in text order, the target's own token is the last. */
  pick() {
    const { token, place } = this.mark;
    const nodes = this.here.querySelectorAll(token.drafted ? ".node.accepted" : ".node.own");
    const node = nodes[token.drafted ? place : 0];
    node?.click(); // page.js listens, and shows the reason
    node?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Tokens that begin a step, in the order of the text. */
  stops() {
    const own = this.answer.marks;
    return own.filter((mark, i) => i === 0 || own[i - 1].step !== mark.step);
  }

  at() {
    return this.stops().findIndex((mark) => mark.step === this.mark.step);
  }

  walk(by) {
    const next = this.stops()[this.at() + by];
    if (next) this.show(this.answer, next);
  }

  enable() {
    byId("step-before").setAttribute("aria-disabled", this.at() <= 0);
    byId("step-after").setAttribute("aria-disabled", this.at() + 1 >= this.stops().length);
  }

  close() {
    if (!this.open) return;
    const inside = this.panel.contains(document.activeElement);
    this.panel.hidden = true;
    this.answer?.point(undefined);
    if (inside) this.mark?.element.focus();
    this.turn += 1;
  }

  /** Forget an answer that was removed. */
  forget(answer) {
    if (this.answer === answer) {
      this.close();
      this.answer = this.mark = null;
      this.here.replaceChildren();
    }
  }
}

export const inspector = new Inspector();
