// @ts-check
// A stack as rows. The text is the only state: rows show it, and a change of a row is a new text.

import { adapterInfo, conceptsOf, infoList } from "./adapter_info.js";
import { Chooser } from "./chooser.js";
import { make, setText } from "./elements.js";
import { Openings, promptLine } from "./gates.js";
import { readControl } from "./row_controls.js";
import { RowDrag } from "./row_drag.js";
import { RowList } from "./row_list.js";
import { RowMenu } from "./row_menu.js";
import { EMPTY, NEW_WORDS, field, isWords, nameOf, parse, plainName, setField, understood, write } from "./stack_document.js";
import { styleElement } from "./stack_style.js";
import { t } from "./strings.js";

/** What a click on an element with data-do does, in row i where it is in one. */
const ACTIONS = {
    add: (editor) => editor.openChooser(-1),
    words: (editor) => editor.addWords(),
    "all-on": (editor) => editor.setAll(true),
    "all-off": (editor) => editor.setAll(false),
    text: (editor) => editor.switchText(),
    toggle: (editor, i) => editor.toggle(i),
    choose: (editor, i) => editor.openChooser(i),
    more: (editor, i) => editor.list.views[i].showMore(),
    info: (editor, i) => editor.openInfo(i),
    duplicate: (editor, i) => editor.duplicate(i),
    remove: (editor, i) => editor.remove(i),
    close: (editor) => editor.closePanel(),
    up: (editor, i) => editor.move(i, i - 1, ".membrane-handle"),
    down: (editor, i) => editor.move(i, i + 1, ".membrane-handle"),
    only: (editor, i) => editor.showOnly(i),
    name: (editor, i) => editor.copyName(i),
};

/** A button of the bar, with the strings of its name. */
const barButton = (name, attributes = {}) =>
    make(
        "button",
        { type: "button", "data-do": name, title: t(/** @type {any} */ (`bar.${name}.hint`)), ...attributes },
        t(/** @type {any} */ (`bar.${name}`)),
    );

export class StackEditor {
    /**
     * @param {{
     *   changed: (text: string) => void, committed: () => void, names: () => Promise<string[]>,
     *   undoRedo: (event: KeyboardEvent) => boolean, copy: (text: string, shown: HTMLElement) => void,
     *   upload: (file: File) => Promise<void>, tell: (text: string) => void,
     * }} host what the editor needs of the page: changed() gets every new text, committed() is called when one
     *   change is over, names() lists the files, undoRedo() handles Ctrl+Z in a control, copy() puts a text that an
     *   element shows into the clipboard, upload() sends a file to the host or raises an Error,
     *   tell() shows a short message over the page.
     */
    constructor(host) {
        this.host = host;
        this.text = EMPTY;
        this.openings = new Openings();
        this.asText = false;
        this.names = []; // of the files there are
        this.known = null; // the same as plain names, null until the host has said
        this.concepts = new Map(); // what each file erases, by its name, as far as it was asked
        this.makeBar();
        this.makeBody();
        this.listen();
        this.read();
        this.refreshNames();
    }

    // ------------------------------------------------------------ the text

    get value() {
        return this.text;
    }

    set value(text) {
        const next = typeof text === "string" ? text : text == null ? "" : JSON.stringify(text);
        if (next === this.text && this.stack !== undefined) return;
        this.text = next;
        this.read();
    }

    /** The entries of the stack; none while the text is no stack. */
    get entries() {
        return this.stack?.entries ?? [];
    }

    read() {
        const { stack, problem } = parse(this.text);
        this.stack = stack;
        this.problemText = problem;
        this.refused = null; // why a file that was dropped was not taken
        this.openings.assign(this.entries);
        this.render();
    }

    /** Puts the changed entries into the text. */
    push(commit = true) {
        this.refused = null;
        this.text = write(this.stack);
        this.host.changed(this.text);
        this.render();
        if (commit) this.host.committed();
    }

    // ------------------------------------------------------------ the elements

    makeBar() {
        const label = t("bar.search");
        const attributes = { class: "membrane-search", type: "text", placeholder: label, "aria-label": label };
        this.search = make("input", { ...attributes, input: () => this.list.filter(this.search.value) });
        this.addButton = barButton("add");
        const fill = [barButton("words"), this.addButton];
        this.rowsOnly = [this.search, ...fill, barButton("all-on"), barButton("all-off")];
        this.textButton = barButton("text", { "aria-pressed": "false" });
        const bar = { class: "membrane-bar", role: "toolbar", "aria-label": t("bar") };
        this.bar = make("div", bar, ...this.rowsOnly, this.textButton);
    }

    makeBody() {
        this.problem = make("div", { class: "membrane-problem", role: "alert", hidden: true });
        const scrolls = { "data-capture-wheel": "true" };
        const area = { class: "membrane-text", spellcheck: "false", "aria-label": t("text"), hidden: true };
        this.area = make("textarea", { ...area, ...scrolls });
        this.list = new RowList();
        this.empty = make("div", { class: "membrane-empty" }, t("list.empty"));
        this.panel = make("div", { class: "membrane-panel", hidden: true });
        this.prompt = make("div", { class: "membrane-prompt", "aria-live": "polite", ...scrolls });
        this.spoken = make("div", { class: "membrane-spoken", "aria-live": "polite" });
        const parts = [this.bar, this.problem, this.area, this.list.element, this.empty];
        parts.push(this.panel, this.prompt, this.spoken);
        const root = { class: "membrane membrane-stack", role: "group", "aria-label": t("editor") };
        this.root = make("div", root, styleElement(), ...parts);
        this.menu = new RowMenu(this.root, (action, i) => ACTIONS[action](this, i));
    }

    listen() {
        this.root.addEventListener("click", (event) => this.onClick(event));
        this.root.addEventListener("keydown", (event) => this.onKey(event));
        const list = this.list.element;
        list.addEventListener("input", (event) => this.onInput(event));
        // browsers undo in the box that was typed in last, wherever the focus is; the page's undo restores the number
        list.addEventListener("beforeinput", (event) => {
            if (event.inputType?.startsWith("history")) event.preventDefault();
        });
        list.addEventListener("change", (event) => this.onChange(event));
        list.addEventListener("pointerdown", (event) => this.onPress(event));
        list.addEventListener("contextmenu", (event) => this.onMenu(event));
        this.root.addEventListener("dragover", (event) => this.onFiles(event));
        this.root.addEventListener("drop", (event) => this.onFiles(event));
        this.area.addEventListener("input", () => {
            this.host.changed(this.area.value);
            this.value = this.area.value;
        });
        this.area.addEventListener("change", () => this.host.committed());
    }

    render() {
        const broken = this.problemText !== null;
        this.renderText(broken);
        const asText = this.asText || broken;
        if (asText) this.closePanel(false);
        const rows = !asText && this.panel.hidden, { entries } = this;
        this.list.element.hidden = !rows || !entries.length;
        this.empty.hidden = !rows || entries.length > 0;
        if (broken) return;
        this.list.show(entries, (entry) => this.isMissing(entry));
        this.list.filter(this.search.value);
        this.list.showGates(this.openings);
        this.showConcepts();
    }

    /** What the files of the rows erase; each file is asked once. */
    showConcepts() {
        for (const { entry } of this.list.views) {
            if (!understood(entry) || isWords(entry) || this.concepts.has(entry.adapter) || this.known === null) continue;
            if (this.isMissing(entry)) continue;
            this.concepts.set(entry.adapter, "");
            const take = (text) => {
                this.concepts.set(entry.adapter, text);
                this.list.showConcepts(this.concepts);
            };
            adapterInfo(entry.adapter).then(conceptsOf, () => "").then(take);
        }
        this.list.showConcepts(this.concepts);
    }

    /** The text box, what is wrong with the text, and the bar that fits. */
    renderText(broken) {
        const asText = this.asText || broken;
        this.problem.hidden = !broken;
        setText(this.problem, this.problemText ?? "");
        this.area.hidden = !asText;
        if (this.area.value !== this.text && asText) this.area.value = this.text;
        this.textButton.setAttribute("aria-pressed", String(asText));
        this.textButton.disabled = broken;
        setText(this.textButton, t(asText && !broken ? "bar.rows" : "bar.text"));
        for (const element of this.rowsOnly) element.hidden = asText;
    }

    /** Tells screen readers something. */
    announce(text) {
        setTimeout(() => setText(this.spoken, text), 50); // after what it is about has been drawn
    }

    // ------------------------------------------------------------ the files there are

    async refreshNames() {
        try {
            this.names = await this.host.names();
            this.known = new Set(this.names.map(plainName));
        } catch {
            this.known = null; // nothing is marked as missing as long as the host does not answer
        }
        if (this.problemText === null) this.render();
    }

    isMissing(entry) {
        return this.known !== null && understood(entry) && !isWords(entry) && !this.known.has(plainName(entry.adapter));
    }

    // ------------------------------------------------------------ changes

    toggle(i) {
        const entry = this.entries[i];
        setField(entry, "enabled", field(entry, "enabled") === false);
        this.push();
    }

    setAll(on) {
        for (const entry of this.entries) if (understood(entry)) setField(entry, "enabled", on);
        this.push();
        this.announce(t(on ? "list.all-on" : "list.all-off"));
    }

    /** Switches all rows off but one, or all on where it was the only one. */
    showOnly(i) {
        const others = this.entries.filter((entry, at) => at !== i && understood(entry));
        const alone = field(this.entries[i], "enabled") !== false && others.every((entry) => entry.enabled === false);
        for (const entry of others) setField(entry, "enabled", alone);
        setField(this.entries[i], "enabled", true);
        this.push();
        this.list.views[i].toggle.focus();
        this.announce(t(alone ? "list.all-on" : "list.only", nameOf(this.entries[i])));
    }

    copyName(i) {
        const { name, handle } = this.list.views[i];
        this.host.copy(nameOf(this.entries[i]), name.hidden ? handle : name);
        this.announce(t("list.copied"));
    }

    /** Adds a row of words below another one, or at the end, and waits for them. */
    addWords(below = this.entries.length - 1) {
        this.panel.hidden = true;
        this.entries.splice(below + 1, 0, structuredClone(NEW_WORDS));
        this.push();
        const view = this.list.views[below + 1];
        view.element.scrollIntoView({ block: "nearest" });
        view.words.box.focus();
    }

    duplicate(i) {
        this.entries.splice(i + 1, 0, structuredClone(this.entries[i]));
        this.push();
        this.list.views[i + 1].more.focus();
    }

    remove(i) {
        this.entries.splice(i, 1);
        this.push();
        const { views } = this.list;
        (views[Math.min(i, views.length - 1)]?.drop ?? this.addButton).focus();
    }

    /** Moves a row; control: the selector of what has the focus afterwards. */
    move(from, to, control) {
        const { entries } = this;
        if (to < 0 || to >= entries.length || from === to) return;
        const [entry] = entries.splice(from, 1);
        entries.splice(to, 0, entry);
        this.push();
        const view = this.list.views[to];
        (view.element.querySelector(control) ?? view.handle).focus();
        view.element.scrollIntoView({ block: "nearest" });
        this.announce(t("list.moved", to + 1, entries.length));
    }

    switchText() {
        this.asText = !this.asText;
        this.render();
        (this.asText ? this.area : this.textButton).focus();
    }

    // ------------------------------------------------------------ mouse and keyboard

    onClick(event) {
        const action = event.target.closest?.("[data-do]")?.dataset.do;
        if (action) ACTIONS[action]?.(this, this.list.rowOf(event.target));
    }

    onInput({ target }) {
        const path = target.dataset.field, entry = this.entries[this.list.rowOf(target)];
        if (!path || entry === undefined) return;
        const value = readControl(target);
        if (value === undefined || value === field(entry, path)) return;
        setField(entry, path, value);
        this.push(false);
    }

    onChange({ target }) {
        const path = target.dataset.field, entry = this.entries[this.list.rowOf(target)];
        if (!path || entry === undefined) return;
        if (readControl(target) === undefined) target.value = String(field(entry, path));
        this.host.committed();
    }

    onKey(event) {
        const { target } = event;
        const inRow = this.list.rowOf(target) >= 0; // where the page's undo restores what was typed
        const typed = target === this.area || (!inRow && target.tagName === "INPUT" && target.type === "text");
        if (!typed && this.host.undoRedo(event)) return;
        if (this.moveByKey(event) || this.nextByKey(event)) return;
        if (event.key === "Escape" && !this.panel.hidden) {
            event.preventDefault();
            this.closePanel();
        }
        // the page has shortcuts on single keys, which are not meant while somebody works here
        if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
    }

    /** Alt and an arrow key move the row with the focus. True when it was one of them. */
    moveByKey(event) {
        const { target } = event, i = this.list.rowOf(target);
        const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
        if (!step || !event.altKey || event.ctrlKey || i < 0) return false;
        event.preventDefault();
        event.stopPropagation();
        const { do: action, field: path } = target.dataset;
        const slider = path && target.type === "range" ? "" : ":not([type=range])";
        this.move(i, i + step, action ? `[data-do="${action}"]` : `[data-field="${path}"]${slider}`);
        return true;
    }

    /** Enter in a row of words begins the next one. True when it was that. */
    nextByKey(event) {
        const { target } = event;
        if (event.key !== "Enter" || target.dataset.field !== "words" || event.isComposing) return false;
        if (event.shiftKey || event.ctrlKey || event.metaKey || event.altKey) return false;
        event.preventDefault();
        event.stopPropagation();
        if (target.value.trim()) this.addWords(this.list.rowOf(target));
        return true;
    }

    /** The menu of a row; boxes keep the browser's, in which one pastes. */
    onMenu(event) {
        const { target } = event, i = this.list.rowOf(target);
        if (i < 0 || ["INPUT", "TEXTAREA", "SELECT"].includes(target.tagName)) return;
        event.preventDefault();
        event.stopPropagation();
        this.menu.open(event, i, this.menuItems(i));
    }

    /** [action, text] of what can be done with a row. */
    menuItems(i) {
        const entry = this.entries[i], last = this.entries.length - 1, known = understood(entry);
        const found = i > 0 ? [["up", t("menu.up")]] : [];
        if (i < last) found.push(["down", t("menu.down")]);
        found.push(["duplicate", t("row.duplicate.hint")]);
        if (known) {
            if (last > 0) found.push(["only", t("menu.only")]);
            found.push(["toggle", t(field(entry, "enabled") === false ? "menu.on" : "menu.off")]);
            found.push(["name", t(isWords(entry) ? "menu.copy_words" : "menu.copy_name")]);
            if (!isWords(entry)) found.push(["info", t("row.info.hint")]);
        }
        return [...found, ["remove", t("row.remove.hint")]];
    }

    onPress(event) {
        const handle = event.target.closest?.(".membrane-handle");
        if (!handle || event.button !== 0) return;
        event.preventDefault();
        event.stopPropagation();
        handle.focus();
        const from = this.list.rowOf(handle);
        new RowDrag(event, this.list, from, (to) => this.move(from, to, ".membrane-handle"));
    }

    // ------------------------------------------------------------ choosing a file, and what a file is

    /** Shows something in the place of the rows; i: the row it is about, -1 for none. */
    openPanel(i, ...content) {
        this.panelRow = i;
        this.panel.replaceChildren(...content);
        this.panel.hidden = false;
        this.render();
    }

    closePanel(focus = true) {
        if (this.panel.hidden) return;
        this.panel.hidden = true;
        this.panel.replaceChildren();
        if (!focus) return;
        this.render();
        (this.panelRow >= 0 ? this.list.views[this.panelRow]?.name : this.addButton)?.focus();
    }

    /** The list of files; i: the row that gets the choice, -1 for a new one. */
    async openChooser(i) {
        const chooser = new Chooser({
            names: () => this.names,
            current: () => this.entries[i]?.adapter,
            take: (name) => this.take(i, name),
        });
        this.openPanel(i, ...chooser.elements);
        chooser.list();
        chooser.box.focus();
        await this.refreshNames();
        if (chooser.box.isConnected) chooser.list();
    }

    /** Asks what may be wrong with rows of words. */
    checkWords() {
        for (const view of this.list.views) view.checkWords();
    }

    /** Gives a row another file, or a new row a file. */
    take(i, name) {
        const { entries } = this;
        if (i >= 0) setField(entries[i], "adapter", name);
        else entries.push({ adapter: name, enabled: true, strength: 1 });
        this.panel.hidden = true;
        this.push();
        const view = this.list.views[i >= 0 ? i : entries.length - 1];
        view.element.scrollIntoView({ block: "nearest" });
        view.name.focus();
    }

    async openInfo(i) {
        const name = this.entries[i].adapter;
        const body = make("div", {}, t("info.reading"));
        const close = make("button", { type: "button", "data-do": "close" }, t("info.close"));
        const title = make("strong", { class: "membrane-search" }, name);
        this.openPanel(i, make("div", { class: "membrane-bar" }, title, close), body);
        close.focus();
        body.replaceChildren(await adapterInfo(name).then(infoList, (error) => error.message));
    }

    // ------------------------------------------------------------ files that are dropped

    /** Takes files that are dragged over the editor, which the page would look for a workflow in. */
    onFiles(event) {
        if (!event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        if (event.type !== "drop") return;
        event.stopPropagation();
        this.dropFiles([...event.dataTransfer.files]);
    }

    /** Adds a row for each file, which is sent to the host where that has none of its name. */
    async dropFiles(files) {
        this.panel.hidden = true;
        this.refused = null;
        for (const file of files) {
            await this.refreshNames();
            const known = this.names.find((name) => plainName(name).split("/").at(-1) === file.name);
            this.say(t("drop.sending", file.name));
            try {
                if (known === undefined) await this.host.upload(file);
                this.host.tell(t(known === undefined ? "drop.sent" : "drop.known", known ?? file.name));
            } catch (error) {
                this.say((this.refused = error.message), true);
                return;
            }
            await this.refreshNames();
            if (this.stack) this.take(-1, known ?? file.name);
        }
    }

    /** Says something in the line below the rows, until the prompt is looked at again. */
    say(text, wrong = false) {
        this.prompt.classList.toggle("membrane-refused", wrong);
        setText(this.prompt, text);
    }

    // ------------------------------------------------------------ what the rows got, and what the prompt asks for

    /** Shows a sampling's openings. */
    showGates(message) {
        this.openings.take(message, this.entries);
        this.list.showGates(this.openings);
    }

    /** The values of the last sampling are from before; they stay, paler, until new ones come. */
    setStale() {
        this.openings.stale = true;
        this.list.showGates(this.openings);
    }

    /** The line below the rows: what the words of the connected prompt would open. */
    showPrompt(answer) {
        if (!this.refused) this.say(promptLine(answer), Boolean(answer.problem));
    }
}
