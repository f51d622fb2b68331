"""The colours of heat maps, for a terminal and a page alike: viridis, dark for little, bright for
much, which is read without telling red from green.
"""

from dataclasses import dataclass
from math import ceil, floor, isnan

import numpy as np

Colour = tuple[int, ...]  # red, green and blue, up to 255

# Nine colours of viridis, evenly apart (Smith, van der Walt and Firing); between them, straight.
NINE = "440154 472c7a 3b518b 2c718e 21908d 27ad81 5cc863 aadc32 fde725"
VIRIDIS: tuple[Colour, ...] = tuple(tuple(bytes.fromhex(colour)) for colour in NINE.split())


@dataclass(frozen=True)
class Scale:
    """What the darkest and the brightest colour mean."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def colour(self, value: float) -> Colour:
        """Of a value; it must not be NaN."""
        place = self.share(value) * (len(VIRIDIS) - 1)
        i = min(int(place), len(VIRIDIS) - 2)
        ends = zip(VIRIDIS[i], VIRIDIS[i + 1], strict=True)
        return tuple(round(x + (place - i) * (y - x)) for x, y in ends)

    def paint(self, value: float) -> tuple[str, str] | None:
        """The colour of a value, and that of letters on it, as `#rrggbb`; None for NaN."""
        if isnan(value):
            return None
        colour = self.colour(value)
        return f"#{bytes(colour).hex()}", "#000000" if is_bright(colour) else "#ffffff"

    def digit(self, value: float) -> str:
        """A value as a digit, where there is no colour; blank for NaN."""
        return " " if isnan(value) else str(min(9, int(10 * self.share(value))))


def scale_of(figures: np.ndarray) -> Scale:
    """From the least to the most of the figures, to the nearest twentieth outside."""
    if np.isnan(figures).all():
        return Scale(0.0, 1.0)
    low = floor(20 * float(np.nanmin(figures)) + 1e-6) / 20
    high = ceil(20 * float(np.nanmax(figures)) - 1e-6) / 20
    return Scale(low, max(high, low + 0.05))


def is_bright(colour: Colour) -> bool:
    """Whether dark letters are the readable ones on it (relative luminance, as WCAG weighs it)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722))) > 0.179
