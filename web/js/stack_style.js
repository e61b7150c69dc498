// @ts-check
// The look of the pack's elements. Every rule begins with the pack's class and lives inside the element's own root.

export const STYLE = `
.membrane {
    --membrane-ink: var(--input-text, #ddd);
    --membrane-faint: var(--descrip-text, #999);
    --membrane-field: var(--comfy-input-bg, #222);
    --membrane-panel: var(--comfy-menu-bg, #353535);
    --membrane-line: var(--border-color, #4e4e4e);
    --membrane-accent: #3f8cff;
    --membrane-negative: #d9772b;
    --membrane-wrong: color-mix(in srgb, var(--error-text, #ff4444) 45%, var(--membrane-ink)); /* readable on light and dark */
    box-sizing: border-box; width: 100%; height: 100%; overflow: hidden;
    display: flex; flex-direction: column; gap: 4px;
    color: var(--membrane-ink); background: var(--membrane-panel);
    border: 1px solid var(--membrane-line); border-radius: 6px; padding: 6px;
    font: 12px/1.35 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; text-align: left; cursor: default;
}
.membrane *, .membrane *::before { box-sizing: border-box; }
.membrane[hidden], .membrane [hidden] { display: none !important; }
.membrane.membrane-stack { contain: layout size; min-height: 260px; position: relative; }
.membrane .membrane-bar { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; flex: none; }
.membrane input, .membrane select, .membrane textarea, .membrane button {
    font: inherit; color: var(--membrane-ink); background: var(--membrane-field);
    border: 1px solid var(--membrane-line); border-radius: 4px; margin: 0; padding: 2px 6px; min-width: 0;
    min-height: 22px; box-shadow: none; width: auto; height: auto; text-transform: none; letter-spacing: normal;
}
.membrane input::placeholder { color: var(--membrane-faint); opacity: 1; }
.membrane button { cursor: pointer; white-space: nowrap; }
.membrane button:hover:not(:disabled) { border-color: var(--membrane-accent); }
.membrane button:disabled { opacity: .45; cursor: default; }
.membrane :is(button, input, select, textarea, [tabindex]):focus-visible {
    outline: 2px solid var(--membrane-accent); outline-offset: 1px;
}
.membrane .membrane-search { flex: 1 1 90px; }
.membrane .membrane-list {
    list-style: none; margin: 0; padding: 0; flex: 1 1 auto; min-height: 0; overflow-y: auto; overflow-x: hidden;
    overscroll-behavior: contain; display: flex; flex-direction: column; gap: 4px; scrollbar-width: thin;
}
.membrane .membrane-row {
    flex: none; border: 1px solid var(--membrane-line); border-radius: 5px; padding: 4px 5px; position: relative;
    display: flex; flex-direction: column; gap: 4px; background: color-mix(in srgb, var(--membrane-field) 45%, transparent);
    content-visibility: auto; contain-intrinsic-size: auto 32px;
}
.membrane .membrane-row.membrane-off > :not(.membrane-top) { opacity: .5; }
.membrane .membrane-row.membrane-off .membrane-name { opacity: .6; }
.membrane .membrane-row.membrane-dragged { opacity: .55; border-style: dashed; }
.membrane .membrane-row.membrane-before { box-shadow: 0 -3px 0 var(--membrane-accent); }
.membrane .membrane-row.membrane-after { box-shadow: 0 3px 0 var(--membrane-accent); }
.membrane .membrane-top, .membrane .membrane-line { display: flex; align-items: center; gap: 4px; }
.membrane .membrane-line { flex-wrap: wrap; column-gap: 10px; }
.membrane .membrane-icon { border-color: transparent; background: transparent; padding: 0 4px; min-width: 22px; }
.membrane .membrane-handle { cursor: grab; touch-action: none; color: var(--membrane-faint); }
.membrane .membrane-name {
    flex: 1 1 60px; text-align: left; overflow: hidden; text-overflow: ellipsis; direction: ltr;
}
.membrane .membrane-concept { flex: 0 1 auto; max-width: 55%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
    font-weight: 600; }
.membrane .membrane-concept:not([hidden]) + .membrane-name { border-color: transparent; background: transparent;
    color: var(--membrane-faint); }
.membrane .membrane-phrase { flex: 1 1 80px; height: auto; min-height: 22px; padding: 2px 6px; resize: none; overflow-y: auto;
    line-height: 16px; white-space: pre; scrollbar-width: none; }
.membrane .membrane-hint { white-space: pre-line; overflow-wrap: anywhere; padding: 0 4px 2px 56px; font-size: 11px; }
.membrane .membrane-menu { position: absolute; z-index: 3; display: flex; flex-direction: column; padding: 3px; min-width: 130px;
    max-height: 100%; overflow-y: auto; background: var(--membrane-field); border: 1px solid var(--membrane-line);
    border-radius: 6px; box-shadow: 0 3px 10px #0008; }
.membrane .membrane-menu > button { border-color: transparent; background: transparent; text-align: left; }
.membrane .membrane-menu > button:is(:hover, :focus-visible) { background: #2b6fd6; color: #fff; outline: none; }
.membrane .membrane-folded { display: flex; flex-direction: column; gap: 4px; }
.membrane .membrane-missing .membrane-name { color: var(--membrane-wrong); border-color: var(--membrane-wrong); }
.membrane .membrane-note { color: var(--membrane-wrong); flex: none; }
.membrane .membrane-switch {
    flex: none; width: 30px; min-height: 18px; height: 18px; padding: 0; border-radius: 9px; position: relative;
}
.membrane .membrane-switch::before {
    content: ""; position: absolute; left: 2px; top: 2px; width: 12px; height: 12px; border-radius: 50%;
    background: var(--membrane-faint);
}
.membrane .membrane-switch[aria-checked="true"] { background: #2b6fd6; border-color: #2b6fd6; }
.membrane .membrane-switch[aria-checked="true"]::before { left: 14px; background: #fff; }
.membrane label { display: flex; align-items: center; gap: 4px; margin: 0; font: inherit; color: var(--membrane-ink); }
.membrane .membrane-line > label { flex: 0 1 auto; }
.membrane .membrane-line > .membrane-wide { flex: 1 1 190px; min-width: 0; }
.membrane svg { display: block; margin: auto; }
.membrane .membrane-caption { color: var(--membrane-ink); opacity: .85; white-space: nowrap; }
.membrane input[type="range"] {
    --membrane-track: linear-gradient(var(--membrane-accent), var(--membrane-accent)) 0 / var(--membrane-fill, 50%) 100% no-repeat,
        color-mix(in srgb, var(--membrane-ink) 28%, transparent);
    flex: 1 1 40px; width: 40px; height: 18px; padding: 0; border: 0; background: transparent; appearance: none; cursor: pointer;
}
.membrane input[type="range"]::-webkit-slider-runnable-track { height: 4px; border-radius: 2px; background: var(--membrane-track); }
.membrane input[type="range"]::-moz-range-track { height: 4px; border-radius: 2px; background: var(--membrane-track); }
.membrane input[type="range"]::-webkit-slider-thumb {
    appearance: none; width: 12px; height: 12px; margin-top: -4px; border: 0; border-radius: 50%; background: var(--membrane-accent);
}
.membrane input[type="range"]::-moz-range-thumb { width: 12px; height: 12px; border: 0; border-radius: 50%; background: var(--membrane-accent); }
.membrane input[type="number"] { width: 46px; flex: none; text-align: right; padding: 2px 4px; appearance: textfield; }
.membrane input[type="number"]::-webkit-inner-spin-button { display: none; }
.membrane input[aria-invalid="true"], .membrane select[aria-invalid="true"] { border-color: var(--membrane-wrong); }
.membrane .membrane-gate { flex: none; display: grid; grid-template-columns: auto 44px auto; gap: 0 4px;
    align-items: center; font-size: 10px; line-height: 11px; font-variant-numeric: tabular-nums; }
.membrane .membrane-gate .membrane-track { height: 4px; border-radius: 2px;
    background: color-mix(in srgb, var(--membrane-ink) 28%, transparent); overflow: hidden; }
.membrane .membrane-gate .membrane-track > span { display: block; height: 100%; width: 0; background: var(--membrane-accent); }
.membrane .membrane-gate .membrane-track + b + i + .membrane-track > span { background: var(--membrane-negative); }
.membrane .membrane-gate b { font-weight: 600; min-width: 28px; text-align: right; }
.membrane .membrane-gate i { font-style: normal; }
.membrane .membrane-gate.membrane-stale { opacity: .45; }
.membrane .membrane-raw { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; flex: 1; font-family: monospace; }
.membrane .membrane-text { flex: 1 1 auto; min-height: 0; resize: none; width: 100%; padding: 6px;
    font: 12px/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; }
.membrane .membrane-problem { flex: none; color: var(--membrane-wrong); font-weight: 600; }
.membrane .membrane-panel { flex: 1 1 auto; min-height: 0; display: flex; flex-direction: column; gap: 4px; }
.membrane .membrane-options { list-style: none; margin: 0; padding: 0; overflow-y: auto; flex: 1 1 auto; min-height: 0; }
.membrane .membrane-options > li { padding: 3px 6px; border-radius: 4px; cursor: pointer; overflow-wrap: anywhere; }
.membrane .membrane-options > li[aria-selected="true"] { background: #2b6fd6; color: #fff; }
.membrane .membrane-options > li.membrane-none { cursor: default; color: var(--membrane-faint); }
.membrane .membrane-prompt { flex: none; min-height: 17px; max-height: 52px; overflow-y: auto; color: var(--membrane-ink);
    border-top: 1px solid var(--membrane-line); padding-top: 3px; opacity: .9; overflow-wrap: anywhere; }
.membrane .membrane-prompt.membrane-refused { color: var(--membrane-wrong); opacity: 1; }
.membrane .membrane-empty { color: var(--membrane-ink); opacity: .75; padding: 14px 6px; text-align: center; }
.membrane dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: 2px 10px; overflow-y: auto; }
.membrane dt { color: var(--membrane-ink); opacity: .75; margin: 0; font-weight: 400; }
.membrane dd { margin: 0; overflow-wrap: anywhere; }
.membrane .membrane-spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.membrane.membrane-report { padding: 5px 8px; overflow-y: auto; cursor: auto; gap: 4px; }
.membrane.membrane-report.membrane-stale { opacity: .5; }
.membrane .membrane-said { display: flex; flex-direction: column; gap: 4px; min-height: 0; flex: 1 1 auto; }
.membrane .membrane-words { flex: 1 1 auto; min-height: 17px; overflow-y: auto; white-space: pre-wrap;
    overflow-wrap: anywhere; cursor: text; user-select: text; -webkit-user-select: text; }
.membrane .membrane-error { color: var(--membrane-wrong); font-weight: 600; }
.membrane .membrane-warning { color: color-mix(in srgb, #ffb020 55%, var(--membrane-ink)); }
.membrane .membrane-bar a { color: var(--membrane-ink); text-decoration: underline; }
.membrane .membrane-compare { flex: none; height: 292px; display: flex; flex-direction: column; gap: 4px; }
.membrane .membrane-frame { position: relative; flex: 1 1 auto; min-height: 0; overflow: hidden; border-radius: 4px;
    background: #0003; touch-action: none; }
.membrane .membrane-frame img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
.membrane .membrane-frame .membrane-over { clip-path: inset(0 0 0 var(--membrane-at)); }
.membrane .membrane-divider { position: absolute; top: 0; bottom: 0; left: var(--membrane-at); width: 2px; margin-left: -1px;
    background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.membrane .membrane-frame input[type="range"] { position: absolute; inset: 0; width: 100%; height: 100%; opacity: 0;
    margin: 0; padding: 0; cursor: ew-resize; }
.membrane .membrane-frame:focus-within { outline: 2px solid var(--membrane-accent); }
.membrane .membrane-sides { justify-content: space-between; }
.membrane.membrane-info { padding: 5px 8px; min-height: 96px; overflow-y: auto; cursor: text; user-select: text; }
`;

/** A <style> with the rules above, for the root of an element. */
export function styleElement() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    return style;
}
