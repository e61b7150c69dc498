// @ts-check
// The controls of a row. Each shows one field of an entry: a choice, or a number with or without a slider.

import { make } from "./elements.js";
import { KINDS, MODES, NEGATIVES, field } from "./stack_document.js";
import { t } from "./strings.js";

/**
 * @typedef {typeof import("./stack_document.js")} Document
 * @typedef {Exclude<keyof Document["DEFAULTS"], "enabled"> | keyof Document["OF_WORDS"]} Path
 */

const SLIDERS = {
    strength: { min: 0, max: 2, step: 0.05 },
    "permeability.factor": { min: 0, max: 3, step: 0.05 },
};
const NUMBERS = {
    strength: { step: 0.05 },
    "permeability.factor": { step: 0.05 },
    start_percent: { min: 0, max: 1, step: 0.01 },
    end_percent: { min: 0, max: 1, step: 0.01 },
    "permeability.threshold": { min: 0, max: 1, step: 0.01 },
    "permeability.top_k": { min: 1, max: 1000, step: 1 },
};
const CHOICES = {
    "permeability.mode": { values: MODES, shown: "mode" },
    "permeability.negative": { values: NEGATIVES, shown: "negative" },
    kind: { values: KINDS, shown: "kind" },
};
const TEXTS = ["words", "keep"]; // of one line or more
const MOST_LINES = 4; // that are seen at once

/** A choice whose values stay as the stack's text has them, whatever the language. */
function choiceBox(path) {
    const { values, shown } = CHOICES[path];
    const option = (value) => make("option", { value }, t(/** @type {any} */ (`${shown}.${value}`)));
    return make("select", { "data-field": path }, ...values.map(option));
}

const textBox = (path) =>
    make("textarea", { "data-field": path, class: "membrane-phrase", rows: 1, spellcheck: "false", placeholder: t(`placeholder.${path}`) });
const numberBox = (path) => make("input", { type: "number", "data-field": path, ...NUMBERS[path] });
const sliderFor = (path) => make("input", { type: "range", "data-field": path, ...SLIDERS[path] });

export class Control {
    /** @param {Path} path the field */
    constructor(path) {
        this.path = path;
        this.box = CHOICES[path] ? choiceBox(path) : TEXTS.includes(path) ? textBox(path) : numberBox(path);
        this.slider = SLIDERS[path] ? sliderFor(path) : null;
        if (path === "strength") this.box.title = t("hint.strength"); // which stands in the row's first line
        this.caption = t(`caption.${path}`);
        this.element = make(
            "label",
            { class: (this.slider || path === "keep") && "membrane-wide", title: t(`hint.${path}`) },
            make("span", { class: "membrane-caption" }, this.caption),
            ...(this.slider ? [this.slider, this.box] : [this.box]),
        );
    }

    /** Says to screen readers whose control it is. */
    setOwner(what) {
        this.box.setAttribute("aria-label", t("control", this.caption, what));
        this.slider?.setAttribute("aria-label", t("control.slider", this.caption, what));
    }

    /** Shows an entry's value, and touches only what differs. */
    show(entry) {
        const value = field(entry, this.path);
        if (value === this.shown) return;
        this.shown = value;
        if (TEXTS.includes(this.path)) return this.showText(value);
        const fits = CHOICES[this.path]?.values.includes(value) ?? typeof value === "number";
        this.box.setAttribute("aria-invalid", String(!fits));
        if (!this.isTyped(value)) this.box.value = fits ? String(value) : "";
        if (this.slider && fits) this.slide(value);
    }

    showText(value) {
        if (this.box.value !== value) this.box.value = value;
        const lines = String(Math.min(MOST_LINES, value.split("\n").length));
        if (this.box.getAttribute("rows") !== lines) this.box.setAttribute("rows", lines);
    }

    /** What is being typed stays as it was typed: 0.50 is a number too. */
    isTyped(value) {
        const { box } = this;
        return box === document.activeElement && box.tagName !== "SELECT" && Number(box.value) === value;
    }

    slide(value) {
        const { min, max } = SLIDERS[this.path];
        this.slider.value = String(value);
        const share = (Number(this.slider.value) - min) / (max - min); // the slider keeps it between its ends
        this.slider.style.setProperty("--membrane-fill", `${share * 100}%`);
    }
}

/** What a control's element says, or undefined while what was typed is no number. */
export function readControl(element) {
    if (["SELECT", "TEXTAREA"].includes(element.tagName)) return element.value;
    if (element.value.trim() === "") return undefined;
    const number = Number(element.value);
    if (!Number.isFinite(number)) return undefined;
    return element.dataset.field === "permeability.top_k" ? Math.max(1, Math.round(number)) : number;
}
