import { h, put } from "./dom.js";
export function show(main) { put(main, h("p", {}, "soon")); }
