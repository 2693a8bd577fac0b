// Inside: where a steering acts, what a unit stands for, what a text is along its direction.

import { get, post } from "./api.js";
import { h, labelled, number, oops, percent, put, say, signed, visible } from "./dom.js";
import { state, writeAddress } from "./state.js";
import { bar } from "./tokens.js";

export async function show(main) {
  const { steerings } = await get("library");
  if (!steerings.length) { put(main, h("p", { class: "note" }, "There is no steering yet. ", h("a", { href: "#/make" }, "Make one"), ".")); return; }
  if (!steerings.some((one) => one.name === state.look)) state.look = [...state.on.keys()][0] || steerings[0].name;
  const choice = h("select", { onchange: () => { state.look = choice.value; writeAddress(); fill(); } }, steerings.map((one) => h("option", { value: one.name }, one.name)));
  choice.value = state.look;
  const found = h("div", { class: "sheet" });
  put(main, h("div", { class: "sheet" },
    h("div", { class: "intro" }, h("h1", {}, "Inside"), h("p", { class: "note" }, "Where the steering acts, block by block; which tokens its direction, or one of its units, stands for; and what a text is along it.")),
    h("div", { class: "ask" }, labelled("Steering", choice)), found));

  async function fill() {
    try {
      draw(found, choice.value, await get(`inside/${encodeURIComponent(choice.value)}`));
    } catch (error) {
      put(found, oops(error));
    }
  }
  await fill();
}

function draw(found, name, said) {
  const tokens = h("section", { class: "card", "aria-label": "Tokens", "aria-live": "polite" }, h("h2", {}, "Tokens"), h("p", { class: "note" }, "Choose a place on the map or a unit of the list."));
  const decode = (site, unit) => async (event) => {
    for (const other of found.querySelectorAll("[aria-pressed]")) other.setAttribute("aria-pressed", "false");
    event?.currentTarget.setAttribute("aria-pressed", "true");
    try {
      const told = await post("unit", { name, site, unit });
      const title = unit === null ? `What is added at ${site}` : `Unit ${unit} of ${site}`;
      put(tokens, h("h2", {}, title), h("p", { class: "quiet-line" }, "the likeliest tokens where the residual stream is this direction alone, as the final norm reads it"),
        h("div", { class: "pair" }, list("Toward", told.toward, "up"), list("Away from", told.away, "down")));
      say(`${title}: ${told.toward.slice(0, 5).map(([text]) => text).join(", ")}`);
    } catch (error) {
      put(tokens, h("h2", {}, "Tokens"), oops(error));
    }
  };
  put(found, map(said, decode), said.records.length ? units(said, decode) : null, tokens, projections(name, said));
  const adds = said.sites.find((site) => site.length !== null);
  if (adds) decode(adds.site, null)(null);
}

function list(title, tokens, kind) {
  return h("div", {}, h("h3", {}, title), h("ul", {}, tokens.map(([text, logp]) => h("li", {}, h("code", {}, visible(text)), bar(Math.exp(logp), kind), h("span", {}, percent(Math.exp(logp)))))));
}

// A row for each kind of site, a cell for each block.
function map(said, decode) {
  const kinds = [...new Set(said.sites.map((site) => site.kind))];
  const most = Math.max(...said.sites.map((site) => site.size), 1);
  return h("section", { class: "card", "aria-label": "Map" }, h("h2", {}, "Map"),
    h("p", { class: "quiet-line" }, `${said.sites.length} ${said.sites.length === 1 ? "site" : "sites"} in ${said.layers} blocks; darker: more units are changed`),
    h("div", { class: "map", tabindex: 0, role: "group", "aria-label": "Blocks from left to right" }, kinds.map((kind) => h("div", { class: "map-row" }, h("span", {}, kind),
      h("div", { class: "cells" }, Array.from({ length: said.layers }, (_, layer) => {
        const here = said.sites.filter((site) => site.kind === kind && site.layer === layer);
        const size = here.reduce((sum, site) => sum + site.size, 0);
        const cell = h("button", {
          type: "button", class: `cell ${size ? "on" : ""}`, disabled: !size, "aria-pressed": size ? "false" : null, onclick: size ? decode(here[0].site, null) : null,
          title: size ? `${here[0].site}: ${here.map((site) => site.operator).join(", ")} on ${size} of ${here[0].width} units${here[0].length === null ? "" : `, length ${number(here[0].length)}`}` : null,
          "aria-label": size ? `Block ${layer}, ${kind}: ${here[0].operator} on ${size} units` : `Block ${layer}, ${kind}: nothing`,
        }, size || layer === 0 || layer === said.layers - 1 ? String(layer) : "");
        cell.style.setProperty("--share", (size / most).toFixed(3));
        return cell;
      }))))));
}

function units(said, decode) {
  const columns = Object.keys(said.records[0]).filter((name) => name !== "site");
  return h("section", { class: "card", "aria-label": said.chosen }, h("h2", {}, `The ${said.of} ${said.chosen} that were chosen`),
    h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": said.chosen }, h("table", {},
      h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col", class: "number" }, name)), h("th", { scope: "col" }, h("span", { class: "unseen" }, "tokens")))),
      h("tbody", {}, said.records.slice(0, 24).map((record) => h("tr", {}, columns.map((name) => h("td", { class: "number" }, typeof record[name] === "number" ? number(record[name]) : String(record[name]))),
        h("td", {}, record.unit !== undefined && record.site ? h("button", { type: "button", class: "quiet", "aria-pressed": "false", "aria-label": `Tokens of unit ${record.unit} of ${record.site}`, onclick: decode(record.site, record.unit) }, "Tokens") : null)))))));
}

function projections(name, said) {
  const text = h("textarea", { rows: 2, value: state.prompt || "I am writing to inform you about the meeting. hey, wanna grab a bite?" });
  const places = h("select", {}, [...new Set(said.sites.map((site) => site.site))].map((site) => h("option", { value: site }, site)));
  const found = h("div", { "aria-live": "polite" });
  async function read() {
    try {
      const told = await post("projections", { name, text: text.value, site: places.value });
      const values = told.tokens.map(([, value]) => value);
      const middle = values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);
      const most = Math.max(...values.map((value) => Math.abs(value - middle)), 1e-9);
      put(found, h("p", { class: "coloured" }, told.tokens.map(([piece, value]) => {
        const share = Math.max(-1, Math.min(1, (value - middle) / most));
        const span = h("span", { class: `t ${share >= 0 ? "up" : "down"}`, title: `${visible(piece)}: ${number(value)}` }, piece);
        span.style.setProperty("--share", Math.abs(share).toFixed(3));
        span.dataset.value = value;
        return span;
      })), h("p", { class: "quiet-line" }, `the ${told.what} at ${told.site}, at unit length; mean ${number(middle)}, orange ${signed(most)} above, purple below; the text's first token, which is like no other, is not shown`));
    } catch (error) {
      put(found, oops(error));
    }
  }
  return h("section", { class: "card", "aria-label": "Along the direction" }, h("h2", {}, "Along the direction"),
    h("div", { class: "ask" }, labelled("Text", text, { class: "field grow" }), labelled("Site", places), h("button", { type: "button", onclick: read }, "Read")), found);
}
