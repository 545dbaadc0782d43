// The page: loads its parts, says what it is about, shows one view at a time.

import { ask, find, h, KNOWN, read, say, set, state, watch } from "./core.js";
import "./card.js";
import "./sentence.js";
import { drawLayers } from "./views.js";

watch(["view"], () => {
  for (const view of KNOWN.view) {
    find(view).hidden = state.view !== view;
    find(`to-${view}`).toggleAttribute("aria-current", state.view === view);
  }
});
for (const view of KNOWN.view) find(`to-${view}`).addEventListener("click", () => set({ view }));

try {
  const about = await ask("about");
  const { store, sae } = about.provenance;
  find("about").textContent = `${store.model}: ${about.n_layers} layers, ${integer(about.n_latents)} latents of ${sae.name}, analysed on ${integer(about.n_tokens)} tokens of ${store.dataset}.`;
  document.title = `${store.model}: explore`;
  find("text").maxLength = about.most.text;
  find("most-text").textContent = integer(about.most.text);
  find("search-profile").append(...Object.keys(about.profiles).map((name) => h("option", { value: name }, name)));
  drawLayers(about);
  read(true);
  say(find("model"), "The model is loading, or busy with another text \u2026");
  const { missing } = await ask("model");
  say(find("model"), missing ? `Sentences cannot be run: ${missing}` : "", Boolean(missing));
} catch (error) {
  say(find("model"), error.message, true);
}
