// @ts-check
// Where a new node fits into a graph without covering another one.

const GAP = 40, TITLE = 30; // graph units between nodes, and of a node's title, which lies above its place

/** The box of a node with its title, {left, top, right, bottom}. */
function boxOf({ pos, size, flags }) {
    const height = flags?.collapsed ? 0 : size[1];
    return { left: pos[0], top: pos[1] - TITLE, right: pos[0] + size[0], bottom: pos[1] + height };
}

const apart = (a, b) =>
    a.right + GAP <= b.left || b.right + GAP <= a.left || a.bottom + GAP <= b.top || b.bottom + GAP <= a.top;

/**
 * The place next to a wished one where a node of a size covers no other.
 * @param {any[]} nodes those that are there
 * @param {[number, number]} wished
 * @param {[number, number]} size
 * @returns {[number, number]}
 */
export function freePlace(nodes, wished, [width, height]) {
    const boxes = nodes.map(boxOf);
    const at = ([x, y]) => ({ left: x, top: y - TITLE, right: x + width, bottom: y + height });
    const free = (place) => boxes.every((box) => apart(at(place), box));
    if (free(wished)) return wished;
    const columns = [wished[0], ...boxes.flatMap((box) => [box.right + GAP, box.left - GAP - width])];
    const lines = [wished[1], ...boxes.flatMap((box) => [box.bottom + GAP + TITLE, box.top - GAP - height])];
    const places = columns.flatMap((x) => lines.map((y) => [x, y]));
    const far = ([x, y]) => Math.hypot(x - wished[0], y - wished[1]);
    places.sort((a, b) => far(a) - far(b));
    return /** @type {[number, number]} */ (places.find(free)); // the one below all others is always free
}
