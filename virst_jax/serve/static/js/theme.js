// Light, dark, or as the system has it.

import { byId, changed } from "./store.js";

const THEMES = ["system", "light", "dark"];

function apply(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
  changed("view");
}

export function startTheme() {
  let theme = localStorage.getItem("virst theme");
  if (!THEMES.includes(theme)) theme = "system";
  apply(theme);
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem("virst theme", theme);
    apply(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => changed("view"));
}
