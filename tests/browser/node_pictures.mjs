// node node_pictures.mjs <address> <folder>: a picture of every node of the pack, for the help pages.

import { api, launch, openPage } from "./page.mjs";

const [url, folder] = process.argv.slice(2);
const TITLE = 30, MARGIN = 12, TOP = 180; // below what the page shows of its tabs
const browser = await launch();
try {
    const page = await openPage(browser, url);
    const types = await api(page, () => Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith("Membrane")));
    await page.setViewportSize({ width: 1500, height: 1500 });
    await page.keyboard.press("Escape"); // a page that is new shows its templates
    await page.mouse.move(1400, 1400);
    for (const [place, type] of types.entries()) {
        await api(page, ([type, top, place, below]) => {
            app.graph.clear();
            app.graph.last_node_id = place; // newer pages remember what a node of the same number had
            const node = LiteGraph.createNode(type);
            app.graph.add(node);
            node.pos = [0, top];
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [80, below];
            app.canvas.setDirty(true, true);
        }, [type, TITLE, place, TOP]);
        await page.waitForTimeout(700);
        // boxes of text are as tall as they want to be only after they were drawn
        const clip = await api(page, ([title, margin, below]) => {
            const node = app.graph._nodes[0], box = app.canvas.canvas.getBoundingClientRect(), [width, height] = node.computeSize();
            const boxes = (node.widgets ?? []).filter((w) => w.inputEl ?? w.element).length;
            node.setSize([Math.max(width, 340), Math.max(height, node.size[1]) + 40 * boxes]);
            app.canvas.setDirty(true, true);
            return { x: box.left + 80 - margin, y: box.top + below - margin, width: node.size[0] + 2 * margin, height: node.size[1] + title + 2 * margin };
        }, [TITLE, MARGIN, TOP]);
        await page.waitForTimeout(700);
        await page.screenshot({ path: `${folder}/${type}.jpg`, type: "jpeg", quality: 80, clip });
    }
} finally {
    await browser.close();
}
