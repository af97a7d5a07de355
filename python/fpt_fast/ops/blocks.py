"""Softmax attention in blocks of queries: scratch of a fixed size, whatever the number of tokens.

A block of logits is made once and then serves everything that depends on it: attention
output, row log-sum-exp and column means.  Products run in f32 on a CPU and in the input's dtype
elsewhere; exponentials and sums are in f32 (f64 for f64).  No atomics and a fixed order of
blocks: results are bit-equal from run to run.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# A block of logits should stay in the second-level cache between the passes over it ...
_BLOCK_BYTES = 1 << 20
# ... unless that leaves so few queries that packing the keys costs more than the product.
_MIN_ROWS = 128
# Bound on the wide logits of one block at any number of tokens that leaves a row of them.
_MAX_BLOCK_BYTES = 16 << 20


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor | None, *, need_scores: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Attention of queries q [B, H, Q, D] to k, v [B, H, N, D], as far as it is asked for.

    Returns the output [B, H, Q, D] of q's dtype (None without ``v``), the mean over the queries
    of the attention map [B, H, N] f32 (None unless ``need_scores``), and the natural-log row
    log-sum-exp [B, H, Q] f32.
    """
    batch, heads, queries, _ = q.shape
    tokens = k.shape[2]
    scratch = Scratch(q, queries, tokens, heads)
    out = None if v is None else q.new_empty(q.shape, dtype=scratch.compute)
    sums = q.new_zeros((batch, heads, 1, tokens), dtype=scratch.wide) if need_scores else None
    top = q.new_empty((batch, heads, queries, 1), dtype=scratch.wide)
    total = torch.empty_like(top)
    for image, group in scratch.head_groups(batch, heads):
        keys = scratch.load(k[image, group]).transpose(1, 2)  # [G, D, N]
        values = None if v is None else scratch.load(v[image, group])  # [G, N, D]
        for rows in scratch.row_blocks(queries):
            at = (image, group, rows)
            weights, logits = scratch.logits(q[at], keys)  # [G, R, N]
            torch.amax(weights, dim=-1, keepdim=True, out=top[at])
            weights.sub_(top[at]).exp_()
            torch.sum(weights, dim=-1, keepdim=True, out=total[at])
            # Normalised before they are added up: a matrix product would add the rows one after
            # the other, and lose two bits that the pairwise sum keeps.
            weights.mul_(total[at].reciprocal())
            if sums is not None:
                sums[image, group] += weights.sum(dim=-2, keepdim=True)
            if out is not None and values is not None:
                out[at] = torch.bmm(scratch.narrow(weights, logits), values)
    lse = top.add_(total.log_()).squeeze(-1).float()
    scores = None if sums is None else sums.squeeze(2).div_(queries).float()
    return None if out is None else out.to(q.dtype), scores, lse


def mean_weights(q: Tensor, k: Tensor) -> Tensor:
    """Mean over the queries q [B, H, Q, D] of their attention to k [B, H, N, D]: [B, H, N] f32."""
    _, scores, _ = attend_in_blocks(q, k, None, need_scores=True)
    assert scores is not None
    return scores


def scores_from_lse(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """Mean over the queries of the attention map [B, H, N] f32, given its row log-sum-exp.

    Key-major: every block holds whole columns of the map, so that one pass is enough.
    """
    batch, heads, tokens, _ = q.shape
    scores = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    scratch = Scratch(q, tokens, tokens, heads)
    for image, group in scratch.head_groups(batch, heads):
        queries = scratch.load(q[image, group]).transpose(1, 2)  # [G, D, N]
        shift = lse[image, group].unsqueeze(1)  # [G, 1, N]
        for rows in scratch.row_blocks(tokens):
            weights, _ = scratch.logits(k[image, group, rows], queries)  # [G, R, N], transposed map
            scores[image, group, rows] = weights.sub_(shift).exp_().mean(dim=-1)
    return scores


class Scratch:
    """Block sizes, and the memory that all blocks of one call share."""

    def __init__(self, q: Tensor, rows: int, tokens: int, heads: int) -> None:
        self.compute = compute_dtype(q)
        self.wide = torch.float64 if self.compute == torch.float64 else torch.float32
        self.rows, self.heads = block_size(rows, tokens, heads)
        self._scale = q.shape[-1] ** -0.5
        size = self.rows * self.heads * tokens
        self._wide = torch.empty(size, dtype=self.wide, device=q.device)
        self._logits = (
            self._wide
            if self.compute == self.wide
            else torch.empty(size, dtype=self.compute, device=q.device)
        )

    def head_groups(self, batch: int, heads: int) -> Iterator[tuple[int, slice]]:
        """Every image with every group of heads."""
        for image in range(batch):
            for head in range(0, heads, self.heads):
                yield image, slice(head, min(head + self.heads, heads))

    def row_blocks(self, rows: int) -> Iterator[slice]:
        """All rows, in blocks of as equal a size as can be."""
        count = -(-rows // self.rows)
        for block in range(count):
            yield slice(block * rows // count, (block + 1) * rows // count)

    def load(self, heads: Tensor) -> Tensor:
        """Heads [G, R, D] in the dtype of products, contiguous."""
        return heads.to(self.compute).contiguous()

    def logits(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled product of [G, R, D] and [G, D, N], wide and in the dtype of products.

        Both [G, R, N] are scratch, valid until the next call; they are one where the dtypes are.
        """
        shape = (*left.shape[:2], right.shape[2])
        size = shape[0] * shape[1] * shape[2]
        logits = self._logits[:size].view(shape)
        # beta=0 ignores what the scratch holds; alpha scales before the product is rounded.
        torch.baddbmm(logits, self.load(left), right, beta=0, alpha=self._scale, out=logits)
        if self.compute == self.wide:
            return logits, logits
        return self._wide[:size].view(shape).copy_(logits), logits

    def narrow(self, weights: Tensor, logits: Tensor) -> Tensor:
        """Weights in the dtype of products, in place of the logits that they came from."""
        return weights if weights is logits else logits.copy_(weights)


def block_size(rows: int, tokens: int, heads: int) -> tuple[int, int]:
    """Rows and heads of one block of logits against ``tokens`` columns."""
    fit = _BLOCK_BYTES // (4 * tokens)
    if fit >= rows:
        return rows, max(1, min(heads, fit // rows))
    bound = max(1, _MAX_BLOCK_BYTES // (4 * tokens))
    return min(rows, bound, max(fit, _MIN_ROWS)), 1


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of products with ``tensor``: f32 on a CPU, whose f16 products are slower than that."""
    if tensor.dtype in (torch.float16, torch.bfloat16) and tensor.device.type == "cpu":
        return torch.float32
    return tensor.dtype
