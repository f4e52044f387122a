// How sure the network is that an object is there, frame by frame.

import { setFrame, store } from "./store.js";

const share = (logit) => 1 / (1 + Math.exp(-logit));

export function summary({ scores }) {
  const known = scores.filter((score) => score !== null);
  const seen = known.filter((score) => score > 0).length;
  return known.length ? `in ${seen} of ${known.length} frames` : "not tracked yet";
}

// A canvas with the curve; a click on it leads to that frame.
export function makeCurve() {
  const canvas = document.createElement("canvas");
  canvas.className = "curve";
  canvas.setAttribute("role", "img");
  canvas.addEventListener("pointerdown", (event) => {
    const edge = canvas.getBoundingClientRect();
    setFrame(((event.clientX - edge.left) / edge.width) * (store.session.num_frames - 1));
    event.stopPropagation();
  });
  return canvas;
}

export function drawCurve(canvas, object) {
  const dense = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth * dense, canvas.clientHeight * dense];
  if (!width) return;
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const quiet = getComputedStyle(canvas).color;
  const last = Math.max(1, store.session.num_frames - 1);
  const pad = 4 * dense;
  const x = (frame) => pad + (frame / last) * (width - 2 * pad);
  const y = (value) => pad + (1 - value) * (height - 2 * pad);
  context.strokeStyle = quiet;
  context.globalAlpha = 0.4;
  context.setLineDash([3 * dense, 3 * dense]);
  line(context, [[x(0), y(0.5)], [x(last), y(0.5)]], dense);
  context.setLineDash([]);
  line(context, [[x(store.frame), 0], [x(store.frame), height]], 1.5 * dense);
  context.globalAlpha = 1;
  context.strokeStyle = object.color;
  let piece = [];
  object.scores.forEach((score, frame) => {
    if (score !== null) return piece.push([x(frame), y(share(score))]);
    line(context, piece, 2 * dense);
    piece = [];
  });
  line(context, piece, 2 * dense);
  context.fillStyle = quiet;
  for (const { frame } of object.prompts) context.fillRect(x(frame) - dense, height - 4 * dense, 2 * dense, 4 * dense);
  canvas.setAttribute("aria-label", `how sure it is, ${object.label}: ${summary(object)}`);
}

function line(context, points, width) {
  if (!points.length) return;
  context.lineWidth = width;
  context.beginPath();
  context.moveTo(...points[0]);
  for (const point of points.slice(1)) context.lineTo(...point);
  if (points.length === 1) context.lineTo(points[0][0] + width, points[0][1]);
  context.stroke();
}
