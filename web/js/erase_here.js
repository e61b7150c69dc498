// @ts-check
// "Erase a concept here": puts an Erase Concepts node into a MODEL link, already wired, where there is room for it.

import { freePlace } from "./free_place.js";
import { linksIn, linksOut, links } from "./graph.js";
import { app, asOneChange, drawsNodesAsElements } from "./host.js";

const TITLE = "Erase a concept here";
const NODES = ["MembraneForget", "MembraneErase"]; // the first of them that the host has
const NEAR = 40; // graph units between the click and a link that is meant

/** Where a link runs, as points of the graph. */
function points(graph, link) {
    const origin = graph.getNodeById(link.origin_id), target = graph.getNodeById(link.target_id);
    if (!origin || !target) return [];
    const [x0, y0] = origin.getConnectionPos(false, link.origin_slot);
    const [x1, y1] = target.getConnectionPos(true, link.target_slot);
    const reach = Math.hypot(x1 - x0, y1 - y0) / 4;
    return Array.from({ length: 33 }, (_, i) => {
        const t = i / 32, s = 1 - t;
        const a = s ** 3, b = 3 * s * s * t, c = 3 * s * t * t, d = t ** 3;
        return [a * x0 + b * (x0 + reach) + c * (x1 - reach) + d * x1, (a + b) * y0 + (c + d) * y1];
    });
}

/** The MODEL link next to a place, {link, distance}, or null when the graph has none. */
function nearest(graph, [x, y]) {
    let best = null;
    for (const link of links(graph, "MODEL")) {
        const distance = Math.min(...points(graph, link).map(([px, py]) => Math.hypot(px - x, py - y)));
        if (!best || distance < best.distance) best = { link, distance };
    }
    return best;
}

/** The one output a CLIP can come from, {node, slot}: of the nodes the model came through, else of the whole graph. */
function clipFor(graph, origin) {
    const clipOf = (node) => {
        const slot = node.outputs?.findIndex((output) => output.type === "CLIP") ?? -1;
        return slot < 0 ? null : { node, slot };
    };
    for (let node = origin, left = 100; node && left; left -= 1) {
        const found = clipOf(node);
        if (found) return found;
        const model = linksIn(node).find(({ input }) => input.type === "MODEL");
        node = model && graph.getNodeById(model.link.origin_id);
    }
    const all = (graph._nodes ?? graph.nodes).map(clipOf).filter(Boolean);
    return all.length === 1 ? all[0] : null;
}

const nodeType = () => NODES.find((type) => globalThis.LiteGraph.registered_node_types[type]);

/** Whether an erasure that a node's model goes into would have all it needs. */
const canErase = (graph, origin) => Boolean(origin && nodeType() && clipFor(graph, origin));

/** The size that a node is going to have on the page. */
function sizeOf(node) {
    const [width, height] = node.computeSize();
    return [Math.max(width, node.size[0]), Math.max(height, node.size[1]) * (drawsNodesAsElements() ? 1.3 : 1)];
}

/** Moves the canvas to a node that is not to be seen whole. */
function bringIntoView(node) {
    const { scale, offset } = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect();
    const [x, y] = [0, 1].map((i) => (node.pos[i] + offset[i]) * scale);
    const inside = x > 0 && y > 0 && x + node.size[0] * scale < box.width && y + node.size[1] * scale < box.height;
    if (!inside) app.canvas.centerOnNode?.(node);
}

/** Puts the keyboard into the first text box of a node, as soon as the page has drawn it. */
function focusWords(node, tries = 20) {
    const own = node.widgets?.map((widget) => widget.inputEl ?? widget.element).find((box) => box?.tagName === "TEXTAREA");
    const drawn = document.querySelector(`[data-node-id="${CSS.escape(String(node.id))}"] textarea`) ?? own;
    if (drawn?.isConnected) drawn.focus();
    if (document.activeElement !== drawn && tries) setTimeout(() => focusWords(node, tries - 1), 50);
}

/** Puts the node into all given links, which leave one output. */
function insert(graph, through, place) {
    const [first] = through;
    const origin = graph.getNodeById(first.origin_id);
    const inserted = asOneChange(graph, () => {
        const node = globalThis.LiteGraph.createNode(nodeType());
        const others = [...(graph._nodes ?? graph.nodes)];
        node.pos = place;
        graph.add(node);
        app.canvas.draw?.(true, true); // text boxes get their room when they are drawn
        node.pos = freePlace(others, place, sizeOf(node));
        const targets = through.map((link) => [graph.getNodeById(link.target_id), link.target_slot]);
        const input = (name) => node.inputs.findIndex((slot) => slot.name === name);
        origin.connect(first.origin_slot, node, input("model"));
        const clip = clipFor(graph, origin);
        if (clip) clip.node.connect(clip.slot, node, input("clip"));
        const output = node.outputs.findIndex((slot) => slot.type === "MODEL");
        for (const [target, slot] of targets) node.connect(output, target, slot);
        app.canvas.selectNode?.(node);
        return node;
    });
    bringIntoView(inserted);
    focusWords(inserted);
}

const graphOf = (canvas) => canvas.graph ?? app.graph;

/** Entries of the menu of the empty canvas: of the MODEL link under the mouse, or of the only one there is. */
export function canvasItems(canvas = app.canvas) {
    const graph = graphOf(canvas), [x, y] = canvas.graph_mouse;
    const found = nearest(graph, [x, y]);
    if (!found || !canErase(graph, graph.getNodeById(found.link.origin_id))) return [];
    if (found.distance > NEAR && new Set(links(graph, "MODEL").map((link) => link.origin_id)).size > 1) return [];
    const through =
        found.distance > NEAR
            ? links(graph, "MODEL").filter((link) => link.origin_slot === found.link.origin_slot)
            : [found.link];
    return [{ content: TITLE, callback: () => void insert(graph, through, [x, y]) }];
}

/** Entries of the menu of a node whose model goes somewhere. */
function nodeItems(node) {
    const through = linksOut(node).filter((link) => link.type === "MODEL");
    if (!through.length || !canErase(node.graph, node)) return [];
    const same = through.filter((link) => link.origin_slot === through[0].origin_slot);
    const place = [node.pos[0] + node.size[0] + 60, node.pos[1]];
    return [{ content: TITLE, callback: () => void insert(node.graph, same, place) }];
}

/** Puts the entry into the menu of a node, above what the page adds last: Clone and Remove. */
export function addToNodeMenu(node) {
    if (!node.outputs?.some((output) => output.type === "MODEL")) return;
    const before = node.getExtraMenuOptions;
    node.getExtraMenuOptions = function (canvas, options) {
        const found = before?.call(this, canvas, options);
        const items = nodeItems(this);
        if (items.length) options.push(...items);
        return found;
    };
}

/** Pages that do not ask extensions for entries of the canvas' menu have a method to be extended instead. */
export function addToOldMenus() {
    if (app.collectCanvasMenuItems) return;
    const before = globalThis.LGraphCanvas.prototype.getCanvasMenuOptions;
    globalThis.LGraphCanvas.prototype.getCanvasMenuOptions = function (...args) {
        const options = before.apply(this, args);
        const found = canvasItems(this);
        if (found.length) options.push(null, ...found);
        return options;
    };
}
