"""Generate Instance LoRA in the frontend: a socket more for each further condition, and all of them reach the server."""

WIRE_THREE = """async () => {
    const {app, LiteGraph} = window;
    const make = (type) => { const node = LiteGraph.createNode(type); app.graph.add(node); return node; };
    const generate = make("HYWUGenerateLoRA"), made = [generate];
    try {
        for (let count = 0; count < 3; count++) {
            const text = make("CLIPTextEncode");
            made.push(text);
            const free = generate.inputs.findIndex((input) => input.name.startsWith("more_conditions.") && !input.link);
            text.connect(0, generate, free);
            await new Promise((grown) => setTimeout(grown, 300));
        }
        const sent = (await app.graphToPrompt()).output[generate.id].inputs;
        const open = generate.inputs.filter((input) => input.name.startsWith("more_conditions.") && !input.link).length;
        const from = made.slice(1).map((node) => `${node.id}`);
        return {sent, open, from, widgets: generate.widgets.map((widget) => widget.name)};
    } finally {
        made.forEach((node) => app.graph.remove(node));
    }
}"""


def test_sockets_grow_and_reach_the_server(page):
    found = page.evaluate(WIRE_THREE)
    wired = {name: link for name, link in found["sent"].items() if name.startswith("more_conditions.")}
    assert wired == {f"more_conditions.condition{n}": [node, 0] for n, node in enumerate(found["from"])}
    assert found["open"] == 1 and "keep_gb" in found["widgets"]
