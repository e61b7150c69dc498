// The scenarios about what nodes say and show after a run, by name.

import { HEART, STAR, api, build, check, fresh, same, setting, stack, until } from "./page.mjs";
import { becomes, drawsElementsOfExtensions, needs, queue, undo } from "./scenarios.mjs";

const MODEL = ["MembraneDemoModel", [20, 40]];
/** What the node says that shows a pair, or that links to a page. */
const report = (page, has = ".membrane-compare") => page.locator(".membrane-report:visible", { has: page.locator(has) });
const widget = (page, id, name, value) =>
    api(page, ([id, name, value]) => void (app.graph.getNodeById(id).widgets.find((w) => w.name === name).value = value), [id, name, value]);

/** A concept that is erased and saved; `concepts` is what the person wrote. */
function erasing(page, concepts) {
    const nodes = { model: MODEL, erase: ["MembraneErase", [360, 40], { concepts }], save: ["MembraneSaveAdapter", [800, 40], { filename_prefix: "parts/erased" }] };
    return build(page, nodes, [["model", 0, "erase", "model"], ["model", 1, "erase", "clip"], ["erase", 1, "save", "adapter"]]);
}

/** One seed on the demo model and on the same without stars. */
function comparing(page, prompt) {
    const nodes = {
        model: MODEL,
        erase: ["MembraneErase", [20, 220], { concepts: "star -> circle" }],
        yes: ["CLIPTextEncode", [400, 40], { text: prompt }],
        no: ["CLIPTextEncode", [400, 280], { text: "" }],
        latent: ["EmptyLatentImage", [400, 520], { width: 128, height: 128, batch_size: 2 }],
        compare: ["MembraneCompare", [840, 40], { steps: 6, cfg: 3, seed: Date.now() }],
    };
    const wires = [["model", 0, "erase", "model"], ["model", 1, "erase", "clip"], ["model", 1, "yes", "clip"], ["model", 1, "no", "clip"]];
    wires.push(["model", 0, "compare", "original"], ["erase", 0, "compare", "erased"], ["yes", 0, "compare", "positive"]);
    wires.push(["no", 0, "compare", "negative"], ["latent", 0, "compare", "latent_image"], ["model", 2, "compare", "vae"]);
    return build(page, nodes, wires);
}

/** The host's own dialogs about a failed run, which cover the graph. */
async function closeDialogs(page) {
    for (let tries = 0; tries < 4; tries++) {
        await page.keyboard.press("Escape");
        await page.waitForTimeout(150);
    }
    await api(page, () => app.ui?.dialog?.close?.());
}

async function aMistakeOnTheNode(page) {
    const { erase } = await erasing(page, " \n ");
    await queue(page);
    const alert = page.locator(".membrane-report[role=alert]");
    await until(async () => /concept/i.test(await alert.locator(".membrane-words").innerText()), "the sentence", 30000);
    const said = await alert.locator(".membrane-words").innerText();
    check(/^[A-Z][^\n]+\.$/.test(said.trim()), `one sentence is shown: ${said}`);
    check(!/Traceback|ErasureError/.test(said), `no trace of Python: ${said}`);
    await closeDialogs(page);
    const inside = await api(page, (id) => app.graph.getNodeById(id).widgets.at(-1).name, erase);
    same(inside, "membrane_report", "the last widget of the node that failed");
    await widget(page, erase, "concepts", "star");
    await queue(page);
    await until(async () => (await alert.count()) === 0, "the end of the sentence", 30000);
}

async function aPairUnderOneDivider(page) {
    await comparing(page, "a red star on snow");
    const values = await api(page, () => JSON.parse(JSON.stringify(app.graph.serialize())));
    await queue(page);
    const frame = report(page).locator(".membrane-frame");
    await frame.waitFor({ state: "visible", timeout: 60000 });
    const loaded = () => frame.locator("img").evaluateAll((all) => all.map((img) => img.complete && img.naturalWidth));
    await becomes(loaded, [128, 128], "both pictures");
    check(/^Picture 1 differs in \d+ % .*\nPicture 2 differs/.test(await report(page).locator(".membrane-words").innerText()), "what changed is said");
    const [before, after] = await frame.locator("img").evaluateAll((all) => all.map((img) => img.src));
    check(before.includes("membrane_original") && after.includes("membrane_erased"), `${before} and ${after}`);
    const clip = () => frame.locator(".membrane-over").evaluate((img) => getComputedStyle(img).clipPath);
    same(await clip(), "inset(0px 0px 0px 50%)", "the divider in the middle");
    const box = await frame.boundingBox();
    await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
    await page.mouse.down();
    await page.mouse.move(box.x + box.width * 0.9, box.y + box.height / 2, { steps: 4 });
    await page.mouse.up();
    const at = Number((await clip()).match(/([\d.]+)%/)[1]);
    check(at > 80 && at < 97, `the divider follows the mouse to ${at} %`);
    await page.keyboard.press("ArrowLeft");
    same(Number((await clip()).match(/([\d.]+)%/)[1]), at - 1, "the divider by keyboard");
    await report(page).locator('button[aria-label="Next pair"]').click();
    same(await report(page).locator(".membrane-place").innerText(), "2 / 2", "the second pair");
    await becomes(loaded, [128, 128], "both pictures of the second pair");
    const saved = await api(page, () => JSON.parse(JSON.stringify(app.graph.serialize())));
    const own = (workflow) => workflow.nodes.find((n) => n.type === "MembraneCompare").widgets_values.filter((v) => v !== "");
    const size = (workflow) => Object.values(workflow.nodes.find((n) => n.type === "MembraneCompare").size).map(Math.round);
    same(size(saved), size(values), "the node's size in the file, which is without the report");
    same(own(saved).length, own(values).length, "widgets in the file, which the report is not");
    const prompt = (await api(page, () => app.graphToPrompt())).output;
    check(!("membrane_report" in Object.values(prompt).find((n) => n.class_type === "MembraneCompare").inputs), "the report is no input");
}

export const PARTS = {
    async a_mistake_is_one_sentence_on_the_node(page) {
        await aMistakeOnTheNode(page);
    },

    async a_mistake_is_one_sentence_in_nodes_2(page) {
        await inNodes2(page, () => aMistakeOnTheNode(page));
    },

    async a_node_grows_by_what_it_says_only_where_it_lacks_the_room(page) {
        const { save } = await erasing(page, `star -> circle\nmoon ${Date.now()}`);
        const height = () => api(page, (id) => app.graph.getNodeById(id).size[1], save);
        const least = await height();
        await api(page, (id) => app.graph.getNodeById(id).setSize([app.graph.getNodeById(id).size[0], app.graph.getNodeById(id).size[1] + 260]), save);
        await page.waitForTimeout(300);
        const before = await height();
        check(before > least + 200, `room was made: ${least} and ${before}`);
        await queue(page);
        const said = page.locator(".membrane-report:visible", { hasText: "erased_0" });
        await said.waitFor({ state: "visible", timeout: 60000 });
        same(await height(), before, "the height with the report in it");
        const bottom = await api(page, (id) => {
            const node = app.graph.getNodeById(id), { scale, offset } = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect();
            return box.top + (node.pos[1] + node.size[1] + offset[1]) * scale;
        }, save);
        const part = await said.boundingBox();
        check(part.y + part.height <= bottom + 1, `the report lies in the node: ${part.y + part.height} and ${bottom}`);
    },

    async a_checkpoint_saved_without_the_erasure_is_a_warning_on_the_node_that_saves(page) {
        const nodes = { model: MODEL, erase: ["MembraneForget", [360, 40], { remove: "star" }], save: ["CheckpointSave", [820, 40], { filename_prefix: `parts/lacks${Date.now()}` }] };
        const wires = [["model", 0, "erase", "model"], ["model", 1, "erase", "clip"], ["erase", 0, "save", "model"], ["model", 1, "save", "clip"], ["model", 2, "save", "vae"]];
        await build(page, nodes, wires);
        await queue(page);
        const words = page.locator(".membrane-report .membrane-warning");
        await until(async () => /does not have the erasure of star.*set apply_to to "weights"/.test((await words.allInnerTexts()).join(" ")), "the warning", 60000);
        const on = await api(page, () => app.graph._nodes.filter((n) => n.widgets?.some((w) => w.name === "membrane_report" && /does not have/.test(w.element.innerText))).map((n) => n.type));
        same(on, ["CheckpointSave"], "the node that shows it");
    },

    async what_the_host_refuses_to_run_is_said_on_the_node(page) {
        const nodes = { model: MODEL, evaluate: ["MembraneEvaluate", [360, 40], { seeds: 1 }] };
        await build(page, nodes, [["model", 0, "evaluate", "original"], ["model", 1, "evaluate", "clip"]]);
        await queue(page);
        const words = page.locator(".membrane-report[role=alert] .membrane-words");
        await until(async () => /erased/.test(await words.innerText()) && /seeds/.test(await words.innerText()), "what is missing and what is too small", 20000);
        await closeDialogs(page);
    },

    async original_and_erased_are_compared_under_one_divider(page) {
        await aPairUnderOneDivider(page);
    },

    async original_and_erased_are_compared_in_nodes_2(page) {
        await inNodes2(page, async () => {
            await setting(page, "Comfy.Minimap.Visible", false); // it covers the corner with the node's buttons
            await aPairUnderOneDivider(page);
        });
    },

    async what_a_run_said_fades_while_the_next_one_runs_and_is_replaced(page) {
        const { erase, yes } = await comparing(page, "a red star on snow");
        await queue(page);
        await until(async () => /differs in/.test(await report(page).innerText()), "the first report", 60000);
        await api(page, async () => {
            const { api } = await import("/scripts/api.js");
            api.addEventListener("execution_start", () => setTimeout(() => (globalThis.faded = [...document.querySelectorAll(".membrane-report.membrane-stale")].some((part) => part.querySelector(".membrane-compare")))), { once: true });
        });
        await widget(page, yes, "text", "a blue star");
        await widget(page, erase, "strength", 0);
        await queue(page);
        await until(async () => /Picture 1 is the same/.test(await report(page).innerText()), "the second report", 60000);
        same(await report(page).count(), 1, "parts of the node");
        check(await api(page, () => globalThis.faded), "the old one was paler while the run went on");
        check(!(await report(page).evaluate((root) => root.classList.contains("membrane-stale"))), "the new one is not");
    },

    async what_a_run_said_is_there_after_an_undo(page) {
        const { compare } = await comparing(page, "a red star on snow");
        await needs(page, () => app.extensionManager?.workflow?.activeWorkflow?.changeTracker !== undefined, "tabs");
        await queue(page);
        await until(async () => /differs in/.test(await report(page).innerText()), "the report", 60000);
        await api(page, (id) => {
            app.canvas.selectNode?.(app.graph.getNodeById(id));
            app.graph.getNodeById(id).title = "Before and after";
            app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState?.();
            app.extensionManager.workflow.activeWorkflow.changeTracker.checkState?.();
        }, compare);
        await undo(page);
        await becomes(() => api(page, (id) => app.graph.getNodeById(id).title, compare), "Sample Original and Erased", "the title after an undo");
        await until(async () => /differs in/.test(await report(page).innerText()), "the report after an undo");
    },

    async erase_a_concept_here_finds_room_and_waits_for_words(page) {
        const nodes = {
            model: MODEL,
            yes: ["CLIPTextEncode", [380, 40], { text: "a star" }],
            no: ["CLIPTextEncode", [380, 280], { text: "" }],
            latent: ["EmptyLatentImage", [380, 520], { width: 64, height: 64 }],
            sampler: ["KSampler", [820, 40], {}],
            loose: ["MembraneDemoModel", [20, 700], {}],
        };
        const wires = [["model", 1, "yes", "clip"], ["model", 1, "no", "clip"], ["model", 0, "sampler", "model"], ["yes", 0, "sampler", "positive"]];
        wires.push(["no", 0, "sampler", "negative"], ["latent", 0, "sampler", "latent_image"]);
        await build(page, nodes, wires);
        const menu = (at) => api(page, (at) => {
            const node = app.graph._nodes.filter((n) => n.type === "MembraneDemoModel")[at];
            return app.canvas.getNodeMenuOptions(node).map((option) => option?.content ?? null);
        }, at);
        const [offered, other] = [await menu(0), await menu(1)];
        const place = offered.indexOf("Erase a concept here");
        check(place >= 0 && place < offered.indexOf("Remove"), `it stands above Remove: ${JSON.stringify(offered)}`);
        check(!other.includes("Erase a concept here"), "a model that goes nowhere offers nothing to erase from");
        await api(page, () => {
            const node = app.graph._nodes.find((n) => n.type === "MembraneDemoModel");
            app.canvas.getNodeMenuOptions(node).find((option) => option?.content === "Erase a concept here").callback();
        });
        const erase = () => api(page, () => {
            const node = app.graph._nodes.find((n) => ["MembraneForget", "MembraneErase"].includes(n.type));
            return node && [node.type, node.pos[0], node.pos[1], node.size[0], node.size[1]];
        });
        const [type, left, top, width, height] = await until(erase, "the node");
        same(type, await api(page, () => (LiteGraph.registered_node_types.MembraneForget ? "MembraneForget" : "MembraneErase")), "the node for daily use, where there is one");
        const covered = await api(page, ([left, top, width, height]) => app.graph._nodes
            .filter((n) => !["MembraneForget", "MembraneErase"].includes(n.type))
            .filter((n) => n.pos[0] < left + width && left < n.pos[0] + n.size[0] && n.pos[1] - 30 < top + height && top - 30 < n.pos[1] + n.size[1])
            .map((n) => n.type), [left, top, width, height]);
        same(covered, [], "nodes that it covers");
        await until(() => page.evaluate(() => document.activeElement.tagName === "TEXTAREA"), "the keyboard in its words");
        await page.keyboard.press("Control+a");
        await page.keyboard.type("moon");
        const words = await api(page, () => app.graph._nodes.find((n) => ["MembraneForget", "MembraneErase"].includes(n.type)).widgets.find((w) => ["remove", "concepts"].includes(w.name)).value);
        same(words, "moon", "what was typed");
        const seen = await api(page, () => {
            const node = app.graph._nodes.find((n) => ["MembraneForget", "MembraneErase"].includes(n.type));
            const { scale, offset } = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect();
            const x = (node.pos[0] + offset[0]) * scale, y = (node.pos[1] + offset[1]) * scale;
            return x > -1 && y > -1 && x < box.width && y < box.height;
        });
        check(seen, "the canvas shows it");
    },

    async the_page_of_an_evaluation_opens_from_its_node(page) {
        const nodes = {
            model: MODEL,
            erase: ["MembraneErase", [20, 220], { concepts: "star -> circle" }],
            evaluate: ["MembraneEvaluate", [420, 40], { steps: 2, cfg: 3, width: 128, height: 128, filename_prefix: "parts/page", neighbour_prompts: "a heart", erase_prompts: "a star", noise_levels: 0 }],
        };
        await build(page, nodes, [["model", 0, "erase", "model"], ["model", 1, "erase", "clip"], ["model", 0, "evaluate", "original"], ["erase", 0, "evaluate", "erased"], ["model", 1, "evaluate", "clip"]]);
        await queue(page);
        const link = report(page, "a").locator("a", { hasText: "Open the report" });
        await link.waitFor({ state: "attached", timeout: 90000 });
        const href = await link.getAttribute("href");
        const answer = await page.request.get(new URL(href, page.url()).href);
        same([answer.status(), answer.headers()["content-type"].split(";")[0]], [200, "text/html"], "the answer");
        check(answer.headers()["content-security-policy"].startsWith("sandbox;"), "the page is on its own");
        check((await answer.text()).startsWith("<!DOCTYPE html>"), "it is the page");
        for (const wrong of ["../comfy.settings.json", "parts/none_00001_.html", "../../etc/passwd"]) {
            const refused = await page.request.get(new URL(href.replace(/\?.*/, `?filename=${encodeURIComponent(wrong)}`), page.url()).href);
            same(refused.status(), 404, `the answer for ${wrong}`);
        }
        await report(page, "a").locator("button", { hasText: "Copy" }).dispatchEvent("click"); // far below
        const copied = await until(() => api(page, () => navigator.clipboard.readText()), "the copy");
        check(/integrity/.test(copied), `copied: ${copied.slice(0, 80)}`);
    },

    async rows_take_one_line_each_and_begin_with_what_they_erase(page) {
        const entries = Array.from({ length: 8 }, (_, i) => ({ adapter: [STAR, HEART][i % 2] }));
        await fresh(page, { text: stack(...entries) });
        const rows = page.locator(".membrane-stack .membrane-row");
        await becomes(async () => (await rows.locator(".membrane-concept").allInnerTexts()).slice(0, 2), ["star \u2192 circle", "heart \u2192 square"], "what the rows erase");
        const heights = await rows.evaluateAll((all) => all.map((row) => row.offsetHeight));
        check(heights.every((height) => height <= 36), `heights of the rows: ${heights}`);
        const list = await page.locator(".membrane-stack .membrane-list").evaluate((element) => [element.scrollHeight, element.clientHeight]);
        check(list[1] >= 6 * heights[0], `six rows fit: ${list}`);
        await rows.nth(0).locator('[data-do="more"]').click();
        check(await rows.nth(0).locator('[data-field="permeability.mode"]').isVisible(), "the rest opens");
        await rows.nth(0).locator('[data-do="more"]').click();
        check(!(await rows.nth(0).locator('[data-field="permeability.mode"]').isVisible()), "and folds");
        await fresh(page, { text: stack() });
        const empty = await page.locator(".membrane-stack .membrane-empty").innerText();
        check(empty.includes("+ Add adapter") && empty.includes("models/erasure_adapters"), `an empty stack says what to do: ${empty}`);
    },

    async a_stack_is_applied_by_its_editor_and_can_be_bypassed(page) {
        await fresh(page, { text: stack({ adapter: STAR }) });
        const editor = await api(page, () => {
            const of = (type) => app.graph._nodes.find((n) => n.type === type);
            const [model, editor, apply, sampler] = ["MembraneDemoModel", "MembraneStackEditor", "MembraneApply", "KSampler"].map(of);
            app.graph.remove(apply);
            const slot = (node, name) => node.inputs.findIndex((input) => input.name === name);
            model.connect(0, editor, slot(editor, "model"));
            model.connect(1, editor, slot(editor, "clip"));
            editor.connect(2, sampler, slot(sampler, "model"));
            return editor.id;
        });
        const picture = () => api(page, () => {
            const node = app.graph._nodes.find((n) => n.type === "SaveImage");
            return (app.nodeOutputs?.[node.id]?.images ?? node.images)?.[0]?.filename ?? null;
        });
        await queue(page);
        const first = await until(picture, "the erased picture", 60000);
        await api(page, (id) => void (app.graph.getNodeById(id).mode = 4), editor);
        const prompt = (await api(page, () => app.graphToPrompt())).output;
        const sampler = Object.values(prompt).find((n) => n.class_type === "KSampler");
        same(prompt[sampler.inputs.model[0]].class_type, "MembraneDemoModel", "where the sampler's model comes from, bypassed");
        await queue(page);
        await until(async () => (await picture()) !== first, "the picture of the model as it is", 60000);
    },
};

/** Does something while the page draws nodes as elements. */
async function inNodes2(page, action) {
    await needs(page, () => typeof app.extensionManager?.setting?.get("Comfy.VueNodes.Enabled") === "boolean", "Nodes 2.0");
    try {
        await setting(page, "Comfy.VueNodes.Enabled", true);
        await drawsElementsOfExtensions(page);
        await action();
    } finally {
        await setting(page, "Comfy.VueNodes.Enabled", false);
    }
}
