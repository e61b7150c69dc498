// @ts-check
// Two pictures in one place, with a divider between them that is moved by mouse, finger or arrow keys.

import { make, setText } from "./elements.js";
import { api, fileAddress } from "./host.js";
import { t } from "./strings.js";

/** Temporary files are named alike in every session, so an address alone may be of an older picture. */
const source = (file) => `${api.apiURL(fileAddress("/view", file))}&rand=${Math.random()}`;

/**
 * The slider of some pairs of pictures.
 * @param {{before: any, after: any}[]} pairs files as the host names them
 */
export function slider(pairs) {
    const before = make("img", { alt: t("compare.before"), draggable: "false" });
    const after = make("img", { alt: t("compare.after"), draggable: "false", class: "membrane-over" });
    const divider = make("i", { class: "membrane-divider" });
    const range = make("input", { type: "range", min: 0, max: 100, step: 1, value: 50, "aria-label": t("compare.divider") });
    const frame = make("div", { class: "membrane-frame" }, before, after, divider, range);
    const move = () => frame.style.setProperty("--membrane-at", `${range.value}%`);
    range.addEventListener("input", move);
    const place = make("span", { class: "membrane-place" });
    let at = 0;
    const turn = (by) => {
        at = (at + by + pairs.length) % pairs.length;
        before.src = source(pairs[at].before);
        after.src = source(pairs[at].after);
        setText(place, `${at + 1} / ${pairs.length}`);
    };
    const step = (by, sign, label) =>
        make("button", { type: "button", "aria-label": label, click: () => turn(by) }, sign);
    const bar = [make("span", {}, t("compare.before")), make("span", { class: "membrane-place" })];
    if (pairs.length > 1) bar.splice(1, 1, step(-1, "\u2039", t("compare.previous")), place, step(1, "\u203a", t("compare.next")));
    bar.push(make("span", {}, t("compare.after")));
    turn(0);
    move();
    return make("div", { class: "membrane-compare" }, frame, make("div", { class: "membrane-bar membrane-sides" }, ...bar));
}
