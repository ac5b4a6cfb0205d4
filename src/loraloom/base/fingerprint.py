"""What tells a base model from others of its shapes."""

import hashlib
from collections.abc import Sequence

import torch

from loraloom.base.blocks import BaseLayer, BlockInfo


def fingerprint(model_type: str, blocks: Sequence[BlockInfo], layers: Sequence[BaseLayer]) -> str:
    shapes = {f"{b.path}.{name}": shape for b in blocks for name, shape in b.shapes.items()}
    digest = hashlib.sha256(f"{model_type} {len(layers)} {sorted(shapes.items())}".encode())
    adapted = [layer for layer in layers if layer.projections]
    for layer in (adapted[0], adapted[len(adapted) // 2], adapted[-1]):
        for projection in layer.projections:
            if projection.device.type != "meta":  # one without weights is known by its shapes
                corner = projection.weight.detach().flatten()[:64]
                digest.update(corner.to(torch.bfloat16).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
