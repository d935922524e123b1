"""A folder of photographic cut-outs from Debian's package tuxpaint-stamps-default, for the world of objects.

    python -m pipeline_steps.world.tuxpaint --output FOLDER [--deb FILE.deb]

Downloads the package (161 MB) with `apt-get download`, unless --deb names it, unpacks it with `dpkg -x` (nothing is
installed) and writes the photographs that suit as FOLDER/*.png with FOLDER/metadata.jsonl (file_name, name, and source:
the file in the package). A photograph suits when its English caption is one thing's name, such as "A red fox.", and it
is not a drawing, a flag, a road sign or a symbol. The pictures are under the GNU General Public License, version 2 or
later (FOLDER/copyright says whose they are): keep them out of a repository under another licence. Takes about 20 s.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_own_folder, replaced_folder

PACKAGE = "tuxpaint-stamps-default"
STAMPS = Path("usr/share/tuxpaint/stamps")
COPYRIGHT = Path("usr/share/doc") / PACKAGE / "copyright"
LEFT_OUT = {"cartoon", "symbols", "flags", "roadsigns", "toys", "plastic"}  # folders of drawings and of signs
SYNONYMS = ("grave-",)  # file names: ten stones that are called gravestone, headstone, tombstone ...
CAPTION = re.compile(r"(?:An?|The) ([A-Za-z][A-Za-z -]*)\.")
MEASURES = re.compile(r"^(?:pair|bunch|head|string|cluster|quarter|plant|baby) of (?:a |an |common )?")
CLAUSES = {"is", "are", "in", "at", "from", "of", "with", "your", "used", "inside", "resembles", "lets"}
MIN_SIDE, MAX_SIDE = 64, 256  # px of the longer side: smaller ones are left out, larger ones scaled down
MAX_WORDS = 3
MAX_ASPECT = 4  # longer side / shorter side
MAX_FLAT = 0.7  # share of the pixels in the eight most frequent colours (of 32,768); drawings have more


def build(output: Path, deb: Path | None) -> Counter:
    """Write the folder; returns how many pictures were taken and left out, by reason."""
    check_own_folder(output, COPYRIGHT.name)
    with tempfile.TemporaryDirectory() as scratch, replaced_folder(output) as folder:
        scratch = Path(scratch)
        run(["dpkg", "-x", str(deb or download(scratch)), str(scratch / "package")])
        stamps = scratch / "package" / STAMPS
        if not stamps.is_dir():
            raise UserError(f"{deb or PACKAGE}: holds no {STAMPS}. Use Debian's package {PACKAGE}.")
        counts, rows = Counter(), []
        for path in sorted(stamps.rglob("*.png")):
            name, reason = suits(path, path.relative_to(stamps))
            counts[reason] += 1
            if name is None:
                continue
            file_name = "-".join(path.relative_to(stamps).parts)
            cut_out(path).save(folder / file_name)
            rows.append({"file_name": file_name, "name": name, "source": str(STAMPS / path.relative_to(stamps))})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        shutil.copyfile(scratch / "package" / COPYRIGHT, folder / COPYRIGHT.name)
    return counts


def download(scratch: Path) -> Path:
    run(["apt-get", "download", PACKAGE], scratch)
    found = sorted(scratch.glob(f"{PACKAGE}_*.deb"))
    if not found:
        raise UserError(f"apt-get download {PACKAGE} left no file. Give one with --deb.")
    return found[0]


def run(command: list[str], folder: Path | None = None) -> None:
    """Run a command. UserError if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} here: run this on Debian or Ubuntu and copy the folder that it writes."
        ) from None
    if done.returncode:
        raise UserError(
            f"`{' '.join(command)}` failed ({' '.join(done.stderr.split())[-300:]}). Check the network "
            "(apt-get update), or give the package with --deb."
        )


def suits(path: Path, relative: Path) -> tuple[str | None, str]:
    """(name, "taken"), or (None, why the picture is left out)."""
    caption_file = path.with_suffix(".txt")
    if LEFT_OUT & set(relative.parts[:-1]):
        return None, "a drawing, symbol, flag or sign"
    if relative.name.startswith(SYNONYMS):
        return None, "one of many names for the same thing"
    if not caption_file.exists():
        return None, "no caption"
    name = name_of(caption_file.read_text(encoding="utf-8", errors="replace").split("\n")[0])
    if name is None:
        return None, "its caption is not one thing's name"
    with Image.open(path) as image:
        if max(image.size) < MIN_SIDE:
            return None, f"smaller than {MIN_SIDE} px"
        if image.convert("RGBA").getchannel("A").getextrema()[0] > 127:
            return None, "not transparent anywhere"
    image = cut_out(path)
    if max(image.size) > MAX_ASPECT * min(image.size):
        return None, f"more than {MAX_ASPECT} times as long as wide"
    if flatness(image) > MAX_FLAT:
        return None, "drawn in few flat colours"
    return name, "taken"


def name_of(caption: str) -> str | None:
    """The name in a caption: "A pair of closed scissors." -> "closed scissors"; None if the caption is a sentence."""
    plain = re.sub(r" \(.*?\)", "", caption).replace("\u201c", "").replace("\u201d", "").replace("!", ".").strip()
    match = CAPTION.fullmatch(plain)
    if match is None:
        return None
    words = MEASURES.sub("", match[1].lower()).removeprefix("very ").split()
    return " ".join(words) if len(words) <= MAX_WORDS and not CLAUSES & set(words) else None


def cut_out(path: Path) -> Image.Image:
    """RGBA, cropped to what is visible, at most MAX_SIDE px on a side."""
    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image


def flatness(image: Image.Image) -> float:
    """Share of the visible pixels of an RGBA picture that have one of its eight most frequent colours (5 bits each)."""
    pixels = np.asarray(image)
    colours = pixels[pixels[..., 3] >= 128][:, :3].astype(int) >> 3
    counts = np.sort(np.bincount(colours @ (1024, 32, 1)))
    return counts[-8:].sum() / counts.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--deb", type=Path, default=None, help=f"the package, if apt-get cannot download {PACKAGE}")
    arguments = parser.parse_args()
    counts = build(arguments.output, arguments.deb)
    taken = counts.pop("taken", 0)
    print(f"{arguments.output}: {taken} cut-outs")
    for reason, count in counts.most_common():
        print(f"  left out: {count}, {reason}")
    print(f"Use them with: -S data=objects -S sources.procedural.objects.cutouts={arguments.output.resolve()}")


if __name__ == "__main__":
    run_main(main)
