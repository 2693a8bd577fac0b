// Chat: the model as it is and under steerings, side by side, and what the steerings changed.

import { events, get, post } from "./api.js";
import { choosing, panel } from "./dials.js";
import { h, number, oops, put, say, signed } from "./dom.js";
import { copyLines } from "./lines.js";
import { sampling, stack, state, writeAddress } from "./state.js";
import { Tokens, legend } from "./tokens.js";

// Conversations outlive a look at another page, and nothing else.
let turns = [];
let running = null; // the AbortController of what is being written
let waiting = null; // a turn of the dial that is not answered yet
let ui = {};
let about = {};

export async function show(main, facts) {
  about = facts;
  const { steerings } = await get("library");
  for (const name of [...state.on.keys()]) if (!steerings.some((one) => one.name === name)) state.on.delete(name);
  if (!location.hash.includes("s=") && state.on.size === 0 && steerings.length && !turns.length) {
    state.on.set(steerings[0].name, { dial: steerings[0].dial.default });
    writeAddress();
  }
  build(main, steerings);
  draw();
}

export function leave() {
  stop();
  hideToken();
}

function build(main, steerings) {
  ui = {
    talk: h("div", { class: "talk" }),
    figures: h("dl", { class: "figures" }),
    problem: h("div", {}),
    ask: h("textarea", { id: "ask", rows: 2, value: state.prompt, placeholder: about.chats ? "Ask something …" : "Begin a text …", "aria-label": "Your message", onkeydown: keyed, oninput: () => { state.prompt = ui.ask.value; writeAddress(); } }),
    send: h("button", { type: "button", class: "main", onclick: () => (running ? stop() : send()) }, "Send"),
  };
  const evidence = h("input", { type: "checkbox", checked: state.evidence, onchange: (event) => { state.evidence = event.target.checked; writeAddress(); main.classList.toggle("bare", !state.evidence); turned(); } });
  main.classList.toggle("bare", !state.evidence);
  const lines = h("button", { type: "button", class: "quiet", onclick: () => copyLines(lines) }, "Copy as …");
  const again = h("button", { type: "button", class: "quiet", onclick: fresh }, "New conversation");
  const wide = matchMedia("(min-width: 60rem)").matches;
  const side = h("aside", { class: "side", "aria-label": "Steerings" },
    h("details", { open: wide }, h("summary", {}, h("h2", {}, "Steerings")),
      steerings.length ? panel(steerings, turned) : empty(),
      choosing(turned),
      h("label", { class: "switch" }, evidence, h("span", {}, "Show what changed", h("small", {}, "off: plain speed")))),
    h("div", { class: "row" }, lines, again));
  put(main, side, h("section", { class: "stage", "aria-label": "Conversation" },
    h("div", { class: "measured", "aria-label": "What the steerings change in the last answer", role: "group" }, ui.figures, legend()),
    ui.talk, ui.problem,
    h("div", { class: "composer" }, ui.ask, ui.send)));
}

function empty() {
  return h("p", { class: "note" }, "There is no steering yet. ", h("a", { href: "#/make" }, "Make one"), ", or begin with ", h("code", {}, "--steer FILE"), ".");
}

function keyed(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!running) send(); }
  if (event.key === "Escape" && running) stop();
}

function fresh() {
  stop();
  turns = [];
  state.prompt = "";
  ui.ask.value = "";
  put(ui.problem);
  writeAddress();
  draw();
  ui.ask.focus();
}

// -- what is asked -----------------------------------------------------------------------------------

async function send() {
  const text = ui.ask.value;
  if (!text.trim()) return;
  state.prompt = text;
  writeAddress();
  turns.push({ user: text, plain: null, steered: null });
  ui.ask.value = "";
  await answer(["plain", "steered"]);
}

// A dial has turned: the last answer is steered anew, and the other one stays as it is.
function turned() {
  clearTimeout(waiting);
  const last = turns.at(-1);
  if (!last) return;
  waiting = setTimeout(() => {
    const done = last.plain?.ended && same(last.plain.sampling) && last.plain.system === state.system;
    answer(done ? ["steered"] : ["plain", "steered"]);
  }, 150);
}

function same(sampled) {
  return Object.keys(sampling).every((name) => sampled[name] === state.sampling[name]);
}

function messages(side, upTo) {
  const said = state.system && about.chats ? [{ role: "system", content: state.system }] : [];
  turns.slice(0, upTo + 1).forEach((turn, place) => {
    said.push({ role: "user", content: turn.user });
    if (place < upTo) said.push({ role: "assistant", content: turn[side]?.text ?? "" });
  });
  return said;
}

async function answer(sides) {
  stop();
  const place = turns.length - 1;
  const turn = turns[place];
  const mine = new AbortController();
  running = mine;
  put(ui.problem);
  const asked = { steerings: stack(), sampling: { ...state.sampling }, evidence: state.evidence };
  for (const side of sides) {
    turn[side] = { text: "", ids: [], evidence: [], ended: null, messages: messages(side, place), steerings: asked.steerings, sampling: asked.sampling, system: state.system };
    asked[side] = turn[side].messages;
  }
  draw();
  busy(true);
  try {
    for await (const told of events("chat", asked, mine.signal)) hear(turn, told);
  } catch (error) {
    if (error.name !== "AbortError") { put(ui.problem, oops(error)); for (const side of sides) if (!turn[side].ended) turn[side].ended = { reason: "error" }; }
  }
  if (running !== mine) return;
  running = null;
  busy(false);
  for (const side of sides) turn[side].view?.settle();
  if (turn.steered?.ids.length && sides.includes("steered")) await lookBack(turn);
}

function stop() {
  running?.abort();
  running = null;
  if (ui.send) busy(false);
}

function busy(is) {
  ui.send.textContent = is ? "Stop" : "Send";
  ui.send.classList.toggle("stopping", is);
  ui.talk.setAttribute("aria-busy", is);
}

function hear(turn, told) {
  const side = turn[told.side];
  if (told.kind === "dials") turn.steered && (turn.steered.dials = told.dials);
  if (told.kind === "begun") { side.gates = told.gates; foot(side); }
  if (told.kind === "gated") {
    side.firing = side.firing || side.steerings.map((one) => ({ name: one.name, answer: [] }));
    told.fired.forEach((fired, i) => { side.firing[i].answer[told.place] = fired === null ? null : Number(fired); });
    side.view.fires(told.place, told.fired.some(Boolean));
    foot(side);
  }
  if (told.kind === "failed") { side.ended = { reason: "failed", message: told.message }; foot(side); }
  if (told.kind === "token") {
    side.text += told.text;
    side.ids.push(told.id);
    side.view.add(told.text, told.evidence);
    if (told.evidence) { side.evidence.push(told.evidence); figures(side); }
    follow();
  }
  if (told.kind === "ended") {
    side.ended = told;
    side.text = told.text;
    foot(side);
    say(`${told.side === "plain" ? "Unsteered" : "Steered"} answer: ${told.text}`);
  }
}

// What takes a pass of the model by itself, once the answer is there: where scopes and gates acted,
// and what plain text costs where the dials stand.
async function lookBack(turn) {
  const side = turn.steered;
  const asked = resolved(side);
  if (!asked.length || !side.evidence.length) { figures(side); return; }
  try {
    const { steerings } = await post("acted", { messages: side.messages, steerings: asked, new: side.ids });
    side.acted = steerings;
    side.view.fired(steerings);
    foot(side);
    side.cost = await post("cost", { steerings: asked });
    figures(side);
  } catch (error) {
    put(ui.problem, oops(error));
  }
}

// The steerings of an answer where their dials stood, those turned by nats too.
function resolved(side) {
  return side.steerings.map((one, place) => {
    const { kl, ...rest } = one;
    return { ...rest, dial: side.dials?.[place]?.dial ?? one.dial };
  });
}

// -- what is drawn -----------------------------------------------------------------------------------

function draw() {
  hideToken();
  put(ui.talk, turns.length ? turns.map(drawn) : h("p", { class: "hello" }, about.chats ? "Ask something: the left side answers as the model is, the right side as it is steered." : "Begin a text: the left side goes on as the model does, the right side as it is steered."));
  figures(turns.at(-1)?.steered);
  follow();
}

function drawn(turn, place) {
  return h("article", { class: "turn-of-talk", "aria-label": `Turn ${place + 1}` },
    h("p", { class: "user" }, turn.user),
    h("div", { class: "sides" }, column(turn, "plain", "Unsteered"), column(turn, "steered", "Steered")));
}

function column(turn, name, title) {
  const side = turn[name];
  if (!side) return h("div", { class: `answer ${name}` });
  side.view = new Tokens(side, name, { pushes: (at) => post("pushes", { messages: side.messages, steerings: resolved(side), new: side.ids, place: at }) });
  side.foot = h("footer", {});
  const box = h("div", { class: `answer ${name}` }, h("h3", {}, title), side.view.element, side.foot);
  side.view.refill();
  foot(side);
  return box;
}

function foot(side) {
  if (!side.foot) return;
  const parts = [];
  if (side.dials?.length) parts.push(side.dials.map((one, i) => `${one.name} @ ${number(one.dial)}${side.steerings[i].kl ? ` (${number(side.steerings[i].kl)} nats)` : ""}`).join(" + "));
  if (side.ended?.tokens !== undefined) parts.push(`${side.ended.tokens} tokens`, `${number(side.ended.tokens / Math.max(side.ended.seconds, 0.001), 2)} per second`);
  if (side.ended?.reason === "length") parts.push("cut off");
  const gates = (side.gates || []).map((gate) => h("span", { class: `gate ${gate.fired ? "fired" : ""}` }, `${gate.kind} gate ${gate.fired ? "fires" : "is closed"}: score ${number(gate.scores[0])} against ${number(gate.thresholds[0])}`));
  const live = side.acted ? [] : (side.firing || []).filter((one) => one.answer.some((fired) => fired !== null)).map((one) => h("span", { class: "gate" }, `${one.name}: its token gate fired at ${one.answer.filter(Boolean).length} of ${one.answer.length} answer tokens so far`));
  const acted = (side.acted || []).map((one) => {
    const here = one.answer.filter((weight) => weight !== 0).length;
    const before = one.prompt.filter((weight) => weight !== 0).length;
    return h("span", { class: "gate" }, `${one.name} acted on ${before} of ${one.prompt.length} prompt tokens and ${here} of ${one.answer.length} answer tokens (${one.scopes.join(", ")})`);
  });
  put(side.foot, side.ended?.message ? h("p", { class: "error" }, side.ended.message) : null, parts.length ? h("span", {}, parts.join(" · ")) : null, gates, live, acted);
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : NaN;
}

function figures(side) {
  const seen = side?.evidence ?? [];
  const kl = mean(seen.map((one) => one.kl));
  const [after, before] = [mean(seen.map((one) => one.entropy)), mean(seen.map((one) => one.base_entropy))];
  const cost = side?.cost;
  put(ui.figures,
    figure("KL per token", Number.isFinite(kl) ? kl.toFixed(3) : "–", "nats, unsteered ‖ steered", "kl", spark(seen.map((one) => one.kl))),
    figure("Cost", cost ? signed(cost.value, 3) : "–", cost ? `nats per token of plain text [${signed(cost.ci95[0])}, ${signed(cost.ci95[1])}]` : "nats per token of plain text", "cost"),
    figure("Entropy", Number.isFinite(after) ? after.toFixed(2) : "–", Number.isFinite(before) ? `nats; ${before.toFixed(2)} unsteered` : "nats", "entropy"));
}

function figure(name, value, unit, key, more = null) {
  return h("div", { "data-figure": key }, h("dt", {}, name), h("dd", {}, h("b", {}, value), more, h("small", {}, unit)));
}

// KL token by token, as bars.
function spark(values) {
  if (values.length < 2) return null;
  const shown = values.slice(-48);
  const most = Math.max(...shown, 0.2);
  return h("span", { class: "spark", "aria-hidden": "true" }, shown.map((value) => {
    const bar = h("i", {});
    bar.style.height = `${Math.max(4, 100 * value / most)}%`;
    return bar;
  }));
}

function follow() {
  if (running) ui.talk.scrollTop = ui.talk.scrollHeight;
}

function hideToken() {
  document.getElementById("token").hidden = true;
}
