// The settings panel: sampling fields and system prompt of the next answer.

import { byId } from "./dom.js";

const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens",
  "repetition_penalty", "presence_penalty", "frequency_penalty",
];
const fields = NUMBERS.map(byId);
const panel = byId("settings"), opener = byId("settings-button"), system = byId("system");

export function showSettings(open) {
  panel.hidden = !open;
  opener.setAttribute("aria-expanded", open);
}

export const settingsOpen = () => !panel.hidden;

export function closeSettings() {
  showSettings(false);
  opener.focus();
}

/** Whether all fields are valid; if not, the first invalid one is shown with the reason. */
export function settingsValid() {
  const wrong = fields.find((field) => !field.checkValidity());
  if (wrong) {
    showSettings(true);
    wrong.reportValidity();
  }
  return !wrong;
}

/** The filled fields by the API's names. A seed is always set, so that the same text can be generated again. */
export function sampling() {
  const filled = fields.filter((field) => field.value !== "");
  const seed = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  return { seed, ...Object.fromEntries(filled.map((field) => [field.id, Number(field.value)])) };
}

export const systemPrompt = () => system.value.trim();

opener.addEventListener("click", () => {
  showSettings(panel.hidden);
  if (!panel.hidden) system.focus();
});
byId("settings-close").addEventListener("click", closeSettings);
byId("settings-reset").addEventListener("click", () => {
  for (const field of [system, ...fields]) field.value = field.defaultValue;
});
