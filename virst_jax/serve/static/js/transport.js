// The scrub bar, playing, and keys.

import { isThere } from "./frames.js";
import { byId, changed, choose, on, setFrame, setTool, store } from "./store.js";

const USUAL_FPS = 10; // of what states none
const STEP = 10; // frames with shift

let due = 0;

export function stop() {
  store.playing = false;
  changed("view");
}

function toggle() {
  if (!store.session || store.session.num_frames < 2) return;
  store.playing = !store.playing;
  if (store.playing) {
    if (store.frame === store.session.num_frames - 1) setFrame(0);
    due = performance.now();
    requestAnimationFrame(tick);
  }
  changed("view");
}

// Frames are not left out: where the network is slow, playing is slow.
function tick(now) {
  if (!store.playing || !store.session) return;
  const pause = 1000 / (store.session.fps || USUAL_FPS);
  if (now - due >= pause) {
    const next = store.frame + 1;
    if (next >= store.session.num_frames) return stop();
    if (isThere(store.frame)) {
      due = Math.max(due + pause, now - pause);
      setFrame(next);
    }
  }
  requestAnimationFrame(tick);
}

function showPlace() {
  const { session, frame } = store;
  if (!session) return;
  byId("scrub").max = session.num_frames - 1;
  byId("scrub").value = frame;
  const time = session.times ? `, ${session.times[frame]?.toFixed(2)} s` : "";
  byId("where").textContent = `${frame} of ${session.num_frames - 1}${time}`;
}

const KEYS = {
  ArrowLeft: (event) => setFrame(store.frame - (event.shiftKey ? STEP : 1)),
  ArrowRight: (event) => setFrame(store.frame + (event.shiftKey ? STEP : 1)),
  Home: () => setFrame(0),
  End: () => setFrame(Infinity),
  " ": toggle,
  "+": () => setTool("add"),
  "=": () => setTool("add"),
  "-": () => setTool("sub"),
  b: () => setTool("box"),
  n: () => choose(null),
  t: () => byId("track").click(),
  u: () => byId("undo").click(),
  "?": () => byId("help").showModal(),
};

function isTyping(target) {
  return target.closest("input:not([type=range]), textarea, select, dialog[open]") !== null;
}

function key(event) {
  if (!store.session?.ready || isTyping(event.target)) return;
  if ((event.ctrlKey || event.metaKey) && event.key === "z") {
    event.preventDefault();
    return byId("undo").click();
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && event.target.closest("button, a, summary, label")) return; // it presses what has the focus
  if (event.target.id === "opacity" && event.key.startsWith("Arrow")) return;
  const nth = "123456789".indexOf(event.key);
  if (nth >= 0) {
    const chosen = store.session.objects[nth];
    return chosen && choose(chosen.object_id);
  }
  const act = KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act(event);
}

export function startTransport() {
  byId("scrub").addEventListener("input", (event) => {
    store.playing = false;
    setFrame(Number(event.target.value));
    changed("view");
  });
  byId("back").addEventListener("click", () => setFrame(store.frame - 1));
  byId("forth").addEventListener("click", () => setFrame(store.frame + 1));
  byId("play").addEventListener("click", toggle);
  byId("opacity").addEventListener("input", (event) => {
    store.opacity = Number(event.target.value) / 100;
    changed("view");
  });
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.addEventListener("click", () => setTool(button.dataset.tool));
  }
  // a button that the mouse has pressed must not keep the focus, or the space bar would press it again
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (event.detail > 0 && button && !button.closest("dialog")) button.blur();
  });
  document.addEventListener("keydown", key);
  on("frame", showPlace);
  on("session", showPlace);
  on("view", () => {
    byId("play").textContent = store.playing ? "Stop" : "Play";
    for (const button of document.querySelectorAll("[data-tool]")) {
      button.setAttribute("aria-pressed", String(button.dataset.tool === store.tool));
    }
  });
}
