"""Membrane's nodes, one file per subject."""

from . import (
    adapters,
    compare,
    demo,
    detect,
    erase,
    evaluate,
    forget,
    guard,
    locate,
    mitigate,
    preview,
    shield,
    soften,
    stack,
    stress,
    train,
)

_NODES = [
    *demo.NODES, *forget.NODES, *erase.NODES, *adapters.NODES, *stack.NODES, *train.NODES, *preview.NODES,
    *evaluate.NODES, *compare.NODES, *stress.NODES, *detect.NODES, *locate.NODES, *mitigate.NODES, *shield.NODES,
    *soften.NODES, *guard.NODES,
]  # fmt: skip
NODE_CLASS_MAPPINGS = {node.__name__: node for node in _NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: node.TITLE for node in _NODES}
