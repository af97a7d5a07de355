"""Recording a step once and launching it whole ever after: CUDA graphs, and when there are none."""

from collections.abc import Callable
from typing import Literal

import torch

StepChoice = Literal["auto", "graph", "eager"]

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
"""Records what a function does on the device, and returns what does it again.

It may run the function a few times (at most 16), and what it does again reads and writes the same
memory; Python is not run again.  Raises ``RuntimeError`` for a function that cannot be recorded.
"""

# True once tests/gpu/test_step.py has passed on a GPU: `auto` takes nothing unproven.
_PROVEN_ON_GPU = False
# The first run compiles and allocates, the second one is as all others.
_WARM_UPS = 2


class CudaCapture:
    """Captures CUDA graphs, all in one pool of memory: they never run at the same time, and nothing
    that one leaves in it is read by another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, body: Callable[[], None]) -> Replay:
        """``body`` as one launch; its random numbers go on with torch's own generator."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                body()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Only this thread is watched: others read ahead, pin memory and copy meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            body()
        replay: Replay = graph.replay
        return replay


def choose_capture(
    choice: StepChoice | Capture, device: torch.device, ranks: int = 1
) -> tuple[Capture | None, str]:
    """How the step is captured (None: it is not), and why.

    Raises ``ValueError`` where ``graph`` is wanted and cannot be.
    """
    if callable(choice):
        return choice, "the caller captures"
    if choice not in ("auto", "graph", "eager"):
        raise ValueError(f"step must be 'auto', 'graph' or 'eager', got {choice!r}")
    if choice == "eager":
        return None, "step=eager"
    why_not = ""
    if device.type != "cuda":
        why_not = f"only CUDA has graphs, and the model is on {device.type}"
    elif ranks > 1:
        why_not = f"gradients are summed over {ranks} processes within the step"
    if why_not:
        if choice == "graph":
            raise ValueError(f"step='graph' cannot be: {why_not}; use step='auto' or 'eager'")
        return None, why_not
    if choice == "auto" and not _PROVEN_ON_GPU:
        return None, "no GPU has proven the captured step yet; --step graph takes it all the same"
    return CudaCapture(device), "one CUDA graph a step"
