// @ts-check
// Making and changing elements of the page.

/**
 * A new element.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, any>} attributes a function is a listener; null, undefined and false leave an attribute out
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        if (typeof value === "function") element.addEventListener(name, value);
        else if (value !== null && value !== undefined && value !== false) {
            element.setAttribute(name, value === true ? "" : value);
        }
    }
    element.append(...children);
    return element;
}

/** New text only where there is some: pages have rules on which every change of text makes the browser spend 20 ms. */
export function setText(element, text) {
    if (element.textContent !== text) element.textContent = text;
}

const ICONS = {
    handle: "M5 3.5h1.5M9.5 3.5h1.5M5 8h1.5M9.5 8h1.5M5 12.5h1.5M9.5 12.5h1.5",
    info: "M8 7.2v4M8 4.7v.2M8 1.8a6.2 6.2 0 1 0 0 12.4a6.2 6.2 0 1 0 0-12.4",
    duplicate: "M5.5 5.5h8v8h-8zM10.5 5.5v-3h-8v8h3",
    remove: "M3.5 3.5l9 9M12.5 3.5l-9 9",
    more: "M3 8h.2M7.9 8h.2M12.8 8h.2",
};
const BOLD = ["handle", "more"]; // drawn as dots

function drawn(tag, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
}

/**
 * A drawing of 16 by 16 in the colour of the text around it.
 * @param {keyof typeof ICONS} name
 */
export function icon(name) {
    const svg = drawn("svg", { viewBox: "0 0 16 16", width: 14, height: 14, "aria-hidden": "true" });
    const line = { fill: "none", stroke: "currentColor", "stroke-linecap": "round" };
    svg.append(drawn("path", { d: ICONS[name], ...line, "stroke-width": BOLD.includes(name) ? "2" : "1.4" }));
    return svg;
}
