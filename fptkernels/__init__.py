"""Triton kernels of fpt-fast, one file per op.

Rules of this package: it holds Triton only (pointers, strides, tiles); it imports torch, triton
and itself, and does not know that ``fpt_fast`` exists; importing it imports no kernel.  Kernels
are imported one by one and lazily, from ``fpt_fast/ops/library.py`` and from nowhere else.
"""

__all__: list[str] = []
