// What the scenarios do in a page of any year: open it, build a graph, read what is in it.

import { createRequire } from "node:module";

const require = createRequire(process.env.MEMBRANE_BROWSER_MODULES);
const { chromium } = require("playwright-core");

export const ADAPTERS = ["shapes/star_00001_.safetensors", "shapes/heart_00001_.safetensors", "shapes/striped_00001_.safetensors"];
export const [STAR, HEART, STRIPED] = ADAPTERS;

/** The page lacks what a scenario is about. */
export class Absent extends Error {}

export function check(fact, what) {
    if (!fact) throw new Error(what);
}

export function same(found, expected, what) {
    const [a, b] = [JSON.stringify(found), JSON.stringify(expected)];
    if (a !== b) throw new Error(`${what}: found ${a}, expected ${b}`);
}

export async function launch() {
    return chromium.launch({
        executablePath: process.env.MEMBRANE_CHROMIUM,
        args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
    });
}

/** A page of the host, ready for work; errors of its scripts are collected in page.problems. */
export async function openPage(browser, url) {
    const context = await browser.newContext({ viewport: { width: 1500, height: 950 } });
    await context.grantPermissions(["clipboard-read", "clipboard-write"]);
    const page = await context.newPage();
    page.problems = [];
    page.on("pageerror", (error) => page.problems.push(error.stack ?? error.message));
    await page.goto(url, { waitUntil: "domcontentloaded" });
    await ready(page);
    return page;
}

export async function ready(page) {
    await page.waitForFunction(
        () => {
            const app = globalThis.app ?? globalThis.comfyAPI?.app?.app;
            if (!app?.graph || !globalThis.LiteGraph?.registered_node_types?.MembraneStackEditor) return false;
            globalThis.app = app;
            return app.vueAppReady !== false;
        },
        null,
        { timeout: 90000 },
    );
    // newer pages put the last workflow, or a first one, into the graph a little later
    await page.waitForTimeout(1200);
    await page.keyboard.press("Escape");
    // or greet with a dialog, which a person would close
    const dialog = page.locator('[role="dialog"]:visible');
    for (let tries = 0; tries < 5 && (await dialog.count()); tries++) {
        await page.keyboard.press("Escape");
        await page.waitForTimeout(300);
    }
}

export const api = (page, action, argument) => page.evaluate(action, argument);

/** Settings of the page, such as Comfy.VueNodes.Enabled. */
export const setting = (page, id, value) =>
    api(
        page,
        async ([id, value]) => {
            const settings = app.extensionManager?.setting ?? app.ui.settings;
            if (settings.set) await settings.set(id, value);
            else settings.setSettingValue(id, value);
        },
        [id, value],
    );

/** A graph that samples one small picture through a stack editor; `text` is the editor's. */
export async function fresh(page, { text = null, positive = "a red star on snow", files = 1 } = {}) {
    await api(
        page,
        async ([text, positive]) => {
            const { graph } = app;
            graph.clear();
            const add = (type, pos, widgets = {}) => {
                const node = LiteGraph.createNode(type);
                node.pos = pos;
                graph.add(node);
                for (const [name, value] of Object.entries(widgets)) node.widgets.find((w) => w.name === name).value = value;
                return node;
            };
            const wire = (from, output, to, input) =>
                from.connect(output, to, to.inputs.findIndex((slot) => slot.name === input));
            const model = add("MembraneDemoModel", [20, 40]);
            const editor = add("MembraneStackEditor", [20, 190], text === null ? {} : { stack_json: text });
            const apply = add("MembraneApply", [580, 40]);
            const yes = add("CLIPTextEncode", [580, 190], { text: positive });
            const no = add("CLIPTextEncode", [580, 420], { text: "" });
            const latent = add("EmptyLatentImage", [1010, 420], { width: 128, height: 128 });
            const sampler = add("KSampler", [1010, 40], { steps: 3, cfg: 3, seed: Date.now() });
            const decode = add("VAEDecode", [580, 650]);
            const save = add("SaveImage", [1010, 560], { filename_prefix: "membrane/browser" });
            wire(model, 0, apply, "model");
            wire(model, 1, apply, "clip");
            wire(editor, 0, apply, "stack");
            wire(model, 1, yes, "clip");
            wire(model, 1, no, "clip");
            wire(apply, 0, sampler, "model");
            wire(yes, 0, sampler, "positive");
            wire(no, 0, sampler, "negative");
            wire(latent, 0, sampler, "latent_image");
            wire(sampler, 0, decode, "samples");
            wire(model, 2, decode, "vae");
            wire(decode, 0, save, "images");
            // loaded as a file would be, so that the page's history begins here
            await app.loadGraphData(JSON.parse(JSON.stringify(graph.serialize())));
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [70, 90];
            app.canvas.setDirty(true, true);
        },
        [text, positive],
    );
    await page.locator(".membrane-stack").first().waitFor({ state: "visible", timeout: 15000 });
    if (files) await page.waitForTimeout(250);
}

/**
 * A graph of some nodes, {name: [type, place, widgets]}, and links, [from, output, to, input]; how the page numbers each
 * node, by name.
 */
export async function build(page, nodes, wires) {
    const numbers = await api(
        page,
        async ([nodes, wires]) => {
            const { graph } = app, made = {};
            graph.clear();
            for (const [name, [type, pos, widgets]] of Object.entries(nodes)) {
                const node = (made[name] = LiteGraph.createNode(type));
                node.pos = pos;
                graph.add(node);
                for (const [key, value] of Object.entries(widgets ?? {})) node.widgets.find((w) => w.name === key).value = value;
            }
            for (const [from, output, to, input] of wires) {
                made[from].connect(output, made[to], made[to].inputs.findIndex((slot) => slot.name === input));
            }
            const numbers = Object.fromEntries(Object.entries(made).map(([name, node]) => [name, node.id]));
            await app.loadGraphData(JSON.parse(JSON.stringify(graph.serialize())));
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [70, 90];
            app.canvas.setDirty(true, true);
            return numbers;
        },
        [nodes, wires],
    );
    await page.waitForTimeout(300);
    return numbers;
}

/** The text of the n-th stack editor of the graph. */
export const stackText = (page, n = 0) =>
    api(
        page,
        (n) => app.graph._nodes.filter((node) => node.type === "MembraneStackEditor")[n].widgets.find((w) => w.name === "stack_json").value,
        n,
    );

export const entries = async (page, n = 0) => JSON.parse(await stackText(page, n)).entries;
export const names = async (page, n = 0) => (await entries(page, n)).map((entry) => entry.adapter);

/** Names of the adapters that the rows show. */
export const rows = (page) => page.locator(".membrane-stack .membrane-row:not([hidden]) .membrane-name").allTextContents();

export async function addByClicking(page, name) {
    await page.click('.membrane-stack [data-do="add"]');
    await page.fill('.membrane-stack [role="combobox"]', name.slice(7, 11));
    await page.locator(`.membrane-stack [role="option"][data-name="${name}"]`).click();
}

/** Waits until a fact of the page holds; `what` says it for the message. */
export async function until(action, what, timeout = 8000) {
    const end = Date.now() + timeout;
    let last;
    while (Date.now() < end) {
        try {
            last = await action();
            if (last) return last;
        } catch (error) {
            last = error.message;
        }
        await new Promise((resolve) => setTimeout(resolve, 60));
    }
    throw new Error(`${what} did not happen within ${timeout} ms; last seen: ${JSON.stringify(last)}`);
}

export const stack = (...entries) => JSON.stringify({ membrane_stack: 1, entries });
export const facilitated = (adapter, more = {}) => ({ adapter, permeability: { mode: "facilitated transport", ...more } });
