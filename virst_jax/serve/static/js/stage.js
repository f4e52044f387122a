// The canvas: the frame, masks and prompts on it, and what is clicked and dragged.

import { imageOf } from "./frames.js";
import { areFresh, layersOf } from "./masks.js";
import { byId, on, store } from "./store.js";

const TALL = 0.68; // share of the window's height that the video takes at most
const RADIUS = 6;
const SMALLEST = 3; // pixels on the screen; a shorter drag is no box

let scale = 1; // screen pixels of a pixel of the video
let draft = null; // a box that is being drawn, in pixels of the video
let shownImage = null; // the last image, until that of a new frame is there
let waiting = false;

const canvas = byId("canvas");

export function resetStage() {
  shownImage = null;
  draft = null;
}

function layout() {
  const { width, height } = store.session;
  const room = byId("stage").clientWidth || width;
  scale = Math.min(room / width, (window.innerHeight * TALL) / height);
  const dense = window.devicePixelRatio || 1;
  const size = [Math.round(width * scale * dense), Math.round(height * scale * dense)];
  if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
  canvas.style.width = `${Math.round(width * scale)}px`;
  canvas.style.height = `${Math.round(height * scale)}px`;
  return canvas.width / width;
}

// Draws at the next opportunity, once for all that has changed.
export function redraw() {
  canvas.dataset.frame = "";
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    if (store.session?.ready && !byId("viewer").hidden) draw();
  });
}

function draw() {
  const ratio = layout();
  const context = canvas.getContext("2d");
  const image = imageOf(store.frame);
  if (image) shownImage = image;
  context.setTransform(1, 0, 0, 1, 0, 0);
  if (shownImage?.width) context.drawImage(shownImage, 0, 0, canvas.width, canvas.height);
  else context.clearRect(0, 0, canvas.width, canvas.height);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  for (const { left, top, fill, edge } of layersOf(store.frame)) {
    context.globalAlpha = store.opacity;
    context.drawImage(fill, left, top);
    context.globalAlpha = store.opacity ? 1 : 0;
    context.drawImage(edge, left, top);
  }
  context.globalAlpha = 1;
  drawPrompts(context, ratio);
  canvas.dataset.frame = image && areFresh(store.frame) ? store.frame : ""; // which frame is shown, once it is
}

function drawPrompts(context, ratio) {
  const unit = (window.devicePixelRatio || 1) / ratio; // a pixel of the screen
  for (const { object_id: id, color, prompts } of store.session.objects) {
    if (store.hidden.has(id)) continue;
    for (const { frame, points, labels, box } of prompts) {
      if (frame !== store.frame) continue;
      if (box) drawBox(context, box, color, unit);
      (points ?? []).forEach((point, i) => drawPoint(context, point, labels[i], color, unit));
    }
  }
  if (draft) drawBox(context, draft, "#ffffff", unit);
}

function drawBox(context, [left, top, right, bottom], color, unit) {
  context.lineWidth = 3 * unit;
  context.strokeStyle = "#000000";
  context.setLineDash([]);
  context.strokeRect(left, top, right - left, bottom - top);
  context.lineWidth = 2 * unit;
  context.strokeStyle = color;
  context.setLineDash([6 * unit, 4 * unit]);
  context.strokeRect(left, top, right - left, bottom - top);
  context.setLineDash([]);
}

// A disc in the object's colour with the sign of the point, which does not depend on seeing colours.
function drawPoint(context, [x, y], label, color, unit) {
  context.beginPath();
  context.arc(x, y, RADIUS * unit, 0, 2 * Math.PI);
  context.fillStyle = label ? color : "#ffffff";
  context.fill();
  context.lineWidth = 2 * unit;
  context.strokeStyle = "#000000";
  context.stroke();
  context.beginPath();
  const arm = 3.2 * unit;
  context.moveTo(x - arm, y);
  context.lineTo(x + arm, y);
  if (label) {
    context.moveTo(x, y - arm);
    context.lineTo(x, y + arm);
  }
  context.stroke();
}

// Where the pointer is, in pixels of the video, within the frame.
function place(event) {
  const { width, height } = store.session;
  const edge = canvas.getBoundingClientRect();
  const x = ((event.clientX - edge.left) / edge.width) * width;
  const y = ((event.clientY - edge.top) / edge.height) * height;
  const round = (value, size) => Math.min(Math.max(0, Math.round(value * 10) / 10), size);
  return [round(x, width), round(y, height)];
}

// Calls `click(point, label)` and `box(corners)`.
export function startStage({ click, box }) {
  let begin = null;
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("pointerdown", (event) => {
    if (!store.session || event.button > 2 || event.button === 1) return;
    if (store.tool === "box" && event.button === 0) {
      begin = place(event);
      canvas.setPointerCapture(event.pointerId);
      return;
    }
    const [x, y] = place(event);
    const beside = event.button === 2 || store.tool === "sub";
    click([Math.min(x, store.session.width - 0.1), Math.min(y, store.session.height - 0.1)], beside ? 0 : 1);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!begin) return;
    const end = place(event);
    draft = [Math.min(begin[0], end[0]), Math.min(begin[1], end[1]), Math.max(begin[0], end[0]), Math.max(begin[1], end[1])];
    redraw();
  });
  const stop = () => {
    const made = draft;
    begin = draft = null;
    redraw();
    return made;
  };
  canvas.addEventListener("pointerup", () => {
    const made = stop();
    if (made && Math.min(made[2] - made[0], made[3] - made[1]) * scale >= SMALLEST) box(made);
  });
  canvas.addEventListener("pointercancel", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  for (const name of ["session", "frame", "masks", "view"]) on(name, redraw);
  new ResizeObserver(redraw).observe(byId("stage"));
}
