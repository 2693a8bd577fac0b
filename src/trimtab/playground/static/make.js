// Make: a wish or pairs, a table to look over, a fit, and what came of it.

import { events } from "./api.js";
import { h, labelled, number, oops, put, say, signed } from "./dom.js";
import { get } from "./api.js";
import { state, writeAddress } from "./state.js";

let kept = null; // the rows that are looked over: {name, rows}
let running = null;

export function leave() {
  running?.abort();
  running = null;
}

export async function show(main, about) {
  const { builtin } = await get("library");
  const given = new URLSearchParams(location.hash.split("?")[1] || "").get("builtin");
  const wish = h("input", { type: "text", placeholder: "answers in one short sentence", onkeydown: (event) => { if (event.key === "Enter") from({ wish: wish.value }); } });
  const named = h("select", {}, builtin.map((each) => h("option", { value: each.name }, `${each.name}: ${each.positive}`)));
  const pasted = h("textarea", { rows: 4, placeholder: "prompt ⇥ positive ⇥ negative, one pair a line; or JSON lines" });
  const said = h("div", { "aria-live": "polite" });
  const table = h("div", {});
  const result = h("div", { "aria-live": "polite" });
  put(main, h("div", { class: "sheet" },
    h("div", { class: "intro" }, h("h1", {}, "Make"), h("p", { class: "note" }, "A steering is made of pairs: the same prompt answered as you wish, and as you do not. Let the model write them for a wish, take those that come with trimtab, or paste your own; then look them over and fit.")),
    h("section", { class: "card", "aria-label": "Where pairs come from" },
      h("div", { class: "ask" }, labelled("A wish", wish, { class: "field grow" }), h("button", { type: "button", onclick: () => from({ wish: wish.value }) }, "Write pairs")),
      h("div", { class: "ask" }, labelled("That come with trimtab", named, { class: "field grow" }), h("button", { type: "button", onclick: () => from({ builtin: named.value }) }, "Take these")),
      h("div", { class: "ask" }, labelled("Pasted", pasted, { class: "field grow" }), h("button", { type: "button", onclick: () => from({ pasted: pasted.value }) }, "Read these"))),
    said, table, result));
  if (given && builtin.some((each) => each.name === given)) { named.value = given; await from({ builtin: given }); }
  else draw();

  async function from(body) {
    if (!Object.values(body)[0].trim()) { put(said, oops(new Error("Write something first."))); return; }
    put(result);
    try {
      const done = await work("contrast", body, said);
      if (!done) return;
      kept = { name: done.name, rows: done.rows };
      say(`${done.rows.length} pairs to look over`);
      draw();
    } catch (error) {
      put(said, oops(error));
    }
  }

  function draw() {
    if (!kept) { put(table); return; }
    const count = h("h2", {});
    const body = h("tbody", {});
    const recount = () => { count.textContent = `${kept.rows.length} pairs`; };
    const shown = 60;
    const add = (row) => body.append(line(row));
    function line(row) {
      const cell = (key, label) => h("td", {}, h("textarea", { rows: 2, value: row[key], "aria-label": label, onchange: (event) => { row[key] = event.target.value; } }));
      const element = h("tr", {}, cell("prompt", "Prompt"), cell("positive", "Positive"), cell("negative", "Negative"),
        h("td", {}, h("button", { type: "button", class: "quiet", "aria-label": "Remove this pair", onclick: () => { kept.rows.splice(kept.rows.indexOf(row), 1); element.remove(); recount(); } }, "×")));
      return element;
    }
    kept.rows.slice(0, shown).forEach(add);
    recount();
    const rest = h("button", { type: "button", class: "quiet", onclick: () => { kept.rows.slice(shown).forEach(add); rest.remove(); } }, `Show the other ${kept.rows.length - shown}`);
    const name = h("input", { type: "text", value: kept.name.replace(/^.*:/, "").replaceAll(/[^A-Za-z0-9._-]+/g, "-").slice(0, 40), maxlength: 64 });
    const method = h("select", {}, Object.entries(about.methods).map(([key, words]) => h("option", { value: key }, `${key}: ${words}`)));
    put(table, h("section", { class: "card", "aria-label": "Pairs" },
      h("div", { class: "row" }, count, h("button", { type: "button", class: "quiet", onclick: () => { const row = { prompt: "", positive: "", negative: "", part: null }; kept.rows.unshift(row); body.prepend(line(row)); recount(); body.querySelector("textarea").focus(); } }, "Add a pair")),
      h("div", { class: "wide tall", tabindex: 0, role: "region", "aria-label": "Table of pairs" }, h("table", { class: "edit" },
        h("thead", {}, h("tr", {}, ["prompt", "positive", "negative"].map((head) => h("th", { scope: "col" }, head)), h("th", { scope: "col" }, h("span", { class: "unseen" }, "remove")))), body)),
      kept.rows.length > shown ? rest : null,
      h("div", { class: "ask" }, labelled("Method", method, { class: "field grow" }), labelled("Name", name), h("button", { type: "button", class: "main", onclick: () => fit(method.value, name.value) }, "Fit"))));
  }

  async function fit(method, name) {
    try {
      const done = await work("fit", { rows: kept.rows, method, name, source: kept.name }, result);
      if (!done) return;
      say(`${done.name} is made`);
      put(result, made(done));
    } catch (error) {
      put(result, oops(error));
    }
  }
}

function made(done) {
  const { gain, cost, dial } = done;
  const on = gain.held_out ? `${gain.n} pairs that were held out` : `the ${gain.n} pairs that it was fitted on: too few to hold some out`;
  return h("section", { class: "card", "aria-label": "What came of it" }, h("h2", {}, `${done.name} is in the library`),
    h("div", { class: "result" },
      h("div", {}, h("small", {}, "Gain"), h("br"), h("b", { "data-figure": "gain" }, signed(gain.value)), h("p", { class: "quiet-line" }, `nats of log-odds per pair [${signed(gain.ci95[0])}, ${signed(gain.ci95[1])}], on ${on}`)),
      h("div", {}, h("small", {}, "Cost"), h("br"), h("b", { "data-figure": "cost" }, signed(cost.value, 3)), h("p", { class: "quiet-line" }, `nats per token of plain text [${signed(cost.ci95[0], 3)}, ${signed(cost.ci95[1], 3)}]`))),
    h("p", { class: "quiet-line" }, `95 % intervals, at ${dial.name} ${number(dial.value)}${dial.unit}. Saved as ${done.file}.`),
    h("div", { class: "row" }, h("button", {
      type: "button", class: "main", onclick: () => { state.on = new Map([[done.name, { dial: dial.value }]]); writeAddress(); location.hash = location.hash.replace(/^#\/[a-z]*/, "#/chat"); },
    }, "Chat with it")));
}

// Long work, with how far it is; null where it was left.
async function work(path, body, place) {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  const bar = h("progress", { "aria-label": "Progress" });
  const what = h("p", { class: "note" }, "Waiting for the model …");
  put(place, h("div", { class: "card" }, what, bar));
  try {
    for await (const told of events(path, body, mine.signal)) {
      if (told.kind === "done") { put(place); return told; }
      what.textContent = `${told.what}: ${told.done} of ${told.total}`;
      bar.max = Math.max(told.total, 1);
      bar.value = told.done;
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
  return null;
}
