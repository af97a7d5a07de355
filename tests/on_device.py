"""Where the tests of ``tests/gpu`` run: at full size on a CUDA device, else tiny, interpreted.

Elsewhere than on a GPU every body runs all the same, on CPU tensors and tiny shapes, so that it
is not wrong when a GPU comes.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter cannot multiply bf16, and truncates to it.
DTYPES = (
    (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)
)
EIGHT_BIT_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
REPEATS = 20 if ON_GPU else 1


def many_images(elements: int, itemsize: int) -> int:
    """How many images of ``elements`` each take a tensor beyond 2**31 elements.

    As many as a third of the free memory holds where that is less; 3 where there is no GPU.
    """
    if not ON_GPU:
        return 3
    free, _ = torch.cuda.mem_get_info()
    return max(3, min((1 << 31) // elements + 2, free // 3 // (elements * itemsize)))


def peak_added(run: Callable[[], object]) -> int:
    """Bytes that ``run`` adds at its peak, its results included; 0 where there is no GPU."""
    if not ON_GPU:
        run()
        return 0
    run()  # compiled, and the allocator warm
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def by_head(one_head: Callable[..., Tensor], q: Tensor, *others: Tensor) -> Tensor:
    """``one_head`` of [1, 1, ...] tensors, [B, H, N] in all, so that one map exists at a time."""
    rows = []
    for image in range(q.shape[0]):
        for head in range(q.shape[1]):
            where = (slice(image, image + 1), slice(head, head + 1))
            rows.append(one_head(*(tensor[where] for tensor in (q, *others))))
    return torch.cat(rows).view(q.shape[:3])
