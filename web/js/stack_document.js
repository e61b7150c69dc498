// @ts-check
// The stack as text and back. Nothing here touches the page; core/adapters/stack_json.py reads the same text.

import { t } from "./strings.js";

export const VERSION = 1;
export const EMPTY = `{"membrane_stack": ${VERSION}, "entries": []}`;
export const MODES = ["automatic", "fixed", "facilitated transport", "reference", "route", "meaning"];
export const NEGATIVES = ["same as positive", "own", "off"];
export const KINDS = ["anything", "object", "style", "person"];

/** What an entry without the field has. A path of two is inside "permeability". */
export const DEFAULTS = {
    enabled: true,
    strength: 1,
    start_percent: 0,
    end_percent: 1,
    "permeability.mode": "automatic",
    "permeability.factor": 1,
    "permeability.threshold": 0,
    "permeability.negative": "same as positive",
    "permeability.top_k": 1,
};

/** The same of what only entries of words have. */
export const OF_WORDS = { words: "", keep: "", kind: "anything" };

/** A row of words as it begins: it opens where the prompt asks for them. */
export const NEW_WORDS = { words: "", enabled: true, strength: 1, permeability: { mode: "meaning" } };

const isObject = (x) => typeof x === "object" && x !== null && !Array.isArray(x);

/**
 * The stack in a text, or the one sentence that says why it cannot be shown as rows.
 * @param {string} text
 * @returns {{stack: any, problem: string | null}} stack is null when there is a problem
 */
export function parse(text) {
    const failed = (problem) => ({ stack: null, problem });
    if (!text.trim()) return { stack: JSON.parse(EMPTY), problem: null };
    let stack;
    try {
        stack = JSON.parse(text);
    } catch (error) {
        return failed(t("problem.json", error.message));
    }
    const version = isObject(stack) ? stack.membrane_stack : undefined;
    if (!Number.isInteger(version)) {
        return failed(t("problem.no_stack", '"membrane_stack"', '{"membrane_stack": 1, "entries": [...]}'));
    }
    if (version > VERSION) return failed(t("problem.version", version, VERSION));
    if (stack.entries !== undefined && !Array.isArray(stack.entries)) {
        return failed(t("problem.entries", '"entries"', '[{"adapter": "name"}, ...]'));
    }
    return { stack: { ...stack, entries: stack.entries ?? [] }, problem: null };
}

/** The text of a stack, one entry a line, with whatever else its author had put into it. */
export function write(stack) {
    const { entries, ...others } = stack;
    const lines = entries.map((entry) => `\n  ${oneLine(entry)}`);
    const head = Object.entries(others).map(([key, value]) => `${JSON.stringify(key)}: ${oneLine(value)}, `);
    return `{${head.join("")}"entries": [${lines.join(",")}${lines.length ? "\n" : ""}]}`;
}

// strings hold no line ends in JSON, so those that are left are the indentation's
const oneLine = (value) =>
    JSON.stringify(value, null, 1).replace(/\n\s*/g, " ").replace(/^([{[]) | ([}\]])$/g, "$1$2");

/** True when an entry can be shown as a row; others are kept as they are. */
export function understood(entry) {
    return (
        isObject(entry) &&
        (isWords(entry) || (typeof entry.adapter === "string" && entry.words === undefined)) &&
        (entry.permeability === undefined || isObject(entry.permeability))
    );
}

/** True for an entry that is words, and no file. */
export const isWords = (entry) =>
    entry?.adapter === undefined && typeof entry?.words === "string" &&
    Object.keys(OF_WORDS).every((name) => ["string", "undefined"].includes(typeof entry[name]));

/** What an entry is called: its file, or its words in one line, as core/adapters/written.py has them. */
export const nameOf = (entry) =>
    isWords(entry) ? entry.words.split("\n").map((line) => line.trim()).filter(Boolean).join(", ") : entry.adapter;

/** What an entry has in a field, or the field's default. */
export function field(entry, path) {
    const [outer, inner] = path.split(".");
    const value = inner ? entry[outer]?.[inner] : entry[outer];
    return value === undefined ? (DEFAULTS[path] ?? OF_WORDS[path]) : value;
}

/** Puts a value into a field of an entry and leaves everything else of it alone. */
export function setField(entry, path, value) {
    const [outer, inner] = path.split(".");
    if (inner) entry[outer] = { ...entry[outer], [inner]: value };
    else entry[outer] = value;
}

/** A name for comparing: files are found with either kind of slash. */
export const plainName = (name) => name.replaceAll("\\", "/").replace(/^\/+|\/+$/g, "");
