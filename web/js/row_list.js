// @ts-check
// The rows of the stack editor, one for each entry of the stack and in its order.

import { make } from "./elements.js";
import { RowView } from "./row_view.js";
import { nameOf, understood } from "./stack_document.js";
import { t } from "./strings.js";

/** What the search looks through: the name or the words, or all of an entry that is not understood. */
const searched = (entry) => (understood(entry) ? nameOf(entry) : (JSON.stringify(entry) ?? "")).toLowerCase();

export class RowList {
    constructor() {
        /** @type {RowView[]} */
        this.views = [];
        const attributes = { class: "membrane-list", "aria-label": t("list"), "data-capture-wheel": "true" };
        this.element = make("ol", attributes);
    }

    /** Shows the entries; isMissing says of which there is no file. */
    show(entries, isMissing) {
        this.arrange(entries);
        entries.forEach((entry, i) => this.views[i].show(entry, isMissing(entry)));
    }

    /** An entry keeps its view, so that a row that moves takes nothing else along. */
    arrange(entries) {
        const asBefore = (entry, i) => this.views[i].entry === entry;
        if (entries.length === this.views.length && entries.every(asBefore)) return;
        const own = new Map(this.views.map((view) => [view.entry, view]));
        const kept = new Set(entries.map((entry) => own.get(entry)));
        const free = this.views.filter((view) => !kept.has(view));
        this.views = entries.map((entry) => {
            const view = own.get(entry) ?? free.shift() ?? new RowView();
            own.delete(entry); // texts and numbers, which are no entries, may be there twice
            return view;
        });
        for (const view of free) view.element.remove();
        this.putInOrder();
    }

    putInOrder() {
        let at = this.element.firstElementChild;
        for (const { element } of this.views) {
            // the row with the focus stays where it is and the others move, as it would lose the focus
            if (at?.nextElementSibling === element && !at.contains(document.activeElement)) this.element.append(at);
            else if (at !== element) this.element.insertBefore(element, at);
            at = element.nextElementSibling;
        }
    }

    /** Hides the rows that lack a text. */
    filter(text) {
        const wanted = text.trim().toLowerCase();
        for (const { entry, element } of this.views) {
            const hidden = wanted !== "" && !searched(entry).includes(wanted);
            if (element.hidden !== hidden) element.hidden = hidden;
        }
    }

    /** @param {import("./gates.js").Openings} openings */
    showGates(openings) {
        for (const view of this.views) view.gate.show(openings.of(view.entry), openings.stale);
    }

    /** @param {Map<string, string>} concepts what each file erases, by its name */
    showConcepts(concepts) {
        for (const view of this.views) view.showConcept(concepts.get(view.entry?.adapter) ?? "");
    }

    /** The row an element is in, -1 when it is in none. */
    rowOf(element) {
        const row = element.closest?.(".membrane-row");
        return row ? this.views.findIndex((view) => view.element === row) : -1;
    }
}
