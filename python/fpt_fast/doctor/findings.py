"""What a check says: how bad it is, what was seen, where, and what to do."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth saying.

    An ``error`` makes figures wrong or stops the work, a ``warning`` may, a ``note`` is good to
    know.  ``where`` names images or files; ``advice`` is empty where there is nothing to do.
    """

    severity: Severity
    what: str
    advice: str = ""
    where: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.severity}: {self.what}"]
        lines += [f"    {name}" for name in self.where[:_SHOWN]]
        if len(self.where) > _SHOWN:
            lines.append(f"    ... and {len(self.where) - _SHOWN} more")
        if self.advice:
            lines.append(f"  -> {self.advice}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was looked at, and what was found, the worst first."""

    looked_at: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True where there is no error (warnings and notes may be)."""
        return all(finding.severity != "error" for finding in self.findings)

    def __str__(self) -> str:
        order = ("error", "warning", "note")
        ranked = sorted(self.findings, key=lambda finding: order.index(finding.severity))
        counts = {name: sum(f.severity == name for f in ranked) for name in order}
        said = ", ".join(
            f"{count} {name}{'s' if count != 1 else ''}" for name, count in counts.items() if count
        )
        return "\n".join([*self.looked_at, *map(str, ranked), said or "nothing found"])
