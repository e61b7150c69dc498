// @ts-check
// What is wrong with words while they are written, in the sentences that a run would say.

import { make, setText } from "./elements.js";
import { linksIn } from "./graph.js";
import { addPart, ask, mountBelow, removePart, stayMounted, whileInGraph } from "./host.js";
import { textHeight } from "./report.js";
import { styleElement } from "./stack_style.js";

/** @typedef {{level: string, text: string}} Hint */

/** The boxes of each node that hold words, by what the host calls them. */
const BOXES = {
    MembraneForget: { concepts: "remove", preserve: "keep", kind: "kind" },
    MembraneForgetSettings: { templates: "templates" },
    MembraneErase: { concepts: "concepts", surrogate: "replace_with", preserve: "preserve", templates: "templates" },
    MembraneTrain: { concepts: "concepts", surrogate: "surrogate", preserve: "preserve", templates: "templates" },
};
const EDGES = 16; // pixels around the text

/** Asks the host about words once they stand still. */
export class Checker {
    /** @param {(hints: Hint[]) => void} show */
    constructor(show) {
        this.show = show;
        this.seen = this.asked = JSON.stringify({});
    }

    /** Looks at words again, {what the host calls them: text}. */
    async look(words) {
        const now = JSON.stringify(words), before = this.seen;
        this.seen = now;
        if (now === this.asked || now !== before) return;
        this.asked = now;
        const said = await ask("/membrane/words", words).then(({ hints }) => hints, () => []);
        if (this.asked === now) this.show(said);
    }
}

export const severest = (hints) => (hints.some((hint) => hint.level === "error") ? "error" : "warning");
export const wordsOf = (hints) => hints.map((hint) => hint.text).join("\n");

/** The part of a node that shows hints, there only as long as there are some. */
class HintPart {
    constructor(node) {
        this.node = node;
        this.text = make("div", { class: "membrane-words" });
        const attributes = { class: "membrane membrane-report membrane-hints", role: "status", "data-capture-wheel": "true" };
        this.root = make("div", attributes, styleElement(), this.text);
        this.widget = null;
    }

    /** @param {Hint[]} hints */
    show(hints) {
        const text = wordsOf(hints), height = textHeight(this.node, text) + EDGES;
        if (this.widget && (!text || height !== this.height)) {
            removePart(this.node, this.widget);
            this.widget = null;
        }
        if (!text) return this.root.remove();
        setText(this.text, text);
        this.text.className = `membrane-words membrane-${severest(hints)}`;
        if (this.widget) return;
        this.height = height;
        this.root.style.minHeight = `${this.height}px`;
        this.widget = addPart(this.node, "membrane_hints", this.root, this.height);
    }

    stay() {
        if (!this.widget) return;
        stayMounted(this.node, this.root, ".membrane-hints");
        mountBelow(this.node, this.root);
    }
}

/** Watches the words of a node. */
export function watchWords(node) {
    const boxes = BOXES[node.comfyClass];
    if (!boxes) return;
    const part = new HintPart(node), checker = new Checker((hints) => part.show(hints));
    const look = () => {
        const wired = new Set(linksIn(node).map(({ input }) => input.widget?.name ?? input.name));
        const valueOf = (name) => (wired.has(name) ? undefined : node.widgets?.find((widget) => widget.name === name)?.value);
        const words = Object.entries(boxes).map(([name, box]) => [name, valueOf(box)]);
        checker.look(Object.fromEntries(words.filter(([, value]) => typeof value === "string" && value !== "")));
        part.stay();
    };
    whileInGraph(node, look, 500); // no page of any year says when a text changed
}
