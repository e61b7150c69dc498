// @ts-check
// What the pack says in the page. English is here, as JSON; the same keys are in locales/<language>/main.json, under
// "membrane". %1, %2, ... stand for what is put in. Nothing here touches the page.

export const ENGLISH = {
    "editor": "Erasure stack editor",
    "bar": "Erasure stack",
    "bar.search": "Search rows",
    "bar.add": "+ Add adapter",
    "bar.add.hint": "Add an adapter to the stack",
    "bar.all-on": "All on",
    "bar.all-on.hint": "Switch all rows on",
    "bar.all-off": "All off",
    "bar.all-off.hint": "Switch all rows off",
    "bar.text": "Text",
    "bar.text.hint": "Show the stack as text, to copy or mend it",
    "bar.rows": "Rows",
    "list": "Adapters of the stack",
    "list.empty": "No adapters yet. Press + Add adapter to choose a file of models/erasure_adapters, or Text to paste a stack. To erase words without a file use Erase Concepts, and Save Erasure Adapter to find it here.",
    "list.all-on": "All rows are on",
    "list.all-off": "All rows are off",
    "list.moved": "Moved to row %1 of %2",
    "text": "The stack as text",
    "row.no_adapter": "no adapter",
    "row.not_understood": "an entry that is not understood",
    "row.kept": "not understood, kept as it is",
    "row.missing": "file not found",
    "row.choose": "%1, choose another adapter",
    "row.toggle": "%1, on",
    "row.move": "Move %1, Alt and arrow keys",
    "row.move.hint": "Drag, or press Alt and an arrow key, to move the row",
    "row.duplicate": "Duplicate %1",
    "row.duplicate.hint": "Duplicate",
    "row.remove": "Remove %1",
    "row.remove.hint": "Remove",
    "row.info": "About %1",
    "row.info.hint": "About",
    "row.more": "More settings of %1",
    "row.more.hint": "More settings",
    "control": "%1 of %2",
    "control.slider": "%1 of %2, slider",
    "caption.strength": "Strength",
    "caption.permeability.factor": "Permeability",
    "caption.permeability.mode": "Mode",
    "caption.start_percent": "Start",
    "caption.end_percent": "End",
    "caption.permeability.threshold": "Threshold",
    "caption.permeability.negative": "Negative",
    "caption.permeability.top_k": "Best of route",
    "hint.strength": "How much of the adapter to use. 0 changes nothing, 1 is the method as published.",
    "hint.permeability.factor": "Multiplies how far the adapter opens. The authors of SPM use 2 for artists' styles.",
    "hint.permeability.mode": "How it opens: as its method was published, always fully, by how well the prompt matches, ...",
    "hint.start_percent": "Where in the sampling it begins to act. 0 is the first step.",
    "hint.end_percent": "Where in the sampling it stops. 1 is the last step.",
    "hint.permeability.threshold": "Prompts that match less than this leave it closed.",
    "hint.permeability.negative": "What the negative prompt gets.",
    "hint.permeability.top_k": "Only for route: how many adapters may open for one prompt.",
    "mode.automatic": "automatic",
    "mode.fixed": "fixed",
    "mode.facilitated transport": "facilitated transport",
    "mode.reference": "reference",
    "mode.route": "route",
    "mode.meaning": "meaning",
    "negative.same as positive": "same as positive",
    "negative.own": "own",
    "negative.off": "off",
    "chooser.search": "Search adapters",
    "chooser.list": "Adapters",
    "chooser.cancel": "Cancel",
    "chooser.none_found": "No file has this name.",
    "chooser.no_files": "There is no file in models/erasure_adapters yet.",
    "gate": "Opened %1 for the positive prompt, %2 for the negative prompt",
    "gate.hint": "What this row got in the last sampling: %1 for the positive prompt, %2 for the negative.",
    "gate.not_known": "not known",
    "prompt.not_connected": "Connect the stack to a sampler with a prompt to see which rows its words would open.",
    "prompt.no_row": "No row is on.",
    "prompt.opens": "the prompt's words alone would open: %1",
    "prompt.opens_none": "the prompt's words alone would open none",
    "prompt.one_acts": "%1 always acts",
    "prompt.more_act": "%1 always act",
    "prompt.listed": "%1, %2",
    "prompt.both": "%1; %2",
    "prompt.by_words": "%1. Sampling also compares the meaning of the texts and may open more.",
    "prompt.all_fixed": "%1.",
    "info.reading": "Reading the file ...",
    "info.close": "Close",
    "info.choose": "Choose a file.",
    "info.concepts": "Concepts",
    "info.method": "Method",
    "info.family": "Family",
    "info.size": "Size",
    "info.licence": "Licence",
    "info.absent": "not in the file",
    "report.copy": "Copy",
    "report.open": "Open the report",
    "compare.before": "Original",
    "compare.after": "Erased",
    "compare.divider": "Divider between original and erased",
    "compare.previous": "Previous pair",
    "compare.next": "Next pair",
    "problem.json": "The stack is not valid JSON (%1); correct it here or undo the last change.",
    "problem.no_stack": "The stack text lacks %1; expected %2, as the stack editor writes it.",
    "problem.version": "The stack is of version %1, and this pack reads up to %2; update Membrane.",
    "problem.entries": "The %1 of the stack are no list; expected %2.",
    "problem.host": "ComfyUI answered %1 to %2."
};

/** @typedef {keyof typeof ENGLISH} Key */

/** @type {Record<string, string>} */
let strings = ENGLISH;

/**
 * Everything that is shown from now on is in another language; what that lacks stays English.
 * @param {Record<string, string>} translations the language's strings, by key; none for English
 */
export function speak(translations) {
    strings = { ...ENGLISH, ...translations };
}

/**
 * A string in the language that is spoken.
 * @param {Key} key
 * @param {...(string | number)} values what to put in for %1, %2, ...
 */
export const t = (key, ...values) => strings[key].replace(/%(\d)/g, (_, place) => String(values[Number(place) - 1]));
