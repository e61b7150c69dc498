// The scenarios of an artist's first hour, by name: how many clicks the first erased picture takes.

import { api, build, check, same, until } from "./page.mjs";
import { queue } from "./scenarios.mjs";

const WORDS = "star -> circle";

/** An artist's hands: the real mouse and keyboard of the page, which count. */
class Hands {
    constructor(page) {
        this.page = page;
        this.did = { clicks: 0, drags: 0, typed: 0 };
    }

    async click(place, options = {}) {
        this.did.clicks += options.clickCount ?? 1; // a double click is two
        if (Array.isArray(place)) {
            await this.page.mouse.move(...place);
            await this.page.mouse.click(...place, options);
        } else await place.click(options);
        await this.page.waitForTimeout(250);
    }

    async drag(from, to) {
        this.did.drags += 1;
        await this.page.mouse.move(...from);
        await this.page.mouse.down();
        await this.page.mouse.move((from[0] + to[0]) / 2, (from[1] + to[1]) / 2, { steps: 4 });
        await this.page.mouse.move(...to, { steps: 4 });
        await this.page.waitForTimeout(100);
        await this.page.mouse.up();
        await this.page.waitForTimeout(250);
    }

    /** A text, with the key that ends it where there is one. */
    async type(text, key) {
        this.did.typed += 1;
        await this.page.keyboard.type(text);
        await this.page.waitForTimeout(key ? 1500 : 250); // lists of nodes follow a little later
        if (key) await this.page.keyboard.press(key, { delay: 50 });
    }
}

/** A usual text-to-image graph, with the demo model where the loader of one's own checkpoint stands. */
async function ownGraph(page) {
    const nodes = {
        model: ["MembraneDemoModel", [20, 40]],
        yes: ["CLIPTextEncode", [380, 40], { text: "a red star on snow" }],
        no: ["CLIPTextEncode", [380, 280], { text: "" }],
        latent: ["EmptyLatentImage", [380, 520], { width: 128, height: 128 }],
        sampler: ["KSampler", [820, 40], { steps: 3, cfg: 3, seed: Date.now() }],
        decode: ["VAEDecode", [820, 380]],
        save: ["SaveImage", [820, 480], { filename_prefix: "membrane/hour" }],
    };
    const wires = [["model", 1, "yes", "clip"], ["model", 1, "no", "clip"], ["model", 0, "sampler", "model"]];
    wires.push(["yes", 0, "sampler", "positive"], ["no", 0, "sampler", "negative"], ["latent", 0, "sampler", "latent_image"]);
    wires.push(["sampler", 0, "decode", "samples"], ["model", 2, "decode", "vae"], ["decode", 0, "save", "images"]);
    await build(page, nodes, wires);
    await api(page, () => {
        app.canvas.ds.offset = [330, 90]; // pages of 2026 pan by themselves when a link is dragged to their edge
        app.canvas.setDirty(true, true);
    });
    await page.waitForTimeout(200);
}

/** Where a place of the graph is on the screen. */
const onScreen = (page, at) => api(page, ([x, y]) => {
    const { scale, offset } = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect();
    return [box.left + (x + offset[0]) * scale, box.top + (y + offset[1]) * scale];
}, at);

/** Where a node's title, or one of its slots, is on the screen. */
const titleOf = async (page, type) => onScreen(page, await api(page, (type) => {
    const node = app.graph._nodes.find((n) => n.type === type);
    return [node.pos[0] + 70, node.pos[1] - 15];
}, type));
const slotOf = async (page, type, isInput, name) => onScreen(page, await api(page, ([type, isInput, name]) => {
    const node = app.graph._nodes.find((n) => n.type === type);
    const slot = (isInput ? node.inputs : node.outputs).findIndex((s) => (isInput ? s.name : s.type) === name);
    return [...node.getConnectionPos(isInput, slot)];
}, [type, isInput, name]));

const wiresOf = (page) => api(page, async () => {
    const prompt = (await app.graphToPrompt()).output, nodes = Object.values(prompt);
    const from = ([id] = []) => prompt[id]?.class_type ?? null;
    const erase = nodes.find((n) => ["MembraneForget", "MembraneErase"].includes(n.class_type));
    const sampler = nodes.find((n) => n.class_type === "KSampler");
    return [from(erase?.inputs.model), from(erase?.inputs.clip), from(sampler.inputs.model)];
});

/** Presses the page's button and waits for a picture of a model without stars. */
async function drawn(page, hands) {
    await api(page, (kept) => { // else the host has the run from before, and says nothing again
        const node = app.graph._nodes.find((n) => ["MembraneForget", "MembraneErase"].includes(n.type));
        node.widgets.find((w) => ["keep", "preserve"].includes(w.name)).value = kept;
    }, `square ${Date.now()}`);
    hands.did.clicks += 1;
    await queue(page);
    const picture = () => api(page, () => {
        const node = app.graph._nodes.find((n) => n.type === "SaveImage");
        return (app.nodeOutputs?.[node.id]?.images ?? node.images)?.[0]?.filename ?? null;
    });
    check(/^hour_\d+_\.png$/.test(await until(picture, "the picture", 60000)), "the picture's name");
    const said = page.locator(".membrane-report .membrane-words");
    await until(async () => (await said.allInnerTexts()).some((text) => text.startsWith("Erased: star -> circle.")), "what was erased, on the node");
}

export const HOUR = {
    async the_first_erased_picture_takes_three_clicks(page) {
        await ownGraph(page);
        const hands = new Hands(page);
        await hands.click(await titleOf(page, "MembraneDemoModel"), { button: "right" });
        await hands.click(page.getByText("Erase a concept here").first());
        await until(() => page.evaluate(() => document.activeElement.tagName === "TEXTAREA"), "the keyboard in its words");
        await hands.type(WORDS);
        same(await wiresOf(page), ["MembraneDemoModel", "MembraneDemoModel", "MembraneForget"], "where the models come from");
        await drawn(page, hands);
        same(hands.did, { clicks: 3, drags: 0, typed: 1 }, "clicks, links that were drawn, and texts that were typed");
    },

    async the_node_for_experts_takes_more_and_three_links_by_hand(page) {
        await ownGraph(page);
        const hands = new Hands(page);
        await hands.click(await onScreen(page, [-40, 300]), { clickCount: 2 });
        await page.waitForTimeout(600);
        await hands.type("MembraneErase", "Enter");
        await until(() => api(page, () => app.graph._nodes.some((n) => n.type === "MembraneErase")), "the node");
        const held = await api(page, () => app.canvas.state?.ghostNodeId != null); // on pages of 2026, until it is put down
        if (held) await hands.click(await onScreen(page, [-40, 300]));
        await page.waitForTimeout(500);
        for (const [type, name] of [["MODEL", "model"], ["CLIP", "clip"]]) {
            await hands.drag(await slotOf(page, "MembraneDemoModel", false, type), await slotOf(page, "MembraneErase", true, name));
        }
        await hands.drag(await slotOf(page, "MembraneErase", false, "MODEL"), await slotOf(page, "KSampler", true, "model"));
        await hands.click(page.locator('textarea[placeholder^="What to erase"]').first());
        await hands.type(WORDS);
        same(await wiresOf(page), ["MembraneDemoModel", "MembraneDemoModel", "MembraneErase"], "where the models come from");
        await drawn(page, hands);
        same(hands.did, { clicks: held ? 5 : 4, drags: 3, typed: 2 }, "clicks, links that were drawn, and texts that were typed");
    },
};
