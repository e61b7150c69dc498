// @ts-check
// Membrane in the page: the stack editor, what adapters' files say, live permeability, "Erase a concept here", and on
// every node what its run did.

import { addInfo } from "./adapter_info.js";
import { addToNodeMenu, addToOldMenus, canvasItems } from "./erase_here.js";
import { executionIds, promptTexts } from "./graph.js";
import { watchWords } from "./hints.js";
import {
    adapterNames, addPart, after, api, app, ask, graphChanged, passCanvasGestures, removePart, sendToClipboard, stayMounted, translations,
    toast, undoRedo, uploadAdapter, whileInGraph,
} from "./host.js";
import { keepReport, listenForReports } from "./report.js";
import { StackEditor } from "./stack_editor.js";
import { speak } from "./strings.js";

const WIDGET = "MEMBRANE_STACK";
const PROMOTED = 320; // pixels of an editor on a subgraph node
const editors = new Map(); // of the nodes that are in a graph of the page

function hasScrollBar(element) {
    const scrolled = element.closest('[data-capture-wheel="true"]');
    return scrolled !== null && scrolled.scrollHeight > scrolled.clientHeight;
}

/** Knows the editor, and keeps it in its place, as long as its node is in a graph. */
function keepTrack(node, editor) {
    after(node, "onRemoved", () => editors.delete(node));
    const look = () => {
        editors.set(node, editor);
        editor.checkWords();
        stayMounted(node, editor.root, ".membrane-stack");
    };
    whileInGraph(node, look, 500);
}

/** Files that are dropped on the node beside its editor. */
function takeFiles(node, editor) {
    node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
    node.onDragDrop = (event) => {
        const files = [...(event.dataTransfer?.files ?? [])];
        if (files.length) editor.dropFiles(files);
        return files.length > 0;
    };
}

/** An editor; changed: gets every new text. */
const newEditor = (changed) =>
    new StackEditor({
        changed,
        committed: graphChanged,
        names: adapterNames,
        undoRedo,
        copy: sendToClipboard,
        upload: uploadAdapter,
        tell: (text) => toast("info", text),
    });

/** The widget of the node's text: the editor, whose value is the text. */
function stackWidget(node, name, spec) {
    const editor = newEditor((text) => {
        widget.value = text;
    });
    if (spec[1]?.default) editor.value = spec[1].default;
    const widget = node.addDOMWidget(name, "membrane_stack", editor.root, {
        hideOnZoom: true,
        getValue: () => editor.value,
        setValue: (text) => {
            editor.value = text;
        },
        getMinHeight: () => 280,
    });
    passCanvasGestures(editor.root, hasScrollBar);
    takeFiles(node, editor);
    keepTrack(node, editor);
    watchPrompt(node, editor);
    return { widget, minWidth: 500, minHeight: 380 };
}

/** Draws the editor on a subgraph node that its text was promoted to, where pages of 2026 draw nothing. */
function drawPromoted(node) {
    const drawn = new Map(); // {widget, editor} by the promoted text's name
    const look = () => {
        const texts = (node.widgets ?? []).filter((widget) => widget.type === "membrane_stack" && !widget.element);
        for (const [name, { widget, editor }] of drawn) {
            if (texts.some((text) => text.name === name)) continue;
            removePart(node, widget);
            editor.root.remove();
            drawn.delete(name);
        }
        for (const { name } of texts) {
            const text = () => (node.widgets ?? []).find((widget) => widget.name === name);
            if (!drawn.has(name)) {
                const editor = newEditor((value) => {
                    text().value = value;
                });
                const widget = addPart(node, `membrane_${name}`, editor.root, PROMOTED);
                node.setSize([Math.max(node.size[0], 500), node.size[1]]);
                passCanvasGestures(editor.root, hasScrollBar);
                drawn.set(name, { widget, editor });
            }
            const { editor } = drawn.get(name);
            editor.value = text().value;
            editor.checkWords();
            stayMounted(node, editor.root, ".membrane-stack");
        }
    };
    whileInGraph(node, look, 500);
}

/** Keeps the line below the rows up to date with the prompt that the stack's model will get. */
function watchPrompt(node, editor) {
    let asked = null;
    const look = async () => {
        if (!node.graph || !editor.root.isConnected) return;
        const texts = promptTexts(node);
        const text = texts.length ? texts.join("\n") : null;
        const now = JSON.stringify([text, editor.value]);
        if (now === asked || editor.problemText !== null) return;
        asked = now;
        const answer = await ask("/membrane/openings", { stack_json: editor.value, text: text ?? "" }).then(
            ({ rows }) => ({ text, rows }),
            (error) => ({ text, rows: [], problem: error.message }),
        );
        if (asked === now) editor.showPrompt(answer);
    };
    whileInGraph(node, look, 700); // no page of any year says when a text changed
}

app.registerExtension({
    name: "membrane.editor",

    getCustomWidgets: () => ({
        [WIDGET]: (node, name, spec) => stackWidget(node, name, spec),
        // pages of 2024 find a widget by the input's type and name
        "STRING:stack_json": (node, name, spec, page) =>
            (node.comfyClass ?? node.constructor.comfyClass) === "MembraneStackEditor"
                ? stackWidget(node, name, spec)
                : page.widgets.STRING(node, name, spec, page),
    }),

    beforeRegisterNodeDef(nodeType, nodeData) {
        if (nodeData.name === "MembraneStackEditor") {
            const spec = nodeData.input.required.stack_json;
            spec[1] = { ...spec[1], widgetType: WIDGET }; // so do newer pages
        }
    },

    nodeCreated(node) {
        if (node.comfyClass === "MembraneLoadAdapter") addInfo(node);
        if (node.comfyClass?.startsWith("Membrane")) keepReport(node);
        watchWords(node);
        addToNodeMenu(node);
        if (node.isSubgraphNode?.()) drawPromoted(node);
    },

    // before any node is made
    async init() {
        speak(await translations());
    },

    // also when the page's language has changed, after which the page makes the nodes anew
    async refreshComboInNodes() {
        speak(await translations());
        for (const editor of editors.values()) editor.refreshNames();
    },

    getCanvasMenuItems: canvasItems,

    setup() {
        addToOldMenus();
        listenForReports();
        api.addEventListener("membrane.gates", ({ detail }) => {
            for (const [node, editor] of editors) {
                if (executionIds(app.rootGraph ?? app.graph, node).includes(detail.node)) editor.showGates(detail);
            }
        });
        api.addEventListener("execution_start", () => {
            for (const editor of editors.values()) editor.setStale();
        });
    },
});
