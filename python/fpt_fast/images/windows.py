"""Deep grey levels to the levels of a network's input: which range becomes black to white.

A window is ``file`` (the file's own, or else everything), ``full`` (everything that the file's
bits can hold), ``minmax`` (from the image's lowest level to its highest) or ``CENTRE/WIDTH``, in
the units that the file gives its levels.  Only ``CENTRE/WIDTH`` and a window of the file cut
anything: levels outside it become black or white.
"""

import re

import numpy as np
import numpy.typing as npt

from fpt_fast.config import ConfigError

Values = npt.NDArray[np.float64]

WINDOWS = ("file", "full", "minmax")
U16_MAX = 65535
_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_GIVEN = re.compile(rf"({_NUMBER})/({_NUMBER})")


def parse_window(text: str) -> tuple[float, float] | None:
    """Read ``40/400`` as (centre, width); None for a window by name; ``ConfigError`` for others."""
    if text in WINDOWS:
        return None
    found = _GIVEN.fullmatch(text)
    if found is None or float(found[2]) < 1.0:
        raise ConfigError(
            f"window must be {', '.join(WINDOWS)}, or CENTRE/WIDTH like 40/400 with a width of at "
            f"least 1, got {text!r}"
        )
    return float(found[1]), float(found[2])


def linear_window(values: Values, centre: float, width: float) -> Values:
    """DICOM's LINEAR window (PS3.3 C.11.2.1.2.1) of levels to [0, 1]; ``width`` at least 1."""
    centre, width = centre - 0.5, width - 1.0
    below, above = values <= centre - width / 2.0, values > centre + width / 2.0
    shares = np.where(above, 1.0, 0.0)
    between = ~below & ~above
    shares[between] = (values[between] - centre) / width + 0.5
    return shares


def stretch(values: Values, low: float, high: float) -> Values:
    """Levels to [0, 1], ``low`` at 0 and ``high`` at 1; 0 where both are one level."""
    return np.zeros_like(values) if low == high else (values - low) / (high - low)


def to_u16(shares: Values) -> npt.NDArray[np.uint16]:
    """[0, 1] to the nearest of 65,536 levels."""
    return np.rint(shares * U16_MAX).astype(np.uint16)


def window_u16(pixels: npt.NDArray[np.uint16], window: str) -> npt.NDArray[np.uint16]:
    """16-bit grey of a file that has no window of its own, through ``window``."""
    given = parse_window(window)
    if given is None and window != "minmax":
        return pixels
    levels = np.arange(U16_MAX + 1, dtype=np.float64)
    if given is None:
        low, high = float(pixels.min()), float(pixels.max())
        # Only the levels between the two occur.
        shares = stretch(levels.clip(low, high), low, high)
    else:
        shares = linear_window(levels, *given)
    return to_u16(shares)[pixels]
