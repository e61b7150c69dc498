// node run.mjs <address> <names...>: runs scenarios in Chromium, one JSON line {name, seconds, error, absent} for each.

import { Absent, launch, openPage } from "./page.mjs";
import { SCENARIOS } from "./scenarios.mjs";
import { HOUR } from "./scenarios_hour.mjs";
import { PARTS } from "./scenarios_parts.mjs";
import { ROWS } from "./scenarios_rows.mjs";

const [url, ...wanted] = process.argv.slice(2);
const browser = await launch();
try {
    for (const name of wanted) {
        const start = Date.now();
        let page, error = null, absent = null;
        try {
            page = await openPage(browser, url);
            await { ...SCENARIOS, ...PARTS, ...ROWS, ...HOUR }[name](page);
            const problems = page.problems.filter((problem) => problem.includes("/extensions/membrane/"));
            if (problems.length) error = `scripts failed: ${problems.join("; ")}`;
        } catch (failure) {
            if (failure instanceof Absent) absent = failure.message;
            else error = failure.stack ?? String(failure);
            if (error && process.env.MEMBRANE_SCREENSHOTS) {
                await page?.screenshot({ path: `${process.env.MEMBRANE_SCREENSHOTS}/${name}.png` }).catch(() => {});
            }
        }
        await page?.context().close();
        console.log(JSON.stringify({ name, seconds: (Date.now() - start) / 1000, error, absent }));
    }
} finally {
    await browser.close();
}
