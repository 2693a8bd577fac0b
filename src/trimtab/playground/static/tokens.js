// An answer token by token: coloured by what the steerings changed, with a closer look at each.

import { h, oops, percent, put, say, signed, visible } from "./dom.js";

// Changes of a log-probability from so many nats on have the full colour.
const FULL = 3;
const tip = document.getElementById("token");

export function legend() {
  return h("div", { class: "legend" },
    h("span", {}, "less likely"), h("span", { class: "scale", "aria-hidden": "true" }), h("span", {}, "likelier by steering"),
    h("small", {}, `token log-probability, ±${FULL} nats; underlined: acted on`));
}

export class Tokens {
  constructor(side, name, actions) {
    this.side = side;
    this.actions = actions;
    this.active = -1;
    this.element = h("div", {
      class: "tokens", tabindex: name === "steered" ? 0 : null, role: name === "steered" ? "group" : null,
      "aria-label": name === "steered" ? "Steered answer; arrow keys go from token to token, Enter shows which sites push, Escape closes" : null,
    });
    this.pinned = false;
    if (name !== "steered") return;
    this.element.addEventListener("keydown", (event) => this.keyed(event));
    this.element.addEventListener("pointerover", (event) => { if (!this.pinned) this.look(this.place(event.target)); });
    this.element.addEventListener("pointerleave", () => { if (!this.pinned && document.activeElement !== this.element) this.close(); });
    this.element.addEventListener("click", (event) => { const place = this.place(event.target); if (place >= 0) this.pin(place); });
    this.element.addEventListener("blur", () => { if (!this.pinned) this.close(); });
  }

  refill() {
    put(this.element);
    this.spans = [];
    if (!this.side.evidence.length) { this.element.append(this.side.text); return; }
    this.side.pieces.forEach((piece, place) => this.span(piece, this.side.evidence[place]));
    if (this.side.acted || this.side.firing) this.fired(this.side.acted || this.side.firing);
  }

  add(text, evidence) {
    this.side.pieces = this.side.pieces || [];
    this.side.pieces.push(text);
    if (evidence) this.span(text, evidence);
    else if (text) this.element.append(text);
  }

  span(text, evidence) {
    const span = h("span", { class: "t", "data-place": this.spans.length }, text);
    const change = evidence.logp - evidence.base_logp;
    span.dataset.change = change.toFixed(4);
    span.dataset.kl = evidence.kl.toFixed(6);
    const share = Math.min(1, Math.abs(change) / FULL);
    span.classList.add(change >= 0 ? "up" : "down");
    span.style.setProperty("--share", share.toFixed(3));
    this.spans.push(span);
    this.element.append(span);
  }

  settle() {
    if (!this.side.evidence.length) put(this.element, this.side.text);
  }

  // Underlines a token at which a gate fires, while the answer is written.
  fires(place, fired) {
    this.spans?.[place]?.classList.toggle("acted", fired);
  }

  // Underlines tokens on which a steering acts.
  fired(steerings) {
    this.spans.forEach((span, place) => {
      const acts = steerings.some((one) => (one.answer[place] ?? 0) !== 0);
      span.classList.toggle("acted", acts);
    });
  }

  place(target) {
    const found = target.closest?.(".t");
    return found && this.element.contains(found) ? Number(found.dataset.place) : -1;
  }

  keyed(event) {
    if (!this.spans?.length) return;
    const last = this.spans.length - 1;
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key in moves) { event.preventDefault(); this.pinned = false; this.look(Math.min(last, Math.max(0, this.active + moves[event.key])), true); }
    else if (event.key === "Home" || event.key === "End") { event.preventDefault(); this.look(event.key === "Home" ? 0 : last, true); }
    else if (event.key === "Enter" && this.active >= 0) { event.preventDefault(); this.pin(this.active); }
    else if (event.key === "Escape") this.close();
  }

  close() {
    this.pinned = false;
    this.spans?.[this.active]?.classList.remove("looked");
    this.active = -1;
    tip.hidden = true;
  }

  look(place, aloud = false) {
    if (place < 0 || !this.spans[place]) return;
    this.spans[this.active]?.classList.remove("looked");
    this.active = place;
    const span = this.spans[place];
    span.classList.add("looked");
    const one = this.side.evidence[place];
    const change = one.logp - one.base_logp;
    const acted = (this.side.acted || []).filter((each) => (each.answer[place] ?? 0) !== 0).map((each) => each.name);
    const text = visible(this.side.pieces[place]);
    put(tip,
      h("div", { class: "row" }, h("b", { class: "piece" }, text), h("span", {}, `${percent(Math.exp(one.base_logp))} → ${percent(Math.exp(one.logp))}`), h("span", { class: "change" }, `${signed(change)} nats`)),
      h("p", { class: "quiet-line" }, `KL ${one.kl.toFixed(3)} · entropy ${one.base_entropy.toFixed(2)} → ${one.entropy.toFixed(2)} nats`, acted.length ? ` · ${acted.join(", ")} acts on it` : ""),
      h("div", { class: "tops" }, top("Before", one.base_top), top("After", one.top)),
      this.pushes = h("div", { class: "pushes" }, h("p", { class: "quiet-line" }, "Click, or press Enter: which sites push")));
    tip.hidden = false;
    beside(span);
    if (aloud) say(`${text}: ${signed(change)} nats, from ${percent(Math.exp(one.base_logp))} to ${percent(Math.exp(one.logp))}`);
  }

  async pin(place) {
    this.pinned = false;
    this.look(place);
    this.pinned = true;
    const box = this.pushes;
    put(box, h("p", { class: "quiet-line" }, "Looking which sites push …"));
    try {
      const found = await this.actions.pushes(place);
      const sites = [...found.sites].sort((one, other) => Math.abs(other.push) - Math.abs(one.push)).slice(0, 8);
      const most = Math.max(...sites.map((site) => Math.abs(site.push)), 0.01);
      put(box, h("h4", {}, "Sites that push"), h("p", { class: "quiet-line" }, "nats of this token's log-probability that go when the site alone is not steered"),
        h("ul", {}, sites.map((site) => h("li", {}, h("code", {}, site.site), bar(Math.abs(site.push) / most, site.push < 0 ? "down" : "up"), h("span", {}, signed(site.push))))));
      say(`Sites that push: ${sites.map((site) => `${site.site} ${signed(site.push)}`).join(", ")}`);
    } catch (error) {
      put(box, oops(error));
    }
    if (this.spans[place]) beside(this.spans[place]);
  }
}

function top(title, tokens) {
  return h("div", {}, h("h4", {}, title), h("ul", {}, tokens.map(([text, logp, other]) => h("li", {},
    h("code", {}, visible(text)), bar(Math.exp(logp), logp >= other ? (title === "After" ? "up" : "down") : "even"), h("span", {}, percent(Math.exp(logp)))))));
}

export function bar(share, kind) {
  const inner = h("i", { class: kind });
  inner.style.width = `${Math.max(1, 100 * share)}%`;
  return h("span", { class: "bar", "aria-hidden": "true" }, inner);
}

// Below its token, or above it; on a phone at the bottom of the screen, where the style has it.
function beside(span) {
  if (matchMedia("(max-width: 40rem)").matches) { tip.style.left = tip.style.top = ""; return; }
  const [at, own] = [span.getBoundingClientRect(), tip.getBoundingClientRect()];
  const left = Math.max(8, Math.min(at.left, innerWidth - own.width - 8));
  const below = at.bottom + 6 + own.height < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - own.height - 6)}px`;
}

document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
document.addEventListener("pointerdown", (event) => {
  if (!tip.hidden && !tip.contains(event.target) && !event.target.closest?.(".t")) tip.hidden = true;
});
