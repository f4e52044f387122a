// Lines above the page: errors, and notes of the server.

import { byId } from "./store.js";

const SHOWN = 4;

function show(text, kind, box = byId("alerts")) {
  const line = document.createElement("div");
  line.className = `message ${kind}`;
  if (kind === "error") line.setAttribute("role", "alert");
  const words = document.createElement("p");
  words.textContent = text;
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "Close";
  close.addEventListener("click", () => line.remove());
  line.append(words, close);
  box.append(line);
  while (box.children.length > SHOWN) box.firstElementChild.remove();
  return close;
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

export function showError(error) {
  show(capital(error.message || String(error)), "error");
  if (error.status === undefined) console.error(error); // a fault of the page
}

export function showNote(text) {
  show(capital(text), "note");
}

// A note that is told once in a browser, if the reader has closed it.
export function showOnce(text) {
  const key = `virst told: ${text}`;
  if (localStorage.getItem(key)) return;
  show(capital(text), "note", byId("messages")).addEventListener("click", () => localStorage.setItem(key, "1"));
}

export function clearErrors() {
  for (const line of document.querySelectorAll("#alerts .error")) line.remove();
}
