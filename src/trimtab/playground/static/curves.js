// Curves: what the next token does over the whole dial, and where the dial stands on it.

import { get, post } from "./api.js";
import { chart, mark, nearest } from "./chart.js";
import { h, labelled, number, oops, percent, put, signed, visible } from "./dom.js";
import { state, writeAddress } from "./state.js";

let asked = 0;

export function leave() {
  asked += 1;
}

export async function show(main, about) {
  const { steerings } = await get("library");
  if (!steerings.length) { put(main, h("p", { class: "note" }, "There is no steering yet. ", h("a", { href: "#/make" }, "Make one"), ".")); return; }
  if (!steerings.some((one) => one.name === state.look)) state.look = [...state.on.keys()][0] || steerings[0].name;
  const choice = h("select", { onchange: () => { state.look = choice.value; writeAddress(); run(); } }, steerings.map((one) => h("option", { value: one.name }, one.name)));
  choice.value = state.look;
  const prompt = h("input", { type: "text", value: state.prompt || (about.chats ? "What should I do today?" : "Today I feel"), onkeydown: (event) => { if (event.key === "Enter") run(); } });
  const tokens = h("input", { type: "text", placeholder: "the ones that gain most", onkeydown: (event) => { if (event.key === "Enter") run(); } });
  const found = h("div", { class: "sheet", "aria-live": "polite" });
  const button = h("button", { type: "button", class: "main", onclick: () => run() }, "Draw");
  put(main, h("div", { class: "sheet" },
    h("div", { class: "intro" }, h("h1", {}, "Curves"), h("p", { class: "note" }, "The next token after a prompt, at every dial: which tokens gain, how far the whole distribution moves (KL), and whether it sharpens or falls apart (entropy).")),
    h("div", { class: "ask" }, labelled("Steering", choice), labelled("Prompt", prompt, { class: "field grow" }), labelled("Tokens, with commas between", tokens), button), found));

  async function run() {
    const mine = ++asked;
    state.prompt = prompt.value;
    writeAddress();
    put(found, h("p", { class: "note" }, "Turning the dial …"));
    try {
      const words = tokens.value.split(",").filter((text) => text.trim()).slice(0, 12);
      const said = await post("curve", { name: choice.value, prompt: prompt.value, tokens: words });
      if (mine === asked) draw(found, said, steerings.find((one) => one.name === choice.value));
    } catch (error) {
      if (mine === asked) put(found, oops(error));
    }
  }
  run();
}

function draw(found, said, steering) {
  const { curve } = said;
  const own = state.on.get(steering.name);
  const at = own?.dial ?? said.setting;
  const spot = said.sweet_spot && [said.sweet_spot.start, said.sweet_spot.end];
  const label = curve.dial.name + curve.dial.unit;
  const values = h("ul", { class: "key" });
  const half = matchMedia("(max-width: 60rem)").matches ? found.clientWidth - 38 : (found.clientWidth - 24) / 2 - 38;
  const general = { xs: curve.dials, label, here: at, spot, onpick: (dial) => move(dial) };
  const charts = [
    chart({ ...general, title: "Tokens", unit: "change of probability", lines: curve.tokens.map((token) => ({ name: token.token, values: token.delta_p })), wide: found.clientWidth - 38, high: 260 }),
    chart({ ...general, title: "KL", wide: half, unit: "nats, unsteered ‖ steered", lines: [{ name: "KL", values: curve.kl }] }),
    chart({ ...general, title: "Entropy", wide: half, unit: `nats; ${number(curve.base_entropy)} unsteered`, lines: [{ name: "entropy", values: curve.entropy }] }),
  ];
  charts[0].box.append(values);
  const [low, high] = [curve.dials[0], curve.dials.at(-1)];
  const slider = h("input", { type: "range", min: low, max: high, step: (high - low) / 200, value: at, "aria-label": `${steering.name}: ${label}`, oninput: () => move(Number(slider.value)), onchange: keep });
  const stands = h("output", { class: "piece" });
  function move(dial) {
    slider.value = dial;
    const place = nearest(curve.dials, dial);
    stands.textContent = `${curve.dial.name} ${number(Number(slider.value))}${curve.dial.unit}`;
    slider.setAttribute("aria-valuetext", `${stands.textContent}, KL ${number(curve.kl[place])} nats`);
    for (const each of charts) each.turn(dial);
    put(values, curve.tokens.map((token, i) => h("li", {}, mark(i), h("code", {}, visible(token.token)), `${percent(Math.max(0, token.base_p + token.delta_p[place]))} (${signed(100 * token.delta_p[place], 1)})`)));
  }
  function keep() {
    state.on.set(steering.name, { ...(own?.scope ? { scope: own.scope } : {}), dial: Number(Number(slider.value).toPrecision(4)) });
    writeAddress();
  }
  move(at);
  put(found,
    h("div", { class: "row" }, h("div", { class: "field" }, h("span", {}, "The dial in the chat: ", stands)), slider),
    h("div", { class: "card" }, h("h2", {}, said.sweet_spot ? `Sweet spot: ${number(said.sweet_spot.start)} to ${number(said.sweet_spot.end)}` : "No sweet spot"), said.lines.slice(0, 1).map((line) => h("p", { class: "note" }, line)),
      said.sweet_spot ? h("div", { class: "row" }, h("button", { type: "button", onclick: () => { move(said.sweet_spot.best); keep(); } }, "Turn the dial there")) : null),
    charts[0].box, h("div", { class: "two" }, charts[1].box, charts[2].box));
}
