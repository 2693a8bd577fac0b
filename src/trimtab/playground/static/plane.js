// Gain against cost: everything that was tried, the front, what was asked, what was chosen.

import { h, number, svg } from "./dom.js";

const [WIDE, HIGH, LEFT, RIGHT, TOP, BELOW] = [640, 260, 48, 14, 12, 40];

export function plane({ methods, front, prompts, chosen, max_cost: limit }) {
  const tried = methods.filter((one) => one.gain !== null);
  const own = methods.find((one) => one.state === "chosen");
  const points = [...tried, ...front, ...prompts].filter((one) => Number.isFinite(one.cost) && Number.isFinite(one.gain));
  const farthest = Math.max(limit, ...tried.map((one) => one.cost));
  const [left, right] = [Math.min(0, ...points.map((one) => one.cost)), 1.15 * Math.max(farthest, ...prompts.map((one) => Math.min(one.cost, 4 * limit)))];
  const [low, high] = [Math.min(0, ...points.map((one) => one.gain)), Math.max(1e-9, ...points.map((one) => one.gain)) * 1.08];
  const x = (cost) => LEFT + (WIDE - LEFT - RIGHT) * (Math.min(cost, right) - left) / (right - left || 1);
  const y = (gain) => TOP + (HIGH - TOP - BELOW) * (1 - (gain - low) / (high - low || 1));
  const spot = (one, kind, mark) => svg("g", { class: kind, transform: `translate(${x(one.cost).toFixed(1)},${y(one.gain).toFixed(1)})` }, svg("title", {}, `${one.name}: ${number(one.gain)} nats for ${number(one.cost)}`), mark());
  const round = (size) => () => svg("circle", { r: size });
  const ticks = (from, to) => [0, 1, 2, 3].map((i) => from + (to - from) * i / 3);
  const says = chosen ? `${own.name} gains ${number(own.gain)} nats for ${number(own.cost)}` : "nothing was chosen";
  return h("figure", {}, h("h3", {}, "Gain against cost, on validation pairs"),
    svg("svg", { class: "chart plane", viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": `Gain against cost of ${tried.length} settings and ${prompts.length} prompts: ${says}` },
      ticks(low, high).map((value) => [svg("line", { class: "axis", x1: LEFT, x2: WIDE - RIGHT, y1: y(value), y2: y(value) }), svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, 2))]),
      ticks(left, right).map((value) => svg("text", { x: x(value), y: HIGH - BELOW + 16, "text-anchor": "middle" }, number(value, 2))),
      svg("text", { x: (LEFT + WIDE) / 2, y: HIGH - 6, "text-anchor": "middle" }, "cost, nats per token of plain text"),
      svg("line", { class: "limit", x1: x(limit), x2: x(limit), y1: TOP, y2: HIGH - BELOW }),
      front.length > 1 ? svg("path", { class: "line-1", d: `M${front.map((one) => `${x(one.cost).toFixed(1)},${y(one.gain).toFixed(1)}`).join("L")}` }) : null,
      tried.map((one) => spot(one, "tried", round(3.5))), front.map((one) => spot(one, "front", round(4))),
      prompts.map((one) => spot(one, "asked", () => svg("rect", { x: -4.5, y: -4.5, width: 9, height: 9 }))),
      own ? spot(own, "chosen", () => svg("path", { d: "M0,-8L8,0L0,8L-8,0Z" })) : null),
    h("ul", { class: "key" }, [["tried", "tried", "●"], ["front", "front: nothing gains as much for less", "●"], ["asked", "asked for in a prompt", "■"], ["chosen", "chosen", "◇"]].map(([kind, text, mark]) => h("li", {}, h("span", { class: `mark ${kind}`, "aria-hidden": "true" }, mark), text)), h("li", {}, "dotted: the limit of cost")));
}
