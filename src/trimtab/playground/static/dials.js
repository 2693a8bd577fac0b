// The panel of steerings: which are on, where each dial stands, on which tokens they act.

import { h, labelled, number, put } from "./dom.js";
import { state, writeAddress } from "./state.js";

const SCOPES = ["all", "prompt", "generated", "generated & !thinking", "generated[:32]"];

// `changed(name)` hears of every change that is settled; `turning(name)` while a slider moves.
export function panel(steerings, changed, turning = () => {}) {
  const list = h("div", { class: "dials" });
  function redraw() {
    const focus = document.activeElement?.dataset?.key;
    put(list, steerings.map((one) => card(one, redraw, changed, turning)));
    if (focus) list.querySelector(`[data-key="${CSS.escape(focus)}"]`)?.focus();
  }
  redraw();
  return list;
}

function card(one, redraw, changed, turning) {
  const turned = state.on.get(one.name);
  const settle = (again = true) => { writeAddress(); if (again) redraw(); changed(one.name); };
  const box = h("input", {
    type: "checkbox", checked: turned !== undefined, "data-key": `${one.name} on`, id: `on-${one.name}`,
    onchange: (event) => {
      if (event.target.checked) state.on.set(one.name, { dial: one.dial.default });
      else state.on.delete(one.name);
      settle();
    },
  });
  const head = h("label", { class: "name", for: box.id }, box, h("span", {}, one.name), h("small", {}, one.method));
  if (!turned) return h("div", { class: "dial off" }, head);
  return h("div", { class: "dial" }, head, slider(one, turned, settle, turning), strengths(one, turned, settle), scope(one, turned, settle));
}

function slider(one, turned, settle, turning) {
  const nats = turned.kl !== undefined;
  const alone = state.on.size === 1;
  const [low, high] = nats ? [0.01, 2] : one.dial.range;
  const step = nats ? 0.01 : Number(((high - low) / 200).toPrecision(1));
  const value = nats ? turned.kl : turned.dial ?? one.dial.default;
  const what = nats ? "KL budget in nats" : `${one.dial.name}${one.dial.unit}`;
  const field = h("input", { type: "number", value: Number(value.toPrecision(4)), step: "any", min: nats ? 0.001 : null, "aria-label": `${one.name}: ${what}, exact` });
  const set = (text) => {
    const next = Number(text);
    if (!Number.isFinite(next) || (nats && next <= 0)) return false;
    state.on.set(one.name, { ...turned, [nats ? "kl" : "dial"]: next });
    return true;
  };
  const range = h("input", {
    type: "range", min: low, max: high, step, value, "data-key": `${one.name} range`,
    "aria-label": `${one.name}: ${what}`, "aria-valuetext": `${number(value)}${nats ? " nats" : one.dial.unit}`,
    oninput: (event) => {
      if (!set(event.target.value)) return;
      field.value = event.target.value;
      range.setAttribute("aria-valuetext", `${number(Number(event.target.value))}${nats ? " nats" : one.dial.unit}`);
      turning(one.name);
    },
    onchange: () => settle(false),
  });
  field.addEventListener("change", () => { if (set(field.value)) { range.value = field.value; settle(false); } });
  const mode = h("select", {
    "aria-label": `${one.name}: turn by`, disabled: !alone && !nats, title: alone ? null : "A budget in nats turns one steering alone",
    onchange: (event) => {
      const { scope: own } = turned;
      state.on.set(one.name, { ...(event.target.value === "nats" ? { kl: 0.1 } : { dial: one.dial.default }), ...(own ? { scope: own } : {}) });
      settle();
    },
  }, h("option", { value: "dial" }, one.dial.name), h("option", { value: "nats", disabled: !alone }, "nats"));
  mode.value = nats ? "nats" : "dial";
  const beyond = h("small", { class: "beyond" });
  const warn = () => { const at = Number(field.value); beyond.textContent = !nats && (at < low || at > high) ? `beyond its sensible range, ${number(low)} to ${number(high)}` : ""; };
  warn();
  field.addEventListener("change", warn);
  range.addEventListener("input", warn);
  return h("div", { class: "turn" }, range, h("div", { class: "exact" }, field, mode), beyond);
}

function strengths(one, turned, settle) {
  const named = Object.entries(one.strengths || {});
  if (!named.length || turned.kl !== undefined) return null;
  return h("div", { class: "strengths" }, named.map(([word, dial]) => h("button", {
    type: "button", class: "chip", "aria-pressed": Math.abs(turned.dial - dial) < 1e-9, "data-key": `${one.name} ${word}`,
    title: `${one.dial.name} ${number(dial)}${one.dial.unit}`,
    onclick: () => { state.on.set(one.name, { ...turned, dial }); settle(); },
  }, word)));
}

function scope(one, turned, settle) {
  const own = one.scopes.join(", ");
  const choices = [...new Set([...SCOPES, ...(turned.scope ? [turned.scope] : [])])];
  const field = h("select", {
    "aria-label": `${one.name}: acts on`,
    onchange: (event) => {
      const { scope: _, ...rest } = turned;
      state.on.set(one.name, event.target.value ? { ...rest, scope: event.target.value } : rest);
      settle();
    },
  }, h("option", { value: "" }, `acts on: ${own} (its own)`), choices.map((each) => h("option", { value: each }, `acts on: ${each}`)));
  field.value = turned.scope || "";
  return h("div", { class: "scope" }, field, one.gate ? h("small", {}, `${one.gate} gate`) : null);
}

// -- how tokens are chosen -------------------------------------------------------------------------

export function choosing(changed) {
  const field = (label, name, more) => labelled(label, h("input", {
    type: "number", value: state.sampling[name], ...more,
    onchange: (event) => {
      const value = Number(event.target.value);
      if (event.target.value !== "" && Number.isFinite(value)) { state.sampling[name] = value; writeAddress(); changed(); }
    },
  }));
  return h("details", { class: "choosing" }, h("summary", {}, "How tokens are chosen"),
    h("div", { class: "fields" },
      field("temperature (0 is greedy)", "temperature", { min: 0, max: 10, step: 0.1 }),
      field("top p", "top_p", { min: 0.01, max: 1, step: 0.05 }),
      field("seed", "seed", { min: 0, step: 1 }),
      field("most tokens", "max_tokens", { min: 1, max: 4096, step: 1 }),
      labelled("system message", h("textarea", {
        rows: 2, value: state.system, onchange: (event) => { state.system = event.target.value; writeAddress(); changed(); },
      }), { class: "field wide" })));
}
