// @ts-check
// What an adapter's file says about itself, as the host reads it from the file's header.

import { ask, stayMounted, whileInGraph } from "./host.js";
import { styleElement } from "./stack_style.js";
import { t } from "./strings.js";

/** The information of a file; raises an Error with the host's sentence. */
export const adapterInfo = (name) => ask(`/membrane/adapter?name=${encodeURIComponent(name)}`);

const size = (bytes) =>
    bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;

/** The information as a list of terms. */
export function infoList(info) {
    const pairs = info.concepts.map((concept, i) =>
        info.surrogates[i] ? `${concept} \u2192 ${info.surrogates[i]}` : concept,
    );
    const facts = [
        [t("info.concepts"), pairs.join(", ")],
        [t("info.method"), info.method],
        [t("info.family"), info.family],
        [t("info.size"), size(info.size)],
        [t("info.licence"), info.licence],
    ];
    const list = document.createElement("dl");
    for (const [term, text] of facts) {
        list.append(
            Object.assign(document.createElement("dt"), { textContent: term }),
            Object.assign(document.createElement("dd"), { textContent: text || t("info.absent") }),
        );
    }
    return list;
}

/** A part of Load Erasure Adapter that shows what the chosen file is. It holds no state and is in no workflow. */
export function addInfo(node) {
    const choice = node.widgets?.find((widget) => widget.name === "adapter_name");
    if (!choice) return;
    const root = document.createElement("div");
    root.className = "membrane membrane-info";
    const body = document.createElement("div");
    root.append(styleElement(), body);
    const widget = node.addDOMWidget("adapter_info", "membrane_info", root, {
        serialize: false,
        hideOnZoom: true,
        getValue: () => "",
        setValue: () => {},
        getMinHeight: () => 116,
        getHeight: () => 116,
    });
    widget.serialize = false;

    let shown;
    const show = async () => {
        const name = choice.value;
        if (name === shown) return;
        shown = name;
        let content = t("info.choose");
        if (name) content = await adapterInfo(name).then(infoList, (error) => error.message);
        if (name === shown) body.replaceChildren(content);
    };
    const callback = choice.callback;
    choice.callback = function (...args) {
        const result = callback?.apply(this, args);
        show();
        return result;
    };
    const onConfigure = node.onConfigure;
    node.onConfigure = function (...args) {
        const result = onConfigure?.apply(this, args);
        show();
        return result;
    };
    node.setSize([Math.max(node.size[0], 300), Math.max(node.size[1], node.computeSize()[1])]);
    whileInGraph(node, () => stayMounted(node, root, ".membrane-info"), 500);
    queueMicrotask(show);
}
