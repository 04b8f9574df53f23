// One answer: its text with every token's origin, its numbers as they come, and the steps behind it.

import { button, counted, make, shown, speech } from "./dom.js";

const PARTS = { prefill: "prefill", draft: "draft", verify: "verify", overhead: "rest" };

/** Cut a piece of text into [part, token]; parts that no token is known for have null. */
function* aligned(text, tokens) {
  let at = 0;
  for (const token of tokens) {
    if (!token.text) continue;
    const found = text.indexOf(token.text, at);
    if (found < 0) continue; // text that is not shown, such as a delimiter's
    if (found > at) yield [text.slice(at, found), null];
    yield [token.text, token];
    at = found + token.text.length;
  }
  if (at < text.length) yield [text.slice(at), null];
}

export class Answer {
  /** `acts`: onToken(answer, mark, really), and the buttons' onRegenerate(answer), onCheck(answer). */
  constructor(acts) {
    this.acts = acts;
    this.body = this.model = null; // the request, and the model that it goes to; see `begin`
    this.whole = false; // whether the stream came to its end
    this.text = this.reasoning = "";
    this.finish = null; // why it ended
    this.count = 0; // tokens
    this.steps = new Map(); // number -> its document
    this.stats = null; // the server's numbers, which come last
    this.usage = null;
    this.tools = [];
    this.marks = []; // every token that is shown: { element, step, place, token }
    this.ofElement = new WeakMap();
    this.placed = new Map(); // step -> how many of its tokens have come
    this.drawing = false;
    this.build();
  }

  build() {
    this.status = make("p", { class: "status waiting" }, "Waiting for the server…");
    this.thoughts = make("div", { class: "answer thoughts" });
    this.reasoned = make("details", { class: "reasoning", hidden: true }, make("summary", {}, "Reasoning"), this.thoughts);
    this.words = make("div", { class: "answer", role: "group", "aria-label": "Answer. Arrow keys walk through its tokens, Enter shows a token’s tree." });
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

  /** Take in a chunk of the stream. */
  receive(chunk) {
    for (const step of chunk.haast?.steps ?? []) this.steps.set(step.number, step);
    const tokens = chunk.haast?.tokens ?? [], choice = chunk.choices?.[0], delta = choice?.delta ?? {};
    let used = 0; // tokens
    if (delta.reasoning_content) {
      this.reasoning += delta.reasoning_content;
      this.reasoned.hidden = false;
      this.status.textContent = "Reasoning…";
      used = this.write(this.thoughts, delta.reasoning_content, tokens, !delta.content);
    }
    if (delta.content) {
      this.text += delta.content;
      this.status.hidden = true;
      speech.hear(delta.content);
    }
    this.write(this.words, delta.content ?? "", tokens.slice(used));
    this.count += tokens.length;
    for (const call of delta.tool_calls ?? []) this.call(call);
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.haast?.stats) this.stats = chunk.haast.stats;
    this.draw();
  }

  /** Show text; how many of the tokens it took: `all` of them, or those up to the last that is seen in it. */
  write(place, text, tokens, all = true) {
    const parts = [...aligned(text, tokens)];
    const taken = all ? tokens.length : 1 + Math.max(-1, ...parts.map(([, token]) => tokens.indexOf(token)));
    const places = new Map(); // tokens without text have a place in their step too
    for (const token of tokens.slice(0, taken)) {
      const at = this.placed.get(token.step) ?? 0;
      places.set(token, at);
      this.placed.set(token.step, at + 1);
    }
    for (const [part, token] of parts) {
      if (token) this.mark(place, part, token, places.get(token));
      else place.append(part);
    }
    return taken;
  }

  /** Append a token to the run of its step: the one that stands last, or a new one. */
  mark(answer, text, token, place) {
    const blank = text.trim() ? text.length - text.trimStart().length : 0; // which is not underlined
    const words = make("span", { class: token.drafted ? "yes" : "own" }, text.slice(blank));
    const element = make("span", { class: "token", tabindex: "-1" }, text.slice(0, blank), words);
    const mark = { element, token, step: token.step, place };
    this.marks.push(mark);
    this.ofElement.set(element, mark);
    const last = answer.lastChild, step = String(token.step);
    if (last?.dataset?.step === step) last.append(element);
    else answer.append(make("span", { class: "run", "data-step": step }, element));
    if (!answer.querySelector('[tabindex="0"]')) this.take(mark, answer);
  }

  /** Let this token be the one that the Tab key finds; it is a button as long as it is. */
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
    mark.element.setAttribute("aria-label", `${token.text.trim() || "blank"}, ${origin}${step === null ? "" : `, step ${step}`}`);
    mark.element.setAttribute("aria-expanded", mark.element.closest("[aria-current]") !== null);
    mark.element.setAttribute("aria-controls", "inspector");
  }

  clicked(event) {
    const mark = this.ofElement.get(event.target.closest(".token"));
    if (!mark || !getSelection().isCollapsed) return; // somebody selects text
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

  /** Mark the tokens of the step whose tree is shown; null takes the mark away. */
  point(step) {
    for (const run of this.element.querySelectorAll(".run[aria-current]")) run.removeAttribute("aria-current");
    const runs = step === undefined ? [] : this.element.querySelectorAll(`.run[data-step="${CSS.escape(String(step))}"]`);
    for (const run of runs) run.setAttribute("aria-current", "step");
    for (const each of this.element.querySelectorAll('.token[tabindex="0"]')) {
      each.setAttribute("aria-expanded", each.closest("[aria-current]") !== null);
    }
  }

  /** A part of a tool call: names and arguments come in pieces. */
  call(piece) {
    const at = Number.isInteger(piece.index) ? piece.index : 0;
    this.tools[at] ??= { name: "", arguments: "", element: make("p", { class: "call" }) };
    const tool = this.tools[at];
    tool.name += piece.function?.name ?? "";
    tool.arguments += piece.function?.arguments ?? "";
    tool.element.replaceChildren("Calls the tool ", make("code", {}, tool.name), " with ", make("code", {}, tool.arguments || "nothing"));
    this.calls.append(tool.element);
    this.calls.hidden = false;
    this.status.hidden = true;
  }

  /** The answer ends here. `trouble` are words on what went wrong, where something did. */
  end(trouble) {
    const blank = !this.text && !this.calls.childElementCount;
    const cut = { length: "Cut: this is as many tokens as the settings allow.", stopped: "Stopped." }[this.finish];
    this.status.textContent = trouble ? "" : (cut ?? (blank ? "The answer is empty." : ""));
    this.status.hidden = !this.status.textContent;
    this.status.classList.remove("waiting");
    this.words.after(this.status);
    if (trouble) {
      this.trouble.replaceChildren(make("p", { role: "alert" }, trouble), make("p", { class: "actions" }, button("Try again", () => this.acts.onRegenerate(this))));
      this.trouble.hidden = false;
    }
    if (!blank) {
      this.actions.replaceChildren(
        ...(trouble ? [] : [button("Regenerate", () => this.acts.onRegenerate(this), { class: "again" })]),
        ...(this.model.drafts ? [button("Same seed without drafting", () => this.acts.onCheck(this), { class: "without" })] : []),
        ...(this.steps.size ? [button("Steps", () => this.acts.onToken(this, this.liveliest(), true), { class: "steps" })] : []),
      );
      this.actions.hidden = false;
    }
    this.draw();
    speech.finish(this.status.textContent || (trouble ? "" : `${counted(this.usage?.completion_tokens ?? this.count, "token")}.`));
  }

  /** A token of the step that kept the most drafts: where somebody begins who wants to see trees. */
  liveliest() {
    const kept = new Map();
    for (const { step, token } of this.marks) if (token.drafted) kept.set(step, (kept.get(step) ?? 0) + 1);
    let best = this.marks.find((mark) => mark.step !== null) ?? this.marks[0];
    for (const mark of this.marks) if ((kept.get(mark.step) ?? 0) > (kept.get(best.step) ?? 0)) best = mark;
    return best;
  }

  /** Numbers: the server's once they are there; until then those of the steps so far. */
  numbers() {
    const own = [...this.steps.values()], sum = (key) => own.reduce((all, step) => all + step[key], 0);
    const decoded = own.reduce((all, step) => all + step.emitted.length, 0);
    const found = { ms_draft: sum("ms_draft"), ms_verify: sum("ms_verify"), ms_overhead: sum("ms_overhead") };
    const ms = found.ms_draft + found.ms_verify + found.ms_overhead;
    if (own.length) Object.assign(found, { tau: decoded / own.length, tokens_per_s: ms ? (1000 * decoded) / ms : undefined });
    const told = Object.fromEntries(Object.entries(this.stats ?? {}).filter(([, value]) => value !== null));
    return { vanilla_tokens_per_s: this.model.vanilla, ...found, ...told };
  }

  fillMeter() {
    this.values = {};
    for (const [key, words] of Object.entries({
      tau: "tokens a forward (tau)", speed: "tokens/s", vanilla: "without drafts", times: "as fast",
    })) {
      this.values[key] = make("dd", {}, "–");
      this.meter.append(make("div", { class: key }, make("dt", {}, words), this.values[key]));
    }
    this.segments = {};
    for (const part of Object.keys(PARTS)) this.bar.append((this.segments[part] = make("span", { class: part })));
  }

  /** Show the numbers, at most once a frame. */
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
