// node node_pictures.mjs <address> <folder>: a picture of every node of the pack, for the help pages.

import { api, launch, openPage } from "./page.mjs";

const [url, folder] = process.argv.slice(2);
const TITLE = 30, MARGIN = 12;
const browser = await launch();
try {
    const page = await openPage(browser, url);
    const types = await api(page, () => Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith("Membrane")));
    for (const type of types) {
        const box = await api(page, ([type, title, margin]) => {
            app.graph.clear();
            const node = LiteGraph.createNode(type), canvas = app.canvas.canvas.getBoundingClientRect();
            app.graph.add(node);
            node.pos = [margin, title + margin];
            const [width, height] = node.computeSize();
            node.setSize([Math.max(width, 340), Math.max(height, node.size[1])]);
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [80, 120];
            app.canvas.setDirty(true, true);
            return { x: canvas.left + 80, y: canvas.top + 120, width: node.size[0] + 2 * margin, height: node.size[1] + title + 2 * margin };
        }, [type, TITLE, MARGIN]);
        await page.waitForTimeout(900);
        const view = page.viewportSize();
        const clip = { ...box, height: Math.min(box.height, view.height - box.y) };
        await page.screenshot({ path: `${folder}/${type}.jpg`, type: "jpeg", quality: 80, clip });
    }
} finally {
    await browser.close();
}
