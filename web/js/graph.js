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

const GETTER = /^(easy )?getNode$/i; // of KJNodes and Easy-Use: what the node that sets the same name is given
const SETTER = /^(easy )?setNode$/i;
const nameAt = (node) => node.widgets?.[0]?.value;

/** Nodes of a graph that get what a node sets, or the other way round; none for all other nodes. */
function counterparts(node) {
    const other = SETTER.test(node.type) ? GETTER : GETTER.test(node.type) ? SETTER : null;
    if (!other) return [];
    return (node.graph._nodes ?? node.graph.nodes ?? []).filter((at) => other.test(at.type) && nameAt(at) === nameAt(node));
}

/** Whether a node only hands on what it is given: reroutes of the host and of rgthree, setters and getters. */
const handsOn = (node) => SETTER.test(node.type) || GETTER.test(node.type) || /^reroute\b/i.test(node.type ?? "");

/** The node that makes what comes through a link, past nodes that only hand it on; null where none does. */
function originOf(graph, link) {
    let node = graph.getNodeById(link.origin_id);
    for (const seen = new Set(); node && handsOn(node); ) {
        if (seen.has(node)) return null;
        seen.add(node);
        const from = GETTER.test(node.type) ? counterparts(node)[0] : node;
        const given = from && linksIn(from)[0];
        node = given ? from.graph.getNodeById(given.link.origin_id) : null;
    }
    return node ?? null;
}

function walk(start, next) {
    const seen = new Set([start]);
    for (const node of seen) for (const other of next(node)) if (other) seen.add(other);
    return seen;
}

/** The nodes that what a node gives out reaches. */
export const downstream = (node) =>
    walk(node, (at) => [
        ...linksOut(at).map((link) => at.graph.getNodeById(link.target_id)),
        ...(SETTER.test(at.type) ? counterparts(at) : []),
    ]);

/** Texts of the positive prompts of the samplers that a node's outputs reach, in this graph. */
export function promptTexts(node) {
    const texts = new Set();
    for (const sampler of downstream(node)) {
        for (const { input, link } of linksIn(sampler)) {
            if (!["positive", "conditioning"].includes(input.name) || input.type !== "CONDITIONING") continue;
            const origin = originOf(sampler.graph, link);
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
            .map(({ link }) => originOf(at.graph, link)),
    );
    return [...sources].flatMap((at) => (at.widgets ?? []).filter(isText).map((widget) => textOf(at, widget)));
}

const isText = (widget) => /^(text(_[a-z0-9]+)?|prompt)$/.test(widget.name) && typeof widget.value === "string";

/** A text widget's value, or that of the node it is connected to. */
function textOf(node, widget) {
    const wired = linksIn(node).find(({ input }) => input.name === widget.name);
    const origin = wired && originOf(node.graph, wired.link);
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
