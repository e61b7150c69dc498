// @ts-check
// Dragging a row by its handle to another place of the list.

const EDGE = 20, SCROLL = 12; // pixels from the list's end within which it scrolls, and how far

export class RowDrag {
    /**
     * @param {PointerEvent} event the press on the handle
     * @param {import("./row_list.js").RowList} list
     * @param {number} from the row that is dragged
     * @param {(to: number) => void} dropped gets the place where the row was let go
     */
    constructor(event, list, from, dropped) {
        this.list = list;
        this.from = this.to = from;
        this.dropped = dropped;
        this.row = list.views[from].element;
        this.handle = list.views[from].handle;
        const over = (e) => this.end(e);
        this.listeners = { pointermove: (e) => this.move(e), pointerup: over, pointercancel: over };
        for (const [kind, listener] of Object.entries(this.listeners)) this.handle.addEventListener(kind, listener);
        this.handle.setPointerCapture(event.pointerId);
    }

    move({ clientY }) {
        this.scroll(clientY);
        this.mark(false);
        this.to = this.placeAt(clientY);
        this.mark(true);
        this.row.classList.add("membrane-dragged");
    }

    end(event) {
        for (const [kind, listener] of Object.entries(this.listeners)) this.handle.removeEventListener(kind, listener);
        this.row.classList.remove("membrane-dragged");
        this.mark(false);
        if (event.type === "pointerup") this.dropped(this.to);
    }

    scroll(y) {
        const { element } = this.list, { top, bottom } = element.getBoundingClientRect();
        if (y < top + EDGE) element.scrollTop -= SCROLL;
        else if (y > bottom - EDGE) element.scrollTop += SCROLL;
    }

    /** The place among the rows: the furthest one whose middle was passed, of those that are not hidden. */
    placeAt(y) {
        let to = this.from;
        this.list.views.forEach(({ element }, i) => {
            if (element.hidden) return;
            const { top, height } = element.getBoundingClientRect(), middle = top + height / 2;
            if (i < this.from && y < middle) to = Math.min(to, i);
            if (i > this.from && y > middle) to = Math.max(to, i);
        });
        return to;
    }

    mark(on) {
        const at = this.list.views[this.to]?.element;
        at?.classList.toggle("membrane-before", on && this.to < this.from);
        at?.classList.toggle("membrane-after", on && this.to > this.from);
    }
}
