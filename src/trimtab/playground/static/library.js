// Library: the steerings that are here, contrasts that come with trimtab, and the hub.

import { ask, get } from "./api.js";
import { copy, h, labelled, number, oops, put, say } from "./dom.js";
import { block } from "./lines.js";
import { state, writeAddress } from "./state.js";

export async function show(main, about) {
  const problem = h("div", {});
  const all = h("div", { class: "sheet" });
  const file = h("input", {
    type: "file", accept: ".safetensors", class: "unseen", id: "file", onchange: async () => {
      const [one] = file.files;
      if (!one) return;
      put(problem);
      try {
        const name = one.name.replace(/\.safetensors$/, "");
        await ask(`library/${encodeURIComponent(name)}`, undefined, { method: "PUT", headers: { "Content-Type": "application/octet-stream" }, body: one });
        say(`${name} is in the library`);
        await fill();
      } catch (error) {
        put(problem, oops(error));
      }
      file.value = "";
    },
  });
  put(main, h("div", { class: "sheet" },
    h("div", { class: "intro" }, h("h1", {}, "Library"), h("p", { class: "note" }, `Steerings for ${about.model}. Files that are made or opened here go to ${about.saves}.`)),
    h("div", { class: "row" }, h("button", { type: "button", onclick: () => file.click() }, "Open a file …"), labelled("A steering's file", file, { class: "unseen" })),
    problem, all));
  await fill();

  async function fill() {
    const found = await get("library");
    put(all,
      found.steerings.length ? h("div", { class: "shelf" }, found.steerings.map(one)) : h("p", { class: "note" }, "There is none yet: ", h("a", { href: "#/make" }, "make one"), ", or open a file."),
      found.refused.length ? h("section", { class: "card" }, h("h2", {}, "Left out"), h("ul", {}, found.refused.map((each) => h("li", {}, h("code", {}, each.file), `: ${each.why}`)))) : null,
      builtin(found.builtin), hub());
  }
}

function one(steering) {
  const more = h("div", {});
  const [low, high] = steering.dial.range;
  const open = h("button", {
    type: "button", class: "quiet", "aria-expanded": "false", onclick: async () => {
      if (more.childElementCount) { put(more); open.setAttribute("aria-expanded", "false"); return; }
      try {
        const card = await get(`library/${encodeURIComponent(steering.name)}`);
        put(more, card.says.map((line) => h("p", { class: "note" }, line)), h("p", { class: "quiet-line" }, card.file),
          h("details", {}, h("summary", {}, "As a card"), block("Markdown", card.card)));
        open.setAttribute("aria-expanded", "true");
      } catch (error) {
        put(more, oops(error));
      }
    },
  }, "Card");
  return h("article", { class: "card", "aria-label": steering.name },
    h("div", { class: "row" }, h("h2", {}, steering.name), h("small", {}, steering.method)),
    h("dl", { class: "facts" },
      h("dt", {}, "dial"), h("dd", {}, `${steering.dial.name} ${number(steering.dial.default)}${steering.dial.unit}, ${number(low)} to ${number(high)}`),
      h("dt", {}, "cost"), h("dd", {}, steering.cost === null ? "not measured" : `${number(steering.cost)} nats per token`),
      h("dt", {}, "at"), h("dd", {}, steering.where),
      h("dt", {}, "from"), h("dd", {}, steering.contrast || "–"),
      steering.gate ? [h("dt", {}, "gate"), h("dd", {}, steering.gate)] : null),
    h("div", { class: "row" },
      h("button", { type: "button", onclick: () => { state.on = new Map([[steering.name, { dial: steering.dial.default }]]); writeAddress(); location.hash = location.hash.replace(/^#\/[a-z]*/, "#/chat"); } }, "Chat with it"),
      h("button", { type: "button", class: "quiet", onclick: () => look(steering.name, "inside") }, "Inside"),
      h("button", { type: "button", class: "quiet", onclick: () => look(steering.name, "curves") }, "Curves"), open),
    more);
}

function look(name, page) {
  state.look = name;
  writeAddress();
  location.hash = location.hash.replace(/^#\/[a-z]*/, `#/${page}`);
}

function builtin(contrasts) {
  return h("details", { class: "card" }, h("summary", {}, h("h2", {}, `Contrasts that come with trimtab (${contrasts.length})`)),
    h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Contrasts" }, h("table", {},
      h("thead", {}, h("tr", {}, ["name", "positive side", "negative side", "pairs", ""].map((head) => h("th", { scope: "col" }, head || h("span", { class: "unseen" }, "what to do"))))),
      h("tbody", {}, contrasts.map((each) => {
        const button = h("button", { type: "button", class: "quiet", "aria-label": `Copy line that fits ${each.name}`, onclick: () => copy(each.line, button) }, "Copy line");
        return h("tr", {}, h("td", {}, each.name), h("td", {}, each.positive), h("td", {}, each.negative), h("td", {}, String(each.rows)),
          h("td", {}, h("div", { class: "row" }, h("a", { href: `#/make?builtin=${each.name}`, "aria-label": `Make a steering of ${each.name}` }, "Make"), button)));
      })))));
}

function hub() {
  const words = h("input", { type: "search", placeholder: "words of a name", onkeydown: (event) => { if (event.key === "Enter") search(); } });
  const found = h("div", { "aria-live": "polite" });
  async function search() {
    put(found, h("p", { class: "note" }, "Asking the hub …"));
    try {
      const said = await get(`hub?words=${encodeURIComponent(words.value)}`);
      put(found, said.error ? h("p", { class: "note" }, said.error) : said.found.length
        ? h("ul", {}, said.found.map((each) => h("li", {}, h("code", {}, each.repo ?? each.id ?? each.name), ` · ${each.method ?? ""} · ${each.model ?? ""}`)))
        : h("p", { class: "note" }, "Nothing was found."));
    } catch (error) {
      put(found, oops(error));
    }
  }
  return h("section", { class: "card" }, h("h2", {}, "On the hub"), h("p", { class: "note" }, "Asks the network, and only when you press the button."),
    h("div", { class: "ask" }, labelled("Words", words), h("button", { type: "button", onclick: search }, "Search")), found);
}
