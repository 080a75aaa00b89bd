"""The words of the scenes, their colours in RGB, and the two records that describe a scene completely.

There are two styles: PLAIN, the demo's, and RICH, with more of everything. What PLAIN draws must not change by a byte, and
the order of its words enters the random numbers. Lengths are fractions of the image's side, angles are degrees; a `Scene`
together with the image size determines every pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

RGB = tuple[int, int, int]

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "cross", "ring", "moon",
    "arrow", "house", "tree", "fish", "mushroom", "flower", "cup", "crown",
)  # fmt: skip

COLOURS: dict[str, RGB] = {
    "red": (214, 32, 38),
    "orange": (255, 136, 0),
    "yellow": (255, 222, 30),
    "green": (34, 146, 52),
    "blue": (36, 78, 214),
    "purple": (122, 40, 160),
    "pink": (255, 120, 190),
    "brown": (120, 70, 32),
    "white": (250, 250, 250),
    "black": (28, 28, 28),
}

PATTERNS = ("plain", "striped", "dotted")
PATTERN_ENDINGS = {"plain": "with no pattern", "striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}

# The longest side of an object; the gaps between the ranges keep the three words apart.
SIZES: dict[str, tuple[float, float]] = {"small": (0.19, 0.21), "medium-sized": (0.27, 0.30), "large": (0.37, 0.41)}

# Muted, so that every object stands out; only white is also an object's colour.
BACKGROUNDS: dict[str, RGB] = {
    "white": (246, 246, 246),
    "gray": (158, 158, 160),
    "beige": (232, 214, 178),
    "mint": (176, 228, 196),
    "lavender": (204, 188, 238),
    "teal": (86, 166, 168),
}

TEXTURES = ("plain", "checkered", "wavy")

# By row and column of the 3x3 grid that the box's centre falls into.
POSITIONS = (
    ("in the top left corner", "at the top of the picture", "in the top right corner"),
    ("on the left side of the picture", "in the middle of the picture", "on the right side of the picture"),
    ("in the bottom left corner", "at the bottom of the picture", "in the bottom right corner"),
)

RELATIONS = ("to the left of", "to the right of", "above", "below")

DIAGONALS = ("to the upper left of", "to the upper right of", "to the lower left of", "to the lower right of")

NUMBERS = {4: "four", 5: "five", 6: "six"}

# What only the rich scenes have.
MORE_SHAPES = (
    "diamond", "hexagon", "drop", "cloud", "umbrella", "boat", "bottle", "key",
    "leaf", "bell", "apple", "bolt", "hourglass", "rocket", "lamp", "car",
)  # fmt: skip
MORE_COLOURS: dict[str, RGB] = {
    "cyan": (0, 196, 222),
    "lime": (168, 230, 40),
    "navy": (20, 26, 100),
    "gray": (128, 128, 130),
}
MORE_PATTERNS = ("checkered",)
MORE_BACKGROUNDS: dict[str, RGB] = {
    "sky-blue": (160, 206, 246),
    "salmon": (240, 164, 146),
    "khaki": (188, 184, 128),
}
MORE_TEXTURES = ("striped", "dotted")
# Smaller, as there are more of them; the same words are relative to the others of their style.
RICH_SIZES: dict[str, tuple[float, float]] = {"small": (0.15, 0.165), "medium-sized": (0.21, 0.23), "large": (0.29, 0.32)}
ALL_NUMBERS = {2: "two", 3: "three", **NUMBERS, 7: "seven", 8: "eight"}


@dataclass(frozen=True)
class Thing:
    """One object. `size` is one of SIZES; `extent` is its longest side, unrotated, and (x, y) its centre."""

    shape: str
    colour: str
    pattern: str
    size: str
    x: float
    y: float
    extent: float
    angle: float
    pattern_angle: float
    tint: RGB  # added to the colour

    @property
    def look(self) -> tuple[str, str, str]:
        """What a sentence always says; unique within a scene."""
        return self.pattern, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """A whole image; later things cover earlier ones. `zoom` scales strokes, patterns and texture (1 for a full scene)."""

    background: str
    texture: str
    tint: RGB
    phase: tuple[float, float]  # shift of the texture, in its periods
    zoom: float
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Style:
    """What scenes are made of. Things lie on a loose grid of `grid` x `grid` cells, their centres up to `jitter` off."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    patterns: tuple[str, ...]
    sizes: dict[str, tuple[float, float]]
    backgrounds: tuple[str, ...]
    textures: tuple[str, ...]
    numbers: tuple[int, ...]
    grid: int
    jitter: float

    @property
    def contrasts(self) -> dict[str, tuple[str, ...]]:
        """The attributes in which a scene and its twin may differ, with their values."""
        return {"colour": self.colours, "shape": self.shapes, "pattern": self.patterns}


PLAIN = Style(
    shapes=SHAPES,
    colours=tuple(COLOURS),
    patterns=PATTERNS,
    sizes=SIZES,
    backgrounds=tuple(BACKGROUNDS),
    textures=TEXTURES,
    numbers=tuple(NUMBERS),
    grid=3,
    jitter=0.085,
)
RICH = Style(
    shapes=SHAPES + MORE_SHAPES,
    colours=(*COLOURS, *MORE_COLOURS),
    patterns=PATTERNS + MORE_PATTERNS,
    sizes=RICH_SIZES,
    backgrounds=(*BACKGROUNDS, *MORE_BACKGROUNDS),
    textures=TEXTURES + MORE_TEXTURES,
    numbers=(4, 5, 6, 7, 8),
    grid=4,
    jitter=0.045,
)
