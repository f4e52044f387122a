// The conversation about the video.

import { byId, on, store } from "./store.js";

export function startChat() {
  on("session", () => {
    const talk = byId("talk");
    const lines = (store.session?.history ?? []).flatMap(([question, answer]) => {
      const [asked, said] = [document.createElement("dt"), document.createElement("dd")];
      asked.textContent = question;
      said.textContent = answer;
      return [asked, said];
    });
    if (lines.length === talk.children.length) return;
    talk.replaceChildren(...lines);
    talk.scrollTop = talk.scrollHeight;
  });
}

// Whether the model answers is known when the page begins.
export function allowChat(answers) {
  byId("question").disabled = byId("ask").disabled = !answers;
  byId("chat-note").textContent = answers ? "" : "This model does not answer questions.";
}
