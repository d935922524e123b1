"""Ten drawings with transparency, as a folder of cut-outs for the world of objects.

python -m tests.drawings FOLDER
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

S = 96  # px of a drawing
DRAWINGS = {
    "ball": [
        ("ellipse", (8, 8, 88, 88), "#d8322a"),
        ("arc", (8, 30, 88, 110), "#ffffff"),
        ("arc", (8, -14, 88, 66), "#ffffff"),
    ],
    "house": [
        ("rectangle", (16, 44, 80, 90), "#d9a15b"),
        ("polygon", (6, 46, 48, 6, 90, 46), "#8c2f23"),
        ("rectangle", (40, 60, 56, 90), "#4b2c1a"),
    ],
    "tree": [
        ("rectangle", (40, 56, 56, 92), "#6b4423"),
        ("ellipse", (12, 4, 84, 66), "#2f8f3a"),
        ("ellipse", (26, 12, 50, 34), "#4cb05a"),
    ],
    "fish": [
        ("polygon", (66, 48, 92, 24, 92, 72), "#e08a1e"),
        ("ellipse", (4, 22, 74, 74), "#f2b134"),
        ("ellipse", (16, 38, 26, 48), "#111111"),
    ],
    "star": [("polygon", (48, 4, 60, 36, 93, 36, 66, 56, 77, 90, 48, 69, 19, 90, 30, 56, 3, 36, 36, 36), "#28c7c0")],
    "cup": [
        ("ellipse", (56, 30, 92, 66), "#3a6fd0"),
        ("ellipse", (64, 38, 84, 58), None),
        ("rectangle", (12, 16, 68, 84), "#4f86e8"),
    ],
    "mushroom": [
        ("rectangle", (36, 44, 60, 90), "#efe2c8"),
        ("pieslice", (6, 8, 90, 92), "#c62f2f"),
        ("ellipse", (26, 18, 38, 30), "#ffffff"),
        ("ellipse", (54, 20, 66, 32), "#ffffff"),
    ],
    "boat": [
        ("polygon", (4, 62, 92, 62, 74, 88, 22, 88), "#6e4a2b"),
        ("rectangle", (45, 8, 49, 62), "#3b2a1a"),
        ("polygon", (52, 10, 52, 56, 86, 56), "#f4f4f4"),
    ],
    "key": [
        ("ellipse", (4, 28, 44, 68), "#c9a227"),
        ("ellipse", (15, 39, 33, 57), None),
        ("rectangle", (40, 43, 92, 53), "#c9a227"),
        ("rectangle", (72, 50, 78, 66), "#c9a227"),
        ("rectangle", (84, 50, 90, 70), "#c9a227"),
    ],
    "umbrella": [
        ("pieslice", (4, 8, 92, 96), "#7b3fb0"),
        ("rectangle", (46, 50, 50, 86), "#333333"),
        ("rectangle", (36, 82, 50, 86), "#333333"),
    ],
}


def write(folder: Path) -> None:
    """Write the ten drawings and their metadata.jsonl into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, shapes in DRAWINGS.items():
        image = Image.new("RGBA", (4 * S, 4 * S), (0, 0, 0, 0))
        draw = ImageDraw.Draw(image)
        for shape, corners, colour in shapes:
            corners = [4 * value for value in corners]
            fill = (0, 0, 0, 0) if colour is None else colour
            if shape == "arc":
                draw.arc(corners, 180 if corners[1] > 0 else 0, 360 if corners[1] > 0 else 180, fill=fill, width=20)
            elif shape == "pieslice":
                draw.pieslice(corners, 180, 360, fill=fill)
            else:
                getattr(draw, shape)(corners, fill=fill)
        image.resize((S, S), Image.Resampling.LANCZOS).save(folder / f"{name}.png")
        rows.append(json.dumps({"file_name": f"{name}.png", "name": name}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


def write_meadows(folder, shades, size=(8, 8), suffix="png"):
    """Writes a photograph of one colour for each of `shades` with its metadata.jsonl, whose rows are returned."""
    rows = []
    for number, shade in enumerate(shades):
        Image.new("RGB", size, (40 * shade, 90, 30)).save(folder / f"{number}.{suffix}")
        rows.append({"file_name": f"{number}.{suffix}", "name": f"meadow {shade}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


if __name__ == "__main__":
    write(Path(sys.argv[1]))
