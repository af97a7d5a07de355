"""Where the frozen model of a peer was found, and how that is kept beside the trained weights."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fpt_fast.model_files import ModelFileError


@dataclass(frozen=True, slots=True)
class BackboneSource:
    """Where a frozen model was found: timm name or directory (None: it was given as an object),
    a file of weights for a timm name, and whether timm's published weights were asked for."""

    source: str | None = None
    checkpoint_path: str | None = None
    pretrained: bool = True

    def to_json(self, folder: Path) -> dict[str, Any]:
        """As saved in ``folder``: what lies on this machine by its path from there, beginning
        with a point, so that both can be moved together and nothing tells where they were."""
        own = self.source is not None and Path(self.source).is_dir()
        return asdict(
            replace(
                self,
                source=_from(folder, self.source) if own else self.source,
                checkpoint_path=_from(folder, self.checkpoint_path),
            )
        )

    def find(self, folder: Path) -> "BackboneSource":
        """The same with paths of this machine, of what was saved in ``folder``.

        Raises ``ModelFileError`` for what is not there.
        """
        source, weights = (_to(folder, path) for path in (self.source, self.checkpoint_path))
        named = source is not None and not Path(source).is_absolute()
        if source is not None and not named and not Path(source).is_dir():
            raise ModelFileError(
                f"{folder} was trained on the frozen model in {source}, which is not there; say "
                "where it is with --backbone (backbone= in Python): its weights are checked"
            )
        if weights is not None and not Path(weights).is_file():
            raise ModelFileError(
                f"{folder} was trained on {source} with the weights of {weights}, which are not "
                "there; say where they are with --backbone and --checkpoint-path (backbone= and "
                "checkpoint_path= in Python): they are checked"
            )
        return BackboneSource(source, weights, self.pretrained)


def _from(folder: Path, path: str | None) -> str | None:
    if path is None:
        return None
    try:
        relative = Path(os.path.relpath(Path(path).resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive of Windows
        return str(Path(path).resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def _to(folder: Path, path: str | None) -> str | None:
    if path is None or not path.startswith("."):
        return path
    return str((folder / path).resolve())
