"""The silhouettes that only the rich scenes have; see `shapes`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fast_goal.data.sources.scenes.shapes import Part, arc, polygon


def _one(*points: tuple[float, float]) -> Callable[[], list[Part]]:
    return lambda: [Part(polygon(*points))]


def _hexagon() -> list[Part]:
    angles = np.radians(np.arange(6) * 60)
    return [Part(0.98 * np.stack([np.cos(angles), np.sin(angles)], axis=1))]


def _drop() -> list[Part]:
    return [Part(np.concatenate([arc(0, 0.36, 0.64, 0.62, -35, 215), polygon((0, -1))]))]


def _cloud() -> list[Part]:
    left, top = arc(-0.56, 0.2, 0.42, 0.42, 90, 255, 20), arc(-0.1, -0.16, 0.52, 0.52, 195, 335, 20)
    return [Part(np.concatenate([left, top, arc(0.53, 0.14, 0.45, 0.48, 285, 450, 20)]))]


def _umbrella() -> list[Part]:
    hook = polygon(
        (-0.08, 0.1), (0.08, 0.1), (0.08, 0.95), (-0.38, 0.95), (-0.38, 0.7), (-0.24, 0.7), (-0.24, 0.8), (-0.08, 0.8)
    )
    return [
        Part(hook, "ink"),
        Part(np.concatenate([arc(0, 0.12, 1, 1, 180, 360, 30), polygon((0.5, 0), (0, 0.12), (-0.5, 0))])),
    ]


def _boat() -> list[Part]:
    return [
        Part(polygon((-0.05, -1), (0.05, -1), (0.05, 0.35), (-0.05, 0.35)), "ink"),
        Part(polygon((0.05, -0.95), (0.8, 0.2), (0.05, 0.2))),
        Part(polygon((-0.05, -0.7), (-0.05, 0.2), (-0.65, 0.2))),
        Part(polygon((-1, 0.35), (1, 0.35), (0.6, 0.95), (-0.6, 0.95))),
    ]


def _key() -> list[Part]:
    teeth = [(1, -0.13), (1, 0.5), (0.8, 0.5), (0.8, 0.13), (0.58, 0.13), (0.58, 0.4), (0.38, 0.4), (0.38, 0.13)]
    return [
        Part(polygon((-0.2, -0.13), *teeth, (-0.2, 0.13))),
        Part(arc(-0.54, 0, 0.46, 0.46)),
        Part(arc(-0.54, 0, 0.2, 0.2, count=24), "hole"),
    ]


def _leaf() -> list[Part]:
    x = np.linspace(-1, 1, 25)
    edge = np.stack([x, -0.58 * (1 - x**2)], axis=1)
    vein = polygon((-1, -0.03), (0.6, -0.03), (0.6, 0.03), (-1, 0.03))
    return [Part(np.concatenate([edge, (edge * [1, -1])[-2:0:-1]])), Part(vein, "ink")]


def _bell() -> list[Part]:
    flare = polygon((0.6, 0.3), (0.95, 0.68), (-0.95, 0.68), (-0.6, 0.3))
    return [Part(arc(0, 0.72, 0.24, 0.24, count=24)), Part(np.concatenate([arc(0, -0.35, 0.52, 0.62, 180, 360, 24), flare]))]


def _apple() -> list[Part]:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    radius = 0.82 * (1 - 0.35 * np.exp(-(((turn - np.pi) / 0.45) ** 2)))  # from below, dented at the top
    body = np.stack([1.1 * radius * np.sin(turn), 0.2 + radius * np.cos(turn)], axis=1)
    return [
        Part(body),
        Part(polygon((-0.07, -0.85), (0.07, -0.85), (0.07, -0.3), (-0.07, -0.3)), "ink"),
        Part(polygon((0.08, -0.62), (0.3, -0.95), (0.75, -0.98), (0.55, -0.65))),
    ]


def _rocket() -> list[Part]:
    return [
        Part(polygon((-0.22, 0.6), (0.22, 0.6), (0, 1)), "ink"),
        Part(polygon((0.3, 0), (0.8, 0.75), (0.3, 0.6))),
        Part(polygon((-0.3, 0), (-0.3, 0.6), (-0.8, 0.75))),
        Part(polygon((0, -1), (0.26, -0.65), (0.36, -0.25), (0.36, 0.62), (-0.36, 0.62), (-0.36, -0.25), (-0.26, -0.65))),
        Part(arc(0, -0.2, 0.14, 0.14, count=16), "ink"),
    ]


def _lamp() -> list[Part]:
    return [
        Part(polygon((-0.1, -0.05), (0.1, -0.05), (0.1, 0.8), (-0.1, 0.8))),
        Part(polygon((-0.5, 0.76), (0.5, 0.76), (0.5, 1), (-0.5, 1))),
        Part(polygon((-0.45, -1), (0.45, -1), (0.88, 0), (-0.88, 0))),
    ]


def _car() -> list[Part]:
    return [
        Part(polygon((-0.58, -0.05), (-0.36, -0.58), (0.34, -0.58), (0.62, -0.05))),
        Part(polygon((-1, -0.08), (0.95, -0.08), (1, 0.42), (-1, 0.42))),
        *(Part(arc(x, 0.42, 0.25, 0.25, count=24), "ink") for x in (-0.52, 0.52)),
    ]


MAKERS: dict[str, Callable[[], list[Part]]] = {
    "diamond": _one((0, -1), (0.68, 0), (0, 1), (-0.68, 0)),
    "hexagon": _hexagon,
    "drop": _drop,
    "cloud": _cloud,
    "umbrella": _umbrella,
    "boat": _boat,
    "bottle": _one((-0.2, -1), (0.2, -1), (0.2, -0.5), (0.48, -0.15), (0.48, 1), (-0.48, 1), (-0.48, -0.15), (-0.2, -0.5)),
    "key": _key,
    "leaf": _leaf,
    "bell": _bell,
    "apple": _apple,
    "bolt": _one((0.1, -1), (-0.62, 0.16), (-0.1, 0.16), (-0.35, 1), (0.65, -0.3), (0.12, -0.3), (0.55, -1)),
    "hourglass": _one((-0.72, -1), (0.72, -1), (0.14, 0), (0.72, 1), (-0.72, 1), (-0.14, 0)),
    "rocket": _rocket,
    "lamp": _lamp,
    "car": _car,
}
