// Choices of the pack's nodes in the language of the frontend, which translates names and tooltips but no choices. Only what is
// shown: saved workflows and prompts hold the values that the server knows.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const PREFIX = "HYWU"; // of every node id of the pack
let translations = {}; // {language: {nodeDefs: {node id: {inputs: {input: {options: {value: label}}}}}}}

function labelsOf(nodeId, input) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  const found = translations[language] ?? translations.en;
  return found?.nodeDefs?.[nodeId]?.inputs?.[input]?.options ?? {};
}

app.registerExtension({
  name: "hywu.labels",
  async init() {
    try {
      translations = await api.getCustomNodesI18n();
    } catch (error) {
      console.warn("HY-WU: choices stay as they are, the translations cannot be read:", error.message);
    }
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(PREFIX)) return;
    for (const widget of node.widgets ?? []) {
      const known = Object.values(translations).some(
        (language) => language.nodeDefs?.[node.comfyClass]?.inputs?.[widget.name]?.options,
      );
      if (widget.type !== "combo" || !known) continue;
      widget.options.getOptionLabel = (value) => labelsOf(node.comfyClass, widget.name)[value] ?? value ?? "";
    }
  },
});
