// The scenarios about rows of words, the menu of a row, files that are dropped, and hints while one types, by name.

import { Absent, HEART, STAR, api, build, check, entries, fresh, names, rows, same, setting, stack, until } from "./page.mjs";
import { becomes, drawsElementsOfExtensions, needs, queue } from "./scenarios.mjs";

const row = (page, n) => page.locator(".membrane-stack .membrane-row").nth(n);
const box = (page, n) => row(page, n).locator('[data-field="words"]');
const menu = (page) => page.locator(".membrane-stack .membrane-menu");

/** The demo model through a stack editor that applies its stack itself. */
async function applying(page, text) {
    const nodes = {
        model: ["MembraneDemoModel", [20, 40]],
        editor: ["MembraneStackEditor", [20, 190], { stack_json: text }],
        yes: ["CLIPTextEncode", [580, 190], { text: "a red star on snow" }],
        no: ["CLIPTextEncode", [580, 420], { text: "" }],
        latent: ["EmptyLatentImage", [1010, 420], { width: 128, height: 128 }],
        sampler: ["KSampler", [1010, 40], { steps: 3, cfg: 3, seed: Date.now() }],
        decode: ["VAEDecode", [580, 650]],
        save: ["SaveImage", [1010, 560], { filename_prefix: "membrane/words" }],
    };
    const wires = [["model", 0, "editor", "model"], ["model", 1, "editor", "clip"], ["model", 1, "yes", "clip"], ["model", 1, "no", "clip"]];
    wires.push(["editor", 2, "sampler", "model"], ["yes", 0, "sampler", "positive"], ["no", 0, "sampler", "negative"]);
    wires.push(["latent", 0, "sampler", "latent_image"], ["sampler", 0, "decode", "samples"], ["model", 2, "decode", "vae"], ["decode", 0, "save", "images"]);
    const made = await build(page, nodes, wires);
    await page.locator(".membrane-stack").first().waitFor({ state: "visible", timeout: 15000 });
    return made;
}

const picture = (page) => api(page, () => {
    const node = app.graph._nodes.find((n) => n.type === "SaveImage");
    return (app.nodeOutputs?.[node.id]?.images ?? node.images)?.[0]?.filename ?? null;
});

async function wordsAsARow(page) {
    await applying(page, stack());
    await page.click('.membrane-stack [data-do="words"]');
    check(await box(page, 0).evaluate((element) => element === document.activeElement), "the new row waits for words");
    await page.keyboard.type("star -> circle");
    await page.keyboard.press("Enter");
    await page.keyboard.type("heart");
    same((await entries(page)).map((e) => [e.words, e.strength, e.permeability.mode]), [["star -> circle", 1, "meaning"], ["heart", 1, "meaning"]], "rows that were typed");
    await row(page, 0).locator('[data-do="more"]').click();
    await row(page, 0).locator('[data-field="kind"]').selectOption("object");
    const keep = `square ${Date.now()}`; // else the host has the run from the page before
    await row(page, 0).locator('[data-field="keep"]').fill(keep);
    same((await entries(page))[0], { words: "star -> circle", enabled: true, strength: 1, permeability: { mode: "meaning" }, kind: "object", keep }, "the row");
    await row(page, 0).locator('[data-do="more"]').click();
    check(!(await row(page, 0).locator('[data-do="choose"]').isVisible()), "a row of words has no file");
    await queue(page);
    await until(() => picture(page), "the picture", 60000);
    const said = page.locator(".membrane-report:visible .membrane-words");
    await until(async () => (await said.allInnerTexts()).some((text) => text.startsWith("Erased: star -> circle. Kept: 1.")), "what was erased, on the node");
    await row(page, 0).locator(".membrane-gate").waitFor({ state: "visible" });
    same((await row(page, 0).locator(".membrane-gate b").allInnerTexts())[0], "1.00", "how far the row opened for a star");
    check(Number((await row(page, 1).locator(".membrane-gate b").allInnerTexts())[0]) < 0.5, "the heart stays nearly closed");
}

async function theMenuOfARow(page) {
    await fresh(page, { text: stack({ adapter: STAR }, { words: "heart -> square" }, { adapter: HEART }) });
    const open = async (n) => {
        await row(page, n).locator('[data-do="handle"]').click({ button: "right" });
        await menu(page).waitFor({ state: "visible", timeout: 4000 });
    };
    const choose = async (n, action) => {
        await open(n);
        await menu(page).locator(`[data-menu="${action}"]`).click();
    };
    const offered = async (n) => {
        await open(n);
        const found = await menu(page).locator("button").evaluateAll((all) => all.map((item) => item.dataset.menu));
        await page.keyboard.press("Escape");
        return found;
    };
    same(await offered(0), ["down", "duplicate", "only", "toggle", "name", "info", "remove"], "what the first row offers");
    same(await offered(1), ["up", "down", "duplicate", "only", "toggle", "name", "remove"], "what a row of words offers");
    check(!(await menu(page).isVisible()), "Escape closes it");
    const order = async () => (await entries(page)).map((e) => e.adapter ?? e.words);
    await choose(1, "up");
    same(await order(), ["heart -> square", STAR, HEART], "moved up");
    await choose(0, "only");
    same((await entries(page)).map((e) => e.enabled ?? true), [true, false, false], "only this one");
    await choose(0, "only");
    same((await entries(page)).map((e) => e.enabled ?? true), [true, true, true], "all again");
    await choose(1, "toggle");
    same((await entries(page))[1].enabled, false, "turned off");
    await choose(1, "name");
    await until(async () => (await api(page, () => navigator.clipboard.readText())) === STAR, "the copied name");
    await choose(0, "name");
    await until(async () => (await api(page, () => navigator.clipboard.readText())) === "heart -> square", "the copied words");
    await choose(1, "duplicate");
    same(await order(), ["heart -> square", STAR, STAR, HEART], "duplicated");
    await choose(2, "remove");
    await open(2);
    for (const key of ["ArrowUp", "Enter"]) await page.keyboard.press(key);
    same(await order(), ["heart -> square", STAR], "removed by keyboard");
    const inside = await open(1).then(() => menu(page).evaluate((element) => {
        const [own, root] = [element, element.closest(".membrane-stack")].map((part) => part.getBoundingClientRect());
        return own.top >= root.top && own.bottom <= root.bottom && own.left >= root.left && own.right <= root.right;
    }));
    check(inside, "the menu lies inside the editor");
}

/** Drops a file on an element: bytes of one of the host's files under another name, or some text. */
const drop = (page, selector, name, from) => page.evaluate(async ([selector, name, from]) => {
    const data = new DataTransfer();
    data.items.add(new File([from], name));
    const target = document.querySelector(selector);
    for (const type of ["dragover", "drop"]) {
        target.dispatchEvent(new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer: data }));
    }
}, [selector, name, from]);

/** What the nodes say of words while they are written, without a run. */
async function hintsWhileOneTypes(page) {
    const nodes = { model: ["MembraneDemoModel", [20, 40]], forget: ["MembraneForget", [360, 40]], editor: ["MembraneStackEditor", [800, 40], { stack_json: stack({ words: "star" }) }] };
    const { forget } = await build(page, nodes, [["model", 0, "forget", "model"], ["model", 1, "forget", "clip"]]);
    const hints = page.locator(".membrane-hints:visible .membrane-words");
    const write = (name, text) => api(page, ([id, name, text]) => {
        const widget = app.graph.getNodeById(id).widgets.find((w) => w.name === name);
        if (widget.inputEl) widget.inputEl.value = text;
        widget.value = text;
    }, [forget, name, text]);
    await page.waitForTimeout(1200);
    same(await hints.count(), 0, "hints of empty boxes");
    const height = () => api(page, (id) => app.graph.getNodeById(id).size[1], forget);
    const before = await height();
    await write("remove", "-> circle");
    await until(async () => /names no concept before/.test(await hints.innerText()), "the sentence about an arrow");
    check(/membrane-error/.test(await hints.getAttribute("class")), "it is a mistake");
    await write("remove", "star, moon, heart");
    await until(async () => /write one per line to erase all three\./.test(await hints.innerText()), "the sentence about commas");
    await write("remove", "star");
    await write("keep", "heart\nstar");
    await until(async () => /"star" is also to be kept/.test(await hints.innerText()), "the sentence about what is kept as well");
    const saved = await api(page, () => app.graph.serialize().nodes.find((n) => n.type === "MembraneForget").widgets_values);
    check(!JSON.stringify(saved).includes("also to be kept"), "the file has no hint");
    await write("keep", "heart");
    await until(async () => (await hints.count()) === 0, "the end of the hint");
    await becomes(height, before, "the node's height again");
    await box(page, 0).fill("star -> star");
    const own = row(page, 0).locator(".membrane-hint");
    await until(async () => /is to be replaced by itself/.test(await own.innerText()), "the sentence in the row");
    await box(page, 0).fill("star -> circle");
    await until(async () => !(await own.isVisible()), "the end of it");
}

/** What was tried in an artist's first hour, [what to remove, what to keep, what the node says of it]. */
const MISTAKES = [
    [" \n", "", /^No concept to erase was given; write at least one/],
    ["star -> star", "", /^The concept "star" is to be replaced by itself/],
    ["-> circle", "", /names no concept before "->"/],
    ["star ".repeat(90), "", /needs more than the 75 tokens/],
    ["star, moon, heart", "", /write one per line to erase all three\./],
    ["star => circle", "", /^Erased: star -> circle\./],
    ["star", "heart\nstar", /"star" is also to be kept/],
    ["dragon", "", /"dragon" is no word of the text encoder/],
];

/** The host's own dialogs about a failed run, which cover the graph. */
async function closeDialogs(page) {
    for (let tries = 0; tries < 3; tries++) await page.keyboard.press("Escape", { delay: 50 });
    await api(page, () => app.ui?.dialog?.close?.());
}

/** The editor on a subgraph node that its text was promoted to: rows, changes both ways, and the prompt's text. */
async function promotedToASubgraph(page) {
    await needs(page, () => typeof app.canvas.graph?.convertToSubgraph === "function", "subgraphs");
    await fresh(page, { text: stack({ adapter: STAR }, { adapter: HEART }) });
    const drawn = await api(page, () => {
        const { node } = app.canvas.graph.convertToSubgraph(new Set([app.graph._nodes.find((n) => n.type === "MembraneStackEditor")]));
        const [inner] = node.subgraph.nodes, slot = inner.getSlotFromWidget(inner.widgets.find((w) => w.name === "stack_json"));
        node.subgraph.addInput("stack_json", String(slot.type)).connect(slot, inner);
        return (node.widgets ?? []).some((widget) => widget.type === "membrane_stack" && !widget.element);
    });
    if (!drawn) throw new Absent("this ComfyUI's page has no texts that are promoted as inputs");
    const editor = page.locator(".membrane-stack:visible");
    await becomes(() => editor.locator(".membrane-row .membrane-name").allTextContents(), [STAR, HEART], "rows on the subgraph node");
    await editor.locator('[data-do="toggle"]').first().click();
    const texts = () => api(page, () => app.graph._nodes.find((n) => n.subgraph).widgets.find((w) => w.name === "stack_json").value);
    same(JSON.parse(await texts()).entries[0].enabled, false, "the switch");
    const prompt = (await api(page, () => app.graphToPrompt())).output;
    const sent = Object.values(prompt).find((n) => n.class_type === "MembraneStackEditor").inputs;
    same(JSON.parse(sent.stack_json).entries[0].enabled, false, "what is sent to the host");
    same(Object.values(prompt).some((n) => Object.keys(n.inputs).some((name) => name.startsWith("membrane_"))), false, "inputs of the drawing");
    await api(page, (text) => void (app.graph._nodes.find((n) => n.subgraph).widgets.find((w) => w.name === "stack_json").value = text), stack({ words: "moon" }));
    await until(async () => (await editor.locator('[data-field="words"]').inputValue()) === "moon", "a change from outside");
}

export const ROWS = {
    async a_promoted_editor_draws_on_its_subgraph_node(page) {
        await promotedToASubgraph(page);
    },

    async each_mistake_of_the_first_hour_is_a_sentence_on_the_node(page) {
        const nodes = { model: ["MembraneDemoModel", [20, 40]], forget: ["MembraneForget", [360, 40]], save: ["MembraneSaveAdapter", [800, 40], { filename_prefix: "rows/mistake" }] };
        const { forget } = await build(page, nodes, [["model", 0, "forget", "model"], ["model", 1, "forget", "clip"], ["forget", 2, "save", "adapter"]]);
        const said = page.locator(".membrane-report:not(.membrane-hints) .membrane-words");
        for (const [remove, keep, sentence] of MISTAKES) {
            await api(page, ([id, words]) => {
                for (const [name, text] of Object.entries(words)) app.graph.getNodeById(id).widgets.find((w) => w.name === name).value = text;
            }, [forget, { remove, keep: `${keep}\nsquare ${Date.now()}` }]);
            await queue(page);
            const found = () => said.allInnerTexts().then((texts) => texts.some((text) => text.split("\n").some((line) => sentence.test(line.trim()))));
            await until(found, `the sentence ${sentence} on ${JSON.stringify(remove)}`, 30000);
            check(!(await said.allInnerTexts()).some((text) => /Traceback/.test(text)), "no trace of Python");
            await closeDialogs(page);
        }
    },

    async words_that_look_wrong_are_told_while_one_types(page) {
        await hintsWhileOneTypes(page);
    },

    async words_that_look_wrong_are_told_in_nodes_2(page) {
        await inNodes2(page, () => hintsWhileOneTypes(page));
    },

    async a_file_is_dropped_on_the_editor(page) {
        await fresh(page, { text: stack() });
        const line = page.locator(".membrane-stack .membrane-prompt");
        await drop(page, ".membrane-stack", "star_00001_.safetensors", "not looked at");
        await becomes(() => names(page), [STAR], "a row for a file that is there already, in its folder");
        await drop(page, ".membrane-stack", "wrong.safetensors", "no adapter");
        await until(async () => (await line.innerText()).includes('"wrong.safetensors" is no erasure adapter'), "the sentence");
        same(await names(page), [STAR], "rows after a file that is none");
        const name = `dropped${Date.now()}.safetensors`;
        await page.evaluate(async ([selector, name]) => {
            const text = JSON.stringify({
                __metadata__: { "membrane.format": "erasure_adapter", "membrane.version": "1", "membrane.method": "UCE", "membrane.concepts": '["star"]', "membrane.surrogates": "[]", "membrane.family": "", "membrane.text_encoder": "", "membrane.settings": "{}" },
                "text_map.a": { dtype: "F32", shape: [4, 1], data_offsets: [0, 16] },
                "text_map.b": { dtype: "F32", shape: [1, 4], data_offsets: [16, 32] },
                "text_map.concept": { dtype: "I64", shape: [1], data_offsets: [32, 40] },
            });
            const header = new TextEncoder().encode(text.padEnd(Math.ceil(text.length / 8) * 8));
            const length = new BigUint64Array([BigInt(header.length)]), data = new DataTransfer();
            data.items.add(new File([length, header, new Uint8Array(40)], name));
            document.querySelector(selector).dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: data }));
        }, [".membrane-stack", name]);
        await becomes(() => names(page), [STAR, name], "a row for a file that was sent");
        check(!(await row(page, 1).getAttribute("class")).includes("membrane-missing"), "the host has the file");
    },

    async words_are_a_row_that_is_erased_when_the_stack_is_applied(page) {
        await wordsAsARow(page);
    },

    async words_are_a_row_in_nodes_2(page) {
        await inNodes2(page, () => wordsAsARow(page));
    },

    async a_row_has_a_menu(page) {
        await theMenuOfARow(page);
    },

    async a_row_has_a_menu_in_nodes_2(page) {
        await inNodes2(page, () => theMenuOfARow(page));
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
