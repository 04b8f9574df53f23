// Requests to the server: API key, server-sent events, and error messages.

import { byId } from "./dom.js";

const KEY = "haast-key";
const WAIT = 2; // seconds until a retry while the model loads, if the server sends no Retry-After
const MOST_WORDS = 2000; // characters of a server's message that are shown

/** An error with a message for the user. */
export class Problem extends Error {}

const LOST = "The connection was lost. The answer may be incomplete.";

/** Seconds of the Retry-After header; null if there is none. */
function retryAfter(reply) {
  const when = reply.headers.get("Retry-After");
  if (!when) return null;
  const seconds = /^\d+(\.\d+)?$/.test(when.trim()) ? Number(when) : (Date.parse(when) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}

/** An error's message as a sentence, with the parameter that it names. */
function sentence(error, otherwise) {
  const message = typeof error?.message === "string" && error.message.trim() ? error.message : otherwise;
  const words = message.slice(0, MOST_WORDS).trim().replace(/\.$/, "");
  const about = typeof error?.param === "string" && !words.includes(error.param) ? ` (${error.param})` : "";
  return `${words}${about}.`;
}

/** The message of an error reply. */
async function errorMessage(reply) {
  try {
    return sentence((await reply.json()).error, `status ${reply.status}`);
  } catch {
    return `status ${reply.status}.`; // not JSON: a proxy's page, which is not shown
  }
}

async function refusal(reply) {
  const words = await errorMessage(reply);
  if (reply.status === 429) {
    const seconds = retryAfter(reply);
    return `The server is busy: ${words}${seconds === null ? "" : ` Try again in ${seconds} s.`}`;
  }
  return reply.status >= 500 ? `The server failed: ${words}` : `The server refused this: ${words}`;
}

/** Resolves after `seconds`; rejects as soon as `signal` aborts. */
function pause(seconds, signal) {
  return new Promise((done, failed) => {
    const gone = () => { clearTimeout(timer); failed(new DOMException("stopped", "AbortError")); };
    const timer = setTimeout(() => { signal?.removeEventListener("abort", gone); done(); }, 1000 * seconds);
    if (signal?.aborted) gone();
    signal?.addEventListener("abort", gone, { once: true });
  });
}

let asking = null; // promise of the open key dialog, which all requests share

/** Ask the user for a key; resolves to whether one was entered. */
function askKey(refused) {
  asking ??= new Promise((done) => {
    const dialog = byId("key-dialog"), field = byId("key"), form = byId("key-form");
    byId("key-words").textContent = refused
      ? "The server rejects this key. Enter another one."
      : "This server needs a key. It is kept until this tab is closed.";
    field.value = "";
    const end = (entered) => {
      asking = null;
      form.onsubmit = dialog.oncancel = byId("key-cancel").onclick = null;
      dialog.close(); // returns the focus
      done(entered);
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value);
      end(true);
    };
    byId("key-cancel").onclick = () => end(false);
    dialog.oncancel = (event) => { event.preventDefault(); end(false); };
    dialog.showModal();
    field.focus();
  });
  return asking;
}

/**
 * Send a request; resolves to a reply with a status of success.
 *
 * Retries while the model is loading (`onWait` gets the message), and asks the user for a key if the server needs one.
 * Throws Problem, or the AbortError of `signal`.
 */
export async function request(path, { body, signal, onWait = () => {} } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = body ? { "Content-Type": "application/json" } : {};
    if (key) headers.Authorization = `Bearer ${key}`;
    let reply;
    try {
      reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server can’t be reached. Is it still running?");
    }
    if (reply.ok) return reply;
    if (reply.status === 401) {
      const other = sessionStorage.getItem(KEY);
      if (other === key) sessionStorage.removeItem(KEY);
      if (other !== null && other !== key) continue; // entered meanwhile
      if (await askKey(key !== null)) continue;
      throw new Problem("The server needs a key, and none was entered.");
    }
    if (reply.status === 503) {
      const seconds = retryAfter(reply) ?? WAIT;
      const words = await errorMessage(reply);
      onWait(`${words[0].toUpperCase()}${words.slice(1)} Retrying in ${seconds} s.`);
      await pause(Math.max(seconds, 0.2), signal);
      continue;
    }
    throw new Problem(await refusal(reply));
  }
}

/** The data of server-sent events; comments and other fields are ignored. */
async function* events(reply) {
  const reader = reply.body.getReader(), decoder = new TextDecoder();
  let rest = "", data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/); // a \r at the end may be half of \r\n
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be closed already
  }
}

/** The chunks of one streamed answer. Throws Problem, or the AbortError of `signal`. */
export async function* chat(body, { signal, onWait } = {}) {
  const reply = await request("v1/chat/completions", { body, signal, onWait });
  try {
    for await (const data of events(reply)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem(`The server failed: ${sentence(chunk.error, "it sent no message")}`);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem(error instanceof SyntaxError ? "The server sent something that can’t be read." : LOST);
  }
  throw new Problem(LOST);
}
