// node screenshots.mjs <address> <folder> <classic|nodes2>: pictures of the stack editor, dark and light, for the README.

import { HEART, STAR, STRIPED, api, facilitated, fresh, launch, openPage, setting, stack, until } from "./page.mjs";

const [url, folder, kind] = process.argv.slice(2);
const browser = await launch();
try {
    const page = await openPage(browser, url);
    for (const theme of ["dark", "light"]) {
        await setting(page, "Comfy.ColorPalette", theme);
        if (kind === "nodes2") await setting(page, "Comfy.VueNodes.Enabled", true);
        const text = stack(
            facilitated(STAR, { factor: 1.25 }),
            { ...facilitated(HEART, { negative: "off" }), strength: 0.8, end_percent: 0.6 },
            { adapter: STRIPED, enabled: false },
        );
        await fresh(page, { text, positive: "a red star on snow" });
        await api(page, () => {
            const at = { MembraneDemoModel: [0, 0], MembraneStackEditor: [0, 170], MembraneApply: [570, 0], KSampler: [880, 0], SaveImage: [880, 330] };
            const sizes = { MembraneStackEditor: [520, 430], SaveImage: [300, 290], KSampler: [300, 262], MembraneApply: [260, 102] };
            let texts = 0;
            for (const node of app.graph._nodes) {
                const place = at[node.type] ?? (node.type === "CLIPTextEncode" ? [570, 190 + 160 * texts++] : null);
                node.pos = place ?? [570, node.type === "VAEDecode" ? 660 : 510];
                if (sizes[node.type]) node.setSize(sizes[node.type]);
                if (node.type === "CLIPTextEncode") node.setSize([260, 110]);
                if (node.type === "VAEDecode" || node.type === "EmptyLatentImage") node.setSize([260, node.type === "VAEDecode" ? 46 : 100]);
            }
            app.canvas.deselectAll?.();
            app.canvas.ds.offset = [90, 150];
            app.canvas.setDirty(true, true);
        });
        await page.waitForTimeout(1200);
        await api(page, () => app.queuePrompt(0));
        await until(async () => (await page.locator(".membrane-gate b").allTextContents()).includes("1.25"), "the openings", 60000);
        await page.waitForTimeout(4000);
        const top = await api(page, () => app.canvas.canvas.getBoundingClientRect().top);
        await page.screenshot({ path: `${folder}/stack_editor_${kind}_${theme}.jpg`, type: "jpeg", quality: 82, clip: { x: 74, y: top + 106, width: 1180, height: 650 } });
    }
    await setting(page, "Comfy.ColorPalette", "dark");
    if (kind === "nodes2") await setting(page, "Comfy.VueNodes.Enabled", false);
} finally {
    await browser.close();
}
