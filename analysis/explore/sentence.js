// A sentence: where its latents are on, over layers and tokens; which switch at a token; what a change does.

import { DENSE, denseMark } from "./card.js";
import { figure, heatMap, switches } from "./charts.js";
import { button, counted, cut, fill, find, h, latest, link, number, pins, quoted, say, set, state, visible, watch } from "./core.js";

const MUCH = 5; // nats
let prompt = null, answered = null; // answered: key of the changes whose outcome is shown; null before any were run
let effectsAsked = ""; // the prediction whose effects were requested last
let wrong = ""; // the message about an invalid field, shown until it is corrected
const ask = latest("prompt", find("sentence-status"), (found, asked) => {
  if (asked.text !== state.text) return "";
  prompt = found;
  if (!found.effects) effectsAsked = "";
  find("sentence-found").classList.remove("outdated");
  draw();
  nameLatents();
  if (answered === null && changes().length) run(); // from a shared address
  const n = found.tokens.filter((token) => token.kept).length;
  const full = asked.text.length >= find("text").maxLength ? " The text has reached the limit; anything more is cut off." : "";
  return `${counted(n, "token")}, ${counted(found.n_active_latents, "latent")} on.${full}`;
});
const change = latest("intervene", find("change-status"), (found, asked) => {
  if (asked.text !== state.text) return "The text has changed in the meantime.";
  answered = key(asked);
  find("outcome").replaceChildren(...outcome(found, asked).filter(Boolean));
  find("outcome").scrollIntoView({ block: "nearest" });
  if (age()) return null;
  return `KL(before \u2016 after) at the last token ${show(found.kl_last)} nats, mean over tokens ${show(found.kl_mean)}.`;
});
const asking = () => ({ text: state.text, changes: changes(), continue_tokens: Number(state.continued) });
const key = ({ text, changes: of, continue_tokens: n }) => JSON.stringify([text, of, n]);
function run() {
  if (!state.text.trim()) return say(find("sentence-status"), "Type a sentence: the changes are run once it has been read.");
  if (!prompt) return; // they are run once it has been read
  answered ??= "";
  change(asking());
}

/** Mark an outcome of other changes than those listed now as outdated. Returns whether it is, or a field is invalid. */
function age() {
  const old = find("outcome").childNodes.length > 0 && answered !== key(asking());
  find("outcome").classList.toggle("outdated", old);
  if (old || wrong) say(find("change-status"), wrong || "The outcome below is of earlier changes: press Run.", true);
  return old || Boolean(wrong);
}

/** The position of the chosen token, or -1. */
const tokenChosen = () => (state.token !== "" && prompt.tokens[state.token]?.kept ? Number(state.token) : -1);

/** The prediction by whose effects latents are ordered, if they are. */
const effects = () => (state.sort === "effect" ? prompt.effects : undefined);

/** If latents are ordered by effect, ask once for the effects on the token after the chosen one, or after the text. */
function askForEffects() {
  const at = tokenChosen(), after = at < 0 ? prompt.tokens.length - 1 : at, others = (at < 0 ? prompt.next : prompt.tokens[at].next).slice(1).map((one) => one.token);
  const against = others.includes(state.against) ? state.against : "", one = state.sort === "effect" ? JSON.stringify([after, against, state.text]) : "";
  find("against-label").hidden = !one;
  fill(find("against"), ...["", ...others].map((token) => h("option", { value: token, selected: token === against }, token ? quoted(visible(token)) : "no other token")));
  const there = prompt.effects?.after === after && (prompt.effects.against ?? "") === against;
  if (one && one !== effectsAsked && prompt.text === state.text && !there) ask({ text: state.text, effects_after: after, effects_against: against });
  effectsAsked = one;
}

/** The latents on at the chosen token, or anywhere if none is chosen or they are ordered by effect (`all`), and those shown
    (`found`), in their order: the most specific, those with the most mass, or those with the largest effects. Specificity
    at a token is m ln(m / expected mass), as in the text, with the mass m at the token and its share of the expected mass. */
function chosen() {
  if (effects()) {
    const found = prompt.latents.toSorted((a, b) => Math.abs(b.effect) - Math.abs(a.effect)).slice(0, Number(state.shown));
    return { all: prompt.latents, found, strongest: found[0]?.latent };
  }
  const token = tokenChosen(), many = Number(state.shown), n = prompt.tokens.filter((one) => one.kept).length;
  const mass = (one) => (token < 0 ? one.mass : one.cells.reduce((sum, cell) => sum + (cell[0] === token ? cell[2] : 0), 0));
  const specific = (one, m) => (token < 0 ? one.specificity : m * (Math.log((n * m) / one.mass) + one.specificity / one.mass));
  const rows = prompt.latents.map((one) => ({ one, mass: mass(one) })).filter((row) => row.mass > 0);
  for (const row of rows) row.specificity = specific(row.one, row.mass);
  const by = { layer_mean: (a, b) => a.one.layer_mean - b.one.layer_mean, mass: (a, b) => b.mass - a.mass, specificity: (a, b) => b.specificity - a.specificity };
  const first = rows.sort(by[state.sort === "mass" ? "mass" : "specificity"]).slice(0, many), strongest = first[0]?.one.latent;
  return { all: rows.map((row) => row.one), found: first.sort(by[state.sort]).map((row) => row.one), strongest };
}

function draw() {
  find("sentence-found").hidden = !prompt;
  if (!prompt) return;
  askForEffects();
  const { tokens, layers } = prompt, { all, found } = chosen(), token = tokenChosen(), of = effects();
  const read = h("p", { class: "readout", role: "status" }, "Point at a cell, or focus a map and use the arrow keys. Rows are layers, the first at the bottom; columns are tokens.");
  const word = (c) => `token ${c} ${quoted(tokens[c].token)}`;
  fill(find("tokens"), h("span", { class: "soft" }, "Choose a token:"), ...tokens.map(({ token: text, kept }, i) => button(visible(text),
    () => set({ token: token === i ? "" : i }), { "aria-pressed": String(i === token), disabled: !kept, "aria-label": `token ${i}: ${visible(text)}` })));
  const dense = (one) => (one.share_of_tokens > DENSE ? `dense, fires at ${percent(one.share_of_tokens)} of the analysed tokens; ` : "");
  const signed = (value) => `${value > 0 ? "+" : ""}${show(value)}`, nats = (value) => `${signed(value)} nats`;
  const cellAt = (one, c, layer) => one.cells.find(([position, at]) => position === c && at === layer) ?? [c, layer, 0, 0];
  const maps = found.map((one) => heatMap(one.cells.map(([c, layer, value, effect]) => [c, layers.indexOf(layer), of ? Math.abs(effect) : value]), layers, tokens.map((token) => visible(token.token.trim() || token.token)), {
    label: `Latent ${one.latent}, ${of ? `effect ${nats(one.effect)} at layer ${one.effect_layer}, ` : ""}mean layer in this text ${show(one.layer_mean)}, ${dense(one)}fires on ${one.fires_on.join(" ")}`, read, chosen: [token, state.latent === String(one.latent) && state.layer ? layers.indexOf(Number(state.layer)) : -1],
    title: of ? `${one.latent}${dense(one) && " (dense)"}: ${signed(one.effect)}` : cut(`${one.latent}${dense(one) && " (dense)"}: ${one.fires_on.slice(0, 3).map(visible).join(" ")}`, 28), top: (value) => (of ? `layer ${one.effect_layer}` : `to ${show(value)}`),
    say: (c, r, v) => `Latent ${one.latent} (${dense(one)}mean layer in this text ${show(one.layer_mean)}), ${word(c)}, layer ${layers[r]}: activation ${show(cellAt(one, c, layers[r])[2])}${of ? `, effect ${nats(cellAt(one, c, layers[r])[3])}` : ""}.`,
    pick: (c, r) => set({ latent: one.latent, layer: layers[r], ...(of ? {} : { token: tokens[c].kept ? c : "" }) }),
  }));
  ofSentence(maps[0]);
  const where = of || token < 0 ? "in the sentence" : `at ${word(token)}`;
  const rows = () => [["latent", "position", "token", "layer", "activation", ...(of ? ["effect_nats"] : [])], ...found.flatMap((one) => one.cells.map(([c, layer, value, effect]) => [one.latent, c, tokens[c].token, layer, value, ...(of ? [effect] : [])]))];
  const foremost = of ? `the largest effects, in nats, on ${quoted(visible(of.token))}${of.against ? ` against ${quoted(visible(of.against))}` : ""} after ${word(of.after)}` : `the most ${state.sort === "mass" ? "active" : "specific"} ${token >= 0 ? "there" : state.sort === "mass" ? "in it" : "to it"}`;
  const picture = figure(`${found.length} of ${integer(of || token < 0 ? prompt.n_active_latents : all.length)} latents on ${where}: ${foremost}`, "latents", maps, rows, of && h("p", { class: "note" },
    `Effect: how far the log probability of that token${of.against ? ", minus the other's," : ""} would fall, to first order, if the latent were taken out after one layer; below 0, the latent works against the token. Above each map: the sum over tokens at the layer where it is furthest from 0. Darker cells have larger effects. Ablate a latent to see its whole effect.`), read);
  fill(find("maps"), ...(of || token < 0 ? [] : [switching(found, all, token, word(token), dense)]), picture);
  const next = (list) => list.map(({ token: text, p_true }) => [h("span", {}, h("code", {}, visible(text)), ` ${percent(p_true)}`), "  "]);
  const before = tokens.slice(tokens.findIndex((one) => one.kept), token + 1).map((one) => one.token).join("");
  find("next").replaceChildren(h("p", {}, h("b", {}, "The model's next token: "), next(prompt.next)), ...(token < 0 ? [] : [h("p", {}, h("b", {}, `After ${word(token)}: `), next(tokens[token].next),
    prompt.text.startsWith(before) && before !== prompt.text && link("Cut the text here to change what follows", { text: before, token }))]));
}

/** Put the sentence into a drawing's legend, which is saved with it. */
function ofSentence(drawing) {
  if (drawing) drawing.dataset.legend = `${quoted(cut(prompt.text, 80))} ${drawing.dataset.legend}`;
  return drawing;
}

/** Which latents switch on, stay on and switch off from layer to layer at a token: `found` are drawn, `all` are counted. */
function switching(found, all, token, word, dense) {
  const { layers } = prompt, read = h("p", { class: "readout told", role: "status" });
  const of = (some) => some.map((one) => ({ one, on: new Map(one.cells.filter((cell) => cell[0] === token).map(([, layer, value]) => [layers.indexOf(layer), value])) }));
  const rows = of(found); // in the chosen order; by default, by the layer where each switches on
  if (state.sort === "layer_mean") rows.sort((a, b) => Math.min(...a.on.keys()) - Math.min(...b.on.keys()) || Math.max(...a.on.keys()) - Math.max(...b.on.keys()));
  const step = h("select", { id: "switch-step", onchange: tell }, layers.slice(1).map((layer, i) => h("option", { value: i }, `${layers[i]} \u2192 ${layer}`)));
  function tell() {
    const i = Number(step.value), kinds = { "switch on": [], stay: [], "switch off": [] };
    for (const { one, on } of of(all)) if (on.has(i) || on.has(i + 1)) kinds[!on.has(i) ? "switch on" : on.has(i + 1) ? "stay" : "switch off"].push(one.latent);
    read.replaceChildren(...Object.entries(kinds).map(([kind, who]) => h("span", {}, h("b", {}, `${who.length} ${kind} `),
      who.slice(0, 24).map((latent) => [link(String(latent), { latent, layer: layers[i + 1] }), " "]), who.length > 24 && `and ${who.length - 24} more`)));
  }
  const drawn = switches(rows.map(({ one, on }) => ({ name: `Latent ${one.latent}`, words: `${one.latent}${dense(one) && " (dense)"}: ${one.fires_on.slice(0, 3).map(visible).join(" ")}`, on,
    chosen: state.latent === String(one.latent), pick: () => set({ latent: one.latent, layer: layers[Math.min(...on.keys())] }) })), layers, { label: `Latents on at ${word}, by layer` });
  if (layers.length > 1) tell();
  return figure(`Switching on and off over the layers at ${word}: ${found.length} of ${all.length} latents, the most ${state.sort === "mass" ? "active" : "specific"} there`, "switches", ofSentence(drawn),
    () => [["latent", "layer", "activation"], ...rows.flatMap(({ one, on }) => [...on].map(([i, value]) => [one.latent, layers[i], value]))],
    h("p", { class: "note" }, "\u25cf first layer of a run, \u25cb its last, \u25c9 both. Line width: activation, scaled for each latent. Right: its highest activation there, and the layer of that."), layers.length > 1 && h("label", {}, `Of all ${all.length} latents on there, between layers `, step), read);
}

/** The changes in the address: KIND:LATENT:LAYERS[:COEFFICIENT], layers as 3.4.5 or "all". */
function changes() {
  return state.changes.split(" ").filter(Boolean).map((words) => {
    const [kind, latent, layers, coefficient] = words.split(":");
    return { kind, latent: Number(latent), layers: layers === "all" || !layers ? "all" : layers.split(".").map(Number), coefficient: kind === "steer" ? Number(coefficient) : null };
  });
}

/** The layers of "4" or "4-7". */
function span(words) {
  const [first, last = first] = words.match(/\d+/g).map(Number);
  return Array.from({ length: Math.max(1, Math.min(last - first + 1, 1000)) }, (_, i) => first + i);
}

/** The rows in which changes are edited. */
function editor() {
  const write = (list) => set({ changes: list.map((one) => [one.kind, one.latent, [one.layers].flat().join("."), ...(one.kind === "steer" ? [one.coefficient ?? 1] : [])].join(":")).join(" ") });
  const list = changes(), edit = (i, key, value) => write(list.map((one, k) => (k === i ? { ...one, [key]: value } : one)));
  const layersOf = (text) => (text.trim() === "all" ? "all" : /^\s*\d+(\s*[-\u2013]\s*\d+|[\s,;]+\d+)*\s*$/.test(text) ? text.match(/\d+(\s*[-\u2013]\s*\d+)?/g).flatMap(span) : null);
  const put = (i, key, value, wanted, text) => {
    if (wrong) say(find("change-status"), "");
    wrong = value === null ? `${wanted}, found \u201c${text}\u201d` : "";
    if (wrong) age();
    else edit(i, key, value);
  };
  // After the focus has moved on, because the fields are rebuilt.
  const later = (act) => (event) => setTimeout(act, 0, event.target.value);
  fill(find("changes"), ...list.map((one, i) => h("fieldset", {}, h("legend", { class: "soft" }, `Change ${i + 1}`),
    h("select", { "aria-label": "Kind", onchange: later((value) => edit(i, "kind", value)) }, ["ablate", "steer"].map((kind) => h("option", { selected: kind === one.kind }, kind))),
    h("label", {}, "latent ", h("input", { type: "number", min: 0, value: one.latent, onchange: later((text) => put(i, "latent", /^\d+$/.test(text) ? Number(text) : null, "latent should be a whole number", text)) })),
    h("span", { class: "soft", "data-latent": one.latent }), h("label", {}, "layers ", h("input", { value: [one.layers].flat().join(" "), placeholder: "all, or 3 4 5", onchange: later((text) => put(i, "layers", layersOf(text), "layers should be all, or numbers such as 3 4 5 or 3-5", text)) })),
    one.kind === "steer" && h("label", {}, "add activation ", h("input", { type: "number", step: "any", value: one.coefficient, onchange: later((text) => put(i, "coefficient", number(text), "the activation to add should be a number", text)) })),
    button("Remove", () => write(list.filter((_, k) => k !== i)), { "aria-label": `Remove change ${i + 1}` }))));
  find("run").disabled = !list.length;
  wrong = "";
  nameLatents();
  age();
}

/** Say beside each change what its latent fires on, if it is on in the text. */
function nameLatents() {
  for (const place of find("changes").querySelectorAll("[data-latent]")) {
    const one = prompt?.latents.find((other) => String(other.latent) === place.dataset.latent);
    place.replaceChildren(...(one ? [`${one.fires_on.slice(0, 3).map(visible).join(" ")} `, denseMark(one.share_of_tokens) || ""] : []));
  }
}

function outcome(found, asked) {
  const list = (name, tokens) => h("div", {}, h("h4", {}, name), h("ol", { class: "next" }, tokens.map(({ token, p }) => h("li", {}, h("i", { style: { width: `${(8 * p).toFixed(2)}rem` } }), h("code", {}, visible(token)), ` ${percent(p)}`))));
  const moved = (sign, tokens) => tokens.map((one) => [`${sign} `, h("code", {}, visible(one.token)), ` ${percent(one.p_true)} \u2192 ${percent(one.p_changed)}  `]);
  const said = (name, text) => h("div", {}, h("h4", {}, name), h("p", { class: "text" }, h("span", { class: "soft" }, asked.text.slice(-60)), h("b", {}, text)));
  const words = asked.changes.map((one) => `${one.kind} ${one.latent} at ${one.layers === "all" ? "all layers" : `layer${one.layers.length > 1 ? "s" : ""} ${one.layers.join(", ")}`}${one.kind === "steer" ? ` by ${one.coefficient}` : ""}`);
  return [h("h3", {}, words.join(", ")), ...found.notes.map((note) => h("p", { class: "note" }, note)), found.kl_last > MUCH && h("p", { class: "warning" }, `A KL divergence above ${MUCH} nats: little of the model's own prediction is left. A smaller change tells more.`),
    h("div", { class: "columns narrow" }, list("Next token, before", found.next_true), list("Next token, after", found.next_changed)),
    h("p", {}, h("span", { class: "soft" }, "Probability rose most: "), moved("\u25b2", found.increased)), h("p", {}, h("span", { class: "soft" }, "fell most: "), moved("\u25bc", found.decreased)),
    asked.continue_tokens > 0 && h("div", { class: "columns narrow" }, said("Continuation, before", found.text_true), said("Continuation, after", found.text_changed))];
}

find("text").addEventListener("input", () => set({ text: find("text").value, token: "" }, true));
for (const name of ["sort", "shown", "against"]) find(name).addEventListener("change", (event) => set({ [name]: event.target.value }));
find("continued").addEventListener("change", (event) => set({ continued: event.target.value }, true));
find("add").addEventListener("click", () => set({ changes: `${state.changes} ablate:${state.latent || pins()[0] || (prompt && chosen().strongest) || 0}:all`.trim() }));
find("run").addEventListener("click", () => setTimeout(run)); // after the change event of a field that was just left
find("changes").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.target.tagName !== "INPUT") return;
  find("run").focus();
  find("run").click();
});
watch(["text"], () => {
  if (find("text").value !== state.text) find("text").value = state.text;
  find("outcome").replaceChildren();
  find("sentence-found").classList.add("outdated");
  say(find("change-status"), "");
  if (state.text.trim()) ask({ text: state.text });
  else {
    prompt = null;
    ask(null);
    draw();
    say(find("sentence-status"), "");
    find("sentence-status").replaceChildren("Type here, or start with ", link(find("text").placeholder, { text: find("text").placeholder }), ". Search finds latents without a sentence.");
  }
});
watch(["token", "sort", "against", "shown", "latent", "layer", "continued"], () => {
  for (const name of ["sort", "shown", "continued"]) find(name).value = state[name];
  draw();
});
watch(["continued"], age);
watch(["changes"], editor);
