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
  const token = tokenChosen(), after = token < 0 ? prompt.tokens.length - 1 : token;
  const others = (token < 0 ? prompt.next : prompt.tokens[token].next).slice(1).map((likely) => likely.token);
  const against = others.includes(state.against) ? state.against : "", wanted = state.sort === "effect" ? JSON.stringify([after, against, state.text]) : "";
  find("against-label").hidden = !wanted;
  fill(find("against"), ...["", ...others].map((other) => h("option", { value: other, selected: other === against }, other ? quoted(visible(other)) : "no other token")));
  const known = prompt.effects?.after === after && (prompt.effects.against ?? "") === against;
  if (wanted && wanted !== effectsAsked && prompt.text === state.text && !known) ask({ text: state.text, effects_after: after, effects_against: against });
  effectsAsked = wanted;
}

/** The latents on at the chosen token, or anywhere if none is chosen or they are ordered by effect (`all`), and those shown
    (`found`), in their order: the most specific, those with the most mass, or those with the largest effects. Specificity
    at a token is m ln(m / expected mass), as in the text, with the mass m at the token and its share of the expected mass. */
function chosen() {
  const most = Number(state.shown), token = tokenChosen(), n = prompt.tokens.filter(({ kept }) => kept).length;
  if (effects()) {
    const found = prompt.latents.toSorted((a, b) => Math.abs(b.effect) - Math.abs(a.effect)).slice(0, most);
    return { all: prompt.latents, found, strongest: found[0]?.latent };
  }
  const rows = prompt.latents.map((latent) => {
    if (token < 0) return { latent, mass: latent.mass, specificity: latent.specificity };
    const mass = latent.cells.reduce((sum, [position, , value]) => sum + (position === token ? value : 0), 0);
    return { latent, mass, specificity: mass * (Math.log((n * mass) / latent.mass) + latent.specificity / latent.mass) };
  }).filter((row) => row.mass > 0);
  const by = { layer_mean: (a, b) => a.latent.layer_mean - b.latent.layer_mean, mass: (a, b) => b.mass - a.mass, specificity: (a, b) => b.specificity - a.specificity };
  const first = rows.sort(by[state.sort === "mass" ? "mass" : "specificity"]).slice(0, most);
  return { all: rows.map((row) => row.latent), found: first.toSorted(by[state.sort]).map((row) => row.latent), strongest: first[0]?.latent.latent };
}

const tokenName = (position) => `token ${position} ${quoted(prompt.tokens[position].token)}`;
const isDense = (latent) => latent.share_of_tokens > DENSE;
const denseWords = (latent) => (isDense(latent) ? `dense, fires at ${percent(latent.share_of_tokens)} of the analysed tokens; ` : "");
const numberOf = (latent) => `${latent.latent}${isDense(latent) ? " (dense)" : ""}`;
const firesOn = (latent) => latent.fires_on.slice(0, 3).map(visible).join(" ");
const signed = (value) => `${value > 0 ? "+" : ""}${show(value)}`;

/** A latent's map: its activations by layer and token or, if latents are ordered by effect, its effects. */
function mapOf(latent, read) {
  const { tokens, layers } = prompt, byEffect = effects(), layerMean = `mean layer in this text ${show(latent.layer_mean)}`;
  const cells = latent.cells.map(([position, layer, activation, effect]) => [position, layers.indexOf(layer), byEffect ? Math.abs(effect) : activation]);
  const say = (position, row) => {
    const [, , activation, effect] = latent.cells.find((cell) => cell[0] === position && cell[1] === layers[row]) ?? [position, layers[row], 0, 0];
    return `Latent ${latent.latent} (${denseWords(latent)}${layerMean}), ${tokenName(position)}, layer ${layers[row]}: activation ${show(activation)}${byEffect ? `, effect ${signed(effect)} nats` : ""}.`;
  };
  return heatMap(cells, layers, tokens.map(({ token }) => visible(token.trim() || token)), {
    label: `Latent ${latent.latent}, ${byEffect ? `effect ${signed(latent.effect)} nats at layer ${latent.effect_layer}, ` : ""}${layerMean}, ${denseWords(latent)}fires on ${latent.fires_on.join(" ")}`,
    title: byEffect ? `${numberOf(latent)}: ${signed(latent.effect)}` : cut(`${numberOf(latent)}: ${firesOn(latent)}`, 28),
    top: (value) => (byEffect ? `layer ${latent.effect_layer}` : `to ${show(value)}`), say, read,
    chosen: [tokenChosen(), state.latent === String(latent.latent) && state.layer ? layers.indexOf(Number(state.layer)) : -1],
    pick: (position, row) => set({ latent: latent.latent, layer: layers[row], ...(byEffect ? {} : { token: tokens[position].kept ? position : "" }) }),
  });
}

function draw() {
  find("sentence-found").hidden = !prompt;
  if (!prompt) return;
  askForEffects();
  const { tokens } = prompt, { all, found } = chosen(), token = tokenChosen(), byEffect = effects(), ofText = byEffect || token < 0;
  fill(find("tokens"), h("span", { class: "soft" }, "Choose a token:"), ...tokens.map(({ token: text, kept }, i) => button(visible(text),
    () => set({ token: token === i ? "" : i }), { "aria-pressed": String(i === token), disabled: !kept, "aria-label": `token ${i}: ${visible(text)}` })));
  const read = h("p", { class: "readout", role: "status" }, "Point at a cell, or focus a map and use the arrow keys. Rows are layers, the first at the bottom; columns are tokens.");
  const maps = found.map((latent) => mapOf(latent, read));
  nameSentence(maps[0]);
  const rows = () => [["latent", "position", "token", "layer", "activation", ...(byEffect ? ["effect_nats"] : [])],
    ...found.flatMap(({ latent, cells }) => cells.map(([position, layer, ...values]) => [latent, position, tokens[position].token, layer, ...values.slice(0, byEffect ? 2 : 1)]))];
  const against = byEffect?.against ? ` against ${quoted(visible(byEffect.against))}` : "", mass = state.sort === "mass";
  const foremost = byEffect ? `the largest effects, in nats, on ${quoted(visible(byEffect.token))}${against} after ${tokenName(byEffect.after)}`
    : `the most ${mass ? "active" : "specific"} ${token >= 0 ? "there" : mass ? "in it" : "to it"}`;
  const title = `${found.length} of ${integer(ofText ? prompt.n_active_latents : all.length)} latents on ${ofText ? "in the sentence" : `at ${tokenName(token)}`}: ${foremost}`;
  const note = byEffect && h("p", { class: "note" }, `Effect: how far the log probability of that token${against && ", minus the other's,"} would fall, to first order, if the latent were taken out after one layer; below 0, the latent works against the token. Above each map: the sum over tokens at the layer where it is furthest from 0. Darker cells have larger effects. Ablate a latent to see its whole effect.`);
  fill(find("maps"), ...(ofText ? [] : [switching(found, all, token)]), figure(title, "latents", maps, rows, note, read));
  const next = (list) => list.map(({ token: text, p_true }) => [h("span", {}, h("code", {}, visible(text)), ` ${percent(p_true)}`), "  "]);
  const before = tokens.slice(tokens.findIndex(({ kept }) => kept), token + 1).map(({ token: text }) => text).join("");
  find("next").replaceChildren(h("p", {}, h("b", {}, "The model's next token: "), next(prompt.next)), ...(token < 0 ? [] : [h("p", {}, h("b", {}, `After ${tokenName(token)}: `), next(tokens[token].next),
    prompt.text.startsWith(before) && before !== prompt.text && link("Cut the text here to change what follows", { text: before, token }))]));
}

/** Put the sentence into a drawing's legend, which is saved with it. */
const nameSentence = (drawing) => { if (drawing) drawing.dataset.legend = `${quoted(cut(prompt.text, 80))} ${drawing.dataset.legend}`; };

/** Which latents switch on, stay on and switch off from layer to layer at a token: `found` are drawn, `all` are counted. */
function switching(found, all, token) {
  const { layers } = prompt, read = h("p", { class: "readout told", role: "status" });
  const there = (latents) => latents.map((latent) => ({ latent, on: new Map(latent.cells.filter((cell) => cell[0] === token).map(([, layer, value]) => [layers.indexOf(layer), value])) }));
  const rows = there(found); // in the chosen order; by default, by the layer where each switches on
  if (state.sort === "layer_mean") rows.sort((a, b) => Math.min(...a.on.keys()) - Math.min(...b.on.keys()) || Math.max(...a.on.keys()) - Math.max(...b.on.keys()));
  const step = h("select", { id: "switch-step", onchange: tell }, layers.slice(1).map((layer, i) => h("option", { value: i }, `${layers[i]} \u2192 ${layer}`)));
  function tell() {
    const i = Number(step.value), kinds = { "switch on": [], stay: [], "switch off": [] };
    for (const { latent, on } of there(all)) if (on.has(i) || on.has(i + 1)) kinds[!on.has(i) ? "switch on" : on.has(i + 1) ? "stay" : "switch off"].push(latent.latent);
    read.replaceChildren(...Object.entries(kinds).map(([kind, latents]) => h("span", {}, h("b", {}, `${latents.length} ${kind} `),
      latents.slice(0, 24).map((latent) => [link(String(latent), { latent, layer: layers[i + 1] }), " "]), latents.length > 24 && `and ${latents.length - 24} more`)));
  }
  const drawn = switches(rows.map(({ latent, on }) => ({ name: `Latent ${latent.latent}`, words: `${numberOf(latent)}: ${firesOn(latent)}`, on,
    chosen: state.latent === String(latent.latent), pick: () => set({ latent: latent.latent, layer: layers[Math.min(...on.keys())] }) })), layers, { label: `Latents on at ${tokenName(token)}, by layer` });
  nameSentence(drawn);
  if (layers.length > 1) tell();
  return figure(`Switching on and off over the layers at ${tokenName(token)}: ${found.length} of ${all.length} latents, the most ${state.sort === "mass" ? "active" : "specific"} there`, "switches", drawn,
    () => [["latent", "layer", "activation"], ...rows.flatMap(({ latent, on }) => [...on].map(([i, value]) => [latent.latent, layers[i], value]))],
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
  const write = (list) => set({ changes: list.map((item) => [item.kind, item.latent, [item.layers].flat().join("."), ...(item.kind === "steer" ? [item.coefficient ?? 1] : [])].join(":")).join(" ") });
  const list = changes(), edit = (i, key, value) => write(list.map((item, k) => (k === i ? { ...item, [key]: value } : item)));
  const layersOf = (text) => (text.trim() === "all" ? "all" : /^\s*\d+(\s*[-\u2013]\s*\d+|[\s,;]+\d+)*\s*$/.test(text) ? text.match(/\d+(\s*[-\u2013]\s*\d+)?/g).flatMap(span) : null);
  const put = (i, key, value, wanted, text) => {
    if (wrong) say(find("change-status"), "");
    wrong = value === null ? `${wanted}, found \u201c${text}\u201d` : "";
    if (wrong) age();
    else edit(i, key, value);
  };
  // After the focus has moved on, because the fields are rebuilt.
  const later = (act) => (event) => setTimeout(act, 0, event.target.value);
  fill(find("changes"), ...list.map((item, i) => h("fieldset", {}, h("legend", { class: "soft" }, `Change ${i + 1}`),
    h("select", { "aria-label": "Kind", onchange: later((value) => edit(i, "kind", value)) }, ["ablate", "steer"].map((kind) => h("option", { selected: kind === item.kind }, kind))),
    h("label", {}, "latent ", h("input", { type: "number", min: 0, value: item.latent, onchange: later((text) => put(i, "latent", /^\d+$/.test(text) ? Number(text) : null, "latent should be a whole number", text)) })),
    h("span", { class: "soft", "data-latent": item.latent }), h("label", {}, "layers ", h("input", { value: [item.layers].flat().join(" "), placeholder: "all, or 3 4 5", onchange: later((text) => put(i, "layers", layersOf(text), "layers should be all, or numbers such as 3 4 5 or 3-5", text)) })),
    item.kind === "steer" && h("label", {}, "add activation ", h("input", { type: "number", step: "any", value: item.coefficient, onchange: later((text) => put(i, "coefficient", number(text), "the activation to add should be a number", text)) })),
    button("Remove", () => write(list.filter((_, k) => k !== i)), { "aria-label": `Remove change ${i + 1}` }))));
  find("run").disabled = !list.length;
  wrong = "";
  nameLatents();
  age();
}

/** Say beside each change what its latent fires on, if it is on in the text. */
function nameLatents() {
  for (const place of find("changes").querySelectorAll("[data-latent]")) {
    const latent = prompt?.latents.find((other) => String(other.latent) === place.dataset.latent);
    place.replaceChildren(...(latent ? [`${firesOn(latent)} `, denseMark(latent.share_of_tokens) || ""] : []));
  }
}

function outcome(found, asked) {
  const list = (name, tokens) => h("div", {}, h("h4", {}, name), h("ol", { class: "next" }, tokens.map(({ token, p }) => h("li", {}, h("i", { style: { width: `${(8 * p).toFixed(2)}rem` } }), h("code", {}, visible(token)), ` ${percent(p)}`))));
  const moved = (sign, tokens) => tokens.map(({ token, p_true, p_changed }) => [`${sign} `, h("code", {}, visible(token)), ` ${percent(p_true)} \u2192 ${percent(p_changed)}  `]);
  const said = (name, text) => h("div", {}, h("h4", {}, name), h("p", { class: "text" }, h("span", { class: "soft" }, asked.text.slice(-60)), h("b", {}, text)));
  const words = asked.changes.map(({ kind, latent, layers, coefficient }) => `${kind} ${latent} at ${layers === "all" ? "all layers" : `layer${layers.length > 1 ? "s" : ""} ${layers.join(", ")}`}${kind === "steer" ? ` by ${coefficient}` : ""}`);
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
