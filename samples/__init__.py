"""Synthetic stained blood smears with exact boxes. Needs numpy and Pillow only."""

from samples.smears import CATEGORIES, Smear, draw_smear

__all__ = ["CATEGORIES", "Smear", "draw_smear"]
