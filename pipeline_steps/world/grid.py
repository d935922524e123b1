"""Sizes of the procedural world's frames; without imports, so that parameters are checked against them anywhere."""

UNITS = 56  # units along a side of the frame
SCALES = (1, 2, 4)  # supported px per unit
PATCH = 14  # units along a side of a patch
GRID = UNITS // PATCH
