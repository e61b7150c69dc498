// node responsiveness.mjs <address> [nodes2]: prints how long the page takes with 200 rows in the stack editor, from the key
// or click to the next frame, and of that the scripts alone. Figures of one machine, so nothing is asserted of them.

import { ADAPTERS, api, facilitated, fresh, launch, openPage, setting, stack } from "./page.mjs";

const [url, kind] = process.argv.slice(2);
const browser = await launch();
try {
    const page = await openPage(browser, url);
    if (kind === "nodes2") await setting(page, "Comfy.VueNodes.Enabled", true);
    await fresh(page, { text: stack(...Array.from({ length: 200 }, (_, i) => facilitated(ADAPTERS[i % 3]))) });
    await page.waitForTimeout(2000);
    await api(page, () => {
        globalThis.timings = [];
        new PerformanceObserver((list) => timings.push(...list.getEntries().filter((entry) => entry.interactionId))).observe({ type: "event", durationThreshold: 16 });
    });
    const row = (n) => page.locator(".membrane-stack .membrane-row").nth(n);
    const box = row(1).locator('[data-field="strength"][type="number"]'), search = page.locator('.membrane-stack [aria-label="Search rows"]');
    await box.click();
    await search.click();
    const interactions = {
        "typing a number": () => box.press("5"),
        "switching a row": () => row(2).locator('[data-do="toggle"]').click(),
        "moving a row": () => row(3).locator('[data-do="handle"]').press("Alt+ArrowDown"),
        "searching rows": () => search.press("s"),
        "copying a row": () => row(0).locator('[data-do="duplicate"]').click(),
    };
    for (const [name, act] of Object.entries(interactions)) {
        const waits = [], work = [];
        for (let i = 0; i < 9; i++) {
            await api(page, () => void timings.splice(0));
            await act();
            await page.waitForTimeout(200);
            // no entry: everything took less than the 16 ms from which the browser keeps one
            waits.push(await api(page, () => Math.max(0, ...timings.map((entry) => entry.duration))));
            work.push(await api(page, () => Math.max(0, ...timings.map((entry) => entry.processingEnd - entry.processingStart))));
        }
        if (name === "searching rows") await search.fill("");
        const [frame, script] = [waits, work].map((times) => times.sort((a, b) => a - b).map(Math.round));
        console.log(JSON.stringify({ interaction: name, to_next_frame_ms: { median: frame[4], slowest: frame[8] }, scripts_ms: { median: script[4], slowest: script[8] } }));
    }
} finally {
    await browser.close();
}
