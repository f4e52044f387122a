// Images of frames, kept as far as memory should go, and fetched ahead.

import { changed, store } from "./store.js";

const KEPT = 160;
const AHEAD = 12;

let kept = new Map(); // frame -> image, or null while it is fetched

export function clearFrames() {
  for (const image of kept.values()) image?.close();
  kept = new Map();
}

// The image of a frame; null while it is fetched, whereupon "frame" is told.
export function imageOf(frame) {
  const image = load(frame);
  const last = store.session.num_frames - 1;
  for (let next = frame + 1; next <= Math.min(last, frame + (store.playing ? AHEAD : 2)); next++) load(next);
  if (frame > 0) load(frame - 1);
  return image;
}

export const isThere = (frame) => Boolean(kept.get(frame));

function load(frame) {
  if (kept.has(frame)) {
    const image = kept.get(frame);
    kept.delete(frame); // the last used one goes to the end
    kept.set(frame, image);
    return image;
  }
  kept.set(frame, null);
  fetchImage(frame, kept);
  while (kept.size > KEPT) {
    const [oldest, image] = kept.entries().next().value;
    image?.close();
    kept.delete(oldest);
  }
  return null;
}

async function fetchImage(frame, place) {
  try {
    const answer = await fetch(`/sessions/${store.session.session_id}/frames/${frame}`);
    if (!answer.ok) throw new Error(String(answer.status));
    const image = await createImageBitmap(await answer.blob());
    if (place !== kept || !place.has(frame)) return image.close();
    place.set(frame, image);
    if (frame === store.frame) changed("frame");
  } catch {
    place.delete(frame); // it is asked for again when it is drawn again
  }
}
