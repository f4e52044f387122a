// What the page asks of the server. Requests are sent one after the other, so that clicks keep their order.

import { ApiError, json, saveFile } from "./api.js";
import { follow } from "./jobs.js";
import { refreshMasks } from "./masks.js";
import { clearErrors, showError } from "./messages.js";
import { byId, changed, choose, setFrame, store } from "./store.js";

let sending = Promise.resolve();
let pending = 0; // requests whose jobs have not ended

function count(change) {
  pending += change;
  byId("page").setAttribute("aria-busy", String(pending > 0));
}

const here = (path) => `/sessions/${store.session.session_id}/${path}`;

// Asks for a job once earlier requests are sent, follows it, and gives whether it was done.
async function perform(ask, then = () => {}) {
  clearErrors();
  count(1);
  const sent = sending.then(ask);
  sending = sent.catch(() => {});
  try {
    const job = await sent;
    then(job);
    return (await follow(job)).state === "done";
  } catch (error) {
    showError(error);
    return false;
  } finally {
    count(-1);
  }
}

// What the server knows of the session.
export async function refresh() {
  if (!store.session) return;
  const id = store.session.session_id;
  const known = await json("GET", `/sessions/${id}`);
  if (store.session?.session_id !== id) return;
  store.session = known;
  refreshMasks();
  changed("session");
}

export function runSentences(sentences) {
  return perform(() => json("POST", here("sentences"), { sentences }));
}

// Clicks or a box on the frame that is shown, for the chosen object, or a new one, which is chosen then.
function point(prompt) {
  const frame = store.frame;
  return perform(
    () => json("POST", here("points"), { object_id: store.chosen, frame, ...prompt }),
    (job) => choose(job.objects[0]),
  );
}

// A mask from an image file, likewise.
function mask(file) {
  const form = new FormData();
  form.append("frame", String(store.frame));
  form.append("mask", file, file.name);
  const ask = () => {
    if (store.chosen !== null) form.append("object_id", String(store.chosen));
    return json("POST", here("masks"), form);
  };
  return perform(ask, (job) => choose(job.objects[0]));
}

export const click = (place, label) => point({ points: [place], labels: [label] });
export const box = (corners) => point({ box: corners });

// A point, or a box, from text.
export function pointByNumbers(text) {
  const numbers = text.trim().split(/[\s,;]+/).map(Number);
  if (numbers.some(Number.isNaN) || ![2, 4].includes(numbers.length)) {
    showError(new ApiError(`“${text}” is no point and no box: give x, y or left, top, right, bottom`, 400));
    return Promise.resolve(false);
  }
  return numbers.length === 4 ? box(numbers) : click(numbers, store.tool === "sub" ? 0 : 1);
}

export function track(direction) {
  const start = direction === "both" ? null : store.frame;
  return perform(() => json("POST", here("propagate"), { start, direction }));
}

export const undo = () => perform(() => json("POST", here("undo")));
export const remove = (id) => perform(() => json("DELETE", here(`objects/${id}`)));
export const clear = (id) => perform(() => json("DELETE", here(`objects/${id}/prompts/${store.frame}`)));
export const ask = (question) => perform(() => json("POST", here("chat"), { question }));

export async function download(format) {
  clearErrors();
  byId("download").disabled = true;
  byId("download").textContent = "Writing ...";
  try {
    const name = store.session.name.replace(/\.[^.]*$/, "") || "video";
    await saveFile(here(`export?format=${encodeURIComponent(format)}`), `${name}-${format}.zip`);
  } catch (error) {
    showError(error);
  } finally {
    byId("download").textContent = "Download";
    changed("view");
  }
}

export function startActions() {
  byId("track").addEventListener("click", () => track(byId("direction").value));
  byId("undo").addEventListener("click", undo);
  byId("download").addEventListener("click", () => download(byId("format").value));
  byId("mask-file").addEventListener("change", (event) => {
    if (event.target.files[0]) mask(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
  byId("numbers").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (await pointByNumbers(byId("place").value)) byId("place").value = "";
  });
  byId("sentence-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const field = byId("sentences");
    const sentences = field.value.split("\n").map((line) => line.trim()).filter(Boolean);
    if (!sentences.length) return showError(new ApiError("write a sentence first: what is to be segmented?", 400));
    const given = field.value;
    if ((await runSentences(sentences)) && field.value === given) field.value = ""; // a failed one stays
    setFrame(store.frame);
  });
  byId("chat-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const question = byId("question").value.trim();
    if (question && (await ask(question))) byId("question").value = "";
  });
}
