// Work that the server does for this page: it is followed until it ends, and can be cancelled.

import { ApiError, json } from "./api.js";
import { showError, showNote } from "./messages.js";
import { byId, store } from "./store.js";

const WAIT = 0.4; // seconds that an answer is held back while nothing has ended
const LIVE = 800; // milliseconds between two looks at what a job has found so far

const NAMES = {
  read: "Reading the video",
  segment: "Segmenting",
  sentences: "Reading the sentences",
  points: "Segmenting what was pointed at",
  propagate: "Tracking",
  chat: "Answering",
};

const running = []; // jobs in the order in which they were asked for
let following = false;
let cancelUpload = null;
let changedBy = async () => {}; // called when a job has changed the session

export function whenChanged(react) {
  changedBy = react;
}

// Follows a job and gives it once it is done. Throws if it fails; `note` tells of a cancelled one.
export function follow(job) {
  return new Promise((resolve, reject) => {
    running.push({ job, resolve, reject });
    draw();
    if (!following) loop();
  });
}

export function isBusy() {
  return running.length > 0;
}

async function loop() {
  following = true;
  let looked = performance.now();
  while (running.length) {
    const first = running[0];
    const before = first.job.version;
    try {
      if (!ended(first.job)) first.job = await json("GET", `/jobs/${first.job.job_id}?wait=${WAIT}`);
      if (ended(first.job)) {
        running.shift();
        await changedBy();
        finish(first);
      } else if (first.job.version !== before && performance.now() - looked > LIVE) {
        await changedBy();
        looked = performance.now();
      }
    } catch (error) {
      if (running[0] === first) running.shift();
      if (store.session) first.reject(error);
    }
    draw();
  }
  following = false;
}

const ended = (job) => ["done", "failed", "cancelled"].includes(job.state);

function finish({ job, resolve, reject }) {
  if (job.state === "failed") return reject(new ApiError(job.error, 400));
  if (job.state === "cancelled") showNote(job.error);
  resolve(job);
}

function draw() {
  const box = byId("work");
  if (cancelUpload) return;
  box.hidden = !running.length;
  if (!running.length) return;
  const { job } = running[0];
  show(describe(job) + (running.length > 1 ? ` (${running.length - 1} more behind it)` : ""), job.done, job.total);
}

function describe(job) {
  const name = NAMES[job.kind] ?? "Working";
  if (job.state === "queued") return job.position ? `${name}: ${job.position} before it in the queue` : `${name} ...`;
  const far = job.total ? ` ${job.done} of ${job.total}` : job.done ? ` ${job.done}` : "";
  return job.stage ? `${name}: ${job.stage}${far}` : `${name} ...`;
}

function show(text, done, total) {
  byId("work").hidden = false;
  if (byId("work-text").textContent !== text) byId("work-text").textContent = text;
  const bar = byId("work-bar");
  if (total) {
    bar.max = total;
    bar.value = done;
  } else {
    bar.removeAttribute("value");
  }
}

// Shows an upload, which is no job yet. `cancel` ends it.
export function showUpload(share, cancel) {
  cancelUpload = cancel;
  show(`Uploading: ${Math.round(share * 100)} %`, share, 1);
}

export function endUpload() {
  cancelUpload = null;
  draw();
}

// A session that is closed has no jobs.
export function forgetJobs() {
  for (const { job, resolve } of running.splice(0)) resolve({ ...job, state: "cancelled" });
  draw();
}

export function startJobs() {
  byId("cancel").addEventListener("click", async () => {
    if (cancelUpload) return cancelUpload();
    if (!running.length || !store.session) return;
    try {
      await json("DELETE", `/jobs/${running[0].job.job_id}`);
      byId("work-text").textContent = "Cancelling ...";
    } catch (error) {
      if (error.status !== 409) showError(error); // it has just ended
    }
  });
}
