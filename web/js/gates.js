// @ts-check
// How far rows open: what the last sampling gave them, and what the words of the connected prompt would.

import { make, setText } from "./elements.js";
import { nameOf, plainName, understood } from "./stack_document.js";
import { t } from "./strings.js";

const SIDES = ["positive", "negative"];

/** The entry an opening belongs to now: rows may have moved since the workflow was queued. */
function owner(entries, index, adapter) {
    const same = (entry) => understood(entry) && plainName(nameOf(entry)) === plainName(adapter);
    if (same(entries[index])) return entries[index];
    const found = entries.filter(same);
    return found.length === 1 ? found[0] : null;
}

/** The openings of the last sampling, by entry. */
export class Openings {
    constructor() {
        this.message = null;
        this.stale = false; // true while a newer sampling has not said anything yet
        this.byEntry = new Map();
    }

    /** Takes what core/host/page/live.py sends: lists of [row, adapter, value] for both prompts. */
    take(message, entries) {
        this.message = message;
        this.stale = false;
        this.assign(entries);
    }

    /** Finds again which entry has which opening. */
    assign(entries) {
        this.byEntry = new Map();
        SIDES.forEach((side, place) => {
            for (const [index, adapter, value] of this.message?.[side] ?? []) {
                const entry = owner(entries, index, adapter);
                if (!entry) continue;
                const values = this.of(entry);
                values[place] = value;
                this.byEntry.set(entry, values);
            }
        });
    }

    /** [positive, negative] of an entry, null where none is known. */
    of(entry) {
        return this.byEntry.get(entry) ?? [null, null];
    }
}

/** The two bars of a row. */
export class GateView {
    constructor() {
        this.bars = SIDES.map(() => make("span"));
        this.numbers = SIDES.map(() => make("b"));
        const parts = ["+", "\u2212"].flatMap((sign, i) => [
            make("i", {}, sign),
            make("span", { class: "membrane-track" }, this.bars[i]),
            this.numbers[i],
        ]);
        this.element = make("div", { class: "membrane-gate", role: "img", hidden: true }, ...parts);
    }

    /** The row is another's now, and has no opening until it gets one. */
    forget() {
        this.shown = null;
        this.element.hidden = true;
    }

    /** Shows [positive, negative]; stale: they are from an earlier sampling, and paler. */
    show(values, stale) {
        const key = JSON.stringify([values, stale]);
        if (key === this.shown) return;
        this.shown = key;
        this.element.hidden = values.every((value) => value === null);
        this.element.classList.toggle("membrane-stale", stale);
        values.forEach((value, i) => {
            this.bars[i].style.width = `${Math.min(100, Math.abs(value ?? 0) * 100)}%`;
            setText(this.numbers[i], value === null ? "\u2013" : value.toFixed(2));
        });
        const said = values.map((value) => (value === null ? t("gate.not_known") : value.toFixed(2)));
        this.element.setAttribute("aria-label", t("gate", ...said));
        this.element.title = t("gate.hint", ...said);
    }
}

const shorten = (value) => Number(value.toFixed(4)).toString();
const capitalised = (text) => text[0].toUpperCase() + text.slice(1);

/** "the prompt's words alone would open: a 1, b 0.5", of rows that open by words. */
function opened(rows) {
    const open = rows.filter((row) => row.value !== 0).map((row) => `${row.adapter} ${shorten(row.value)}`);
    if (!open.length) return t("prompt.opens_none");
    return t("prompt.opens", open.reduce((listed, next) => t("prompt.listed", listed, next)));
}

/**
 * The line below the rows.
 * @param {{text: string | null, rows: {adapter: string, mode: string, value: number}[], problem?: string}} answer
 *   text: the prompt, null when none is connected; rows: those that are on; problem: why there is no answer
 */
export function promptLine({ text, rows, problem }) {
    if (problem) return problem;
    if (text === null) return t("prompt.not_connected");
    if (!rows.length) return t("prompt.no_row");
    const byWords = rows.filter((row) => row.mode !== "fixed");
    const fixed = rows.length - byWords.length;
    const acts = t(fixed === 1 ? "prompt.one_acts" : "prompt.more_act", fixed);
    if (!byWords.length) return t("prompt.all_fixed", capitalised(acts));
    const said = fixed ? t("prompt.both", opened(byWords), acts) : opened(byWords);
    return t("prompt.by_words", capitalised(said));
}
