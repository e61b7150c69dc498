// node examples.mjs <address> <files...>: opens each workflow as a person would who drags it in, one JSON line
// {name, missing, changed, prompt, error} for each; changed: widget values that are not what the file says.

import { readFileSync } from "node:fs";
import { basename } from "node:path";

import { api, launch, openPage } from "./page.mjs";

const [url, ...files] = process.argv.slice(2);
const browser = await launch();
try {
    const page = await openPage(browser, url);
    for (const file of files) {
        const found = { name: basename(file, ".json"), missing: [], changed: [], prompt: null, error: null };
        page.problems.splice(0);
        try {
            const workflow = JSON.parse(readFileSync(file, "utf8"));
            await api(page, (workflow) => app.loadGraphData(structuredClone(workflow)), workflow);
            await page.waitForTimeout(300);
            Object.assign(found, await api(page, async (workflow) => {
                const missing = workflow.nodes.map((node) => node.type).filter((type) => !LiteGraph.registered_node_types[type]);
                const changed = workflow.nodes.flatMap((node) => {
                    const values = app.graph.getNodeById(node.id).serialize().widgets_values ?? [];
                    return node.widgets_values.flatMap((value, i) => JSON.stringify(values[i]) === JSON.stringify(value) ? [] : [[node.type, i, value, values[i]]]);
                });
                return { missing, changed, prompt: (await app.graphToPrompt()).output };
            }, workflow));
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
