// The list of objects: choose, hide and remove them; their curves.

import { drawCurve, makeCurve, summary } from "./curves.js";
import { isBusy } from "./jobs.js";
import { byId, changed, choose, on, store } from "./store.js";

const rows = new Map(); // number of an object -> its parts

function button(text, label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = "icon small";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.title = label;
  made.addEventListener("click", act);
  return made;
}

function makeRow(object, { remove, clear }) {
  const id = object.object_id;
  const item = document.createElement("li");
  const head = document.createElement("div");
  head.className = "row";
  const swatch = document.createElement("canvas"); // a colour that the page's policy for styles lets through
  swatch.className = "swatch";
  swatch.width = swatch.height = 1;
  const context = swatch.getContext("2d");
  context.fillStyle = object.color;
  context.fillRect(0, 0, 1, 1);
  const name = document.createElement("button");
  name.type = "button";
  name.className = "name";
  name.addEventListener("click", () => choose(store.chosen === id ? null : id));
  const hide = button("Hide", `hide ${object.label}`, () => {
    if (!store.hidden.delete(id)) store.hidden.add(id);
    changed("view");
  });
  const forget = button("Clear", `forget what was pointed at on this frame for ${object.label}`, () => clear(id));
  const away = button("Remove", `remove ${object.label}`, () => remove(id));
  head.append(swatch, name);
  const curve = makeCurve();
  const facts = document.createElement("p");
  facts.className = "faint small facts";
  const foot = document.createElement("div");
  foot.className = "row";
  foot.append(facts, hide, forget, away);
  item.append(head, curve, foot);
  item.dataset.object = id;
  return { item, name, hide, forget, curve, facts };
}

function show(actions) {
  const objects = store.session?.objects ?? [];
  const known = new Set(objects.map((object) => object.object_id));
  // one that is to begin is not known until its click is done
  if (store.chosen !== null && !known.has(store.chosen) && !isBusy()) store.chosen = null;
  for (const [id, { item }] of rows) {
    if (known.has(id)) continue;
    item.remove();
    rows.delete(id);
  }
  for (const object of objects) {
    const id = object.object_id;
    if (!rows.has(id)) rows.set(id, makeRow(object, actions));
    const { item, name, facts } = rows.get(id);
    name.textContent = object.label;
    facts.textContent = summary(object);
    byId("objects").append(item);
  }
  showView();
}

function showView() {
  for (const object of store.session?.objects ?? []) {
    const row = rows.get(object.object_id);
    if (!row) continue;
    const chosen = store.chosen === object.object_id;
    row.item.classList.toggle("chosen", chosen);
    row.name.setAttribute("aria-pressed", String(chosen));
    const hidden = store.hidden.has(object.object_id);
    row.hide.textContent = hidden ? "Show" : "Hide";
    row.hide.setAttribute("aria-pressed", String(hidden));
    row.forget.disabled = !object.prompts.some((prompt) => prompt.frame === store.frame);
    drawCurve(row.curve, object);
  }
  byId("new-object").setAttribute("aria-pressed", String(store.chosen === null));
  const chosen = store.session?.objects.find((object) => object.object_id === store.chosen);
  byId("object-hint").textContent = chosen
    ? `Clicks and boxes correct “${chosen.label}”. Then press Track.`
    : "Click into the video, or draw a box, to begin an object.";
  byId("undo").disabled = !store.session?.num_undo;
  byId("track").disabled = byId("download").disabled = !store.session?.objects.length;
}

export function startObjects(actions) {
  on("session", () => show(actions));
  on("view", showView);
  on("frame", showView);
  byId("new-object").addEventListener("click", () => choose(null));
  new ResizeObserver(showView).observe(byId("objects"));
}
