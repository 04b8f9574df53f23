// Runs the same conversation and seed without drafting, and compares the texts and speeds.

import { counted, make, shown, speech } from "./dom.js";

const AROUND = 32; // characters shown on both sides of a difference

/** The first difference of two texts, in UTF-16 units and never inside a character; -1 if they are equal. */
export function firstDifference(one, other) {
  const shorter = Math.min(one.length, other.length);
  let at = 0;
  while (at < shorter && one[at] === other[at]) at += 1;
  if (at === one.length && at === other.length) return -1;
  const half = /[\uDC00-\uDFFF]/.test(one[at] ?? other[at] ?? "");
  return half && at > 0 ? at - 1 : at;
}

export const characters = (text) => [...text].length;

export class Check {
  constructor(answer) {
    this.answer = answer;
    this.text = this.reasoning = "";
    this.stats = this.usage = null;
    this.words = make("p", { class: "verdict" }, "Without drafting: reading the prompt…");
    answer.check.replaceChildren(this.words);
    answer.check.hidden = false;
    this.decoded = this.ms = 0; // tokens of all steps so far, and their milliseconds
  }

  /** Whether the texts can be compared already: a stopped answer is compared as far as it goes. */
  get enough() {
    const { text, reasoning, whole } = this.answer;
    return !whole && this.text.length >= text.length && this.reasoning.length >= reasoning.length;
  }

  receive(chunk) {
    const delta = chunk.choices?.[0]?.delta ?? {};
    this.text += delta.content ?? "";
    this.reasoning += delta.reasoning_content ?? "";
    if (delta.content || delta.reasoning_content) {
      const same = this.first()[1] < 0 ? "the same so far" : "different";
      this.words.textContent = `Without drafting: ${counted(characters(this.text), "character")}, ${same}…`;
    }
    for (const step of chunk.haast?.steps ?? []) {
      this.decoded += step.emitted.length;
      this.ms += step.ms_draft + step.ms_verify + step.ms_overhead;
    }
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.haast?.stats) this.stats = chunk.haast.stats;
  }

  /** [part, place] of the first difference; place is -1 for none. Unfinished texts are compared as far as both go. */
  first(done = false) {
    for (const what of ["reasoning", "text"]) {
      let [one, other] = [this.answer[what], this[what]];
      if (!done) one = one.slice(0, other.length);
      if (!done || !this.answer.whole) other = other.slice(0, one.length);
      const at = firstDifference(one, other);
      if (at >= 0) return [what, at];
    }
    return ["text", -1];
  }

  fail(words) {
    this.words.textContent = words;
    speech.say(words);
  }

  /** Show the result. */
  end() {
    const [what, at] = this.first(true);
    const block = this.answer.check;
    if (at < 0) {
      const tokens = this.usage?.completion_tokens, size = characters(this.answer.reasoning + this.answer.text);
      const words = counted(size, "character") + (tokens ? `, ${counted(tokens, "token")}` : "");
      const far = this.answer.whole ? "" : ", as far as the answer goes";
      const verdict = make("strong", { class: "same" }, "✓ Same text");
      this.words.replaceChildren(verdict, ` with and without drafting${far}: ${words}.`);
    } else {
      const place = characters(this.answer[what].slice(0, at)) + 1;
      const where = `character ${place}${what === "text" ? "" : " of the reasoning"}`;
      const verdict = make("strong", { class: "other" }, "✗ Different text");
      this.words.replaceChildren(verdict, ` without drafting, from ${where} on.`);
      const both = [...this.excerpt("with drafts", this.answer[what], at), ...this.excerpt("without", this[what], at)];
      block.append(make("dl", { class: "parting" }, ...both));
    }
    speech.say(this.words.textContent);
    this.speeds(block);
  }

  excerpt(words, text, at) {
    const before = (at > AROUND ? "…" : "") + text.slice(Math.max(0, at - AROUND), at);
    const after = text.slice(at, at + AROUND), more = text.length > at + AROUND ? "…" : "";
    return [make("dt", {}, words), make("dd", {}, before, make("mark", {}, after || "(ends here)"), more)];
  }

  speeds(block) {
    const fast = this.answer.numbers().tokens_per_s;
    const slow = this.stats?.tokens_per_s ?? (this.ms ? (1000 * this.decoded) / this.ms : undefined);
    if (!Number.isFinite(fast) || !Number.isFinite(slow)) return;
    const most = Math.max(fast, slow) || 1;
    const rows = Object.entries({ "with drafts": fast, without: slow }).map(([words, speed]) => {
      const bar = make("span", { class: "length" });
      bar.style.width = `${(100 * speed) / most}%`;
      const track = make("span", { class: "track", "aria-hidden": "true" }, bar);
      const rate = make("span", { class: "rate" }, `${shown(speed)} tokens/s`);
      return make("div", {}, make("dt", {}, words), make("dd", {}, track, rate));
    });
    block.append(make("dl", { class: "speeds" }, ...rows));
    const times = shown(fast / slow, 2);
    const words = fast >= slow ? `${times} times as fast with drafts.` : `Drafting was slower here: ${times} times the speed.`;
    block.append(make("p", { class: "gain" }, words));
    this.answer.measured = slow;
    this.answer.draw();
  }
}
