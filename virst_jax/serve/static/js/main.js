// The page: what its parts are, and how it begins.

import { box, clear, click, refresh, remove, startActions } from "./actions.js";
import { json } from "./api.js";
import { allowChat, startChat } from "./chat.js";
import { startJobs, whenChanged } from "./jobs.js";
import { showError, showOnce } from "./messages.js";
import { startObjects } from "./objects.js";
import { openFromAddress, startOpening } from "./opening.js";
import { startStage } from "./stage.js";
import { byId, store } from "./store.js";
import { startTheme } from "./theme.js";
import { startTransport } from "./transport.js";

function showServer(server) {
  byId("model").textContent = server.model;
  const megabytes = Math.round(server.max_upload_bytes / 2 ** 20);
  byId("limits").textContent =
    `Up to ${megabytes} MB and ${server.max_frames} frames. ` +
    `It is deleted when nobody has used it for ${+server.idle_minutes.toFixed(2)} minutes.`;
  byId("format").replaceChildren(
    ...server.formats.map((name) => {
      const option = document.createElement("option");
      option.value = option.textContent = name;
      return option;
    }),
  );
  byId("format").value = "all";
  allowChat(server.answers);
  for (const note of server.notes) showOnce(note);
}

startTheme();
startStage({ click, box });
startTransport();
startObjects({ remove, clear });
startActions();
startChat();
startJobs();
startOpening();
whenChanged(async () => store.session?.ready && refresh());
byId("help-button").addEventListener("click", () => byId("help").showModal());
try {
  store.server = await json("GET", "/server");
  showServer(store.server);
  await openFromAddress();
} catch (error) {
  showError(error);
}
document.body.dataset.ready = "true"; // for tests
