"""The JSON of one run: written whole after every step, so that a killed run keeps what it has."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FORMAT = 1
NOT_RUN = "not run"
NO_TIME = "no time was left"


class Report:
    """``phases.<phase>.items.<item>`` holds a state, seconds, and a result or the reason of none.

    States: ``done``, ``failed`` (it raised), ``killed`` (its process ended or was ended while it
    ran), ``not run``.  ``running`` names the item that a process is at.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content

    @classmethod
    def create(cls, path: Path, **settings: Any) -> "Report":
        """A new file with ``settings`` beside the empty phases."""
        fixed = {"format": FORMAT, "started": _now(), "finished": None, "running": None}
        report = cls(path, {**fixed, **settings, "phases": {}})
        report.save()
        return report

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read a file; ``ValueError`` for one of another format."""
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ValueError(f"{path} must have format {FORMAT}, got {content.get('format')}")
        return cls(path, content)

    def save(self) -> None:
        """Replace the file in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def plan(self, phase: str, items: Iterable[str]) -> None:
        """Name what a phase has to do, so that what never ran is named too."""
        known = self.content["phases"].setdefault(phase, {"items": {}})["items"]
        for name in items:
            known.setdefault(name, {"state": NOT_RUN, "why": NO_TIME})
        self.save()

    def is_settled(self, phase: str, item: str) -> bool:
        """Whether the item need not run any more: it ran, failed or was killed."""
        found = self.content["phases"].get(phase, {}).get("items", {}).get(item)
        return found is not None and found["state"] != NOT_RUN

    def start(self, phase: str, item: str, kill_at: float) -> None:
        """Say what runs now, and until when it may (seconds since the epoch)."""
        self.content["running"] = {"phase": phase, "item": item, "since": time.time()}
        self.content["running"]["kill_at"] = kill_at
        self.save()

    def settle(self, state: str, **values: Any) -> None:
        """End what runs now with ``state``."""
        running = self.content["running"]
        if running is None:
            return
        seconds = round(time.time() - running["since"], 3)
        items = self.content["phases"].setdefault(running["phase"], {"items": {}})["items"]
        items[running["item"]] = {"state": state, "seconds": seconds, **values}
        self.content["running"] = None
        self.save()

    def finish(self, **values: Any) -> None:
        """Note the end of the run."""
        self.content.update(values, finished=_now())
        self.save()

    def items(self, phase: str) -> dict[str, dict[str, Any]]:
        """What stands of every item of a phase."""
        found: dict[str, dict[str, Any]] = self.content["phases"].get(phase, {}).get("items", {})
        return found

    def results(self, phase: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and result of every item that is done."""
        for name, item in self.items(phase).items():
            if item["state"] == "done":
                yield name, item["result"]

    def count(self) -> dict[str, int]:
        """How many items are in each state."""
        states = [i["state"] for p in self.content["phases"].values() for i in p["items"].values()]
        return {state: states.count(state) for state in sorted(set(states))}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
