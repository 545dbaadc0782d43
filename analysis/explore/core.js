// What all parts of the page share: its state, which the address holds; requests; elements; text. Uses show, integer,
// percent and signs of report.js.

/** All that a view depends on, as text, with its defaults; an address holds only what differs from them. */
const DEFAULTS = {
  view: "sentence", text: "", latent: "", layer: "", token: "", sort: "layer_mean", against: "", shown: "24", pins: "", measure: "probs",
  changes: "", continued: "16", tokens: "", promotes: "", on: "", off: "", from_layer: "", to_layer: "", profile: "", explained: "",
};
/** The allowed values of those keys that do not take any text. */
export const KNOWN = {
  view: ["sentence", "search", "compare", "layers"], sort: ["layer_mean", "mass", "specificity", "effect"],
  shown: ["12", "24", "48", "96"], measure: ["probs", "counts", "means"],
};
export const state = { ...DEFAULTS };
const watchers = [];

/** Call `react` whenever one of these keys of the state has changed. */
export function watch(keys, react) { watchers.push([keys, react]); }

/** The address of the page with some of its state changed. */
export function address(changes) {
  const other = Object.entries({ ...state, ...changes }).filter(([key, value]) => value !== DEFAULTS[key]);
  return `${location.pathname}${location.search}#${new URLSearchParams(other)}`;
}

function arrive(next, first) {
  const changed = Object.keys(DEFAULTS).filter((key) => first || state[key] !== next[key]);
  Object.assign(state, next);
  for (const [keys, react] of watchers) if (keys.some((key) => changed.includes(key))) react();
}

/** Change the state, as a new entry of the browser's history or, if `quiet`, in place of the present one. Returns whether it changed. */
export function set(changes, quiet = false) {
  const next = { ...state, ...Object.fromEntries(Object.entries(changes).map(([key, value]) => [key, String(value)])) };
  if (Object.keys(DEFAULTS).every((key) => state[key] === next[key])) return false;
  history[quiet ? "replaceState" : "pushState"](null, "", address(next));
  arrive(next);
  return true;
}

/** Take the state from the address; `first`: react as if all of it were new. */
export function read(first = false) {
  const given = [...new URLSearchParams(location.hash.slice(1))].filter(([key, value]) => key in DEFAULTS && (KNOWN[key]?.includes(value) ?? true));
  arrive({ ...DEFAULTS, ...Object.fromEntries(given) }, first);
}
addEventListener("popstate", () => read());

export const pins = () => [...new Set(state.pins.split(",").filter(Boolean).map(Number))];
export const number = (text) => (text === "" ? null : Number(text));

const LONG = 2000; // ms

/** The answer of /api/NAME, to a POST if there is a `body`; throws an Error of one line if there is none. */
export async function ask(name, body, signal) {
  const headers = { "X-Token": new URLSearchParams(location.search).get("token") ?? "", "Content-Type": "application/json" };
  const request = body ? { method: "POST", headers, body: JSON.stringify(body), signal } : { headers };
  const response = await fetch(`/api/${name}`, request).catch(() => {
    throw new Error(signal?.aborted ? "Stopped." : "the server does not answer: is `residscope explore` still running?");
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

/** A function that sends a body to /api/NAME, one request at a time; of the bodies that wait, only the newest is sent. A
    slow request can be stopped with a button, and is stopped by a newer one. `status`: the element that reports progress. */
export function latest(name, status, show) {
  let n = 0, running = null, next = null, wanted = true;
  return async (body) => {
    wanted = Boolean(body);
    next = body && { ...body, n: ++n };
    if (running && next) say(status, "Waiting for the previous answer \u2026");
    if (running && (!next || performance.now() - running.began > LONG)) running.stop();
    if (running) return;
    while (next) {
      const mine = next, abort = new AbortController(), began = performance.now(), stop = () => abort.abort();
      next = null;
      running = { began, stop };
      say(status, "Computing \u2026");
      const offer = button("Stop", stop), timers = [setTimeout(() => status.after(offer), LONG / 2), setTimeout(() => next && stop(), LONG)];
      try {
        const answer = await ask(name, mine, abort.signal);
        if (answer.n !== mine.n) throw new Error("the server answered another request");
        const words = show(answer.found, mine);
        if (!next && wanted && words !== null) say(status, `${words} ${((performance.now() - began) / 1000).toFixed(2)} s.`);
      } catch (error) {
        if (!next && wanted) say(status, error.message, true);
      }
      timers.forEach(clearTimeout);
      offer.remove();
      running = null;
    }
  };
}

export function say(place, words, wrong = false) {
  place.textContent = words;
  place.classList.toggle("warning", wrong);
}

/** An element: properties that begin with "on" are listeners, `style` is an object; children may be nested lists. */
const maker = (create) => (name, props = {}, ...children) => {
  const made = create(name);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(made.style, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
};
export const h = maker((name) => document.createElement(name));
export const svg = maker((name) => document.createElementNS("http://www.w3.org/2000/svg", name));

/** Give a place new content; the control that had the focus has it again, with its text selected, as after the Tab key. */
export function fill(place, ...content) {
  const parts = () => [...place.querySelectorAll("button, a, input, select, [tabindex]")], at = parts().indexOf(document.activeElement);
  place.replaceChildren(...content);
  if (at < 0) return;
  parts()[at]?.focus({ preventScroll: true });
  parts()[at]?.select?.();
}

export const find = (id) => document.getElementById(id);
export const button = (words, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, words);

/** A link to the page with some of its state changed; a plain click changes the state without loading. */
export function link(words, changes, props = {}) {
  const onclick = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    set(changes);
  };
  return h("a", { href: address(changes), onclick, ...props }, words);
}

/** Text with invisible characters made visible, also spaces if there is nothing else. */
export const visible = (text) => signs(text.trim() ? text : text.replaceAll(" ", "\u00b7").replaceAll("\u00a0", "\u237d") || "\u00b7");
export const quoted = (text) => `\u201c${visible(text)}\u201d`;
export const counted = (n, word) => `${integer(n)} ${word}${n === 1 ? "" : "s"}`;
export const code = (words) => words.map((word) => [h("code", {}, visible(word)), " "]);

/** The first n characters of a text. */
export const cut = (text, n) => { const signs = [...text]; return signs.length > n ? `${signs.slice(0, n - 1).join("")}\u2026` : text; };

/** A table of numbers; the first column names the rows. */
export function table(head, rows, caption) {
  const line = (cells, first) => h("tr", {}, cells.map((cell, i) => h(first || i === 0 ? "th" : "td",
    { scope: first ? "col" : i === 0 ? "row" : null }, cell)));
  return h("div", { class: "scroll" }, h("table", { class: "numbers" }, h("caption", { class: "soft" }, caption),
    h("thead", {}, line(head, true)), h("tbody", {}, rows.map((cells) => line(cells, false)))));
}
