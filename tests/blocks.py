"""The blocks of a base model, as tests ask for them."""

from loraloom.base.blocks import BaseInfo, BlockInfo


def block_of(base: BaseInfo, kind: str) -> BlockInfo:
    """The first block of a kind; most models have one."""
    return next(block for block in base.blocks if block.kind == kind)


def names_of(base: BaseInfo, kind: str | None = None) -> tuple[str, ...]:
    """Names of the projections of all blocks, or of those of a kind."""
    blocks = [block for block in base.blocks if kind in (None, block.kind)]
    return tuple(dict.fromkeys(name for block in blocks for name in block.shapes))


def shapes_of(base: BaseInfo) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the projections, by their paths in a layer."""
    return {f"{b.path}.{name}": shape for b in base.blocks for name, shape in b.shapes.items()}
