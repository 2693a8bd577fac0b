// The same question elsewhere: lines that can be copied.

import { post } from "./api.js";
import { copy, h, oops, put } from "./dom.js";
import { stack, state } from "./state.js";

const NAMES = { python: "Python", cli: "Command line", curl: "curl", "llama.cpp": "llama.cpp" };

export async function copyLines(button) {
  const body = h("div", {});
  const dialog = h("dialog", { class: "lines", "aria-labelledby": "lines-title", onclose: () => { dialog.remove(); button.focus(); } },
    h("h2", { id: "lines-title" }, "The same, elsewhere"), body,
    h("form", { method: "dialog" }, h("button", { class: "quiet" }, "Close")));
  document.body.append(dialog);
  dialog.showModal();
  try {
    const found = await post("lines", {
      prompt: state.prompt || "Today I feel", system: state.system, steerings: stack(), sampling: state.sampling,
    });
    put(body, Object.entries(NAMES).map(([key, name]) => block(name, found[key])));
  } catch (error) {
    put(body, oops(error));
  }
}

export function block(name, text) {
  const button = h("button", { type: "button", class: "quiet", "aria-label": `Copy ${name}`, onclick: () => copy(text, button) }, "Copy");
  return h("section", { class: "block" }, h("div", { class: "row" }, h("h3", {}, name), button),
    h("pre", { tabindex: 0, role: "region", "aria-label": name }, text));
}
