// Puts the pages together: which is shown, by the address; light or dark.

import { get } from "./api.js";
import * as chat from "./chat.js";
import * as curves from "./curves.js";
import { h, oops, put } from "./dom.js";
import * as inside from "./inside.js";
import * as library from "./library.js";
import * as make from "./make.js";
import * as runs from "./runs.js";
import { address, readAddress, state } from "./state.js";

const PAGES = { chat, make, curves, inside, library, runs };
const NAMES = { chat: "Chat", make: "Make", curves: "Curves", inside: "Inside", library: "Library", runs: "Runs" };
const main = document.getElementById("page");
const nav = document.querySelector("nav.pages");
export const about = {};
let shown = null;

// -- light and dark --------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
const button = document.getElementById("theme");

function dress(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  button.textContent = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" }[theme];
  button.setAttribute("aria-label", `Colours: ${theme}. Change`);
}

function kept() {
  try {
    const theme = localStorage.getItem("theme");
    return THEMES.includes(theme) ? theme : "auto";
  } catch {
    return "auto";
  }
}

button.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(kept()) + 1) % THEMES.length];
  try {
    localStorage.setItem("theme", next);
  } catch { /* then it is for this page only */ }
  dress(next);
});

// -- pages -----------------------------------------------------------------------------------------

function links() {
  put(nav, Object.entries(NAMES).map(([page, name]) =>
    h("a", { href: address(page), "aria-current": page === state.page ? "page" : null }, name)));
}

async function show() {
  readAddress();
  if (!(state.page in PAGES)) state.page = "chat";
  links();
  document.title = `${NAMES[state.page]} – trimtab`;
  if (shown?.leave) shown.leave();
  shown = PAGES[state.page];
  main.className = state.page;
  try {
    await shown.show(main, about);
  } catch (error) {
    put(main, oops(error));
  }
}

window.addEventListener("hashchange", show);
document.addEventListener("address", links);
dress(kept());
try {
  Object.assign(about, await get("about"));
  document.getElementById("model").textContent = about.model;
  await show();
} catch (error) {
  put(main, oops(error));
}
document.documentElement.dataset.ready = "yes";
