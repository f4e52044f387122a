// Masks of frames: fetched in blocks as run lengths, decoded when they are drawn.

import { json } from "./api.js";
import { changed, store } from "./store.js";

const BLOCK = 16; // frames that are fetched at a time
const KEPT = 400; // masks that are kept decoded

let version = -1;
let blocks = new Map(); // first frame -> codes by frame and object, or null while they are fetched
let drawn = new Map(); // "frame object code length" -> canvases

// Forgets what an older version of the session has shown.
export function refreshMasks() {
  if (!store.session || store.session.version === version) return;
  version = store.session.version;
  blocks = new Map([...blocks].map(([first, codes]) => [first, codes && { ...codes, old: true }]));
  changed("masks");
}

export function clearMasks() {
  version = -1;
  blocks = new Map();
  drawn = new Map();
}

// Codes of a frame by object. Old ones are shown until the new ones are there.
export function codesOf(frame) {
  const first = Math.floor(frame / BLOCK) * BLOCK;
  const known = blocks.get(first);
  if (known === undefined || known?.old === true) fetchBlock(first, known);
  return known?.frames[frame] ?? {};
}

// Whether the newest masks of a frame are there.
export function areFresh(frame) {
  const known = blocks.get(Math.floor(frame / BLOCK) * BLOCK);
  return Boolean(known && !known.old);
}

async function fetchBlock(first, known) {
  const asked = version;
  const id = store.session.session_id;
  blocks.set(first, known ? { ...known, old: "fetched now" } : null);
  try {
    const answer = await json("GET", `/sessions/${id}/masks?first=${first}&count=${BLOCK}`);
    if (store.session?.session_id !== id) return;
    blocks.set(first, { frames: answer.frames, old: version !== asked });
    changed("masks");
  } catch {
    blocks.delete(first); // they are asked for again when they are drawn again
  }
}

// Run lengths of COCO's compressed form: six bits a character, five of them digits of a number that is the difference
// to the run two before.
export function readRuns(code) {
  const runs = [];
  for (let at = 0; at < code.length; ) {
    let value = 0;
    let shift = 0;
    let more = true;
    while (more) {
      const bits = code.charCodeAt(at++) - 48;
      value |= (bits & 0x1f) << shift;
      more = (bits & 0x20) !== 0;
      shift += 5;
      if (!more && bits & 0x10) value |= -1 << shift;
    }
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

// Pixels of a mask, 1 where the object is, by rows; and the box that holds them.
export function decode(code, width, height) {
  const pixels = new Uint8Array(width * height);
  let [left, top, right, bottom] = [width, height, -1, -1];
  let at = 0;
  readRuns(code).forEach((length, i) => {
    if (i % 2) {
      for (let n = at; n < at + length; n++) {
        const x = Math.floor(n / height); // runs go down the columns
        const y = n - x * height;
        pixels[y * width + x] = 1;
        if (x < left) left = x;
        if (x > right) right = x;
        if (y < top) top = y;
        if (y > bottom) bottom = y;
      }
    }
    at += length;
  });
  return { pixels, left, top, right, bottom };
}

function paint(code, color, width, height) {
  const { pixels, left, top, right, bottom } = decode(code, width, height);
  if (right < 0) return null;
  const [w, h] = [right - left + 1, bottom - top + 1];
  const [fill, edge] = [new ImageData(w, h), new ImageData(w, h)];
  const rgb = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
  const inside = (x, y) => x < 0 || y < 0 || x >= width || y >= height || pixels[y * width + x];
  for (let y = top; y <= bottom; y++) {
    for (let x = left; x <= right; x++) {
      if (!pixels[y * width + x]) continue;
      const to = ((y - top) * w + x - left) * 4;
      fill.data.set(rgb, to);
      fill.data[to + 3] = 255;
      if (inside(x - 1, y) && inside(x + 1, y) && inside(x, y - 1) && inside(x, y + 1)) continue;
      edge.data.set(rgb, to);
      edge.data[to + 3] = 255;
    }
  }
  return { left, top, fill: onCanvas(fill), edge: onCanvas(edge) };
}

function onCanvas(image) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// The visible objects of a frame as images: { left, top, fill, edge }.
export function layersOf(frame) {
  const { width, height, objects } = store.session;
  const codes = codesOf(frame);
  const layers = [];
  for (const { object_id: id, color } of objects) {
    if (store.hidden.has(id) || codes[id] === undefined) continue;
    const key = `${id} ${codes[id]}`;
    if (!drawn.has(key)) drawn.set(key, paint(codes[id], color, width, height));
    if (drawn.get(key)) layers.push(drawn.get(key));
  }
  while (drawn.size > KEPT) drawn.delete(drawn.keys().next().value);
  return layers;
}
