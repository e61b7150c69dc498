// @ts-check
// One row of the stack editor. It shows whatever entry it is given, and touches only what differs.

import { icon, make, setText } from "./elements.js";
import { GateView } from "./gates.js";
import { Checker, severest, wordsOf } from "./hints.js";
import { Control } from "./row_controls.js";
import { field, isWords, nameOf, understood } from "./stack_document.js";
import { t } from "./strings.js";

const iconButton = (name, attributes = {}) =>
    make("button", { class: "membrane-icon", type: "button", "data-do": name, ...attributes }, icon(name));

const lineOf = (controls, attributes = {}) =>
    make("div", { class: "membrane-line", ...attributes }, ...controls.map((control) => control.element));

export class RowView {
    constructor() {
        this.entry = null;
        this.gate = new GateView();
        this.checker = new Checker((hints) => this.showHints(hints));
        this.makeButtons();
        this.makeControls();
        this.note = make("span", { class: "membrane-note" });
        this.raw = make("code", { class: "membrane-raw", hidden: true });
        this.hint = make("div", { class: "membrane-hint", hidden: true });
        const top = [this.handle, this.toggle, this.concept, this.name, this.raw, this.note];
        top.push(this.gate.element, this.strength.box, this.more, this.drop);
        const tools = make("div", { class: "membrane-line" }, this.info, this.copy);
        const folded = [this.basic, this.second, this.advanced, tools];
        this.folded = make("div", { class: "membrane-folded", hidden: true }, ...folded);
        const first = make("div", { class: "membrane-top" }, ...top);
        this.element = make("li", { class: "membrane-row" }, first, this.hint, this.folded);
    }

    makeButtons() {
        const ours = (name, attributes) => make("button", { type: "button", "data-do": name, ...attributes });
        this.toggle = ours("toggle", { class: "membrane-switch", role: "switch" });
        this.name = ours("choose", { class: "membrane-name" });
        this.concept = make("span", { class: "membrane-concept", hidden: true });
        this.handle = iconButton("handle", { class: "membrane-icon membrane-handle", title: t("row.move.hint") });
        this.more = iconButton("more", { title: t("row.more.hint"), "aria-expanded": "false" });
        this.info = iconButton("info", { title: t("row.info.hint") });
        this.copy = iconButton("duplicate", { title: t("row.duplicate.hint") });
        this.drop = iconButton("remove", { title: t("row.remove.hint") });
    }

    makeControls() {
        const strength = (this.strength = new Control("strength"));
        const factor = new Control("permeability.factor");
        const mode = new Control("permeability.mode");
        const [start, end] = [new Control("start_percent"), new Control("end_percent")];
        const [threshold, topK] = [new Control("permeability.threshold"), new Control("permeability.top_k")];
        const negative = new Control("permeability.negative");
        const [keep, kind] = [new Control("keep"), new Control("kind")];
        this.words = new Control("words");
        this.ofWords = lineOf([keep, kind]);
        this.basic = lineOf([strength, factor]);
        this.second = lineOf([mode, start, end]);
        this.advanced = lineOf([threshold, negative, topK]);
        this.controls = [this.words, keep, kind, strength, factor, mode, start, end, threshold, negative, topK];
    }

    /** Shows an entry of the stack; missing: there is no file of its name. */
    show(entry, missing) {
        this.entry = entry;
        const key = `${missing} ${JSON.stringify(entry)}`;
        if (key === this.shown) return;
        this.shown = key;
        const known = understood(entry);
        this.setKind(known, known && isWords(entry));
        this.setOwner(known ? nameOf(entry) || t(isWords(entry) ? "row.no_words" : "row.no_adapter") : t("row.not_understood"));
        setText(this.note, known ? (missing ? t("row.missing") : "") : t("row.kept"));
        this.element.classList.toggle("membrane-missing", missing);
        this.element.classList.toggle("membrane-off", known && field(entry, "enabled") === false);
        if (known) this.showFields(entry);
        else this.raw.textContent = JSON.stringify(entry);
    }

    showFields(entry) {
        const on = String(field(entry, "enabled") !== false);
        if (this.toggle.getAttribute("aria-checked") !== on) this.toggle.setAttribute("aria-checked", on);
        for (const control of this.controls) control.show(entry);
    }

    /** Everything that depends only on whether the entry is understood, and on whether it is words. */
    setKind(known, words) {
        const kind = `${known} ${words}`;
        if (kind === this.kind) return;
        this.kind = kind;
        this.owner = undefined;
        for (const part of [this.toggle, this.strength.box, this.more]) part.hidden = !known;
        if (!known) this.folded.hidden = true;
        this.raw.hidden = known;
        this.name.hidden = !known || words;
        this.info.hidden = words;
        if (words) {
            this.name.after(this.words.box);
            this.folded.prepend(this.ofWords);
        } else for (const part of [this.words.box, this.ofWords]) part.remove();
        this.showHints([]);
    }

    /** Everything that depends only on whose row it is. */
    setOwner(what) {
        if (what === this.owner) return;
        this.owner = what;
        this.showConcept("");
        this.gate.forget();
        this.element.setAttribute("aria-label", what);
        this.nameButtons(what);
        for (const control of this.controls) control.setOwner(what);
    }

    nameButtons(what) {
        this.name.textContent = this.name.title = what;
        this.name.setAttribute("aria-label", t("row.choose", what));
        this.handle.setAttribute("aria-label", t("row.move", what));
        this.toggle.setAttribute("aria-label", t("row.toggle", what));
        this.copy.setAttribute("aria-label", t("row.duplicate", what));
        this.drop.setAttribute("aria-label", t("row.remove", what));
        this.info.setAttribute("aria-label", t("row.info", what));
        this.more.setAttribute("aria-label", t("row.more", what));
    }

    /** What the file erases, before its name; nothing as long as that is not known. */
    showConcept(text) {
        if (this.concept.textContent === text) return;
        this.concept.hidden = text === "";
        this.concept.textContent = this.concept.title = text;
    }

    /** What may be wrong with the words. @param {import("./hints.js").Hint[]} hints */
    showHints(hints) {
        this.hint.hidden = !hints.length;
        setText(this.hint, wordsOf(hints));
        this.hint.className = `membrane-hint membrane-${severest(hints)}`;
    }

    /** Looks at words again that may have changed. */
    checkWords() {
        const { words, keep, kind } = isWords(this.entry) ? this.entry : { words: "" };
        if (words || this.checker.seen !== "{}") this.checker.look(words ? { concepts: words, preserve: keep, kind } : {});
    }

    /** Opens or closes everything but the first line. */
    showMore() {
        this.folded.hidden = !this.folded.hidden;
        this.more.setAttribute("aria-expanded", String(!this.folded.hidden));
    }
}
