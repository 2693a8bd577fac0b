// Lines over the dial, drawn by hand: one panel each for tokens, KL and entropy.

import { h, number, svg } from "./dom.js";

// A colour and a dash each, so that no colour is needed to tell lines apart; style.css has the colours.
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "1 3", "12 4"];
const [LEFT, RIGHT, TOP, BELOW] = [52, 12, 10, 28];

// lines: [{name, values}], over xs; here: the dial's place, spot: the sweet spot, both on the axis.
export function chart({ title, xs, lines, unit, label, wide = 640, high = 190, here, spot, onpick }) {
  const all = lines.flatMap((line) => line.values).filter(Number.isFinite);
  let [low, top] = [Math.min(0, ...all), Math.max(...all, 1e-9)];
  if (title === "Entropy") low = Math.min(...all) * 0.95;
  const span = top - low || 1;
  const x = (value) => LEFT + (wide - LEFT - RIGHT) * (value - xs[0]) / (xs.at(-1) - xs[0]);
  const y = (value) => TOP + (high - TOP - BELOW) * (1 - (value - low) / span);
  const cursor = svg("line", { class: "here", y1: TOP, y2: high - BELOW, x1: x(here), x2: x(here) });
  const picture = svg("svg", { class: "chart", viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": `${title}: ${described(lines, xs)}` },
    spot ? svg("rect", { class: "spot", x: Math.min(x(spot[0]), x(spot[1])), width: Math.max(2, Math.abs(x(spot[1]) - x(spot[0]))), y: TOP, height: high - TOP - BELOW }) : null,
    ticks(low, top, 4).map((value) => [
      svg("line", { class: "axis", x1: LEFT, x2: wide - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, 2)),
    ]),
    ticks(xs[0], xs.at(-1), Math.max(3, Math.round(wide / 120))).map((value) => svg("text", { x: x(value), y: high - 9, "text-anchor": "middle" }, number(value))),
    svg("text", { x: wide - RIGHT, y: high - BELOW - 6, "text-anchor": "end" }, label),
    lines.map((line, i) => svg("path", {
      d: `M${line.values.map((value, at) => `${x(xs[at]).toFixed(1)},${y(value).toFixed(1)}`).join("L")}`,
      class: `line-${i % DASHES.length}`, "stroke-dasharray": DASHES[i % DASHES.length] || null,
    })),
    cursor);
  if (onpick) {
    picture.addEventListener("click", (event) => {
      const box = picture.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width * wide - LEFT) / (wide - LEFT - RIGHT);
      onpick(xs[0] + Math.min(1, Math.max(0, at)) * (xs.at(-1) - xs[0]));
    });
  }
  const value = h("output", {}, "");
  const box = h("figure", { class: "card" }, h("div", { class: "row" }, h("h2", {}, title), h("small", {}, unit), value), picture);
  return { box, turn(to) { cursor.setAttribute("x1", x(to)); cursor.setAttribute("x2", x(to)); value.textContent = reading(lines, xs, to); } };
}

// Round numbers between two, about so many.
function ticks(from, to, count) {
  const rough = (to - from) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((times) => unit * times >= rough);
  const first = Math.ceil(from / step - 1e-9);
  return Array.from({ length: Math.floor(to / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

export function nearest(xs, to) {
  return xs.reduce((best, value, i) => (Math.abs(value - to) < Math.abs(xs[best] - to) ? i : best), 0);
}

function reading(lines, xs, to) {
  return lines.length === 1 ? number(lines[0].values[nearest(xs, to)]) : "";
}

function described(lines, xs) {
  return lines.map((line) => `${line.name} from ${number(line.values[0])} at ${number(xs[0])} to ${number(line.values.at(-1))} at ${number(xs.at(-1))}`).join("; ");
}

export function mark(i) {
  return svg("svg", { width: 26, height: 8, "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 4, y2: 4, class: `line-${i % DASHES.length}`, "stroke-width": 2.5, "stroke-dasharray": DASHES[i % DASHES.length] || null }));
}
