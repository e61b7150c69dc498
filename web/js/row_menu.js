// @ts-check
// The menu of a row: opened by the right mouse button or the menu key, used by mouse or arrow keys.

import { make } from "./elements.js";
import { t } from "./strings.js";

const STEPS = { ArrowDown: 1, ArrowUp: -1 };

export class RowMenu {
    /**
     * @param {HTMLElement} root what it opens in
     * @param {(action: string, row: number) => void} act does what was chosen
     */
    constructor(root, act) {
        this.root = root;
        this.act = act;
        const attributes = { class: "membrane-menu", role: "menu", "aria-label": t("menu"), hidden: true };
        this.element = make("div", { ...attributes, keydown: (event) => this.onKey(event) });
        this.element.addEventListener("focusout", (event) => {
            if (!this.element.contains(/** @type {Node | null} */ (event.relatedTarget))) this.close();
        });
        this.element.addEventListener("contextmenu", (event) => event.preventDefault());
        root.append(this.element);
    }

    /** Opens for a row where the event was; items: [action, text]. */
    open(event, row, items) {
        this.before = document.activeElement;
        const choose = (action) => {
            this.close();
            this.act(action, row);
        };
        const item = ([action, text]) =>
            make("button", { type: "button", role: "menuitem", "data-menu": action, click: () => choose(action) }, text);
        this.element.replaceChildren(...items.map(item));
        this.element.hidden = false;
        this.place(event);
        this.items[0].focus({ preventScroll: true });
    }

    get items() {
        return /** @type {HTMLElement[]} */ ([...this.element.children]);
    }

    /** Puts the menu beside the pointer, or the element with the focus, and wholly inside. */
    place(event) {
        const box = this.root.getBoundingClientRect(), zoom = box.width / this.root.offsetWidth || 1;
        const own = event.target.getBoundingClientRect();
        const byMouse = event.clientX || event.clientY;
        const [x, y] = byMouse ? [event.clientX, event.clientY] : [own.left, own.bottom];
        const most = [this.root.clientWidth - this.element.offsetWidth, this.root.clientHeight - this.element.offsetHeight];
        const inside = (value, limit) => `${Math.max(0, Math.min(value / zoom, limit))}px`;
        this.element.style.left = inside(x - box.left, most[0]);
        this.element.style.top = inside(y - box.top, most[1]);
    }

    close() {
        this.element.hidden = true;
    }

    onKey(event) {
        event.stopPropagation();
        const at = this.items.indexOf(/** @type {HTMLElement} */ (document.activeElement)), count = this.items.length;
        if (event.key in STEPS) this.items[(at + STEPS[event.key] + count) % count].focus();
        else if (event.key === "Escape" || event.key === "Tab") {
            this.close();
            this.before?.focus?.();
        } else return;
        event.preventDefault();
    }
}
