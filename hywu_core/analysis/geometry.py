"""How the dW of many instances lie to each other: cosines, neighbours, a map. All from the factors, no out x in product.

B instances. dW_i = scale * sum over targets of up_i @ down_i, taken as one long vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..lora import InstanceLora


class Separation(NamedTuple):
    """Whether instances of one group are closer to each other than to those of other groups."""

    within: float  # mean cosine of two instances of one group
    across: float  # mean cosine of two instances of different groups
    purity: float  # share of instances whose nearest neighbour is of their own group


def gram(lora: InstanceLora) -> Tensor:
    """Inner products <dW_i, dW_j> of all instances, graph kept: (B, B), without the scale.

    <B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T)), over experts too.
    """
    batch = lora.batch
    total = lora.pairs[0].down.new_zeros(batch, batch)
    for down, up in lora.pairs:
        ups = torch.einsum("i...or,j...os->ij...rs", up, up)
        downs = torch.einsum("i...rn,j...sn->ij...rs", down, down)
        total = total + (ups * downs).flatten(2).sum(-1)
    return total


def cosines(products: Tensor) -> Tensor:
    """Inner products (B, B) -> cosines (B, B); 0 for a vector without length."""
    norms = products.diagonal().clamp(min=torch.finfo(products.dtype).tiny).sqrt()
    return products / (norms.unsqueeze(0) * norms.unsqueeze(1))


def centred(products: Tensor) -> Tensor:
    """Inner products after the mean of all vectors is taken off each: what is left when what all share is gone."""
    rows = products.mean(0, keepdim=True)
    return products - rows - rows.T + products.mean()


def separation(similarity: Tensor, groups: Sequence[int]) -> Separation:
    """Measure a matrix of similarities (B, B) against groups (B)."""
    labels = torch.as_tensor(groups)
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    others = ~torch.eye(len(labels), dtype=torch.bool)
    nearest = similarity.masked_fill(~others, float("-inf")).argmax(1)
    return Separation(
        float(similarity[same & others].mean()),
        float(similarity[~same].mean()),
        float((labels[nearest] == labels).float().mean()),
    )


def plane(products: Tensor) -> Tensor:
    """Inner products (B, B) -> the two principal coordinates of each vector (B, 2), as PCA of the vectors would give."""
    values, vectors = torch.linalg.eigh(centred(products).double())
    return vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp(min=0).sqrt()
