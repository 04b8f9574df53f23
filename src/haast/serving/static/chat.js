// The conversation: its turns, the running request, and keyboard and button events.

import { Answer } from "./answer.js";
import { Check } from "./check.js";
import { button, byId, make, setBusy, speech } from "./dom.js";
import { inspector } from "./inspector.js";
import { chat, Problem, request } from "./net.js";
import { closeSettings, sampling, settingsOpen, settingsValid, systemPrompt } from "./settings.js";

const talk = byId("talk"), list = byId("turns"), prompt = byId("prompt"), welcome = byId("welcome");
const turns = []; // { question, answer, elements }, the oldest first
const modelsById = new Map(); // id -> the server's facts about a model
let running = null; // the AbortController of the running request

/** The chosen model; loads the list of models first, if needed. Throws Problem, or AbortError. */
async function theModel({ signal, onWait }) {
  if (!modelsById.size) await learnModels({ signal, onWait });
  return modelsById.get(byId("models").value);
}

async function learnModels(more) {
  const name = byId("model-name"), choice = byId("models");
  const reply = await request("v1/models", more);
  const { data = [] } = await reply.json();
  modelsById.clear();
  for (const { id, haast } of data) {
    const drafter = haast?.drafter ?? "none";
    modelsById.set(id, { id, drafter, drafts: drafter !== "none", vanilla: haast?.vanilla_tokens_per_s ?? null });
  }
  if (!modelsById.size) throw new Problem("The server has no model.");
  choice.replaceChildren(...[...modelsById.keys()].map((id) => make("option", { value: id }, id)));
  choice.hidden = modelsById.size < 2;
  name.hidden = !choice.hidden;
  showModel();
}

function showModel() {
  const model = modelsById.get(byId("models").value);
  byId("model-name").textContent = model.id;
  byId("drafter").textContent = model.drafts ? model.drafter : "no drafter";
}

async function start() {
  const name = byId("model-name");
  try {
    await theModel({ onWait: (words) => { name.textContent = words; } });
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (!modelsById.size) name.replaceChildren(error.message, " ", button("Try again", start));
  }
}

/** The messages of earlier turns. Turns without an answer are left out. */
function messages(before) {
  const earlier = systemPrompt() ? [{ role: "system", content: systemPrompt() }] : [];
  for (const { question, answer } of before) {
    if (answer.text) earlier.push({ role: "user", content: question }, { role: "assistant", content: answer.text });
  }
  return earlier;
}

function requestBody(model, question, before) {
  return {
    model: model.id,
    messages: [...messages(before), { role: "user", content: question }],
    stream: true,
    stream_options: { include_usage: true },
    ...sampling(),
    haast: { trace: true },
  };
}

function setRunning(controller) {
  const inside = byId("composer").contains(document.activeElement) && document.activeElement !== prompt;
  running = controller;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  if (inside) prompt.focus(); // the focused button was hidden
  setBusy(controller !== null);
}

/** Run `work(signal)`, which the user can stop; no other work starts meanwhile. */
async function run(work) {
  const controller = new AbortController();
  setRunning(controller);
  try {
    await work(controller.signal);
  } finally {
    if (running === controller) setRunning(null);
  }
}

async function ask(question) {
  const turn = { question, answer: null }, title = make("h2", { class: "unseen" }, "You");
  turns.push(turn);
  welcome.hidden = true;
  list.append(make("article", { class: "turn you" }, title, make("p", {}, question)));
  await run((signal) => answer(turn, signal));
}

/** Generate the answer of the last turn. */
async function answer(turn, signal) {
  const made = new Answer(acts), onWait = (words) => { made.status.textContent = words; };
  turn.answer = made;
  list.append(made.element);
  toEnd();
  speech.rest = "";
  let trouble = null;
  try {
    const model = await theModel({ signal, onWait });
    made.begin(requestBody(model, turn.question, turns.slice(0, turns.indexOf(turn))), model);
    for await (const chunk of chat(made.body, { signal, onWait })) made.receive(chunk);
    made.whole = true;
  } catch (error) {
    if (error.name === "AbortError") made.finish = "stopped";
    else if (error instanceof Problem) trouble = error.message;
    else throw error;
  }
  if (turns.includes(turn) && turn.answer === made) made.end(trouble); // otherwise it was cleared
}

/** Scroll with the newest text, unless the user has scrolled away. */
let atEnd = true;
function toEnd() {
  atEnd = true;
  talk.scrollTop = talk.scrollHeight;
}
talk.addEventListener("scroll", () => { atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40; });
new ResizeObserver(() => { if (atEnd) toEnd(); }).observe(list);

const acts = {
  onToken: (made, mark, really) => inspector.show(made, mark, really),

  /** Replace the last answer by a new one, with the current settings. */
  onRegenerate(made) {
    const turn = turns.find((each) => each.answer === made);
    if (running || turn !== turns.at(-1) || !settingsValid()) return;
    inspector.forget(made);
    made.element.remove();
    prompt.focus();
    run((signal) => answer(turn, signal));
  },

  /** Send the same request with drafting off. */
  onCheck(made) {
    if (running || !made.body) return;
    run(async (signal) => {
      const check = new Check(made);
      const onWait = (words) => { check.words.textContent = words; };
      try {
        const body = { ...made.body, haast: { trace: true, drafter: "none" } };
        for await (const chunk of chat(body, { signal, onWait })) {
          check.receive(chunk);
          if (check.enough) break; // this closes the connection too
        }
        check.end();
      } catch (error) {
        if (error.name !== "AbortError" && !(error instanceof Problem)) throw error;
        check.fail(error instanceof Problem ? error.message : "Stopped before the texts were compared.");
      }
      made.check.scrollIntoView({ block: "nearest" });
    });
  },
};

function send(question) {
  if (running || !question.trim() || !settingsValid()) return;
  prompt.value = "";
  grow();
  ask(question);
}

function clear() {
  running?.abort();
  setRunning(null);
  for (const { answer: made } of turns.splice(0)) if (made) inspector.forget(made);
  list.replaceChildren();
  speech.rest = "";
  welcome.hidden = false;
  prompt.focus();
}

/** Fit the message field's height to its text, up to a limit. */
function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 0.3 * innerHeight)}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(prompt.value);
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(prompt.value);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || byId("key-dialog").open) return;
  if (running) running.abort();
  else if (inspector.open) inspector.close();
  else if (settingsOpen()) closeSettings();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", clear);
byId("models").addEventListener("change", showModel);
byId("marks").addEventListener("change", ({ target }) => document.body.classList.toggle("unmarked", !target.checked));
for (const each of welcome.querySelectorAll("button")) each.addEventListener("click", () => send(each.textContent));

start();
prompt.focus();
