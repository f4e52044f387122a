// What the page knows, and who wants to hear of changes.

export const store = {
  server: null, // what the server can do
  session: null, // the video and its objects, as the server tells
  frame: 0,
  chosen: null, // number of the object that clicks are for; null: a new one
  tool: "add", // or "sub", "box"
  opacity: 0.5,
  hidden: new Set(), // numbers of objects that are not drawn
  playing: false,
};

const listeners = new Map();

// Calls `react` when something of this name changes: "session", "frame", "masks" or "view".
export function on(name, react) {
  listeners.set(name, [...(listeners.get(name) ?? []), react]);
}

export function changed(...names) {
  for (const name of names) for (const react of listeners.get(name) ?? []) react();
}

export function setFrame(frame) {
  const last = (store.session?.num_frames ?? 1) - 1;
  const next = Math.max(0, Math.min(last, Math.round(frame)));
  if (next === store.frame) return;
  store.frame = next;
  changed("frame");
}

export function choose(objectId) {
  store.chosen = objectId;
  changed("view");
}

export function setTool(tool) {
  store.tool = tool;
  changed("view");
}

export const byId = (id) => document.getElementById(id);
