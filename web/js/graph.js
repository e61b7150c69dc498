// @ts-check
// Walking a graph of the page: which texts a node's stack will meet, and how the host calls a node.

const linkOf = (graph, id) => (id == null ? null : (graph.links.get?.(id) ?? graph.links[id] ?? null));

/** Links that go into a node: [{input, link}]. */
export function linksIn(node) {
    return (node.inputs ?? [])
        .map((input) => ({ input, link: linkOf(node.graph, input.link) }))
        .filter(({ link }) => link);
}

/** Links that leave a node. */
export function linksOut(node) {
    return (node.outputs ?? []).flatMap((output) =>
        (output.links ?? []).map((id) => linkOf(node.graph, id)).filter(Boolean),
    );
}

/** All links of a graph, of a type when one is given. */
export function links(graph, type) {
    const all = graph.links instanceof Map ? [...graph.links.values()] : Object.values(graph.links);
    return all.filter((link) => link && (!type || link.type === type));
}

function walk(start, next) {
    const seen = new Set([start]);
    for (const node of seen) for (const other of next(node)) if (other) seen.add(other);
    return seen;
}

/** The nodes that what a node gives out reaches. */
export const downstream = (node) =>
    walk(node, (at) => linksOut(at).map((link) => at.graph.getNodeById(link.target_id)));

/** Texts of the positive prompts of the samplers that a node's outputs reach, in this graph. */
export function promptTexts(node) {
    const texts = new Set();
    for (const sampler of downstream(node)) {
        for (const { input, link } of linksIn(sampler)) {
            if (!["positive", "conditioning"].includes(input.name) || input.type !== "CONDITIONING") continue;
            const origin = sampler.graph.getNodeById(link.origin_id);
            for (const text of conditioningTexts(origin)) texts.add(text);
        }
    }
    return [...texts];
}

function conditioningTexts(origin) {
    if (!origin) return [];
    const sources = walk(origin, (at) =>
        linksIn(at)
            .filter(({ input }) => input.type === "CONDITIONING" && input.name !== "negative")
            .map(({ link }) => at.graph.getNodeById(link.origin_id)),
    );
    return [...sources].flatMap((at) => (at.widgets ?? []).filter(isText).map((widget) => textOf(at, widget)));
}

const isText = (widget) => /^text(_[a-z0-9]+)?$/.test(widget.name) && typeof widget.value === "string";

/** A text widget's value, or that of the node it is connected to. */
function textOf(node, widget) {
    const wired = linksIn(node).find(({ input }) => input.name === widget.name);
    const origin = wired && node.graph.getNodeById(wired.link.origin_id);
    const other = origin?.widgets?.find((w) => typeof w.value === "string");
    return other ? other.value : widget.value;
}

/** How the host calls a node: its number, behind those of the subgraph nodes it lies in. */
export function executionIds(root, node) {
    const found = [];
    const visit = (graph, prefix) => {
        if (graph === node.graph) found.push(prefix + node.id);
        for (const inner of graph._nodes ?? graph.nodes ?? []) {
            if (inner.subgraph) visit(inner.subgraph, `${prefix}${inner.id}:`);
        }
    };
    visit(root, "");
    return found;
}

/** The node of the page that the host calls so, or the one it lies in; null when there is none. */
export function nodeByExecutionId(root, id) {
    let graph = root, found = null;
    for (const number of String(id).split(":")) {
        const node = graph?.getNodeById(Number(number)) ?? graph?.getNodeById(number);
        if (!node) break;
        [found, graph] = [node, node.subgraph];
    }
    return found;
}
