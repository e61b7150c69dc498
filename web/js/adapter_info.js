// @ts-check
// What an adapter's file says about itself, as the host reads it from the file's header.

import { make } from "./elements.js";
import { after, ask, stayMounted, whileInGraph } from "./host.js";
import { styleElement } from "./stack_style.js";
import { t } from "./strings.js";

/** The information of a file; raises an Error with the host's sentence. */
export const adapterInfo = (name) => ask(`/membrane/adapter?name=${encodeURIComponent(name)}`);

const size = (bytes) =>
    bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;

/** What a file erases: "star \u2192 circle, moon". */
export const conceptsOf = ({ concepts, surrogates }) =>
    concepts.map((concept, i) => (surrogates[i] ? `${concept} \u2192 ${surrogates[i]}` : concept)).join(", ");

/** The information as a list of terms. */
export function infoList(info) {
    const facts = [
        [t("info.concepts"), conceptsOf(info)],
        [t("info.method"), info.method],
        [t("info.family"), info.family],
        [t("info.size"), size(info.size)],
        [t("info.licence"), info.licence],
    ];
    const line = ([term, text]) => [make("dt", {}, term), make("dd", {}, text || t("info.absent"))];
    return make("dl", {}, ...facts.flatMap(line));
}

/** What keeps showing the file that a widget names in an element. */
function shower(choice, body) {
    let shown;
    return async () => {
        const name = choice.value;
        if (name === shown) return;
        shown = name;
        let content = t("info.choose");
        if (name) content = await adapterInfo(name).then(infoList, (error) => error.message);
        if (name === shown) body.replaceChildren(content);
    };
}

/** A part of Load Erasure Adapter that shows what the chosen file is. It holds no state and is in no workflow. */
export function addInfo(node) {
    const choice = node.widgets?.find((widget) => widget.name === "adapter_name");
    if (!choice) return;
    const body = make("div");
    const root = make("div", { class: "membrane membrane-info" }, styleElement(), body);
    const widget = node.addDOMWidget("adapter_info", "membrane_info", root, {
        serialize: false,
        hideOnZoom: true,
        getValue: () => "",
        setValue: () => {},
        getMinHeight: () => 116,
        getHeight: () => 116,
    });
    widget.serialize = false;
    const show = shower(choice, body);
    after(choice, "callback", show);
    after(node, "onConfigure", show);
    node.setSize([Math.max(node.size[0], 300), Math.max(node.size[1], node.computeSize()[1])]);
    whileInGraph(node, () => stayMounted(node, root, ".membrane-info"), 500);
    queueMicrotask(show);
}
