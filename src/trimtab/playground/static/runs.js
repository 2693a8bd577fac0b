// Runs: the reports of a directory.

import { get } from "./api.js";
import { h, put } from "./dom.js";

export async function show(main, about) {
  const { runs } = await get("runs");
  const report = h("div", {});
  const intro = h("div", { class: "intro" }, h("h1", {}, "Runs"), h("p", { class: "note" }, about.runs ? `Reports in ${about.runs}.` : "Begin the playground with --runs DIR, and the reports of that directory are here."));
  const address = (run) => `reports/${run.path.split("/").map(encodeURIComponent).join("/")}/report.html`;
  const open = (run) => {
    put(report, h("div", { class: "row" }, h("h2", {}, run.path), h("a", { href: address(run), target: "_blank", rel: "noopener" }, "in a tab of its own")),
      h("iframe", { class: "report", src: address(run), title: `Report of ${run.path}`, sandbox: "" }));
    report.scrollIntoView({ block: "start" });
  };
  put(main, h("div", { class: "sheet" }, intro,
    runs.length ? h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Runs" }, h("table", {},
      h("thead", {}, h("tr", {}, ["run", "what", "model", "changed"].map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, runs.map((run) => h("tr", {}, h("td", {}, h("button", { type: "button", class: "quiet", onclick: () => open(run) }, run.path)), h("td", {}, run.what), h("td", {}, run.model), h("td", {}, new Date(1000 * run.changed).toLocaleString()))))))
      : about.runs ? h("p", { class: "note" }, "There is no report yet.") : null,
    report));
}
