"""Embeddings: the table (num, dim) is the matrix Wᵀ with out = dim and in = num, and an id is a one-hot input.

The update of ids is A[:, ids]ᵀ·diag(s)·Bᵀ: a second look-up, of the few columns that are needed. It is not dropped out,
since ids are no numbers. What torch's `Embedding` does with its table is done with A as well: `max_norm` bounds
its columns in place, `scale_grad_by_freq` scales their gradients, and padding stays what it was.

A starts random and B at 0, as the rules of every method expect (PEFT starts the other way round). A is as small as for
a linear layer of num inputs, so that ids that are never seen hardly move with B.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.adapters.layer import AdapterLayer, check_samples
from rankwise.update import Factors


class AdapterEmbedding(AdapterLayer):
    """An embedding, also one that multiplies by a constant `embed_scale`, with low-rank updates added to it."""

    wraps = (nn.Embedding,)

    @staticmethod
    def matrix_shape(root: Any) -> tuple[int, int]:
        """(dim, num)."""
        return root.embedding_dim, root.num_embeddings

    @staticmethod
    def refusal(root: Any) -> tuple[str, str] | None:
        """Sparse gradients have no rules; a subclass may look up something other than its input."""
        if root.sparse:
            return "name embeddings with dense gradients", "sparse=True"
        if type(root).forward is not nn.Embedding.forward and not hasattr(root, "embed_scale"):
            return "name embeddings that look up their input as torch's Embedding does", type(root).__name__
        return None

    def factors(self, adapter: str) -> Factors:
        """As for any layer; padding has no update."""
        root: Any = self.get_base_layer()
        return without_padding(super().factors(adapter), root.padding_idx)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Transposed."""
        return weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Transposed."""
        return matrix.T

    def _add(self, adapter: str, factors: Factors, result: Tensor, x: Tensor) -> Tensor:
        B, s, A = factors
        gates = self.gates.get(adapter)
        if gates is not None and gates.dim() > 1:
            check_samples(gates, x)
            gates = gates.view(len(gates), *[1] * (x.dim() - 1), gates.shape[1])
        h = self._looked_up(x, A) * (s if gates is None else s * gates)
        update = F.linear(h.to(B.dtype), B)
        scale = self._embed_scale()
        return result + (update if scale is None else update * scale)

    def _looked_up(self, x: Tensor, A: Tensor) -> Tensor:
        """The columns of A for ids x, (…, r), those of padding 0."""
        root: Any = self.get_base_layer()
        h = F.embedding(x, A.T, root.padding_idx, root.max_norm, root.norm_type, root.scale_grad_by_freq)
        return h if root.padding_idx is None else h.masked_fill((x == root.padding_idx).unsqueeze(-1), 0)

    def _embed_scale(self) -> Tensor | float | None:
        """What the base layer multiplies its output by, rounded as transformers' layers do."""
        root: Any = self.get_base_layer()
        scale = getattr(root, "embed_scale", None)
        return scale.to(root.weight.dtype) if isinstance(scale, Tensor) else scale


def without_padding(factors: Factors, padding: int | None) -> Factors:
    """The update with a zero row for padding, whatever a rule made of its column of A."""
    if padding is None:
        return factors
    A = factors.A.clone()
    A[..., padding] = 0
    return Factors(factors.B, factors.s, A)
