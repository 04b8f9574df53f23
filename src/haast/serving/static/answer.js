// One answer: its text with the origin of each token, its statistics while it runs, and its steps.

import { button, counted, make, shown, speech } from "./dom.js";

const PARTS = { prefill: "prefill", draft: "draft", verify: "verify", overhead: "rest" };

export class Answer {
  /** `acts`: callbacks onToken(answer, mark, really), onRegenerate(answer), onCheck(answer). */
  constructor(acts) {
    this.acts = acts;
    this.body = this.model = null; // the request body and its model; see `begin`
    this.whole = false; // whether the stream is complete
    this.text = this.reasoning = "";
    this.finish = null; // its finish_reason
    this.count = 0; // tokens so far
    this.steps = new Map(); // number -> its document
    this.stats = null; // the server's statistics, in the last chunk
    this.usage = null;
    this.measured = null; // tokens/s of this answer without drafting, once measured
    this.tools = [];
    this.marks = []; // all shown tokens: { element, step, place, token }
    this.ofElement = new WeakMap();
    this.placed = new Map(); // step -> number of its tokens so far
    this.waiting = []; // tokens whose text is not shown yet: { token, place, rest, mark }
    this.drawing = false;
    this.build();
  }

  build() {
    this.status = make("p", { class: "status waiting" }, "Waiting for the server…");
    this.thoughts = make("div", { class: "answer thoughts" });
    const summary = make("summary", {}, "Reasoning");
    this.reasoned = make("details", { class: "reasoning", hidden: true }, summary, this.thoughts);
    const how = "Answer. Arrow keys move through its tokens, Enter shows a token’s tree.";
    this.words = make("div", { class: "answer", role: "group", "aria-label": how });
    this.calls = make("div", { class: "calls", hidden: true });
    this.trouble = make("div", { class: "trouble", hidden: true });
    this.meter = make("dl", { class: "meter", hidden: true });
    this.bar = make("div", { class: "bar-of-parts", "aria-hidden": "true" });
    this.parts = make("p", { class: "parts", hidden: true });
    this.timing = make("div", { class: "timing", hidden: true }, this.bar, this.parts);
    this.actions = make("div", { class: "actions", hidden: true });
    this.check = make("div", { class: "check", hidden: true });
    this.element = make(
      "article", { class: "turn model" }, make("h2", { class: "unseen" }, "Answer"),
      this.status, this.reasoned, this.words, this.calls, this.trouble, this.meter, this.timing, this.actions, this.check,
    );
    this.fillMeter();
    for (const place of [this.words, this.thoughts]) {
      place.addEventListener("click", (event) => this.clicked(event));
      place.addEventListener("keydown", (event) => this.walked(event));
      place.addEventListener("focusin", (event) => this.take(this.ofElement.get(event.target), place));
    }
  }

  begin(body, model) {
    Object.assign(this, { body, model });
    this.status.textContent = "Reading the prompt…";
  }

  /** Process a chunk of the stream. */
  receive(chunk) {
    for (const step of chunk.haast?.steps ?? []) this.steps.set(step.number, step);
    const tokens = chunk.haast?.tokens ?? [], choice = chunk.choices?.[0], delta = choice?.delta ?? {};
    for (const token of tokens) {
      const place = this.placed.get(token.step) ?? 0; // tokens without text count too
      this.placed.set(token.step, place + 1);
      this.waiting.push({ token, place, rest: token.text, mark: null });
    }
    if (delta.reasoning_content) {
      this.reasoning += delta.reasoning_content;
      this.reasoned.hidden = false;
      this.status.textContent = "Reasoning…";
      this.write(this.thoughts, delta.reasoning_content);
    }
    if (delta.content) {
      this.text += delta.content;
      this.status.hidden = true;
      this.write(this.words, delta.content);
      speech.hear(delta.content);
    }
    this.count += tokens.length;
    for (const call of delta.tool_calls ?? []) this.call(call);
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.haast?.stats) this.stats = chunk.haast.stats;
    this.draw();
  }

  /**
   * Show text, marked by the waiting tokens. The server holds text back that may be part of a delimiter. Waiting text
   * before the given one was a delimiter and is dropped; text that matches no token is shown unmarked.
   */
  write(answer, text) {
    const at = this.waiting.map((each) => each.rest).join("").indexOf(text);
    if (at < 0) {
      answer.append(text);
      return;
    }
    this.cut(at);
    for (const [part, origin] of this.cut(text.length)) this.mark(answer, part, origin);
  }

  /** Take `length` characters from the waiting tokens, as [part, origin]. */
  cut(length) {
    const parts = [];
    while (length > 0) {
      const first = this.waiting[0], part = first.rest.slice(0, length);
      length -= part.length;
      first.rest = first.rest.slice(part.length);
      if (part) parts.push([part, first]);
      if (!first.rest) this.waiting.shift();
    }
    return parts;
  }

  /** Append a token, or more of its text, to the run of its step: the last run, or a new one. */
  mark(answer, text, origin) {
    const { token, place } = origin, step = String(token.step);
    if (origin.mark) {
      origin.mark.element.lastChild.append(text);
      return;
    }
    const blank = text.length - text.trimStart().length; // not underlined: it would look like "_"
    const words = make("span", { class: token.drafted ? "yes" : "own" }, text.slice(blank));
    const element = make("span", { class: "token", tabindex: "-1" }, text.slice(0, blank), words);
    origin.mark = { element, token, step: token.step, place };
    this.marks.push(origin.mark);
    this.ofElement.set(element, origin.mark);
    const last = answer.lastChild;
    if (last?.dataset?.step === step) last.append(element);
    else answer.append(make("span", { class: "run", "data-step": step }, element));
    if (!answer.querySelector('[tabindex="0"]')) this.take(origin.mark, answer);
  }

  /** Make this token the one that the Tab key reaches; only that one has the role of a button. */
  take(mark, answer) {
    if (!mark) return;
    for (const each of answer.querySelectorAll('[tabindex="0"]')) {
      each.tabIndex = -1;
      for (const name of ["role", "aria-label", "aria-expanded", "aria-controls"]) each.removeAttribute(name);
    }
    const { step, token } = mark;
    mark.element.tabIndex = 0;
    mark.element.setAttribute("role", "button");
    const origin = token.drafted ? "accepted draft" : "the target’s own";
    mark.element.setAttribute("aria-label", `${token.text.trim() || "blank"}, ${origin}${step === null ? "" : `, step ${step + 1}`}`);
    mark.element.setAttribute("aria-expanded", mark.element.closest("[aria-current]") !== null);
    mark.element.setAttribute("aria-controls", "inspector");
  }

  clicked(event) {
    const mark = this.ofElement.get(event.target.closest(".token"));
    if (!mark || !getSelection().isCollapsed) return; // the user selects text
    mark.element.focus({ preventScroll: true });
    this.acts.onToken(this, mark, true);
  }

  walked(event) {
    const mark = this.ofElement.get(event.target);
    if (!mark || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.acts.onToken(this, mark, true);
      return;
    }
    const own = this.marks.filter((each) => each.element.parentElement.parentElement === event.currentTarget);
    const at = own.indexOf(mark), steps = own.filter((each, i) => i === 0 || own[i - 1].step !== each.step);
    const step = steps.findIndex((each) => each.step === mark.step);
    const next = {
      ArrowLeft: own[at - 1], ArrowRight: own[at + 1], Home: own[0], End: own.at(-1),
      ArrowUp: steps[step - 1], ArrowDown: steps[step + 1],
    }[event.key];
    if (!next) return;
    event.preventDefault();
    next.element.focus();
    this.acts.onToken(this, next, false);
  }

  /** Mark the tokens of the step whose tree is shown; undefined removes the mark. */
  point(step) {
    for (const run of this.element.querySelectorAll(".run[aria-current]")) run.removeAttribute("aria-current");
    for (const run of this.element.querySelectorAll(".run")) {
      if (run.dataset.step === String(step)) run.setAttribute("aria-current", "step");
    }
    for (const each of this.element.querySelectorAll('.token[tabindex="0"]')) {
      each.setAttribute("aria-expanded", each.closest("[aria-current]") !== null);
    }
  }

  /** Add a part of a tool call: name and arguments come in pieces. */
  call(piece) {
    const at = Number.isInteger(piece.index) ? piece.index : 0;
    this.tools[at] ??= { name: "", arguments: "", element: make("p", { class: "call" }) };
    const tool = this.tools[at];
    tool.name += piece.function?.name ?? "";
    tool.arguments += piece.function?.arguments ?? "";
    const [name, args] = [tool.name, tool.arguments || "nothing"].map((words) => make("code", {}, words));
    tool.element.replaceChildren("Calls the tool ", name, " with ", args);
    this.calls.append(tool.element);
    this.calls.hidden = false;
    this.status.hidden = true;
  }

  /** End the answer. `trouble`: the error message, if it failed. */
  end(trouble) {
    const blank = !this.text && !this.calls.childElementCount;
    const cut = { length: "Cut off: the limit of tokens is reached.", stopped: "Stopped." }[this.finish];
    this.status.textContent = trouble ? "" : (cut ?? (blank ? "The answer is empty." : ""));
    this.status.hidden = !this.status.textContent;
    this.status.classList.remove("waiting");
    this.words.after(this.status);
    if (trouble) {
      const again = make("p", { class: "actions" }, button("Try again", () => this.acts.onRegenerate(this)));
      this.trouble.replaceChildren(make("p", { role: "alert" }, trouble), again);
      this.trouble.hidden = false;
    }
    if (!blank) {
      const { onRegenerate, onCheck, onToken } = this.acts, made = [];
      if (!trouble) made.push(button("Regenerate", () => onRegenerate(this), { class: "again" }));
      if (this.model.drafts) made.push(button("Same seed without drafting", () => onCheck(this), { class: "without" }));
      if (this.steps.size) made.push(button("Steps", () => onToken(this, this.mostAccepted(), true), { class: "steps" }));
      this.actions.replaceChildren(...made);
      this.actions.hidden = false;
    }
    this.draw();
    speech.finish(this.status.textContent || (trouble ? "" : `${counted(this.usage?.completion_tokens ?? this.count, "token")}.`));
  }

  /** A token of the step with the most accepted drafts, to start with in the tree view. */
  mostAccepted() {
    const kept = new Map();
    for (const { step, token } of this.marks) kept.set(step, (kept.get(step) ?? 0) + token.drafted);
    let best = this.marks.find((mark) => mark.step !== null) ?? this.marks[0];
    for (const mark of this.marks) if ((kept.get(mark.step) ?? 0) > (kept.get(best.step) ?? 0)) best = mark;
    return best;
  }

  /** Statistics: the server's once they arrive, until then those of the steps so far. Milliseconds are totals. */
  numbers() {
    const own = [...this.steps.values()], sum = (key) => own.reduce((all, step) => all + step[key], 0);
    const decoded = own.reduce((all, step) => all + step.emitted.length, 0);
    const found = { ms_draft: sum("ms_draft"), ms_verify: sum("ms_verify"), ms_overhead: sum("ms_overhead") };
    const ms = found.ms_draft + found.ms_verify + found.ms_overhead;
    if (own.length) found.tau = decoded / own.length;
    if (ms) found.tokens_per_s = (1000 * decoded) / ms;
    Object.assign(found, this.stats);
    found.vanilla_tokens_per_s = this.measured ?? this.stats?.vanilla_tokens_per_s ?? this.model?.vanilla;
    return found;
  }

  fillMeter() {
    this.values = {};
    for (const [key, words] of Object.entries({
      tau: "tokens per forward (tau)", speed: "tokens/s", vanilla: "without drafts", times: "speed-up",
    })) {
      this.values[key] = make("dd", {}, "–");
      this.meter.append(make("div", { class: key }, make("dt", {}, words), this.values[key]));
    }
    this.segments = {};
    for (const part of Object.keys(PARTS)) this.bar.append((this.segments[part] = make("span", { class: part })));
  }

  /** Show the statistics, at most once per frame. */
  draw() {
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      const now = this.numbers(), { tau, tokens_per_s: speed, vanilla_tokens_per_s: vanilla } = now;
      if (!Number.isFinite(tau) && !Number.isFinite(speed)) return;
      this.meter.hidden = this.timing.hidden = this.parts.hidden = false;
      this.values.tau.textContent = shown(tau, 2);
      this.values.speed.textContent = shown(speed);
      this.values.vanilla.textContent = shown(vanilla);
      this.values.times.parentElement.hidden = !(vanilla > 0);
      this.values.times.textContent = vanilla > 0 && Number.isFinite(speed) ? `${shown(speed / vanilla, 2)}×` : "–";
      const known = Object.keys(PARTS).filter((part) => Number.isFinite(now[`ms_${part}`]));
      const whole = known.reduce((all, part) => all + now[`ms_${part}`], 0) || 1;
      for (const part of Object.keys(PARTS)) {
        this.segments[part].hidden = !known.includes(part);
        if (known.includes(part)) this.segments[part].style.flexGrow = now[`ms_${part}`] / whole;
      }
      this.parts.replaceChildren(
        ...known.map((part) => make("span", { class: part }, `${PARTS[part]} ${shown(now[`ms_${part}`], 0)} ms`)),
        ...(this.stats && this.body.temperature !== 0 ? [make("span", { class: "seed" }, `seed ${this.body.seed}`)] : []),
      );
    });
  }
}
