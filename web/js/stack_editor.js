// @ts-check
// A stack as rows. The text is the only state: rows show it, and a change of a row is a new text.

import { adapterInfo, infoList } from "./adapter_info.js";
import { EMPTY, MODES, NEGATIVES, field, parse, plainName, setField, understood, write } from "./stack_document.js";
import { styleElement } from "./stack_style.js";

/** A new element: tag, attributes (a function is a listener), children. */
function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        if (typeof value === "function") element.addEventListener(name, value);
        else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
}

const ICONS = {
    handle: "M5 3.5h1.5M9.5 3.5h1.5M5 8h1.5M9.5 8h1.5M5 12.5h1.5M9.5 12.5h1.5",
    info: "M8 7.2v4M8 4.7v.2M8 1.8a6.2 6.2 0 1 0 0 12.4a6.2 6.2 0 1 0 0-12.4",
    duplicate: "M5.5 5.5h8v8h-8zM10.5 5.5v-3h-8v8h3",
    remove: "M3.5 3.5l9 9M12.5 3.5l-9 9",
    more: "M3 8h.2M7.9 8h.2M12.8 8h.2",
};

/** A drawing of 16 by 16 in the colour of the text around it. */
function icon(name) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg"), path = document.createElementNS(space, "path");
    for (const [key, value] of Object.entries({ viewBox: "0 0 16 16", width: 14, height: 14, "aria-hidden": "true" })) svg.setAttribute(key, value);
    for (const [key, value] of Object.entries({ d: ICONS[name], fill: "none", stroke: "currentColor", "stroke-linecap": "round" })) path.setAttribute(key, value);
    path.setAttribute("stroke-width", name === "handle" || name === "more" ? "2" : "1.4");
    svg.append(path);
    return svg;
}

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
const CHOICES = { "permeability.mode": MODES, "permeability.negative": NEGATIVES };
const HINTS = {
    strength: "How much of the adapter to use. 0 changes nothing, 1 is the method as published.",
    "permeability.factor": "Multiplies how far the adapter opens. The authors of SPM use 2 for artists' styles.",
    start_percent: "Where in the sampling it begins to act. 0 is the first step.",
    end_percent: "Where in the sampling it stops. 1 is the last step.",
    "permeability.threshold": "Prompts that match less than this leave it closed.",
    "permeability.top_k": "Only for route: how many adapters may open for one prompt.",
    "permeability.mode": "How it opens: as its method was published, always fully, by how well the prompt matches, ...",
    "permeability.negative": "What the negative prompt gets.",
};

/** New text only where there is some: pages have rules on which every change of text makes the browser spend 20 ms. */
function setText(element, text) {
    if (element.textContent !== text) element.textContent = text;
}

const shorten = (value) => Number(value.toFixed(4)).toString();

/** One line of the list; shows whatever entry it is given, and touches only what differs. */
class RowView {
    constructor() {
        this.controls = {};
        this.entry = null;
        this.handle = make("button", {
            class: "membrane-icon membrane-handle", type: "button", "data-do": "handle",
            title: "Drag, or press Alt and an arrow key, to move the row",
        }, icon("handle"));
        this.toggle = make("button", { class: "membrane-switch", type: "button", role: "switch", "data-do": "toggle" });
        this.name = make("button", { class: "membrane-name", type: "button", "data-do": "choose" });
        this.note = make("span", { class: "membrane-note" });
        this.gate = this.makeGate();
        this.more = make("button", { class: "membrane-icon", type: "button", "data-do": "more", "aria-expanded": "false" }, icon("more"));
        this.info = make("button", { class: "membrane-icon", type: "button", "data-do": "info" }, icon("info"));
        this.copy = make("button", { class: "membrane-icon", type: "button", "data-do": "duplicate" }, icon("duplicate"));
        this.drop = make("button", { class: "membrane-icon", type: "button", "data-do": "remove" }, icon("remove"));
        this.basic = make("div", { class: "membrane-line" },
            this.number("strength", "Strength"), this.number("permeability.factor", "Permeability"));
        this.second = make("div", { class: "membrane-line" },
            this.choice("permeability.mode", "Mode"), this.number("start_percent", "Start"), this.number("end_percent", "End"));
        this.advanced = make("div", { class: "membrane-line", hidden: true },
            this.number("permeability.threshold", "Threshold"), this.choice("permeability.negative", "Negative"),
            this.number("permeability.top_k", "Best of route"));
        this.raw = make("code", { class: "membrane-raw", hidden: true });
        this.top = make("div", { class: "membrane-top" }, this.handle, this.toggle, this.name, this.raw, this.note,
            this.gate, this.info, this.copy, this.drop, this.more);
        this.element = make("li", { class: "membrane-row" }, this.top, this.basic, this.second, this.advanced);
    }

    makeGate() {
        this.bars = ["positive", "negative"].map(() => make("span"));
        this.numbers = ["positive", "negative"].map(() => make("b"));
        const track = (bar) => make("span", { class: "membrane-track" }, bar);
        return make("div", { class: "membrane-gate", role: "img", hidden: true },
            make("i", {}, "+"), track(this.bars[0]), this.numbers[0],
            make("i", {}, "\u2212"), track(this.bars[1]), this.numbers[1]);
    }

    number(path, caption) {
        const slider = SLIDERS[path] && make("input", { type: "range", "data-field": path, ...SLIDERS[path] });
        const box = make("input", { type: "number", "data-field": path, ...NUMBERS[path] });
        this.controls[path] = { box, slider, caption };
        const label = make("label", { class: slider ? "membrane-wide" : "", title: HINTS[path] },
            make("span", { class: "membrane-caption" }, caption), ...(slider ? [slider] : []), box);
        return label;
    }

    choice(path, caption) {
        const box = make("select", { "data-field": path }, ...CHOICES[path].map((text) => make("option", { value: text }, text)));
        this.controls[path] = { box, caption };
        return make("label", { title: HINTS[path] }, make("span", { class: "membrane-caption" }, caption), box);
    }

    show(entry, missing) {
        this.entry = entry;
        const key = `${missing} ${JSON.stringify(entry)}`;
        if (key === this.shown) return;
        this.shown = key;
        const known = understood(entry);
        this.showName(known ? entry.adapter || "no adapter" : "an entry that is not understood", known);
        setText(this.note, known ? (missing ? "file not found" : "") : "not understood, kept as it is");
        const on = known && field(entry, "enabled") !== false;
        this.element.classList.toggle("membrane-off", known && !on);
        this.element.classList.toggle("membrane-missing", missing);
        if (!known) {
            this.raw.textContent = JSON.stringify(entry);
            return;
        }
        if (this.toggle.getAttribute("aria-checked") !== String(on)) this.toggle.setAttribute("aria-checked", String(on));
        for (const [path, control] of Object.entries(this.controls)) {
            const { box, slider } = control, value = field(entry, path);
            if (control.shown === value) continue;
            control.shown = value;
            const fits = CHOICES[path] ? CHOICES[path].includes(value) : typeof value === "number";
            box.setAttribute("aria-invalid", String(!fits));
            // what is being typed stays as it was typed: 0.50 is a number too
            if (box !== document.activeElement || box.tagName === "SELECT" || Number(box.value) !== value) box.value = fits ? String(value) : "";
            if (!slider || !fits) continue;
            slider.value = String(value);
            const { min, max } = SLIDERS[path];
            slider.style.setProperty("--membrane-fill", `${((Number(slider.value) - min) / (max - min)) * 100}%`);
        }
    }

    /** Everything that depends only on whose row it is. */
    showName(what, known) {
        const key = `${known} ${what}`;
        if (key === this.nameShown) return;
        this.nameShown = key;
        for (const part of [this.toggle, this.name, this.basic, this.second, this.info, this.more]) part.hidden = !known;
        if (!known) this.advanced.hidden = this.gate.hidden = true;
        this.gateShown = null;
        this.raw.hidden = known;
        this.element.setAttribute("aria-label", what);
        this.handle.setAttribute("aria-label", `Move ${what}, Alt and arrow keys`);
        this.toggle.setAttribute("aria-label", `${what}, on`);
        for (const [button, verb] of [[this.copy, "Duplicate"], [this.drop, "Remove"], [this.info, "About"], [this.more, "More settings of"]]) {
            button.setAttribute("aria-label", `${verb} ${what}`);
            button.title = button === this.more ? "More settings" : verb;
        }
        this.name.textContent = this.name.title = what;
        this.name.setAttribute("aria-label", `${what}, choose another adapter`);
        for (const { box, slider, caption } of Object.values(this.controls)) {
            box.setAttribute("aria-label", `${caption} of ${what}`);
            slider?.setAttribute("aria-label", `${caption} of ${what}, slider`);
        }
    }

    /** Openings of the row for the positive and the negative prompt, null where none is known; or that it is fixed. */
    showGate(positive, negative, stale) {
        const values = [positive, negative];
        const key = JSON.stringify([values, stale]);
        if (key === this.gateShown) return;
        this.gateShown = key;
        this.gate.hidden = positive === null && negative === null;
        this.gate.classList.toggle("membrane-stale", stale);
        values.forEach((value, i) => {
            this.bars[i].style.width = `${Math.min(100, Math.abs(value ?? 0) * 100)}%`;
            setText(this.numbers[i], value === null ? "\u2013" : value.toFixed(2));
        });
        const said = values.map((value) => (value === null ? "not known" : value.toFixed(2)));
        this.gate.setAttribute("aria-label", `Opened ${said[0]} for the positive prompt, ${said[1]} for the negative prompt`);
        this.gate.title = `What this row got in the last sampling: ${said[0]} for the positive prompt, ${said[1]} for the negative.`;
    }
}

export class StackEditor {
    /**
     * @param {{
     *   changed: (text: string) => void, committed: () => void, names: () => Promise<string[]>,
     *   undoRedo: (event: KeyboardEvent) => boolean,
     * }} host what the editor needs of the page: changed() gets every new text, committed() is called when one
     *   change is over, names() lists the files, undoRedo() handles Ctrl+Z in a control.
     */
    constructor(host) {
        this.host = host;
        this.text = EMPTY;
        this.views = [];
        this.openings = null; // the last message of a sampling
        this.gates = new Map(); // what it says of each entry
        this.stale = false;
        this.asText = false;
        this.known = null; // plain names of the files there are, null until the host has said
        this.build();
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

    read() {
        const { stack, problem } = parse(this.text);
        this.stack = stack;
        this.problemText = problem;
        this.assignGates();
        this.render();
    }

    /** Puts the changed entries into the text. */
    push(commit = true) {
        this.text = write(this.stack);
        this.host.changed(this.text);
        this.render();
        if (commit) this.host.committed();
    }

    // ------------------------------------------------------------ the elements

    build() {
        this.search = make("input", { class: "membrane-search", type: "text", placeholder: "Search rows", "aria-label": "Search rows", input: () => this.filter() });
        const button = (name, text, title) => make("button", { type: "button", "data-do": name, title }, text);
        this.rowsOnly = [this.search, button("add", "+ Add adapter", "Add an adapter to the stack"), button("all-on", "All on", "Switch all rows on"), button("all-off", "All off", "Switch all rows off")];
        this.textButton = make("button", { type: "button", "data-do": "text", "aria-pressed": "false", title: "Show the stack as text, to copy or mend it" }, "Text");
        this.bar = make("div", { class: "membrane-bar", role: "toolbar", "aria-label": "Erasure stack" }, ...this.rowsOnly, this.textButton);
        this.problem = make("div", { class: "membrane-problem", role: "alert", hidden: true });
        this.area = make("textarea", { class: "membrane-text", spellcheck: "false", "aria-label": "The stack as text", hidden: true, "data-capture-wheel": "true" });
        this.list = make("ol", { class: "membrane-list", "aria-label": "Adapters of the stack", "data-capture-wheel": "true" });
        this.empty = make("div", { class: "membrane-empty" }, "No adapters yet. Add one, or press Text to paste a stack.");
        this.panel = make("div", { class: "membrane-panel", hidden: true });
        this.prompt = make("div", { class: "membrane-prompt", "aria-live": "polite", "data-capture-wheel": "true" });
        this.spoken = make("div", { class: "membrane-spoken", "aria-live": "polite" });
        this.root = make("div", { class: "membrane membrane-stack", role: "group", "aria-label": "Erasure stack editor" },
            styleElement(), this.bar, this.problem, this.area, this.list, this.empty, this.panel, this.prompt, this.spoken);

        this.root.addEventListener("click", (event) => this.onClick(event));
        this.root.addEventListener("keydown", (event) => this.onKey(event));
        this.list.addEventListener("input", (event) => this.onInput(event));
        // browsers undo in the box that was typed in last, wherever the focus is; the page's undo restores the number
        this.list.addEventListener("beforeinput", (event) => {
            if (event.inputType?.startsWith("history")) event.preventDefault();
        });
        this.list.addEventListener("change", (event) => this.onChange(event));
        this.list.addEventListener("pointerdown", (event) => this.onDragStart(event));
        this.area.addEventListener("input", () => {
            this.host.changed(this.area.value);
            this.value = this.area.value;
        });
        this.area.addEventListener("change", () => this.host.committed());
    }

    render() {
        const broken = this.problemText !== null;
        const asText = this.asText || broken;
        this.problem.hidden = !broken;
        setText(this.problem, this.problemText ?? "");
        this.area.hidden = !asText;
        if (this.area.value !== this.text && asText) this.area.value = this.text;
        this.textButton.setAttribute("aria-pressed", String(asText));
        this.textButton.disabled = broken;
        setText(this.textButton, asText && !broken ? "Rows" : "Text");
        for (const element of this.rowsOnly) element.hidden = asText;
        if (asText) this.closePanel(false);
        const panel = !this.panel.hidden;
        const entries = this.stack?.entries ?? [];
        this.list.hidden = asText || panel || !entries.length;
        this.empty.hidden = asText || panel || entries.length > 0;
        if (broken) return;
        this.arrange(entries);
        entries.forEach((entry, i) => this.views[i].show(entry, this.isMissing(entry)));
        this.filter();
        this.renderGates();
    }

    /** One view for each entry, in order: an entry keeps its view, so that a row that moves takes nothing else along. */
    arrange(entries) {
        if (entries.length === this.views.length && entries.every((entry, i) => this.views[i].entry === entry)) return;
        const own = new Map(this.views.map((view) => [view.entry, view]));
        const kept = new Set(entries.map((entry) => own.get(entry)));
        const free = this.views.filter((view) => !kept.has(view));
        this.views = entries.map((entry) => {
            const view = own.get(entry) ?? free.shift() ?? new RowView();
            own.delete(entry); // texts and numbers, which are no entries, may be there twice
            return view;
        });
        for (const view of free) view.element.remove();
        let at = this.list.firstElementChild;
        for (const { element } of this.views) {
            // the row with the focus stays where it is and the others move, as it would lose the focus
            if (at?.nextElementSibling === element && !at.contains(document.activeElement)) this.list.append(at);
            else if (at !== element) this.list.insertBefore(element, at);
            at = element.nextElementSibling;
        }
    }

    filter() {
        const wanted = this.search.value.trim().toLowerCase();
        this.views.forEach((view, i) => {
            const entry = this.stack?.entries[i];
            const text = understood(entry) ? entry.adapter : JSON.stringify(entry) ?? "";
            const hidden = wanted !== "" && !text.toLowerCase().includes(wanted);
            if (view.element.hidden !== hidden) view.element.hidden = hidden;
        });
    }

    say(text) {
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
        return this.known !== null && understood(entry) && !this.known.has(plainName(entry.adapter));
    }

    // ------------------------------------------------------------ changes

    rowOf(target) {
        const element = target.closest?.(".membrane-row");
        return element ? this.views.findIndex((view) => view.element === element) : -1;
    }

    onClick(event) {
        const action = event.target.closest?.("[data-do]")?.dataset.do;
        if (!action) return;
        const i = this.rowOf(event.target), entries = this.stack?.entries ?? [];
        const actions = {
            add: () => this.openChooser(-1),
            "all-on": () => this.setAll(true),
            "all-off": () => this.setAll(false),
            text: () => {
                this.asText = !this.asText;
                this.render();
                (this.asText ? this.area : this.textButton).focus();
            },
            toggle: () => {
                setField(entries[i], "enabled", field(entries[i], "enabled") === false);
                this.push();
            },
            choose: () => this.openChooser(i),
            more: () => {
                const view = this.views[i];
                view.advanced.hidden = !view.advanced.hidden;
                view.more.setAttribute("aria-expanded", String(!view.advanced.hidden));
            },
            info: () => this.openInfo(i),
            duplicate: () => {
                entries.splice(i + 1, 0, structuredClone(entries[i]));
                this.push();
                this.views[i + 1].copy.focus();
            },
            remove: () => {
                entries.splice(i, 1);
                this.push();
                (this.views[Math.min(i, this.views.length - 1)]?.drop ?? this.rowsOnly[1]).focus();
            },
            close: () => this.closePanel(),
        };
        actions[action]?.();
    }

    setAll(on) {
        for (const entry of this.stack.entries) if (understood(entry)) setField(entry, "enabled", on);
        this.push();
        this.say(`All rows are ${on ? "on" : "off"}`);
    }

    move(from, to, control) {
        const entries = this.stack.entries;
        if (to < 0 || to >= entries.length || from === to) return;
        const [entry] = entries.splice(from, 1);
        entries.splice(to, 0, entry);
        this.push();
        const view = this.views[to];
        (view.element.querySelector(control) ?? view.handle).focus();
        view.element.scrollIntoView({ block: "nearest" });
        this.say(`Moved to row ${to + 1} of ${entries.length}`);
    }

    /** The value of a control, or undefined while what was typed is no number. */
    readControl(control) {
        if (control.tagName === "SELECT") return control.value;
        if (control.value.trim() === "") return undefined;
        const number = Number(control.value), path = control.dataset.field;
        if (!Number.isFinite(number)) return undefined;
        return path === "permeability.top_k" ? Math.max(1, Math.round(number)) : number;
    }

    onInput(event) {
        const control = event.target, path = control.dataset.field, i = this.rowOf(control);
        if (!path || i < 0) return;
        const value = this.readControl(control);
        if (value === undefined || value === field(this.stack.entries[i], path)) return;
        setField(this.stack.entries[i], path, value);
        this.push(false);
    }

    onChange(event) {
        const control = event.target, i = this.rowOf(control);
        if (!control.dataset.field || i < 0) return;
        if (this.readControl(control) === undefined) control.value = String(field(this.stack.entries[i], control.dataset.field));
        this.host.committed();
    }

    onKey(event) {
        const target = event.target, i = this.rowOf(target);
        const typed = target === this.area || (target.tagName === "INPUT" && target.type === "text");
        if (!typed && this.host.undoRedo(event)) return;
        if (event.altKey && !event.ctrlKey && (event.key === "ArrowUp" || event.key === "ArrowDown") && i >= 0) {
            event.preventDefault();
            event.stopPropagation();
            const { do: action, field: path } = target.dataset;
            const control = action ? `[data-do="${action}"]` : `[data-field="${path}"]${path && target.type === "range" ? "" : ":not([type=range])"}`;
            this.move(i, i + (event.key === "ArrowUp" ? -1 : 1), control);
            return;
        }
        if (event.key === "Escape" && !this.panel.hidden) {
            event.preventDefault();
            this.closePanel();
        }
        // the page has shortcuts on single keys, which are not meant while somebody works here
        if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
    }

    onDragStart(event) {
        const handle = event.target.closest?.(".membrane-handle");
        if (!handle || event.button !== 0) return;
        event.preventDefault();
        event.stopPropagation();
        handle.focus();
        const from = this.rowOf(handle), row = this.views[from].element;
        let to = from;
        const mark = (on) => {
            const at = this.views[to]?.element;
            at?.classList.toggle("membrane-before", on && to < from);
            at?.classList.toggle("membrane-after", on && to > from);
        };
        const moved = (e) => {
            const box = this.list.getBoundingClientRect();
            if (e.clientY < box.top + 20) this.list.scrollTop -= 12;
            else if (e.clientY > box.bottom - 20) this.list.scrollTop += 12;
            mark(false);
            const middle = (view) => {
                const { top, height } = view.element.getBoundingClientRect();
                return view.element.hidden ? null : top + height / 2;
            };
            to = from;
            this.views.forEach((view, i) => {
                const y = middle(view);
                if (y === null) return;
                if (i < from && e.clientY < y) to = Math.min(to, i);
                if (i > from && e.clientY > y) to = Math.max(to, i);
            });
            mark(true);
            row.classList.add("membrane-dragged");
        };
        const over = (e) => {
            for (const [kind, listener] of Object.entries(listeners)) handle.removeEventListener(kind, listener);
            row.classList.remove("membrane-dragged");
            mark(false);
            if (e.type === "pointerup") this.move(from, to, ".membrane-handle");
        };
        const listeners = { pointermove: moved, pointerup: over, pointercancel: over };
        for (const [kind, listener] of Object.entries(listeners)) handle.addEventListener(kind, listener);
        handle.setPointerCapture(event.pointerId);
    }

    // ------------------------------------------------------------ choosing a file, and what a file is

    openPanel(...content) {
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
        (this.panelRow >= 0 ? this.views[this.panelRow]?.name : this.rowsOnly[1])?.focus();
    }

    /** The list of files with a search box; i: the row that gets the choice, -1 for a new one. */
    async openChooser(i) {
        this.panelRow = i;
        const id = `membrane-options-${Math.random().toString(36).slice(2)}`;
        const box = make("input", {
            class: "membrane-search", type: "text", placeholder: "Search adapters", role: "combobox",
            "aria-label": "Search adapters", "aria-expanded": "true", "aria-controls": id, "aria-autocomplete": "list",
        });
        const options = make("ul", { class: "membrane-options", role: "listbox", id, "aria-label": "Adapters", "data-capture-wheel": "true" });
        const close = make("button", { type: "button", "data-do": "close" }, "Cancel");
        let found = [], at = 0;
        const point = () => {
            [...options.children].forEach((item, k) => item.setAttribute("aria-selected", String(k === at && found.length > 0)));
            const item = found.length ? options.children[at] : null;
            box.setAttribute("aria-activedescendant", item?.id ?? "");
            item?.scrollIntoView({ block: "nearest" });
        };
        const list = () => {
            const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
            found = (this.names ?? []).filter((name) => words.every((word) => name.toLowerCase().includes(word))).slice(0, 500);
            at = Math.max(0, found.indexOf(this.stack.entries[i]?.adapter));
            options.replaceChildren(...found.map((name, k) => make("li", { role: "option", id: `${id}-${k}`, "data-name": name }, name)));
            if (!found.length) options.append(make("li", { class: "membrane-none" }, this.names?.length ? "No file has this name." : "There is no file in models/erasure_adapters yet."));
            point();
        };
        const take = (name) => {
            const entries = this.stack.entries;
            if (i >= 0) setField(entries[i], "adapter", name);
            else entries.push({ adapter: name, enabled: true, strength: 1 });
            this.panelRow = i >= 0 ? i : entries.length - 1;
            this.panel.hidden = true;
            this.push();
            this.views[this.panelRow].element.scrollIntoView({ block: "nearest" });
            this.views[this.panelRow].name.focus();
        };
        box.addEventListener("input", list);
        box.addEventListener("keydown", (event) => {
            const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
            if (step && found.length && !event.altKey) {
                event.preventDefault();
                at = (at + step + found.length) % found.length;
                point();
            } else if (event.key === "Enter" && found.length) {
                event.preventDefault();
                take(found[at]);
            }
        });
        options.addEventListener("click", (event) => {
            const name = event.target.closest("[data-name]")?.dataset.name;
            if (name !== undefined) take(name);
        });
        this.openPanel(make("div", { class: "membrane-bar" }, box, close), options);
        list();
        box.focus();
        await this.refreshNames();
        if (box.isConnected) list();
    }

    async openInfo(i) {
        this.panelRow = i;
        const name = this.stack.entries[i].adapter;
        const body = make("div", {}, "Reading the file ...");
        const close = make("button", { type: "button", "data-do": "close" }, "Close");
        this.openPanel(make("div", { class: "membrane-bar" }, make("strong", { class: "membrane-search" }, name), close), body);
        close.focus();
        body.replaceChildren(await adapterInfo(name).then(infoList, (error) => error.message));
    }

    // ------------------------------------------------------------ what the rows got, and what the prompt asks for

    /** A sampling's openings, as core/host/page/live.py sends them: lists of [row, adapter, value]. */
    showGates(message) {
        this.openings = message;
        this.stale = false;
        this.assignGates();
        this.renderGates();
    }

    assignGates() {
        this.gates = new Map();
        const place = { positive: 0, negative: 1 };
        for (const side of Object.keys(place)) {
            for (const [index, adapter, value] of this.openings?.[side] ?? []) {
                const i = this.find(index, adapter);
                if (i < 0) continue;
                const values = this.gates.get(this.stack.entries[i]) ?? [null, null];
                values[place[side]] = value;
                this.gates.set(this.stack.entries[i], values);
            }
        }
    }

    /** The row that an opening belongs to now: rows may have moved since the workflow was queued. */
    find(index, adapter) {
        const entries = this.stack?.entries ?? [];
        const same = (entry) => understood(entry) && plainName(entry.adapter) === plainName(adapter);
        if (entries[index] !== undefined && same(entries[index])) return index;
        const found = entries.flatMap((entry, i) => (same(entry) ? [i] : []));
        return found.length === 1 ? found[0] : -1;
    }

    /** The values of the last sampling are from before; they stay, paler, until new ones come. */
    setStale() {
        this.stale = true;
        this.renderGates();
    }

    renderGates() {
        this.views.forEach((view, i) => {
            const [positive, negative] = this.gates.get(this.stack.entries[i]) ?? [null, null];
            view.showGate(positive, negative, this.stale);
        });
    }

    /** The line below the rows: what the words of the connected prompt would open. */
    showPrompt({ text, rows, problem }) {
        let line;
        if (problem) line = problem;
        else if (text === null) line = "Connect the stack to a sampler with a prompt to see which rows its words would open.";
        else if (!rows.length) line = "No row is on.";
        else {
            const byWords = rows.filter((row) => row.mode !== "fixed");
            const open = byWords.filter((row) => row.value !== 0).map((row) => `${row.adapter} ${shorten(row.value)}`);
            const fixed = rows.length - byWords.length;
            const parts = [];
            if (byWords.length) parts.push(open.length ? `the prompt's words alone would open: ${open.join(", ")}` : "the prompt's words alone would open none");
            if (fixed) parts.push(`${fixed} always ${fixed === 1 ? "acts" : "act"}`);
            line = parts.join("; ");
            line = line[0].toUpperCase() + line.slice(1) + (byWords.length ? ". Sampling also compares the meaning of the texts and may open more." : ".");
        }
        this.prompt.classList.toggle("membrane-refused", Boolean(problem));
        setText(this.prompt, line);
    }
}
