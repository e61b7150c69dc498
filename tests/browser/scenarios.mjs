// The scenarios, by name.

import {
    Absent, HEART, STAR, STRIPED, addByClicking, api, check, entries, facilitated, fresh, names, ready, rows, same, setting, stack, stackText, until,
} from "./page.mjs";

const THREE = stack({ adapter: STAR }, { adapter: HEART, strength: 0.5 }, { adapter: STRIPED, enabled: false });
const row = (page, n) => page.locator(".membrane-stack .membrane-row").nth(n);

export async function undo(page, keys = "Control+z") {
    await page.evaluate(() => document.activeElement?.blur());
    await page.waitForTimeout(3000); // the page takes a change down when it next draws, late on a busy machine
    await page.keyboard.press(keys, { delay: 50 }); // as long as a person holds it
    await page.waitForTimeout(500);
}

/** Like same(), of what a page may need a moment for. */
export async function becomes(get, expected, what) {
    const wanted = JSON.stringify(expected);
    let last;
    await until(async () => JSON.stringify((last = await get())) === wanted, what).catch(() => same(last, expected, what));
}

export const SCENARIOS = {
    async a_stack_is_built_by_clicking_and_its_picture_arrives(page) {
        await fresh(page);
        await addByClicking(page, STAR);
        await addByClicking(page, HEART);
        await row(page, 1).locator('[data-field="strength"][type="number"]').fill("0.5");
        for (const n of [0, 1]) {
            await row(page, n).locator('[data-do="more"]').click();
            await row(page, n).locator('[data-field="permeability.mode"]').selectOption("facilitated transport");
        }
        same(await rows(page), [STAR, HEART], "rows");
        same((await entries(page)).map((e) => [e.adapter, e.strength, e.permeability.mode]), [[STAR, 1, "facilitated transport"], [HEART, 0.5, "facilitated transport"]], "entries");
        await queue(page);
        const picture = await until(
            () => api(page, () => {
                const node = app.graph._nodes.find((n) => n.type === "SaveImage");
                const outputs = app.nodeOutputs?.[node.id]?.images ?? node.images;
                return outputs?.[0]?.filename ?? null;
            }),
            "the picture", 60000,
        );
        check(/^browser_\d+_\.png$/.test(picture), `the picture is called ${picture}`);
        // live permeability: a star is asked for, a heart is not; the negative prompt gets the positive one's
        await row(page, 0).locator(".membrane-gate").waitFor({ state: "visible" });
        const gates = async (n) => (await row(page, n).locator(".membrane-gate b").allInnerTexts()).map(Number);
        const [star, heart] = [await gates(0), await gates(1)];
        same(star, [1, 1], "openings of the star");
        check(heart[0] > 0 && heart[0] < 0.5 && heart[0] === heart[1], `openings of the heart are ${heart}`);
    },

    async the_line_below_says_what_the_prompts_words_open(page) {
        await fresh(page, { text: stack(facilitated(STAR), facilitated(HEART), { adapter: STRIPED }), positive: "a blue star" });
        const line = page.locator(".membrane-stack .membrane-prompt");
        await until(async () => (await line.innerText()).includes(`would open: ${STAR} 1;`), "the line for a star");
        check(/1 always acts/.test(await line.innerText()), "the fixed row is counted");
        await api(page, () => {
            app.graph._nodes.find((n) => n.type === "CLIPTextEncode").widgets[0].value = "a (heart:1.2)";
        });
        await until(async () => (await line.innerText()).includes(`would open: ${HEART} 1;`), "the line for a heart");
    },

    async rows_are_edited_moved_copied_and_removed(page) {
        await fresh(page, { text: THREE });
        await row(page, 0).locator('[data-do="toggle"]').click();
        same((await entries(page))[0].enabled, false, "the switch");
        await row(page, 0).locator('[data-do="handle"]').focus();
        await page.keyboard.press("Alt+ArrowDown");
        await page.keyboard.press("Alt+ArrowDown");
        same(await names(page), [HEART, STRIPED, STAR], "moved by keyboard");
        check(await row(page, 2).locator('[data-do="handle"]').evaluate((e) => e === document.activeElement), "the focus stays on what was moved");
        await row(page, 0).locator('[data-do="more"]').click();
        await row(page, 0).locator('[data-do="duplicate"]').click();
        same(await names(page), [HEART, HEART, STRIPED, STAR], "duplicated");
        await row(page, 1).locator('[data-do="remove"]').click();
        same(await names(page), [HEART, STRIPED, STAR], "removed");
        await page.click('.membrane-stack [data-do="all-off"]');
        same((await entries(page)).map((e) => e.enabled), [false, false, false], "all off");
        await page.click('.membrane-stack [data-do="all-on"]');
        same((await entries(page)).map((e) => e.enabled), [true, true, true], "all on");
        await page.fill('.membrane-stack [aria-label="Search rows"]', "heart");
        same(await rows(page), [HEART], "searched");
        await page.fill('.membrane-stack [aria-label="Search rows"]', "");
        await row(page, 1).locator('[data-do="more"]').click();
        await row(page, 1).locator('[data-field="permeability.threshold"]').fill("0.3");
        same((await entries(page))[1].permeability, { threshold: 0.3 }, "the threshold");
        await row(page, 0).locator('[data-field="strength"][type="range"]').fill("1.5");
        same((await entries(page))[0].strength, 1.5, "the slider");
        same(await row(page, 0).locator('[data-field="strength"][type="number"]').inputValue(), "1.5", "the number beside it");
        await row(page, 0).locator('[data-do="info"]').click();
        await until(async () => (await page.locator(".membrane-stack dl").innerText()).includes("heart"), "the information");
        await page.keyboard.press("Escape");
        same(await rows(page), [HEART, STRIPED, STAR], "rows after Escape");
    },

    async a_row_is_dragged_to_its_place(page) {
        await fresh(page, { text: THREE });
        const [handle, target] = [await row(page, 0).locator('[data-do="handle"]').boundingBox(), await row(page, 1).boundingBox()];
        await page.mouse.move(handle.x + 5, handle.y + 5);
        await page.mouse.down();
        await page.mouse.move(handle.x + 5, target.y + target.height * 0.4, { steps: 3 });
        await page.mouse.move(handle.x + 5, target.y + target.height * 0.8, { steps: 3 });
        await page.mouse.up();
        same(await names(page), [HEART, STAR, STRIPED], "dragged");
    },

    async every_change_can_be_undone_and_done_again(page) {
        await fresh(page, { text: THREE });
        await row(page, 0).locator('[data-do="toggle"]').click();
        await row(page, 1).locator('[data-do="remove"]').click();
        const changed = [[STAR, false], [STRIPED, false]];
        const state = async () => (await entries(page)).map((e) => [e.adapter, e.enabled ?? true]);
        same(await state(), changed, "after two changes");
        await undo(page);
        await becomes(state, [[STAR, false], [HEART, true], [STRIPED, false]], "after one undo");
        await undo(page);
        await becomes(state, [[STAR, true], [HEART, true], [STRIPED, false]], "after two");
        await becomes(() => rows(page), [STAR, HEART, STRIPED], "rows after two");
        await undo(page, "Control+y");
        await undo(page, "Control+y");
        await becomes(state, changed, "after two times redo");
        // from a control of the editor itself
        await row(page, 0).locator('[data-field="strength"][type="number"]').fill("0.25");
        await page.keyboard.press("Enter");
        same((await entries(page))[0].strength, 0.25, "the number");
        await page.keyboard.press("Control+z");
        await until(async () => ((await entries(page))[0].strength ?? 1) === 1, "the undo inside a number box");
    },

    async the_state_survives_a_reload_of_the_page(page) {
        await fresh(page, { text: THREE });
        await row(page, 0).locator('[data-do="toggle"]').click();
        const text = await stackText(page);
        await page.waitForTimeout(2500); // pages store the workflow now and then
        await page.reload({ waitUntil: "domcontentloaded" });
        await ready(page);
        await until(async () => (await stackText(page)) === text, "the same text after the reload");
        same(await rows(page), [STAR, HEART, STRIPED], "rows after the reload");
    },

    async a_copied_node_has_the_same_stack_and_its_own_state(page) {
        await fresh(page, { text: THREE });
        const text = await stackText(page);
        await api(page, () => {
            const node = app.graph._nodes.find((n) => n.type === "MembraneStackEditor");
            app.canvas.deselectAll?.();
            app.canvas.selectNode(node);
            app.canvas.copyToClipboard([node]);
            app.canvas.pasteFromClipboard();
        });
        await until(() => api(page, () => app.graph._nodes.filter((n) => n.type === "MembraneStackEditor").length === 2), "the copy");
        same(await stackText(page, 1), text, "text of the copy");
        await api(page, () => {
            const nodes = app.graph._nodes.filter((n) => n.type === "MembraneStackEditor");
            nodes[1].widgets[0].element.querySelector('[data-do="toggle"]').click();
        });
        same(await stackText(page, 0), text, "text of the first after a change of the copy");
        same((await entries(page, 1))[0].enabled, false, "the copy's switch");
    },

    async the_state_survives_saving_and_loading_a_workflow(page) {
        await fresh(page, { text: THREE });
        await row(page, 0).locator('[data-do="toggle"]').click();
        const text = await stackText(page);
        const saved = await api(page, () => JSON.parse(JSON.stringify(app.graph.serialize())));
        const node = saved.nodes.find((n) => n.type === "MembraneStackEditor");
        same(node.widgets_values[0], text, "the first widget value of the file");
        await api(page, () => app.graph.clear());
        await api(page, (workflow) => app.loadGraphData(workflow), saved);
        same(await stackText(page), text, "text after loading");
        await until(async () => (await rows(page)).join() === [STAR, HEART, STRIPED].join(), "rows after loading");
    },

    async the_state_survives_the_api_format(page) {
        await fresh(page, { text: THREE });
        const text = await stackText(page);
        const prompt = (await api(page, () => app.graphToPrompt())).output;
        const [, node] = Object.entries(prompt).find(([, n]) => n.class_type === "MembraneStackEditor");
        same(node.inputs, { stack_json: text }, "inputs in the API format");
        await api(page, (output) => app.loadApiJson(output, "exported"), prompt);
        same(await stackText(page), text, "text after the import");
        await until(async () => (await rows(page)).join() === [STAR, HEART, STRIPED].join(), "rows after the import");
    },

    async older_and_foreign_entries_load_and_lose_nothing(page) {
        const text = '{"membrane_stack": 1, "note": "mine", "entries": [{"adapter": "shapes\\\\star_00001_.safetensors", "comment": {"a": [1, 2]}}, "a text", {"adapter": "gone.safetensors", "strength": 0.7}]}';
        await fresh(page, { text });
        same(await stackText(page), text, "a text that was only looked at");
        const notes = () => page.locator(".membrane-stack .membrane-note").allInnerTexts();
        await until(async () => (await notes()).join("|") === "|not understood, kept as it is|file not found", "the notes of the rows");
        await row(page, 0).locator('[data-field="strength"][type="number"]').fill("0.4");
        const after = JSON.parse(await stackText(page));
        same(after, { membrane_stack: 1, note: "mine", entries: [{ adapter: "shapes\\star_00001_.safetensors", comment: { a: [1, 2] }, strength: 0.4 }, "a text", { adapter: "gone.safetensors", strength: 0.7 }] }, "after an edit");
    },

    async malformed_text_shows_one_sentence_and_loses_nothing(page) {
        const text = '{"membrane_stack": 1, "entries": [{"adapter": "a.safetensors"},, ]}';
        await fresh(page, { text });
        const problem = page.locator(".membrane-stack .membrane-problem");
        await until(async () => (await problem.innerText()).startsWith("The stack is not valid JSON"), "the sentence");
        same(await stackText(page), text, "the malformed text");
        same((await api(page, () => JSON.parse(JSON.stringify(app.graph.serialize())))).nodes.find((n) => n.type === "MembraneStackEditor").widgets_values[0], text, "the malformed text in a saved workflow");
        const area = page.locator(".membrane-stack textarea");
        same(await area.inputValue(), text, "the text box");
        await area.fill(text.replace(",, ", ""));
        same(await entries(page), [{ adapter: "a.safetensors" }], "after mending it");
        check(!(await problem.isVisible()), "the sentence is gone");
        // a workflow that begins meanwhile does not stumble over rows whose text is malformed again
        await page.click('.membrane-stack [data-do="text"]');
        await area.fill(text);
        await api(page, async () => (await import("/scripts/api.js")).api.dispatchEvent(new CustomEvent("execution_start", { detail: {} })));
        await area.fill(text.replace(",, ", ""));
        await page.reload({ waitUntil: "domcontentloaded" });
        await ready(page);
        await fresh(page, { text: '{"membrane_stack": 9}' });
        await until(async () => (await problem.innerText()).includes("version 9"), "the sentence about the version");
    },

    async a_keystroke_touches_its_own_row_only(page) {
        await fresh(page, { text: stack(...Array.from({ length: 200 }, () => ({ adapter: STAR }))) });
        await api(page, () => {
            const list = document.querySelector(".membrane-stack .membrane-list");
            globalThis.touched = new Set();
            new MutationObserver((records) => {
                for (const { target } of records) {
                    const element = target.nodeType === 1 ? target : target.parentElement;
                    touched.add([...list.children].indexOf(element?.closest(".membrane-row")));
                }
            }).observe(list, { subtree: true, childList: true, attributes: true, characterData: true });
        });
        await row(page, 3).locator('[data-field="strength"][type="number"]').fill("0.35");
        await page.waitForTimeout(200);
        same((await entries(page))[3].strength, 0.35, "the strength");
        const touched = await api(page, () => [...globalThis.touched]);
        check(touched.every((i) => i === 3), `rows that were touched: ${touched}`);
    },

    async the_loader_shows_what_its_file_is(page) {
        await api(page, () => {
            app.graph.clear();
            const node = LiteGraph.createNode("MembraneLoadAdapter");
            node.pos = [100, 100];
            app.graph.add(node);
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [70, 90];
        });
        const info = page.locator(".membrane-info");
        await until(async () => (await info.innerText()).includes("heart"), "the information");
        for (const word of ["UCE", "Size", "Licence", "Family", "square"]) check((await info.innerText()).includes(word), `${word} is shown`);
        await api(page, (name) => {
            const widget = app.graph._nodes[0].widgets[0];
            widget.value = name;
            widget.callback?.(name);
        }, STAR);
        await until(async () => (await info.innerText()).includes("star"), "the information of another file");
        const values = await api(page, () => app.graph.serialize().nodes[0].widgets_values);
        same(values[0], STAR, "the first widget value of the file");
        same(Object.keys(Object.values((await api(page, () => app.graphToPrompt())).output)[0].inputs), ["adapter_name"], "inputs in the API format");
    },

    async erase_a_concept_here_wires_itself_into_a_model_link(page) {
        await fresh(page, { text: THREE });
        const wiring = () => api(page, () => {
            const erase = app.graph._nodes.find((n) => ["MembraneForget", "MembraneErase"].includes(n.type));
            if (!erase) return null;
            const links = app.graph.links;
            const get = (id) => links.get?.(id) ?? links[id];
            const from = (name) => app.graph.getNodeById(get(erase.inputs.find((i) => i.name === name).link)?.origin_id)?.type;
            return [from("model"), from("clip"), ...erase.outputs[0].links.map((id) => app.graph.getNodeById(get(id).target_id).type)];
        });
        // the middle of the link from Apply Erasure to the sampler
        const place = await api(page, () => {
            const apply = app.graph._nodes.find((n) => n.type === "MembraneApply"), sampler = app.graph._nodes.find((n) => n.type === "KSampler");
            const a = apply.getConnectionPos(false, 0), b = sampler.getConnectionPos(true, 0);
            const { scale, offset } = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect();
            return [box.left + ((a[0] + b[0]) / 2 + offset[0]) * scale, box.top + ((a[1] + b[1]) / 2 + offset[1]) * scale + 3];
        });
        await page.mouse.move(...place);
        await page.mouse.click(...place, { button: "right" });
        await page.getByText("Erase a concept here").first().click({ timeout: 5000 });
        same(await wiring(), ["MembraneApply", "MembraneDemoModel", "KSampler"], "the wires");
        await undo(page);
        await becomes(wiring, null, "the wires after an undo");
    },

    // ---------------------------------------------------------------- what only newer pages have

    async the_state_survives_a_switch_of_tabs(page) {
        await needs(page, () => app.extensionManager?.workflow?.activeWorkflow !== undefined, "tabs");
        await fresh(page, { text: THREE });
        await row(page, 0).locator('[data-do="toggle"]').click();
        const text = await stackText(page);
        await api(page, () => app.extensionManager.command.execute("Comfy.NewBlankWorkflow"));
        await until(() => api(page, () => !app.graph._nodes.some((n) => n.type === "MembraneStackEditor")), "the empty tab");
        await api(page, () => app.extensionManager.command.execute("Workspace.PreviousOpenedWorkflow"));
        await until(async () => (await stackText(page)) === text, "the same text in the first tab");
        same(await rows(page), [STAR, HEART, STRIPED], "rows in the first tab");
    },

    async the_state_survives_the_conversion_into_a_subgraph(page) {
        await needs(page, () => typeof app.canvas.graph?.convertToSubgraph === "function", "subgraphs");
        await fresh(page, { text: stack(facilitated(STAR), facilitated(HEART)) });
        const text = await stackText(page);
        await api(page, () => {
            const node = app.graph._nodes.find((n) => n.type === "MembraneStackEditor");
            app.canvas.graph.convertToSubgraph(new Set([node]));
        });
        const inside = () => api(page, () => {
            const outer = app.graph._nodes.find((n) => n.subgraph);
            return outer.subgraph.nodes.find((n) => n.type === "MembraneStackEditor").widgets.find((w) => w.name === "stack_json").value;
        });
        same(await inside(), text, "text in the subgraph");
        const saved = await api(page, () => JSON.parse(JSON.stringify(app.graph.serialize())));
        const prompt = (await api(page, () => app.graphToPrompt())).output;
        same(Object.values(prompt).find((n) => n.class_type === "MembraneStackEditor").inputs.stack_json, text, "text in the API format");
        await api(page, () => app.graph.clear());
        await api(page, (workflow) => app.loadGraphData(workflow), saved);
        same(await inside(), text, "text in the subgraph after loading");
        await api(page, () => app.canvas.setGraph(app.graph._nodes.find((n) => n.subgraph).subgraph));
        await until(async () => (await rows(page)).join() === [STAR, HEART].join(), "rows in the opened subgraph");
        await row(page, 1).locator('[data-do="toggle"]').dispatchEvent("click");
        same(JSON.parse(await inside()).entries[1].enabled, false, "a change in the subgraph");
        await api(page, () => app.canvas.setGraph(app.rootGraph ?? app.graph.rootGraph));
        await queue(page);
        await until(() => api(page, () => {
            const node = app.graph._nodes.find((n) => n.type === "SaveImage");
            return app.nodeOutputs?.[node.id]?.images?.length > 0;
        }), "the picture", 60000);
        // the host knows the node by another id there
        await api(page, () => app.canvas.setGraph(app.graph._nodes.find((n) => n.subgraph).subgraph));
        await until(async () => (await row(page, 0).locator(".membrane-gate b").allTextContents()).join() === "1.00,1.00", "the openings in the subgraph");
    },

    async the_editor_speaks_the_language_of_the_page(page) {
        await needs(page, () => typeof app.extensionManager?.setting?.get("Comfy.Locale") === "string", "languages");
        const search = () => page.locator(".membrane-stack .membrane-search").first().getAttribute("aria-label");
        const shows = (language, label) => until(async () => (await search()) === label, `the editor in ${language}`);
        const text = stack(facilitated(STAR), { adapter: HEART });
        try {
            await fresh(page, { text });
            same(await search(), "Search rows", "the search box in English");
            // an open page makes its nodes anew
            await setting(page, "Comfy.Locale", "ja");
            await shows("Japanese", "\u884c\u3092\u691c\u7d22");
            await setting(page, "Comfy.Locale", "zh");
            await shows("Chinese", "\u641c\u7d22\u884c");
            await page.reload({ waitUntil: "domcontentloaded" });
            await ready(page);
            await fresh(page, { text });
            await shows("Chinese after a reload", "\u641c\u7d22\u884c");
            same(await stackText(page), text, "the text, which no language changes");
            await row(page, 1).locator('[data-field="permeability.negative"]').evaluate((select) => {
                select.selectedIndex = 2;
                select.dispatchEvent(new Event("input", { bubbles: true }));
            });
            same((await entries(page))[1].permeability, { negative: "off" }, "a choice, which no language changes");
            await speaksChineseEverywhere(page);
            await setting(page, "Comfy.Locale", "zh-TW"); // has no translation of its own
            await shows("general Chinese", "\u641c\u7d22\u884c");
            await setting(page, "Comfy.Locale", "fr");
            await shows("English for want of French", "Search rows");
        } finally {
            await setting(page, "Comfy.Locale", "en");
        }
    },

    async nodes_2_shows_the_same_editor(page) {
        await needs(page, () => typeof app.extensionManager?.setting?.get("Comfy.VueNodes.Enabled") === "boolean", "Nodes 2.0");
        await fresh(page, { text: THREE });
        const text = await stackText(page);
        try {
            await setting(page, "Comfy.VueNodes.Enabled", true);
            await drawsElementsOfExtensions(page);
            const inNode = page.locator("[data-node-id] .membrane-stack");
            await inNode.waitFor({ state: "visible", timeout: 10000 });
            same(await stackText(page), text, "text after the change of the drawing");
            await page.waitForTimeout(800);
            await row(page, 0).locator('[data-do="toggle"]').click();
            same((await entries(page))[0].enabled, false, "the switch");
            await addByClicking(page, STAR);
            same(await names(page), [STAR, HEART, STRIPED, STAR], "added by clicking");
            await row(page, 1).locator('[data-field="strength"][type="number"]').fill("0.7");
            await page.keyboard.press("Tab");
            same((await entries(page))[1].strength, 0.7, "the strength");
            const before = await inNode.boundingBox();
            await page.waitForTimeout(700);
            same(await inNode.boundingBox(), before, "place and size, which do not creep");
            const height = await inNode.evaluate((element) => element.offsetHeight); // the page may have zoomed out
            check(height > 250 && height < 800, `height ${height}`);
            await undo(page);
            await until(async () => ((await entries(page))[1].strength ?? 1) === 0.5, "the undo");
            await until(async () => (await row(page, 1).locator('[data-field="strength"][type="number"]').inputValue()) === "0.5", "the undo in the row that is shown");
            await row(page, 2).locator('[data-do="toggle"]').click();
            same((await entries(page))[2].enabled, true, "a switch after the undo");
            const kept = await stackText(page);
            await setting(page, "Comfy.VueNodes.Enabled", false);
            await page.waitForTimeout(800);
            same(await stackText(page), kept, "text after drawing on the canvas again");
            check(await page.locator(".membrane-stack").first().isVisible(), "the editor is visible on the canvas again");
        } finally {
            await setting(page, "Comfy.VueNodes.Enabled", false);
        }
    },
};

/** Looks for English in whatever the editor says of a stack, of a file and of rows that are not as they should be. */
async function speaksChineseEverywhere(page) {
    const editor = page.locator(".membrane-stack");
    await until(async () => (await editor.locator(".membrane-prompt").innerText()).includes(`\u4f1a\u6253\u5f00\uff1a${STAR} 1\uff1b1 \u884c`), "the line below the rows");
    await row(page, 0).locator('[data-do="more"]').click();
    const said = await editor.evaluate((root) => {
        const own = (element) => [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data);
        const attributes = ["title", "placeholder", "aria-label"];
        const elements = [...root.querySelectorAll("*")].filter((element) => !element.matches("style, .membrane-concept")); // words of the files
        return elements.flatMap((element) => [...own(element), ...attributes.map((name) => element.getAttribute(name))]);
    });
    const names = /\S+\.safetensors|models\/erasure_adapters|SPM|Alt|star -> circle|automatic|fixed|facilitated transport|reference|route|meaning/g;
    const english = said.filter((text) => text && /[a-z]{2}/i.test(text.replace(names, "")));
    same(english, [], "texts that are left in English");
    await row(page, 0).locator('[data-do="info"]').click();
    await until(async () => (await editor.locator("dt").allInnerTexts()).join() === "\u6982\u5ff5,\u65b9\u6cd5,\u7cfb\u5217,\u5927\u5c0f,\u8bb8\u53ef\u8bc1", "the information");
    await page.keyboard.press("Escape");
    await editor.locator('[data-do="add"]').click();
    same(await editor.locator('[role="combobox"]').getAttribute("placeholder"), "\u641c\u7d22\u9002\u914d\u5668", "the chooser");
    await page.keyboard.press("Escape");
    await editor.locator('[data-do="text"]').click();
    await editor.locator("textarea").fill('{"membrane_stack": 1, "entries": [{"adapter": "gone.safetensors"}, 7]}');
    await editor.locator('[data-do="text"]').click();
    const notes = "\u627e\u4e0d\u5230\u6587\u4ef6,\u65e0\u6cd5\u8bc6\u522b\uff0c\u539f\u6837\u4fdd\u7559";
    await until(async () => (await editor.locator(".membrane-note").allInnerTexts()).join() === notes, "the notes of the rows");
    await editor.locator('[data-do="text"]').click();
    await editor.locator("textarea").fill("7");
    await until(async () => (await editor.locator(".membrane-problem").innerText()).startsWith("\u5806\u6808\u6587\u672c\u7f3a\u5c11"), "the sentence about the text");
}

/** Leaves a scenario out where the page lacks what it is about. */
export async function needs(page, action, what) {
    if (!(await api(page, action))) throw new Absent(`this ComfyUI's page has no ${what}`);
}

/** Leaves a scenario out where Nodes 2.0, as in its first versions, leave out what any extension draws. */
export async function drawsElementsOfExtensions(page) {
    await api(page, () => {
        const node = LiteGraph.createNode("EmptyLatentImage"), probe = document.createElement("div");
        probe.className = "membrane-probe";
        node.addDOMWidget("probe", "probe", probe, {});
        node.pos = [20, 700];
        app.graph.add(node);
    });
    const found = await page.locator("[data-node-id] .membrane-probe").waitFor({ state: "attached", timeout: 5000 }).then(() => true, () => false);
    await api(page, () => app.graph.remove(app.graph._nodes.find((node) => node.widgets?.some((widget) => widget.name === "probe"))));
    if (!found) throw new Absent("this ComfyUI's Nodes 2.0 draw no elements of extensions");
}

/** Queues the workflow as a person would, by the page's button where there is one of a known name. */
export async function queue(page) {
    const button = page.locator('#queue-button, [data-testid="queue-button"] button, button[data-testid="queue-button"], .queue-button-group button').first();
    if (await button.isVisible().catch(() => false)) await button.click();
    else await api(page, () => app.queuePrompt(0));
}

