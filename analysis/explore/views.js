// The other views: search, pinned latents side by side, and what each layer's reconstruction costs.

import { cardBody, cardOf, denseMark } from "./card.js";
import { figure, lines } from "./charts.js";
import { code, counted, find, h, latest, link, number, pins, set, state, table, watch } from "./core.js";

const FIRST = 50; // as many as the server sends
const FIELDS = ["tokens", "promotes", "on", "off", "from_layer", "to_layer", "profile", "explained"];
const search = latest("search", find("search-status"), (found) => {
  const rows = found.map((hit) => [link(String(hit.latent), { latent: hit.latent, layer: "" }), code(hit.fires_on), hit.profile ?? "\u2013", show(hit.layer_mean), [percent(hit.share_of_tokens), " ", denseMark(hit.share_of_tokens)], hit.why]);
  const names = ["latent", "fires_on", "profile", "layer_mean", "share_of_tokens", "count", "score", "why"];
  find("search-found").classList.remove("outdated");
  find("search-found").replaceChildren(rows.length ? figure("Latents found, the most specific first", "search",
    table(["Latent", "Fires on", "Profile", "Mean layer", "Tokens it fires at", "Why"], rows, "Choose a number to see its card."), () => [names, ...found.map((hit) => names.map((name) => hit[name]))]) : "");
  return rows.length ? `${counted(rows.length, "latent")}${rows.length === FIRST ? ", the best matches; there may be more" : ""}.` : "No live latent meets all conditions.";
});

find("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  last = null;
  if (!set(Object.fromEntries(FIELDS.map((name) => [name, find(`search-${name}`).value])))) asked();
});
let last = null; // the last request, so that returning to the view does not repeat it
function asked() {
  const body = Object.fromEntries(FIELDS.map((name) => [name, name.endsWith("layer") ? number(state[name]) : state[name].replaceAll("\\n", "\n")]));
  if (state.view === "search" && FIELDS.some((name) => state[name])) {
    if (last === (last = JSON.stringify(body))) return;
    find("search-found").classList.add("outdated");
    search(body);
  }
  else if (!FIELDS.some((name) => state[name])) { search(null); find("search-found").replaceChildren(); find("search-status").textContent = ""; last = null; }
}
watch(FIELDS, () => { for (const name of FIELDS) find(`search-${name}`).value = state[name]; });
watch([...FIELDS, "view"], asked);

const MEASURES = { probs: ["Share of activation mass", percent], counts: ["Tokens at which it fired", integer], means: ["Mean activation where it fired", show] };

watch(["pins", "view", "measure"], async () => {
  find("measure").value = state.measure;
  find("to-compare").textContent = `Compare (${pins().length})`;
  if (state.view !== "compare") return;
  const asked = state.pins, cards = (await Promise.allSettled(pins().map(cardOf))).filter(({ value }) => value).map(({ value }) => value);
  if (asked !== state.pins) return;
  if (!cards.length) return find("compared").replaceChildren(h("p", {}, "Nothing is pinned: open a latent's card and choose Pin."));
  const [title, format] = MEASURES[state.measure], { layers } = cards[0];
  const drawing = lines(cards.map((card) => ({ name: String(card.latent), values: card[state.measure] })), layers, { label: `${title} of latents ${pins().join(", ")}`, unit: title.toLowerCase(), format });
  find("compared").replaceChildren(figure(title, "compare", drawing, () => [["layer", ...cards.map((card) => card.latent)], ...layers.map((layer, i) => [layer, ...cards.map((card) => card[state.measure][i])])]),
    h("div", { class: "side-by-side" }, cards.map((card) => h("article", { "aria-label": `Latent ${card.latent}` }, h("h2", {}, `Latent ${card.latent}`), cardBody(card)))));
});
find("measure").addEventListener("change", (event) => set({ measure: event.target.value }));

const COLUMNS = { fvu: "FVU", fvu_without_few: "FVU without outlier tokens", validation_fvu: "FVU, held-out text", delta_ce: "Delta cross-entropy, nats", kl: "KL, nats", l0: "L0", mean_norm: "Mean norm", active_latents: "Latents active" };

/** FVU and cost to the model by layer, from summary.json. */
export function drawLayers({ layers: rows, downstream, n_tokens: analysed, warnings }) {
  const isKnown = (name) => rows.some((row) => Number.isFinite(row[name])), known = Object.keys(COLUMNS).filter(isKnown);
  const worst = (name) => rows.reduce((a, b) => ((b[name] ?? -Infinity) > (a[name] ?? -Infinity) ? b : a));
  const tokens = downstream && counted(downstream.n_tokens, "token"), documents = downstream && counted(downstream.n_documents, "document");
  const most = isKnown("delta_ce") ? `Replacing layer ${worst("delta_ce").layer} by its reconstruction costs the model most: its cross-entropy rises by ${show(worst("delta_ce").delta_ce)} nats a token${downstream ? `, over ${tokens} of ${documents}` : ""}. `
    : "What reconstructions cost the model was not computed (analyze --downstream-tokens). ";
  const own = Number.isFinite(downstream?.true_ce) ? `On those tokens the model's own cross-entropy is ${show(downstream.true_ce)} nats. ` : "";
  const all = downstream?.together?.groups?.find(({ kind }) => kind === "all");
  const together = all ? `Replacing all ${all.n} layers at once by their reconstructions costs ${show(all.delta_ce)} nats a token, by their mean vectors ${show(all.mean_ablation_delta_ce)} (over ${counted(downstream.together.n_tokens, "token")}).` : "";
  const sample = downstream ? ` Delta cross-entropy and KL are over ${counted(downstream.n_tokens, `${downstream.tokens} token`)} of ${documents}, with this layer alone replaced.` : "";
  const outliers = isKnown("fvu_without_few") ? " Outlier tokens: the few that carry much of a layer's variance." : "";
  const charts = ["fvu", "delta_ce"].filter(isKnown).map((name) => figure(`${COLUMNS[name]} (lower is better)`, name,
    lines([{ name: COLUMNS[name], values: rows.map((row) => row[name] ?? null) }], rows.map((row) => row.layer), { label: `${COLUMNS[name]}; highest ${show(worst(name)[name])} at layer ${worst(name).layer}`, unit: COLUMNS[name], format: show }),
    () => [["layer", name], ...rows.map((row) => [row.layer, row[name]])]));
  const byLayer = table(["Layer", ...known.map((name) => COLUMNS[name])], rows.map((row) => [String(row.layer), ...known.map((name) => show(row[name]))]),
    `FVU, L0 and mean norm are of the ${integer(analysed)} analysed tokens.${sample}${outliers}`);
  find("layers-found").replaceChildren(h("p", { class: "headline-small" }, `${most}FVU is highest at layer ${worst("fvu").layer}: ${show(worst("fvu").fvu)}.`), own + together ? h("p", {}, own + together) : "",
    ...warnings.map((warning) => h("p", { class: "warning" }, warning)), h("div", { class: "columns" }, charts),
    figure("All layers", "layers", byLayer, () => [["layer", ...known], ...rows.map((row) => [row.layer, ...known.map((name) => row[name])])]));
}
