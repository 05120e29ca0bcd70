// The calls to the server, messages, and which of the two modes is shown.
import { startDraw } from "./draw.js";
import { startLabel } from "./label.js";

export const $ = (id) => document.getElementById(id);

export function say(text, error = false) {
  $("message").textContent = text;
  $("message").className = error && text ? "error" : "";
}

// A call of the server: GET without a body, else POST. Throws an Error with the server's sentence.
export async function call(path, body, signal) {
  const json = body !== undefined && !(body instanceof Blob);
  const response = await fetch(`api/${path}`, body === undefined ? { signal } : {
    method: "POST", signal, body: json ? JSON.stringify(body) : body,
    headers: { "Content-Type": json ? "application/json" : "application/octet-stream" },
  }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; start it again with the same command, and open "
                    + "the URL that it prints");
  });
  if (response.ok) return response;
  throw new Error((await response.json()).error);
}

export const ask = async (path, body) => (await call(path, body)).json();

// Runs f; what it throws becomes a message.
export async function attempt(f) {
  try { return await f(); } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
}

// Builds an element: make("button", { textContent: "Save" }, child, ...).
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

attempt(async () => {
  const about = await ask("about"), modes = {};
  let shown = null;
  function show(name) {
    shown = modes[name];
    for (const other of Object.keys(modes)) {
      $(other).hidden = other !== name;
      $(`to-${other}`).classList.toggle("here", other === name);
    }
    $("where").textContent = shown.where;
    shown.editor.resize();
    shown.editor.canvas.focus();
  }
  // A key goes to the mode that is shown, unless a field or a focused button takes it.
  addEventListener("keydown", (event) => {
    if (event.altKey || event.target.closest("input:not([type=checkbox]), select")) return;
    if (event.key === "Enter" && event.repeat) return;
    if (event.key === "Enter" && event.target.closest("button, a, summary")) return;
    if (shown && (shown.editor.key(event) || shown.key(event))) event.preventDefault();
  });
  for (const [name, start] of [["label", startLabel], ["draw", startDraw]]) {
    if (!about[name]) continue;
    modes[name] = await start(about, modes, show);
    $(`to-${name}`).hidden = false;
    $(`to-${name}`).onclick = () => show(name);
    if (!shown) show(name);
  }
});
