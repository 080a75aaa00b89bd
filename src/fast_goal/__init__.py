"""FAST-GOAL: fine-tune CLIP so that it understands long, detailed descriptions (arXiv 2605.26615)."""

__version__ = "0.1.0"
