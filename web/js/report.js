// @ts-check
// What a run did, or why it stopped, on the node itself: a read-only part below its widgets, in no workflow.

import { slider } from "./compare.js";
import { make } from "./elements.js";
import * as graphs from "./graph.js";
import { addPart, api, app, fileAddress, mountBelow, removePart, sendToClipboard, stayMounted, toast, whileInGraph } from "./host.js";
import { styleElement } from "./stack_style.js";
import { t } from "./strings.js";

/**
 * @typedef {{filename: string, subfolder: string, type: string}} File
 * @typedef {{title: string, level?: string, lines: string[], links?: {label: string, url: string}[]}} Part
 * @typedef {{parts: Part[], pairs?: {before: File, after: File}[]}} Report
 */

const LINE = 17, CHARACTER = 6.8, EDGES = 64; // pixels: of a line, of a letter, and around the text
const TALLEST = 170; // of the text; the rest scrolls
const PICTURE = 300;
const WAITING = "queued"; // of a report that came before its run began

/** What the page shows of each node. @type {Map<any, NodePart>} */
const shown = new Map();

const nodeByExecutionId = (id) => graphs.nodeByExecutionId(app.rootGraph ?? app.graph, id);
const textOf = ({ title, lines }) => [title, ...lines].filter((line, i) => i || line).join("\n");

/** Only addresses of the host itself and of the web, so that no report can run anything. */
const address = (url) => (/^\/(?!\/)/.test(url) ? api.apiURL(url) : /^https:\/\//.test(url) ? url : null);

function linkTo({ label, url }) {
    const href = address(String(url));
    return href && make("a", { href, target: "_blank", rel: "noopener" }, label);
}

/** How many pixels a text takes on a node. */
export function textHeight(node, text) {
    const letters = Math.max(20, ((node.size?.[0] ?? 300) - 40) / CHARACTER);
    const lines = text.split("\n").map((line) => Math.max(1, Math.ceil(line.length / letters)));
    return Math.min(TALLEST, lines.reduce((sum, count) => sum + count, 0) * LINE);
}

/** The part of one node. */
class NodePart {
    constructor(node) {
        this.node = node;
        this.body = make("div", { class: "membrane-said" });
        this.root = make("div", { class: "membrane membrane-report", "data-capture-wheel": "true" }, styleElement());
        this.root.append(this.body);
        for (const kind of ["pointerdown", "copy", "keydown"]) {
            this.root.addEventListener(kind, (event) => event.stopPropagation()); // text is selected, no node dragged
        }
        this.widget = null;
    }

    /** @param {Report} report @param {string} kind "report", "error" or "queued" */
    show(report, kind) {
        this.kind = kind;
        this.root.setAttribute("role", kind === "error" ? "alert" : "status");
        this.setStale(false);
        const parts = report.parts.flatMap((part) => this.elements(part));
        if (report.pairs?.length) parts.unshift(slider(report.pairs));
        this.body.replaceChildren(...parts);
        const height = this.heightOf(report);
        this.root.style.minHeight = `${height}px`;
        if (this.height !== height) this.free();
        if (!this.widget) this.widget = addPart(this.node, "membrane_report", this.root, height);
        this.height = height;
    }

    elements(part) {
        const words = make("div", { class: `membrane-words membrane-${part.level ?? "info"}` });
        if (part.title) words.append(make("strong", {}, part.title));
        words.append(make("div", {}, part.lines.join("\n")));
        const copy = make("button", { type: "button", click: () => sendToClipboard(textOf(part), words) }, t("report.copy"));
        const links = (part.links ?? []).map(linkTo).filter((link) => link !== null);
        return [words, make("div", { class: "membrane-bar" }, copy, ...links)];
    }

    heightOf({ parts, pairs }) {
        const text = parts.map((part) => textHeight(this.node, textOf(part)) + EDGES);
        return text.reduce((sum, height) => sum + height, pairs?.length ? PICTURE : 0);
    }

    /** Paler: it is from before the run that is going on. */
    setStale(stale) {
        this.stale = stale;
        this.root.classList.toggle("membrane-stale", stale);
    }

    /** Gives the room back; the element stays where the page has it, for what is shown next. */
    free() {
        if (this.widget) removePart(this.node, this.widget);
        this.widget = null;
    }

    hide() {
        this.free();
        this.root.remove();
    }
}

function clear(node) {
    shown.get(node)?.hide();
    shown.delete(node);
}

/** @param {any} node @param {Report} report @param {string} kind */
function show(node, report, kind) {
    const part = shown.get(node) ?? new NodePart(node);
    shown.set(node, part);
    part.show(report, kind);
}

/** A node's report from what it sent to the page, or null. @returns {Report | null} */
function reportOf(output) {
    const parts = (output?.membrane ?? []).filter((part) => part && typeof part === "object");
    const pairs = output?.membrane_pairs ?? [];
    const pages = (output?.membrane_files ?? []).filter((file) => file.filename?.endsWith(".html"));
    const links = pages.map((file) => ({ label: t("report.open"), url: fileAddress("/membrane/report", file) }));
    if (!parts.length && !pairs.length && !links.length) return null;
    const all = parts.map((part) => ({ ...part, title: String(part.title ?? ""), lines: (part.lines ?? []).map(String) }));
    if (links.length) {
        const last = all.at(-1) ?? { title: "", lines: (output.text ?? []).map(String) };
        all.splice(-1, 1, { ...last, links: [...(last.links ?? []), ...links] });
    }
    return { parts: all, pairs };
}

const asError = (text) => ({ parts: [{ title: "", level: "error", lines: [text] }] });

/** The sentence of a mistake: the pack's own are for people, and all others are named by their kind. */
function sentence({ exception_type, exception_message }) {
    const text = String(exception_message ?? "").trim();
    return exception_type?.endsWith("ErasureError") ? text : `${exception_type}: ${text}`;
}

const ofThePack = (type) => String(type ?? "").startsWith("Membrane");

function onError(detail) {
    if (!ofThePack(detail.node_type) && !detail.exception_type?.endsWith("ErasureError")) return;
    const node = nodeByExecutionId(detail.node_id), text = sentence(detail);
    toast("error", node?.title ?? detail.node_type, text);
    if (node) show(node, asError(text), "error");
}

/** What the host refused before it ran anything, {id: {class_type, errors: [{message, details}]}}. */
function onRefused(errors) {
    for (const [id, { class_type, errors: found }] of Object.entries(errors ?? {})) {
        const node = nodeByExecutionId(id);
        if (!node || !ofThePack(class_type) || !found?.length) continue;
        const said = found.map(({ type, message, details }) =>
            type === "custom_validation_failed" ? String(details).replace(/^\w+ - /, "") : `${message}: ${details}`,
        );
        show(node, asError(said.join("\n")), "error");
    }
}

function onStart() {
    for (const [node, part] of shown) {
        if (part.kind === "error" || [2, 4].includes(node.mode)) clear(node); // muted and bypassed ones do not run
        else if (part.kind === WAITING) part.kind = "report";
        else part.setStale(true);
        part.ran = false;
    }
}

function onExecuting(id) {
    const part = id == null ? null : shown.get(nodeByExecutionId(id));
    if (part) part.ran = true;
    if (id == null) onEnd();
}

/** What is still from before belongs to nodes that ran and had nothing to say, or to such that were not run again. */
function onEnd() {
    for (const [node, part] of shown) {
        if (part.stale && part.ran) clear(node);
        else part.setStale(false);
    }
}

/** A warning that the host sends when a prompt is queued: {node, title, text}. */
function onWarning({ node: id, title, text }) {
    const node = nodeByExecutionId(id);
    toast("warn", title, text);
    if (node) show(node, { parts: [{ title, level: "warning", lines: [text] }] }, WAITING);
}

/** Shows what a node of the pack had said when the page makes it anew, as after an undo. */
export function keepReport(node) {
    let looked = false;
    whileInGraph(
        node,
        () => {
            const part = shown.get(node);
            if (part?.widget) {
                stayMounted(node, part.root, ".membrane-report");
                mountBelow(node, part.root);
            }
            if (looked || part || node.graph !== (app.rootGraph ?? app.graph)) return;
            looked = true;
            const report = reportOf(app.nodeOutputs?.[node.id]);
            if (report) show(node, report, "report");
        },
        500,
    );
    const removed = node.onRemoved;
    node.onRemoved = function (...args) {
        shown.delete(node);
        return removed?.apply(this, args);
    };
}

/** Listens to the host. */
export function listenForReports() {
    const on = (event, action) => api.addEventListener(event, ({ detail }) => action(detail));
    on("executed", ({ node: id, display_node, output }) => {
        const node = nodeByExecutionId(id) ?? nodeByExecutionId(display_node), report = reportOf(output);
        if (node && report) show(node, report, "report");
    });
    on("execution_start", onStart);
    on("executing", onExecuting);
    on("execution_success", onEnd);
    on("execution_error", onError);
    on("membrane.warning", onWarning);
    const queue = api.queuePrompt;
    api.queuePrompt = async function (...args) {
        try {
            const answer = await queue.apply(this, args);
            onRefused(answer?.node_errors);
            return answer;
        } catch (error) {
            onRefused(error?.response?.node_errors);
            throw error;
        }
    };
}
