// What the address says: the page, the steerings with their dials, how tokens are chosen, the prompt.
// #/chat?s=formality@2&s=calm@kl=0.1&q=Hello

export const sampling = { max_tokens: 128, temperature: 0, top_p: 1, seed: 0 };
const LETTERS = { max_tokens: "n", temperature: "t", top_p: "p", seed: "r" };

export const state = {
  page: "chat",
  on: new Map(), // name -> {dial} or {kl}, and scope
  sampling: { ...sampling },
  evidence: true,
  prompt: "",
  system: "",
  look: "", // the steering that Curves and Inside show
};

export function readAddress() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const given = new URLSearchParams(query || "");
  state.page = path || "chat";
  state.on = new Map();
  for (const part of given.getAll("s")) {
    const [name, dial, scope] = part.split("@");
    const turned = {};
    if (dial && dial.startsWith("kl=")) turned.kl = Number(dial.slice(3));
    else if (dial) turned.dial = Number(dial);
    if (scope) turned.scope = scope;
    if (name && !Object.values(turned).some(Number.isNaN)) state.on.set(name, turned);
  }
  for (const [name, letter] of Object.entries(LETTERS)) {
    const value = Number(given.get(letter));
    state.sampling[name] = given.has(letter) && Number.isFinite(value) ? value : sampling[name];
  }
  state.evidence = given.get("e") !== "0";
  state.prompt = given.get("q") || "";
  state.system = given.get("sys") || "";
  state.look = given.get("look") || "";
}

export function address(page = state.page) {
  const said = new URLSearchParams();
  for (const [name, turned] of state.on) {
    const dial = turned.kl !== undefined ? `kl=${turned.kl}` : turned.dial ?? "";
    said.append("s", [name, dial, turned.scope || ""].join("@").replace(/@+$/, ""));
  }
  for (const [name, letter] of Object.entries(LETTERS)) {
    if (state.sampling[name] !== sampling[name]) said.set(letter, state.sampling[name]);
  }
  if (!state.evidence) said.set("e", "0");
  if (state.prompt) said.set("q", state.prompt);
  if (state.system) said.set("sys", state.system);
  if (state.look) said.set("look", state.look);
  const query = said.toString();
  return `#/${page}${query ? `?${query}` : ""}`;
}

// The page is the same one: what was changed is written down, and nothing is loaded.
export function writeAddress() {
  history.replaceState(null, "", address());
  document.dispatchEvent(new Event("address"));
}

export function stack() {
  return [...state.on].map(([name, turned]) => ({ name, ...turned }));
}
