"""What shapes a peer's input, and where it starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fpt_fast.peers import BackboneSource, PeerModel
from fpt_fast.records import BackboneSpec, Preprocessing, Reading


@dataclass(frozen=True, slots=True)
class PeerPlan:
    """What shapes a peer's input and its start: the frozen model, and how images are prepared."""

    spec: BackboneSpec
    source: BackboneSource
    preprocessing: Preprocessing
    reading: Reading

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, as JSON values."""
        return {
            "backbone": self.spec.name,
            "weights_hash": self.spec.weights_hash,
            "input_size": list(self.preprocessing.size),
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
            "fit": self.preprocessing.fit,
            "window": self.reading.window,
            "dicom_frame": self.reading.frame,
        }

    def to_json(self) -> dict[str, Any]:
        """The fingerprint; where the frozen model was found is saved by ``PeerModel``."""
        return self.fingerprint()

    @classmethod
    def of(cls, model: PeerModel) -> "PeerPlan":
        """The plan that ``model`` was trained by, from what was saved with it.

        Raises ``KeyError`` for a model that ``fpt-fast train`` did not save.
        """
        values: Mapping[str, Any] = model.extra["features"]
        size, mean, std = (tuple(values[name]) for name in ("input_size", "mean", "std"))
        return cls(
            model.spec,
            model.source,
            Preprocessing(size, mean, std, values["fit"]),
            Reading(values["window"], values["dicom_frame"]),
        )
