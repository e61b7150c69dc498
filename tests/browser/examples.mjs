// node examples.mjs <address> <files...>: opens each workflow as a person would who picks it among the templates, one
// JSON line {name, missing, changed, prompt, zoom, overlaps, cut, app, error} for each; changed: widget values that are not
// what the file says; zoom: of the page at 1440x900; cut: texts that their boxes or rows do not show whole; app: labels
// of the form's rows, null where it did not open as an app, false on pages without
// apps, "every input" on those of 2025, whose forms have all of them.

import { readFileSync } from "node:fs";
import { basename } from "node:path";

import { api, launch, openPage } from "./page.mjs";

const [url, ...files] = process.argv.slice(2);

/** What the page shows of the workflow that is open. */
function layout() {
    const TITLE = LiteGraph.NODE_TITLE_HEIGHT;
    const ENDS = { combo: 90, number: 90, text: 65, string: 65 }; // of a row beside its name and its value, px
    const nodes = app.graph._nodes, overlaps = [], cut = [];
    nodes.forEach((a, i) => nodes.slice(0, i).forEach((b) => {
        const apart = (k, above) => a.pos[k] - above >= b.pos[k] + b.size[k] || b.pos[k] - above >= a.pos[k] + a.size[k];
        if (!apart(0, 0) && !apart(1, TITLE)) overlaps.push([a.type, b.type]);
    }));
    const context = document.createElement("canvas").getContext("2d");
    context.font = app.canvas.inner_text_font ?? "normal 12px sans-serif";
    for (const node of nodes) {
        for (const widget of node.widgets ?? []) {
            const box = widget.inputEl ?? widget.element;
            if (box) {
                const seen = [box, ...box.querySelectorAll("*")].filter((e) => e.clientHeight > 20 && getComputedStyle(e).opacity !== "0");
                if (seen.some((e) => e.scrollHeight > e.clientHeight + 2)) cut.push([node.type, widget.name]);
            } else if (ENDS[widget.type]) {
                const value = typeof widget.value === "number" ? widget.value.toFixed(4) : String(widget.value);
                const needs = context.measureText(widget.label ?? widget.name).width + context.measureText(value).width;
                if (needs + ENDS[widget.type] > node.size[0]) cut.push([node.type, widget.name, value]);
            }
        }
    }
    return { zoom: app.canvas.ds.scale, overlaps, cut };
}

/** Labels of the form that the page shows instead of the graph, which it shows again then; null where there is none. */
async function appForm(page) {
    const mode = await api(page, () => {
        const workflow = app.extensionManager?.workflow?.activeWorkflow;
        if (workflow && "initialMode" in workflow) return workflow.initialMode ?? "graph";
        return app.canvas.canvas.clientWidth ? "no apps" : "every input";
    });
    if (mode === "graph") return null;
    if (mode === "no apps") return false;
    const found = mode === "every input" ? mode : await page.getByTestId("builder-widget-label").allInnerTexts();
    await api(page, () => app.extensionManager.command.execute("Comfy.ToggleLinear"));
    await page.waitForTimeout(700);
    return found;
}

const browser = await launch();
try {
    const page = await openPage(browser, url);
    await page.setViewportSize({ width: 1440, height: 900 });
    await page.waitForTimeout(500);
    for (const file of files) {
        const found = { name: basename(file, ".json"), missing: [], changed: [], prompt: null, app: null, error: null };
        page.problems.splice(0);
        try {
            const workflow = JSON.parse(readFileSync(file, "utf8"));
            await api(page, (workflow) => app.loadGraphData(structuredClone(workflow), true, true, null, { openSource: "template" }), workflow);
            await page.waitForTimeout(700); // boxes of text are there only after they were drawn
            found.app = await appForm(page);
            Object.assign(found, await api(page, async (workflow) => {
                const missing = workflow.nodes.map((node) => node.type).filter((type) => !LiteGraph.registered_node_types[type]);
                const changed = workflow.nodes.flatMap((node) => {
                    const values = app.graph.getNodeById(node.id).serialize().widgets_values ?? [];
                    return node.widgets_values.flatMap((value, i) => JSON.stringify(values[i]) === JSON.stringify(value) ? [] : [[node.type, i, value, values[i]]]);
                });
                return { missing, changed, prompt: (await app.graphToPrompt()).output };
            }, workflow), await api(page, layout));
            const problems = page.problems.filter((problem) => problem.includes("/extensions/membrane/"));
            if (problems.length) found.error = `scripts failed: ${problems.join("; ")}`;
        } catch (failure) {
            found.error = failure.stack ?? String(failure);
        }
        console.log(JSON.stringify(found));
    }
} finally {
    await browser.close();
}
