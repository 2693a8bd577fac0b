// Make: a wish or pairs, a table to look over, and a steering that is made of it behind the page.
// What goes on is kept by the server: a page that is opened again finds it.

import { get, post } from "./api.js";
import { h, labelled, number, oops, put, say, signed } from "./dom.js";
import { plane } from "./plane.js";
import { state, writeAddress } from "./state.js";

const SHOWN = 60; // rows of the table at first
const OFTEN = 1000; // milliseconds between two looks at what goes on
let kept = null; // the rows that are looked over: {name, behaviour, opposite, rows}
let watching = 0; // who looks at the work that goes on; a page that is left looks no more

export function leave() {
  watching += 1;
}

export async function show(main) {
  const [{ builtin }, job] = await Promise.all([get("library"), get("job?whole=true")]);
  const given = new URLSearchParams(location.hash.split("?")[1] || "").get("builtin");
  const wish = h("input", { type: "text", placeholder: "answers in one short sentence", onkeydown: (event) => { if (event.key === "Enter") from({ wish: wish.value }); } });
  const named = h("select", {}, builtin.map((each) => h("option", { value: each.name }, `${each.name}: ${each.positive}`)));
  const pasted = h("textarea", { rows: 4, placeholder: "prompt ⇥ positive ⇥ negative, one pair a line; or JSON lines" });
  const work = h("div", {});
  const problem = h("div", {});
  const table = h("div", {});
  const result = h("div", {});
  put(main, h("div", { class: "sheet" },
    h("div", { class: "intro" }, h("h1", {}, "Make"), h("p", { class: "note" }, "A steering is made of pairs: the same prompt answered as you wish, and as you do not. Let the model write them for a wish, take those that come with trimtab, or paste your own; look them over; then many methods are tried, and what gains most within a limit of cost is measured on pairs that nothing was chosen on.")),
    h("section", { class: "card", "aria-label": "Where pairs come from" },
      h("div", { class: "ask" }, labelled("A wish", wish, { class: "field grow" }), h("button", { type: "button", onclick: () => from({ wish: wish.value }) }, "Write pairs")),
      h("div", { class: "ask" }, labelled("That come with trimtab", named, { class: "field grow" }), h("button", { type: "button", onclick: () => from({ builtin: named.value }) }, "Take these")),
      h("div", { class: "ask" }, labelled("Pasted", pasted, { class: "field grow" }), h("button", { type: "button", onclick: () => from({ pasted: pasted.value }) }, "Read these"))),
    work, problem, result, table));
  if (job.kind === "make") kept = { as: job.asked.name, name: job.asked.source, behaviour: job.asked.behaviour, opposite: job.asked.opposite, rows: job.asked.rows };
  if (given && builtin.some((each) => each.name === given)) { named.value = given; await from({ builtin: given }); } else draw();
  if (job.state !== "none") heard(job);

  async function from(body) {
    if (!Object.values(body)[0].trim()) { put(problem, oops(new Error("Write something first."))); return; }
    await trying(async () => {
      const found = await post("contrast", body);
      if (body.wish) { put(result); await watch(found); } else { put(result); take(found); }
    });
  }

  async function trying(act) {
    put(problem);
    try {
      await act();
    } catch (error) {
      put(problem, oops(error));
    }
  }

  function take(found) {
    kept = found;
    say(`${found.rows.length} pairs to look over`);
    draw();
  }

  // -- what goes on ------------------------------------------------------------------------------

  function heard(job) {
    put(work, goesOn(job) ? going(job, stop) : null);
    put(problem);
    if (goesOn(job)) { trying(() => watch(job)); return; }
    if (job.state === "failed") put(problem, oops(new Error(job.error)));
    if (job.state === "stopped") put(problem, h("p", { class: "note" }, job.kind === "make" ? `${job.name} was stopped: made again of the same pairs under the same name it goes on where it was.` : "It was stopped."));
    if (job.state !== "done") return;
    if (job.kind === "pairs") take(job.result);
    else { say(`${job.name}: ${job.result.summary}`); put(result, made(job.result)); }
  }

  async function watch(job) {
    const mine = watching += 1;
    let at = job;
    while (goesOn(at)) {
      put(work, going(at, stop));
      await new Promise((resolve) => { setTimeout(resolve, OFTEN); });
      if (mine !== watching) return;
      at = await get("job");
      if (mine !== watching) return;
    }
    heard(await get("job?whole=true"));
  }

  function stop(job) {
    trying(() => post("job/stop", { name: job.name }));
  }

  // -- the table ---------------------------------------------------------------------------------

  function draw() {
    if (!kept) { put(table); return; }
    const count = h("h2", {});
    const body = h("tbody", {});
    const recount = () => { count.textContent = `${kept.rows.length} pairs`; };
    const add = (row) => body.append(line(row));
    function line(row) {
      const cell = (key, label) => h("td", {}, h("textarea", { rows: 2, value: row[key], "aria-label": label, onchange: (event) => { row[key] = event.target.value; } }));
      const element = h("tr", {}, cell("prompt", "Prompt"), cell("positive", "Positive"), cell("negative", "Negative"),
        h("td", {}, h("button", { type: "button", class: "quiet", "aria-label": "Remove this pair", onclick: () => { kept.rows.splice(kept.rows.indexOf(row), 1); element.remove(); recount(); } }, "×")));
      return element;
    }
    kept.rows.slice(0, SHOWN).forEach(add);
    recount();
    const rest = h("button", { type: "button", class: "quiet", onclick: () => { kept.rows.slice(SHOWN).forEach(add); rest.remove(); } }, `Show the other ${kept.rows.length - SHOWN}`);
    const name = h("input", { type: "text", value: kept.as || kept.name.replace(/^.*:/, "").replaceAll(/[^A-Za-z0-9._-]+/g, "-").slice(0, 40), maxlength: 64, onchange: () => { kept.as = name.value; } });
    const limit = h("input", { type: "number", value: "0.1", min: "0.001", max: "10", step: "any" });
    const minutes = h("input", { type: "number", min: "0.1", step: "any", placeholder: "as long as it takes" });
    const begin = () => trying(async () => {
      const body = { rows: kept.rows, name: name.value, source: kept.name, behaviour: kept.behaviour, opposite: kept.opposite, max_cost: Number(limit.value), minutes: minutes.value ? Number(minutes.value) : null };
      const job = await post("make", body);
      put(result);
      work.scrollIntoView({ block: "nearest" });
      await watch(job);
    });
    put(table, h("section", { class: "card", "aria-label": "Pairs" },
      h("div", { class: "row" }, count, h("button", { type: "button", class: "quiet", onclick: () => { const row = { prompt: "", chat: kept.rows.some((each) => each.chat), positive: "", negative: "", part: null }; kept.rows.unshift(row); body.prepend(line(row)); recount(); body.querySelector("textarea").focus(); } }, "Add a pair")),
      h("div", { class: "wide tall", tabindex: 0, role: "region", "aria-label": "Table of pairs" }, h("table", { class: "edit" },
        h("thead", {}, h("tr", {}, ["prompt", "positive", "negative"].map((head) => h("th", { scope: "col" }, head)), h("th", { scope: "col" }, h("span", { class: "unseen" }, "remove")))), body)),
      kept.rows.length > SHOWN ? rest : null,
      h("div", { class: "ask" }, labelled("Name", name), labelled("Cost at most, nats per token", limit), labelled("Minutes at most", minutes), h("button", { type: "button", class: "main", onclick: begin }, "Make"))));
  }
}

function goesOn(job) {
  return ["waiting", "running", "stopping"].includes(job.state);
}

function going(job, stop) {
  const { what, done, total } = job.progress;
  const bar = h("progress", total ? { "aria-label": "Progress", max: total, value: done } : { "aria-label": "Progress" });
  bar.value = total ? done : bar.value;
  const doing = job.state === "waiting" ? "Waiting for the model …" : job.state === "stopping" ? "Stopping at its next step …" : what ? `${what}: ${done} of ${total}` : "Beginning …";
  return h("section", { class: "card", "aria-label": "What goes on" },
    h("div", { class: "row" }, h("h2", {}, job.kind === "make" ? `Making ${job.name}` : `Writing pairs: ${job.name}`), h("small", {}, clock(job.seconds))),
    h("p", { class: "note" }, doing), bar,
    job.said.length ? h("pre", { class: "said", tabindex: 0, "aria-label": "What it said" }, job.said.slice(-8).join("\n")) : null,
    h("p", { class: "quiet-line" }, "It goes on when this page is closed. Answers in the chat wait until it is done."),
    h("div", { class: "row" }, h("button", { type: "button", disabled: job.state === "stopping", onclick: () => stop(job) }, "Stop")));
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}

// -- what came of it ---------------------------------------------------------------------------------

function made(done) {
  const { chosen, prompt_baseline: asked } = done.made;
  const chat = () => {
    state.on = new Map([[done.name, { dial: chosen.dial }]]);
    writeAddress();
    location.hash = location.hash.replace(/^#\/[a-z]*/, "#/chat");
  };
  return h("section", { class: "card", "aria-label": "What came of it" },
    h("h2", {}, done.file ? `${done.name} is in the library` : `Nothing works for ${done.name}`),
    h("p", {}, done.summary),
    chosen ? h("div", { class: "result" },
      figure("Gain", "gain", chosen.gain, chosen.gain_ci95, 2, `nats per pair, on ${chosen.n} test pairs`),
      figure("Cost", "cost", chosen.cost, chosen.cost_ci95, 3, "nats per token of plain text"),
      asked?.part === "test" ? figure("Just asking", "asked", asked.gain, asked.gain_ci95, 2, `nats per pair, for ${signed(asked.cost, 3)} nats per token`) : null) : null,
    h("ul", { class: "notes" }, done.notes.map((line) => h("li", {}, line))),
    done.made.methods.some((one) => one.gain !== null) ? plane(done.made) : null,
    methods(done.made.methods), samples(done.made.written.samples),
    h("p", { class: "quiet-line" }, `95 % intervals. Report, samples and what to do next are in ${done.directory}.`),
    chosen ? h("div", { class: "row" }, h("button", { type: "button", class: "main", onclick: chat }, "Chat with it")) : null);
}

function figure(name, key, value, ci95, digits, says) {
  return h("div", {}, h("small", {}, name), h("br"), h("b", { "data-figure": key }, signed(value, digits)), h("p", { class: "quiet-line" }, `[${signed(ci95[0], digits)}, ${signed(ci95[1], digits)}] ${says}`));
}

function methods(rows) {
  const ranked = [...rows].sort((one, other) => (other.gain ?? -Infinity) - (one.gain ?? -Infinity));
  const heads = ["method", "", "gain, nats per pair", "pairs", "dial", "cost", "to know"];
  return h("details", {}, h("summary", {}, h("h3", {}, `Every method that was tried (${rows.length})`)),
    h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Methods" }, h("table", {},
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, ranked.map((one) => h("tr", {}, h("td", {}, one.name), h("td", {}, one.state),
        h("td", {}, one.gain === null ? "" : `${signed(one.gain)} [${signed(one.gain_ci95[0])}, ${signed(one.gain_ci95[1])}]`),
        h("td", {}, one.gain === null ? "" : one.n), h("td", {}, number(one.dial)), h("td", {}, one.cost === null ? "" : signed(one.cost, 3)), h("td", {}, one.why)))))));
}

function samples(rows) {
  if (!rows.length) return null;
  const last = (prompt) => (typeof prompt === "string" ? prompt : prompt.at(-1).content ?? prompt.at(-1)[1]);
  return h("details", { open: true }, h("summary", {}, h("h3", {}, `What it writes (${rows.length})`)),
    rows.slice(0, 6).map((row) => h("div", { class: "sample" }, h("p", { class: "user" }, last(row.prompt)),
      h("div", { class: "sides" }, Object.entries({ unsteered: row.unsteered, ...row.steered }).map(([name, text]) => h("div", { class: `answer ${name}` }, h("h4", {}, name), h("p", { class: "tokens" }, text)))))));
}
