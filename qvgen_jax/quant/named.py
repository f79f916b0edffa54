"""One layer in nested dicts of arrays, by its dotted name: `blocks.attn1.to_q`."""

from collections.abc import Mapping
from typing import Any

from qvgen_jax.errors import UserError


def layer_at(tree: Mapping, name: str) -> Any:
    """The node of that name.

    Raises:
        UserError: there is none.
    """
    node = tree
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise UserError(
                f"the parameters have no layer {name!r}: {part!r} is missing; quantizable layers "
                "are named by their dotted path in the parameters"
            )
        node = node[part]
    return node


def with_layer(tree: Mapping, name: str, node: Any) -> dict:
    """A copy of the dicts on the way to that name, with `node` there; the arrays are shared."""
    first, _, rest = name.partition(".")
    return {**tree, first: with_layer(tree.get(first, {}), rest, node) if rest else node}


def without_layer(tree: Mapping, name: str) -> dict:
    """A copy of the dicts on the way to that name, without what was there."""
    first, _, rest = name.partition(".")
    if not rest:
        return {key: node for key, node in tree.items() if key != first}
    return {**tree, first: without_layer(tree[first], rest)}
