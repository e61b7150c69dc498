// @ts-check
// Choosing a file: a search box above the list of names, one of which the arrow keys point at.

import { make } from "./elements.js";
import { t } from "./strings.js";

const MOST = 500; // names that are listed
const STEPS = { ArrowDown: 1, ArrowUp: -1 };

export class Chooser {
    /**
     * @param {{names: () => string[], current: () => string | undefined, take: (name: string) => void}} wishes
     *   names: the files there are; current: the name to point at first; take: gets the name that was chosen
     */
    constructor(wishes) {
        this.wishes = wishes;
        this.found = [];
        this.at = 0;
        this.id = `membrane-options-${Math.random().toString(36).slice(2)}`;
        this.box = this.makeBox();
        this.options = this.makeOptions();
        const close = make("button", { type: "button", "data-do": "close" }, t("chooser.cancel"));
        this.elements = [make("div", { class: "membrane-bar" }, this.box, close), this.options];
    }

    makeBox() {
        return make("input", {
            class: "membrane-search", type: "text", role: "combobox",
            placeholder: t("chooser.search"), "aria-label": t("chooser.search"),
            "aria-expanded": "true", "aria-controls": this.id, "aria-autocomplete": "list",
            input: () => this.list(),
            keydown: (event) => this.onKey(event),
        });
    }

    makeOptions() {
        return make("ul", {
            class: "membrane-options", role: "listbox", id: this.id,
            "aria-label": t("chooser.list"), "data-capture-wheel": "true",
            click: (event) => this.onClick(event),
        });
    }

    /** Lists the names that have all words of the search box. */
    list() {
        const words = this.box.value.toLowerCase().split(/\s+/).filter(Boolean);
        const fits = (name) => words.every((word) => name.toLowerCase().includes(word));
        const names = this.wishes.names();
        this.found = names.filter(fits).slice(0, MOST);
        this.at = Math.max(0, this.found.indexOf(this.wishes.current() ?? ""));
        const option = (name, i) => make("li", { role: "option", id: `${this.id}-${i}`, "data-name": name }, name);
        const none = names.length ? "chooser.none_found" : "chooser.no_files";
        const items = this.found.length
            ? this.found.map(option)
            : [make("li", { class: "membrane-none" }, t(none))];
        this.options.replaceChildren(...items);
        this.point();
    }

    /** Marks the name that Enter would take. */
    point() {
        const items = this.found.length ? [...this.options.children] : [];
        items.forEach((item, i) => item.setAttribute("aria-selected", String(i === this.at)));
        this.box.setAttribute("aria-activedescendant", items[this.at]?.id ?? "");
        items[this.at]?.scrollIntoView({ block: "nearest" });
    }

    onKey(event) {
        if (!this.found.length || (event.altKey && event.key in STEPS)) return;
        if (event.key in STEPS) {
            this.at = (this.at + STEPS[event.key] + this.found.length) % this.found.length;
            this.point();
        } else if (event.key === "Enter") this.wishes.take(this.found[this.at]);
        else return;
        event.preventDefault();
    }

    onClick(event) {
        const name = event.target.closest("[data-name]")?.dataset.name;
        if (name !== undefined) this.wishes.take(name);
    }
}
