// What the frontend does not translate by itself: the choices of a node's combos, and the words that a search finds it by. Only
// what is shown: saved workflows and prompts hold the values that the server knows.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const PREFIX = "HYWU"; // of every node id of the pack
let translations = {}; // locales/<language>/*.json of all packs, by language

const entries = (nodeId) => Object.values(translations).flatMap((language) => language.nodeDefs?.[nodeId] ?? []);

function labelsOf(nodeId, input) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return translations[language]?.nodeDefs?.[nodeId]?.inputs?.[input]?.options ?? {};
}

app.registerExtension({
  name: "hywu.words",
  async init() {
    try {
      translations = await api.getCustomNodesI18n();
    } catch (error) {
      console.warn("HY-WU: choices stay in English, the translations cannot be read:", error.message);
    }
  },
  beforeRegisterVueAppNodeDefs(nodeDefs) {
    for (const nodeDef of nodeDefs) {
      if (!nodeDef.name.startsWith(PREFIX)) continue;
      const words = entries(nodeDef.name).flatMap((entry) => entry.search_aliases ?? []);
      nodeDef.search_aliases = [...new Set([...(nodeDef.search_aliases ?? []), ...words])];
    }
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(PREFIX)) return;
    for (const widget of node.widgets ?? []) {
      const isLabelled = entries(node.comfyClass).some((entry) => entry.inputs?.[widget.name]?.options);
      if (widget.type !== "combo" || !isLabelled) continue;
      widget.options.getOptionLabel = (value) => labelsOf(node.comfyClass, widget.name)[value] ?? value ?? "";
    }
  },
});
