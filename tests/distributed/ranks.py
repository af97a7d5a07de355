"""Several processes of one task on this machine, over gloo on the loopback interface."""

import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from children import start


@dataclass(frozen=True)
class Ended:
    """How one rank ended, and when: seconds after the first one did."""

    status: int
    output: str
    seconds: float


def run_ranks(work: Callable[..., object], *arguments: Any, size: int = 2) -> list[Ended]:
    """Run ``work(*arguments)``, a function of a module below ``tests``, in ``size`` processes with
    the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(size)]
        children = [
            start(
                _work,
                work,
                arguments,
                environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                output=output,
            )
            for rank, output in enumerate(outputs)
        ]
        ended: dict[int, float] = {}
        while len(ended) < size:
            for rank, child in enumerate(children):
                child.join(0.02)
                if child.exitcode is not None:
                    ended.setdefault(rank, time.monotonic())
        first = min(ended.values())
        return [
            Ended(int(child.exitcode or 0), output.read_text(), ended[rank] - first)
            for rank, (child, output) in enumerate(zip(children, outputs, strict=True))
        ]


def _work(work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    work(*arguments)
