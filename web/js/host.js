// @ts-check
// Where the pages of ComfyUI of different years differ.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { t } from "./strings.js";

export { api, app };

const tracker = () => app.extensionManager?.workflow?.activeWorkflow?.changeTracker;

/** Tells the page that the graph has changed, so that it can be undone and counts as unsaved. */
export function graphChanged() {
    app.graph?.setDirtyCanvas(true, true);
    const found = tracker();
    if (found?.captureCanvasState) found.captureCanvasState();
    else if (found?.checkState) found.checkState();
    else window.dispatchEvent(new MouseEvent("mouseup")); // pages of 2024 look for changes then, and only then
}

/** Ctrl+Z and Ctrl+Y from a control of ours, which the page itself leaves to inputs. True when it was one of them. */
export function undoRedo(event) {
    if (!(event.ctrlKey || event.metaKey) || event.altKey) return false;
    const key = event.key.toLowerCase();
    if (key !== "z" && key !== "y") return false;
    const found = tracker();
    if (found?.undo) {
        event.preventDefault();
        event.stopPropagation();
        if (key === "y" || event.shiftKey) found.redo();
        else found.undo();
    } else {
        // pages of 2024 look in the next frame where the focus is
        /** @type {HTMLElement | null} */ (document.activeElement)?.blur();
    }
    return true;
}

/** One change of the graph, however many steps it takes. */
export function asOneChange(graph, action) {
    app.canvas.emitBeforeChange?.();
    graph.beforeChange?.();
    try {
        return action();
    } finally {
        graph.afterChange?.();
        app.canvas.emitAfterChange?.();
        app.canvas.draw?.(true, true); // gives new nodes their size, which would else be a change of its own
        graphChanged();
    }
}

/** A JSON answer of the host; raises an Error with its sentence when there is one. */
export async function ask(route, body) {
    const options = body && {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
    };
    return answered(route, options);
}

async function answered(route, options) {
    const answer = await api.fetchApi(route, options);
    const found = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(found.error ?? t("problem.host", answer.status, route));
    return found;
}

/** Sends an adapter's file to the model folder; raises an Error with the host's sentence. */
export async function uploadAdapter(file) {
    const options = { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file };
    await answered(`/membrane/upload?name=${encodeURIComponent(file.name)}`, options);
}

/** The pack's strings in the page's language, as locales/ has them; none in English, and from hosts of 2024. */
export async function translations() {
    const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
    if (language === "en") return {};
    const all = await ask("/i18n").catch(() => ({})); // a page in English is better than none
    const [general] = language.split("-"); // the page shows zh, too, where a pack lacks zh-TW
    return { ...all[general]?.membrane, ...all[language]?.membrane };
}

/** Names of the files that Load Erasure Adapter lists, as the host has them now. */
export async function adapterNames() {
    const input = (await ask("/object_info/MembraneLoadAdapter")).MembraneLoadAdapter.input.required.adapter_name;
    return Array.isArray(input[0]) ? input[0] : (input[1]?.options ?? []);
}

/** True when nodes are drawn as elements of the page (Nodes 2.0) and not on the canvas. */
export const drawsNodesAsElements = () => globalThis.LiteGraph?.vueNodesMode === true;

/** Does something whenever a method of an object has been called, which it may have or not. */
export function after(object, method, action) {
    const before = object[method];
    object[method] = function (...args) {
        const result = before?.apply(this, args);
        action();
        return result;
    };
}

/** Does something now and then as long as a node is in a graph, soon after it got there first. */
export function whileInGraph(node, action, milliseconds) {
    const timers = [];
    after(node, "onAdded", () => {
        timers.push(setInterval(action, milliseconds), setTimeout(action, 0), setTimeout(action, 100));
    });
    after(node, "onRemoved", () => {
        for (const timer of timers.splice(0)) clearInterval(timer); // which ends a timeout as well
    });
}

/**
 * Puts an element of ours in the place of that of a node before it: pages that draw nodes as elements keep what a node
 * of the same number had shown, as after an undo.
 */
export function stayMounted(node, element, selector) {
    if (!drawsNodesAsElements() || element.isConnected || app.canvas.graph !== node.graph) return;
    drawnNode(node)?.querySelector(selector)?.replaceWith(element);
}

const drawnNode = (node) => document.querySelector(`[data-node-id="${CSS.escape(String(node.id))}"]`);

/**
 * Puts an element below a node's widgets that the page has not drawn: pages of 2025 take down a node's widgets when one
 * of them changes, and know none that is added later.
 */
export function mountBelow(node, element) {
    if (!drawsNodesAsElements() || element.isConnected || app.canvas.graph !== node.graph) return;
    drawnNode(node)?.querySelector(".lg-node-widgets")?.append(element);
}

/** The pan and zoom of the canvas go on over an element of ours, except where `scrolls` says it needs the wheel. */
export function passCanvasGestures(element, scrolls) {
    element.addEventListener(
        "wheel",
        (event) => {
            if (drawsNodesAsElements()) return; // its page decides by data-capture-wheel
            if (!event.ctrlKey && scrolls(event.target)) {
                event.stopPropagation();
                return;
            }
            event.preventDefault();
            app.canvas.processMouseWheel(event);
        },
        { passive: false },
    );
    const middle = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
    for (const [kind, method] of Object.entries(middle)) {
        element.addEventListener(kind, (event) => {
            const held = kind === "pointermove" ? event.buttons & 4 : event.button === 1;
            if (held && !drawsNodesAsElements()) app.canvas[method](event);
        });
    }
}

/** The route that gives a file of the output or temp folder, as the host names it. */
export const fileAddress = (route, file) => `${route}?${new URLSearchParams(file)}`;

/** Puts a text that an element shows into the clipboard. */
export function sendToClipboard(text, shown) {
    const byHand = () => {
        getSelection()?.selectAllChildren(shown);
        document.execCommand("copy"); // the page has no clipboard where it was not opened over https
    };
    if (navigator.clipboard) navigator.clipboard.writeText(text).catch(byHand);
    else byHand();
}

/** A short message over the page, where it has such. */
export function toast(severity, summary, detail) {
    app.extensionManager?.toast?.add({ severity, summary, detail, life: 12000 });
}

/**
 * The parts of each node: {widget: {from: the node's height without it, takes: how many pixels it made that grow}}.
 * @type {WeakMap<any, Map<any, {from: number, takes: number}>>}
 */
const partsOf = new WeakMap();

/** How many pixels of a node's height are due to a part, however the node was resized since. */
const dueTo = (node, { from, takes }) => Math.min(takes, Math.max(0, node.size[1] - from));

/** The parts of a node, of whose height none gets into a workflow: a run is no change of it. */
function knownParts(node) {
    const known = partsOf.get(node);
    if (known) return known;
    const parts = new Map(), before = node.onSerialize;
    partsOf.set(node, parts);
    node.onSerialize = function (data) {
        const found = before?.call(this, data);
        const due = [...parts.values()].reduce((sum, part) => sum + dueTo(this, part), 0);
        if (due) data.size = [data.size[0], data.size[1] - due];
        return found;
    };
    return parts;
}

/** Puts an element of so many pixels below a node's widgets, and makes what room it lacks; it is in no workflow. */
export function addPart(node, name, element, height) {
    const filled = node.widgets?.some((widget) => widget.element ?? widget.inputEl); // boxes of text take all there is
    const [from, least] = [node.size[1], node.computeSize()[1]];
    const widget = node.addDOMWidget(name, name, element, {
        serialize: false,
        hideOnZoom: true,
        getValue: () => "",
        setValue: () => {},
        getMinHeight: () => height,
        getHeight: () => height,
        getMaxHeight: () => height,
    });
    widget.serialize = false;
    const needs = Math.max(height, node.computeSize()[1] - least); // with the gap that newer pages put between widgets
    const grows = Math.max(0, needs - (filled ? 0 : Math.max(0, from - least)));
    // pages that draw nodes as elements know how much room there is, and make the node taller by themselves
    knownParts(node).set(widget, { from, takes: drawsNodesAsElements() ? needs : grows });
    node.setSize([node.size[0], from + grows]);
    app.graph?.setDirtyCanvas(true, true);
    return widget;
}

/** Takes such an element out again, and the room that was made for it. */
export function removePart(node, widget) {
    const parts = knownParts(node), own = parts.get(widget);
    const due = own ? dueTo(node, own) : 0;
    parts.delete(widget);
    for (const part of parts.values()) if (part.from > own.from) part.from -= due; // of those below it
    widget.onRemove?.();
    const place = node.widgets.indexOf(widget);
    if (place >= 0) node.widgets.splice(place, 1);
    node.setSize([node.size[0], Math.max(node.size[1] - due, node.computeSize()[1])]);
    app.graph?.setDirtyCanvas(true, true);
}
