// Opening a video: a file, the sample, or the session that the page's address names.

import { ApiError, json, sendForm } from "./api.js";
import { clearFrames } from "./frames.js";
import { endUpload, follow, forgetJobs, showUpload } from "./jobs.js";
import { clearMasks } from "./masks.js";
import { clearErrors, showError } from "./messages.js";
import { resetStage } from "./stage.js";
import { byId, changed, store } from "./store.js";

const SAMPLE = "demo.mp4";

function forget() {
  clearFrames();
  clearMasks();
  resetStage();
  forgetJobs();
  Object.assign(store, { session: null, frame: 0, chosen: null, playing: false });
  store.hidden.clear();
}

function showParts() {
  const { session, server } = store;
  const ready = Boolean(session?.ready);
  byId("welcome").hidden = ready;
  byId("viewer").hidden = !ready;
  for (const name of ["object", "download", "chat", "video"]) byId(`${name}-card`).hidden = !ready;
  byId("sentence-card").hidden = !ready || !server.reads_text;
  if (!ready) return changed("session", "frame", "view");
  const rate = session.fps ? `, ${+session.fps.toFixed(2)} frames a second` : "";
  const apart = session.exclusive ? "; objects do not overlap" : "";
  byId("video-facts").textContent =
    `${session.name}: ${session.num_frames} frames of ${session.width}x${session.height}${rate}${apart}`;
  showSuggestions();
  changed("session", "frame", "view");
}

function showSuggestions() {
  const sentences = store.session.name === SAMPLE ? store.server.sample_sentences : [];
  byId("suggestions").replaceChildren(
    ...sentences.map((text) => {
      const made = document.createElement("button");
      made.type = "button";
      made.className = "small";
      made.textContent = text;
      made.addEventListener("click", () => {
        const field = byId("sentences");
        field.value = field.value.trim() ? `${field.value.trimEnd()}\n${text}` : text;
        field.focus();
      });
      return made;
    }),
  );
}

async function open(form) {
  clearErrors();
  const stopping = new AbortController();
  const cancel = () => stopping.abort();
  let sent = null;
  try {
    showUpload(0, cancel);
    sent = await sendForm("/sessions", form, (share) => showUpload(share, cancel), stopping.signal);
  } catch (error) {
    return showError(error);
  } finally {
    endUpload();
  }
  const before = store.session;
  store.session = { session_id: sent.session_id, ready: false, objects: [], version: 0 };
  try {
    const done = await follow(sent);
    if (done.state === "done") {
      if (before) json("DELETE", `/sessions/${before.session_id}`).catch(() => {});
      return await show(sent.session_id);
    }
    drop(sent.session_id);
  } catch (error) {
    showError(error);
    drop(sent.session_id);
  }
  store.session = before;
  showParts();
}

const drop = (id) => json("DELETE", `/sessions/${id}`).catch(() => {});

async function show(id) {
  forget();
  store.session = await json("GET", `/sessions/${id}`);
  history.replaceState(null, "", `#${id}`);
  showParts();
}

function openFile(file) {
  if (!file) return;
  if (file.size > store.server.max_upload_bytes) {
    const most = Math.round(store.server.max_upload_bytes / 2 ** 20);
    return showError(new ApiError(`${file.name} is larger than ${most} MB, the limit of this server`, 413));
  }
  const form = new FormData();
  form.append("every", byId("every").value || "1");
  form.append("allow_damaged", String(byId("damaged").checked));
  form.append("exclusive", String(byId("exclusive").checked));
  form.append("video", file, file.name);
  open(form);
}

// After a reload: the session that the address names, and the work that goes on.
export async function openFromAddress() {
  const id = location.hash.slice(1);
  if (!id) return showParts();
  try {
    await show(id);
    for (const jobId of store.session.jobs) {
      // a video that is still being read is shown when it is there; what other work finds is shown as it comes
      follow(await json("GET", `/jobs/${jobId}`)).then(() => store.session?.ready || show(id)).catch(showError);
    }
  } catch (error) {
    showError(error);
    history.replaceState(null, "", location.pathname);
    forget();
    showParts();
  }
}

export function startOpening() {
  byId("file").addEventListener("change", (event) => {
    openFile(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
  byId("sample").addEventListener("click", () => {
    const form = new FormData();
    form.append("sample", "true");
    form.append("exclusive", String(byId("exclusive").checked));
    open(form);
  });
  byId("close").addEventListener("click", () => {
    drop(store.session.session_id);
    forget();
    history.replaceState(null, "", location.pathname);
    showParts();
  });
  const welcome = byId("welcome");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    welcome.classList.add("dropping");
  });
  document.addEventListener("dragleave", () => welcome.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    welcome.classList.remove("dropping");
    openFile(event.dataTransfer.files[0]);
  });
}
