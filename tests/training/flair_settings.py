"""FLAIR for the tiny CLIP."""

from typing import Any


def flair_config(tcs: float = 0.5, mps: float = 0.5, count: int = 3, heads: int = 4) -> dict[str, Any]:
    """The section `objective`."""
    drawn = {"count": count, "most_sentences": 2, "consecutive": 0.5}
    return {"name": "flair", "weights": {"tcs": tcs, "mps": mps}, "sub_captions": drawn, "heads": heads}
