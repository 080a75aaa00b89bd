"""The silhouettes: each shape as a few closed contours in the square from -1 to 1, y downwards.

Those that only the rich scenes have are in `more_shapes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Part:
    """A closed contour, points [K, 2]. `solid` is filled and outlined, `hole` cut out and outlined, `ink` filled dark."""

    points: np.ndarray
    kind: Literal["solid", "hole", "ink"] = "solid"

    @cached_property
    def outwards(self) -> np.ndarray:
        """By how much each point moves, [K, 2], when the contour grows by 1 on all sides, corners mitred."""
        following = np.roll(self.points, -1, axis=0)
        edges = following - self.points
        after = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / np.linalg.norm(edges, axis=1, keepdims=True)
        twice_area = (self.points[:, 0] * following[:, 1] - self.points[:, 1] * following[:, 0]).sum()
        before = np.roll(after, 1, axis=0)
        # 0.35 keeps the tip of an acute corner near its point
        return np.sign(twice_area) * (before + after) / np.maximum(1 + (before * after).sum(axis=1, keepdims=True), 0.35)


def polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=np.float64)


def arc(x: float, y: float, width: float, height: float, start: float = 0, stop: float = 360, count: int = 40) -> np.ndarray:
    """Points of an ellipse with the half axes `width` and `height`, from `start` to `stop` degrees (clockwise on screen)."""
    angles = np.radians(np.linspace(start, stop, count, endpoint=(stop - start) % 360 != 0))
    return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], axis=1)


def _star() -> list[Part]:
    angles = np.radians(np.arange(10) * 36 - 90)
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    return [Part(np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1))]


def _heart() -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [Part(np.stack([x, y - 2.5], axis=1) / 15.5)]


def _cross() -> list[Part]:
    a = 0.36
    return [
        Part(
            polygon((-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a))
        )
    ]


def _moon() -> list[Part]:
    outer = arc(0, 0, 1, 1, 50, 310)
    # the circle through the two horns whose centre lies at x = 0.6
    radius = float(np.hypot(*(outer[0] - (0.6, 0))))
    horn = float(np.degrees(np.arctan2(outer[0, 1], outer[0, 0] - 0.6)))
    inner = arc(0.6, 0, radius, radius, 360 - horn, horn, 30)
    crescent = np.concatenate([outer, inner[1:-1]])
    return [Part(crescent + np.array([0.18, 0]))]


def _flower() -> list[Part]:
    angles = np.radians(np.arange(6) * 60 - 90)
    petals = [Part(arc(0.6 * np.cos(angle), 0.6 * np.sin(angle), 0.4, 0.4, count=24)) for angle in angles]
    return [*petals, Part(arc(0, 0, 0.34, 0.34, count=24))]


def _tree() -> list[Part]:
    layers = [(1.0, -0.05, 0.6), (0.8, -0.55, 0.15), (0.58, -1.0, -0.3)]
    return [
        Part(polygon((-0.2, 0.5), (0.2, 0.5), (0.2, 1), (-0.2, 1))),
        *(Part(polygon((0, top), (0.85 * half, bottom), (-0.85 * half, bottom))) for half, top, bottom in layers),
    ]


def _house() -> list[Part]:
    return [
        Part(polygon((-0.75, -0.15), (0.75, -0.15), (0.75, 0.95), (-0.75, 0.95))),
        Part(polygon((-1, -0.15), (0, -1), (1, -0.15))),
        Part(polygon((-0.2, 0.35), (0.2, 0.35), (0.2, 0.95), (-0.2, 0.95)), "ink"),
    ]


def _fish() -> list[Part]:
    return [
        Part(polygon((-0.45, 0), (-1, -0.55), (-1, 0.55))),
        Part(arc(0.22, 0, 0.78, 0.55)),
        Part(arc(0.62, -0.14, 0.11, 0.11, count=12), "ink"),
    ]


def _mushroom() -> list[Part]:
    return [
        Part(polygon((-0.27, 0), (0.27, 0), (0.38, 0.95), (-0.38, 0.95))),
        Part(np.concatenate([arc(0, 0.1, 1, 1.0, 180, 360, 30), arc(0, 0.1, 1, 0.16, 0, 180, 16)[1:-1]])),
    ]


def _cup() -> list[Part]:
    return [
        Part(arc(0.5, -0.05, 0.5, 0.5)),
        Part(arc(0.5, -0.05, 0.25, 0.25, count=24), "hole"),
        Part(polygon((-1, -0.8), (0.5, -0.8), (0.32, 0.8), (-0.82, 0.8))),
    ]


def _crown() -> list[Part]:
    return [
        Part(polygon((-1, -0.75), (-0.5, -0.05), (0, -0.85), (0.5, -0.05), (1, -0.75), (0.82, 0.75), (-0.82, 0.75))),
    ]


_MAKERS: dict[str, Callable[[], list[Part]]] = {
    "circle": lambda: [Part(arc(0, 0, 0.95, 0.95, count=48))],
    "square": lambda: [Part(0.86 * polygon((-1, -1), (1, -1), (1, 1), (-1, 1)))],
    "triangle": lambda: [Part(polygon((0, -0.92), (1, 0.82), (-1, 0.82)))],
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": lambda: [Part(arc(0, 0, 1, 1, count=48)), Part(arc(0, 0, 0.46, 0.46), "hole")],
    "moon": _moon,
    "arrow": lambda: [Part(polygon((-1, -0.34), (0.05, -0.34), (0.05, -0.85), (1, 0), (0.05, 0.85), (0.05, 0.34), (-1, 0.34)))],
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "mushroom": _mushroom,
    "flower": _flower,
    "cup": _cup,
    "crown": _crown,
}


@cache
def parts(shape: str) -> tuple[Part, ...]:
    """The contours of a shape, in drawing order; a later one covers an earlier one."""
    if shape not in _MAKERS:
        from fast_goal.data.sources.scenes.more_shapes import MAKERS

        return tuple(MAKERS[shape]())
    return tuple(_MAKERS[shape]())
