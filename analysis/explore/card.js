// A latent's card: what it fires on, its layers, its strongest examples, its neighbours.

import { bars, figure, heatMap } from "./charts.js";
import { ask, button, code, fill, find, h, link, number, pins, say, set, state, visible, watch } from "./core.js";

const known = new Map();
export const DENSE = 0.1; // share of the tokens
const PROFILES = { persistent: "its mass is spread over two thirds of the layers or more", bimodal: "its mass is in two groups of layers",
  early: "its mean layer is in the first third", middle: "its mean layer is in the middle third", late: "its mean layer is in the last third" };

/** A mark for a latent that is on at so many tokens that this says little. */
export const denseMark = (share) => share > DENSE && h("small", { class: "dense", title: `fires at ${percent(share)} of the analysed tokens` }, "dense");

/** A latent's data, requested only once. */
export function cardOf(latent) {
  if (!known.has(latent)) {
    known.set(latent, ask("card", { latent }).then((answer) => answer.found));
    known.get(latent).catch(() => known.delete(latent));
  }
  return known.get(latent);
}

/** A button that pins a latent for comparison, or unpins it. */
export function pinButton(latent) {
  const pinned = pins().includes(latent), rest = pins().filter((other) => other !== latent);
  return button(pinned ? "Unpin" : "Pin", () => set({ pins: pinned ? rest : [...rest, latent] }),
    { "aria-pressed": String(pinned), "aria-label": `${pinned ? "Unpin" : "Pin"} latent ${latent}` });
}

/** Add a change, as the address writes it, to the list; `now`: and run it. */
function change(words, now) {
  set({ view: "sentence", changes: [state.changes, words].filter(Boolean).join(" ") });
  find("changes").scrollIntoView({ block: "center" });
  if (now) find("run").click();
}

/** The card as elements. */
export function cardBody(card) {
  const { latent, layers } = card, share = card.n_tokens / card.of_tokens, highest = (values) => values.indexOf(Math.max(...values));
  if (!card.count) return [h("p", {}, "It never fired on the analysed tokens.")];
  const layer = layers.includes(number(state.layer)) ? number(state.layer) : null, steered = layer === null ? highest(card.probs) : layers.indexOf(layer);
  const facts = {
    Profile: card.profile ?? "\u2013", "Mean layer": show(card.layer_mean), "Spread (standard deviation), layers": show(card.layer_std),
    Firings: integer(card.count), "Tokens it fires at": `${integer(card.n_tokens)}, ${percent(share)}`,
    "Mean number of layers it is on at, per such token": (card.count / card.n_tokens).toFixed(1), "Layers at which it ever fired": `${card.n_layers_active} of ${layers.length}`,
  };
  const chart = (name, title, format) => {
    const values = card[name], top = format(Math.max(...values));
    const drawing = bars(values, layers, { top, say: (i) => `layer ${layers[i]}: ${format(values[i])}`,
      label: `${title}, latent ${latent}, layers ${layers[0]} to ${layers.at(-1)}; highest ${top} at layer ${layers[highest(values)]}` });
    return figure(title, `latent-${latent}-${name}`, drawing, () => [["layer", name], ...layers.map((at, i) => [at, values[i]])]);
  };
  const read = h("p", { class: "readout", role: "status" }, "Point at a cell, or use the arrow keys.");
  const histogramRows = () => [["layer", "activation_from", "activation_to", "tokens"],
    ...card.histogram.rows.flatMap(([at, first, ...counts]) => counts.map((n, i) => [at, card.histogram.edges[first + i], card.histogram.edges[first + i + 1], n]))];
  return [
    h("p", {}, h("b", {}, "Fires on "), card.fires_on.length ? code(card.fires_on) : "nothing in particular"),
    card.explanations.map(({ where, explanation, said }) => h("p", { class: "explained" }, h("b", {}, `Explained, ${where} `), explanation ?? "-", " ", h("small", {}, said))),
    h("p", { class: "actions" }, pinButton(latent), button("Ablate at all layers", () => change(`ablate:${latent}:all`, true)),
      layer !== null && button(`Ablate at layer ${layer}`, () => change(`ablate:${latent}:${layer}`, true)),
      button(`Steer at layer ${layers[steered]}\u2026`, () => change(`steer:${latent}:${layers[steered]}:${(card.means[steered] || 1).toPrecision(3)}`))),
    share > DENSE && h("p", { class: "warning" }, `Dense: it fires at ${percent(share)} of the analysed tokens, so that it is on says little about a token, unless what it represents is just as common.`),
    h("dl", {}, Object.entries(facts).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    card.profile && h("p", { class: "note" }, `${card.profile}: ${PROFILES[card.profile]}.`),
    chart("probs", "Share of its activation mass", percent), h("h3", {}, "Most active at"), examples(card.examples, card),
    card.random_examples.length > 0 && [h("h3", {}, "Active at, drawn at random"), examples(card.random_examples, card)],
    chart("counts", "Tokens at which it fired", integer), chart("means", "Mean activation where it fired", show),
    card.histogram && figure("Activations by layer", `latent-${latent}-histogram`, histogram(card, read), histogramRows, read),
    card.promotes?.length > 0 && !card.logits_above_chance ? h("p", { class: "note" }, "Promoted tokens are not shown: their cosines are no higher than those of random directions.")
      : [words("Promotes", card.promotes), words("Suppresses", card.suppresses)],
    card.neighbours?.length > 0 && h("p", {}, h("b", {}, "Neighbours "), "(cosine of decoder rows) ",
      card.neighbours.map(({ latent: other, cosine }) => [link(String(other), { latent: other, layer: "" }), ` ${cosine.toFixed(2)}  `])),
  ];
}

function words(name, tokens) {
  return tokens?.length ? h("p", {}, h("b", {}, `${name} `), code(tokens.map(({ token }) => token))) : null;
}

/** Examples: the layers at which each is one, then its tokens, marked by their activation. */
function examples(found, card) {
  if (!found.length) return h("p", {}, "No examples were kept.");
  const top = Math.max(...card.examples.map((example) => example.activation));
  const marked = ({ text, activation }, own) => (activation || own ? h(own ? "mark" : "i", { title: `activation ${show(activation)}`,
    class: activation > 0.55 * top ? "hot" : null, style: { background: `rgb(230 159 0 / ${(activation / top).toFixed(2)})` } }, visible(text)) : visible(text));
  return h("ol", { class: "examples" }, found.map(({ activation, layer, layers, tokens, position }) => h("li", {},
    h("span", { class: "soft" }, `${show(activation)} at layer ${layer}${layers.length > 1 ? `, also ${layers.filter((other) => other !== layer).join(" ")}` : ""}`),
    h("p", { class: "text" }, tokens.map((token, i) => marked(token, i === position))))));
}

function histogram({ histogram: { edges, rows }, layers, latent }, read) {
  const first = Math.min(...rows.map((row) => row[1])), n = Math.max(...rows.map((row) => row[1] + row.length - 2)) - first;
  const cells = rows.flatMap(([layer, low, ...counts]) => counts.map((count, i) => [low + i - first, layers.indexOf(layer), Math.log1p(count)]).filter((cell) => cell[2]));
  return heatMap(cells, layers, Array.from({ length: n }), { read, label: `Latent ${latent}: tokens by layer and activation`, width: 300,
    say: (c, r, v) => `Layer ${layers[r]}, activation ${show(edges[first + c])} to ${show(edges[first + c + 1])}: ${integer(Math.expm1(v))} tokens.` });
}

async function draw() {
  const [place, latent] = [find("card"), state.latent];
  place.hidden = latent === "" || state.view === "compare";
  document.body.classList.toggle("with-card", !place.hidden);
  if (place.hidden) return;
  const body = h("div", { role: "status" }, "Loading \u2026");
  const head = h("div", { class: "title" }, h("h2", {}, `Latent ${latent}`), button("Close", () => set({ latent: "", layer: "" }), { "aria-label": "Close the card" }));
  if (place.dataset.latent !== latent) place.replaceChildren(head, body);
  place.dataset.latent = latent;
  try {
    const card = await cardOf(Number(latent));
    if (latent === state.latent) fill(place, head, ...cardBody(card).flat().filter(Boolean));
  } catch (error) {
    say(body, error.message, true);
    place.replaceChildren(head, body);
  }
}

addEventListener("keydown", (event) => { if (event.key === "Escape" && state.latent !== "") set({ latent: "", layer: "" }); });
watch(["latent", "layer", "pins", "view"], draw);
