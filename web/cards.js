// Cards: what a node of the pack found or is doing, drawn on that node. The server sends them with a node's ui outputs
// ("executed"), and while it is at work ("hywu.card"); hywu_core/host/cards.py says what is in one. A card is a DOM widget
// that is never saved, so that it shifts no widget's value.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const KEY = "hywu_card";
const EVENT = "hywu.card";
const WIDGET = "hywu_card";
const OURS = "HYWU"; // what the types of this pack's nodes begin with
const LEAST_WIDTH = 300;
const ROOM = 24; // what the frontend leaves free around a DOM widget, above and below
const SVG = "http://www.w3.org/2000/svg";
const EDGES = { good: "#3f9d6b", notice: "#d9a441", warning: "#d9534f" };
const STYLE = `
.hywu-card { box-sizing: border-box; width: 100%; overflow: hidden; }
.hywu-card-page { box-sizing: border-box; padding: 6px 8px; border-left: 4px solid var(--hywu-edge); border-radius: 4px;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font: 11px/1.4 sans-serif; user-select: text; }
.hywu-card-page + .hywu-card-page { margin-top: 6px; }
.hywu-card-title { font-weight: 600; font-size: 12px; margin-bottom: 3px; }
.hywu-card-rows { display: grid; grid-template-columns: max-content 1fr; gap: 1px 10px; margin: 0; }
.hywu-card-rows dt { color: var(--descrip-text, #999); margin: 0; }
.hywu-card-rows dd { margin: 0; overflow-wrap: anywhere; }
.hywu-card-note { margin: 4px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.hywu-card-chart { margin-top: 6px; }
.hywu-card-chart span { color: var(--descrip-text, #999); }
.hywu-card-chart svg { display: block; width: 100%; height: 56px; }
.hywu-card-page img { display: block; width: 100%; margin-top: 6px; border-radius: 3px; cursor: zoom-in; }
`;

let words = {}; // {language: {template: translated}}

// A message of the server in the reader's language, its values put in; any other text as it is. See hywu_core/messages.py.
function shown(text) {
  if (typeof text === "string") return text;
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  const template = words[language]?.[text.message] ?? text.message;
  return template.replace(/\{(\w+)\}/g, (place, name) => (name in text.values ? shown(text.values[name]) : place));
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawn(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Bars from 0, or a curve between its least and largest value, in a box of 300 x 56.
function chartOf({ kind, title, values }) {
  const chart = element("div", "hywu-card-chart");
  const largest = Math.max(...values);
  const least = kind === "bars" ? 0 : Math.min(...values);
  const height = (value) => (50 * (value - least)) / (largest - least || 1);
  const svg = drawn("svg", { viewBox: "0 0 300 56", preserveAspectRatio: "none", role: "img", "aria-label": shown(title) });
  if (kind === "bars") {
    const wide = 300 / values.length;
    values.forEach((value, at) =>
      svg.append(
        drawn("rect", { x: at * wide, y: 54 - height(value), width: wide * 0.85, height: height(value) + 1, fill: "#6c9bd2" }),
      ),
    );
  } else {
    const points = values.map((value, at) => `${(300 * at) / (values.length - 1 || 1)},${53 - height(value)}`);
    svg.append(
      drawn("polyline", {
        points: points.join(" "), fill: "none", stroke: "#6c9bd2", "stroke-width": 1.5, "vector-effect": "non-scaling-stroke",
      }),
    );
  }
  const range = `${Number(least.toPrecision(3))} – ${Number(largest.toPrecision(3))}`;
  chart.append(element("span", "", `${shown(title)} (${range})`), svg);
  return chart;
}

function pictureOf(picture) {
  const image = element("img");
  image.src = api.apiURL(`/view?${new URLSearchParams(picture)}`);
  image.addEventListener("click", () => window.open(image.src, "_blank"));
  return image;
}

function pageOf(card) {
  const page = element("div", "hywu-card-page");
  page.dataset.level = card.level;
  page.style.setProperty("--hywu-edge", EDGES[card.level] ?? EDGES.good);
  page.append(element("div", "hywu-card-title", shown(card.title)));
  const rows = element("dl", "hywu-card-rows");
  for (const [name, value] of card.rows) {
    rows.append(element("dt", "", shown(name)), element("dd", "", shown(value)));
  }
  page.append(rows);
  for (const note of card.notes) page.append(element("p", "hywu-card-note", shown(note)));
  for (const chart of card.charts) if (chart.values.length) page.append(chartOf(chart));
  if (card.picture) page.append(pictureOf(card.picture));
  return page;
}

// Nodes inside subgraphs are named by the path to them, such as 12:5.
function nodeOf(path) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of String(path).split(":")) {
    node = graph?.getNodeById(id) ?? graph?.getNodeById(Number(id));
    graph = node?.subgraph;
  }
  return node;
}

function fit(node) {
  const [width, height] = node.size;
  const needed = Math.max(height, node.computeSize()[1]);
  if (width < LEAST_WIDTH || height < needed) node.setSize([Math.max(width, LEAST_WIDTH), needed]);
  node.setDirtyCanvas(true, true);
}

function widgetOf(node) {
  const there = node.widgets?.find((widget) => widget.name === WIDGET);
  if (there) return there;
  const outer = element("div", "hywu-card");
  const inner = element("div");
  outer.append(element("style", "", STYLE), inner); // it comes and goes with the card, and nothing else of the page changes
  const height = () => inner.offsetHeight + ROOM;
  const widget = node.addDOMWidget(WIDGET, "HYWU_CARD", outer, {
    serialize: false, hideOnZoom: false, getMinHeight: height, getMaxHeight: height,
  });
  widget.serialize = false;
  widget.pages = inner;
  new ResizeObserver(() => fit(node)).observe(inner);
  return widget;
}

function show(path, cards) {
  const node = nodeOf(path);
  // another workflow may be open, in which the id is another node's
  if (!node?.addDOMWidget || !String(node.comfyClass ?? node.type).startsWith(OURS)) return;
  const { pages } = widgetOf(node);
  pages.replaceChildren(...cards.map(pageOf));
  fit(node);
}

app.registerExtension({
  name: "hywu.cards",
  async setup() {
    api.addEventListener("executed", ({ detail }) => {
      if (detail.output?.[KEY]) show(detail.display_node ?? detail.node, detail.output[KEY]);
    });
    api.addEventListener(EVENT, ({ detail }) => show(detail.node, [detail.card]));
    try {
      const found = await api.getCustomNodesI18n();
      words = Object.fromEntries(Object.entries(found).map(([language, texts]) => [language, texts.hywuCards ?? {}]));
    } catch (error) {
      console.warn("HY-WU: cards stay English, the translations cannot be read:", error.message);
    }
  },
  // what ran before this workflow was shown again
  afterConfigureGraph() {
    for (const [path, output] of Object.entries(app.nodeOutputs ?? {})) if (output?.[KEY]) show(path, output[KEY]);
  },
});
