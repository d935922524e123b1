"""Stage `backbones`: provide the vision encoder and the language model that every run starts from.

    python -m pipeline_steps.backbones [--params params.yaml] [--out data/backbones] [--metrics FILE.json]

kind embedded  trains a tiny DINOv2, a tiny Llama and a byte-level BPE tokenizer on the procedural world. This
               pre-trains SELECTION (a query that names a colour or a place finds that object) and copying. Large
               pretrained backbones already have both abilities. All runs of a comparison start from the same files.
               Takes about a minute on two free cores and 0.8 GB.
kind local     checks and copies two existing folders in Hugging Face format: a DINOv2, and a Llama with its tokenizer.
kind hub       downloads such a pair from the Hugging Face Hub at pinned revisions.

Writes OUT/vision_encoder and OUT/language_model (Hugging Face folders), OUT/autoencoder if embedded backbones have
`autoencoder_steps` above 0, and the held-out accuracies of the warm-ups.
OUT is replaced atomically. Exits with code 1 and a one-paragraph message if a folder is unusable or a path cannot be
written.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from pipeline_steps.common import params
from pipeline_steps.common.autoencoder import require
from pipeline_steps.common.errors import run_main
from pipeline_steps.common.files import check_outputs, replaced_folder, write_text

from .autoencoder import KEY, rendered, train_autoencoder
from .hub import download_backbones
from .language_model import build_language_model, save_language_model, warm_up_language_model
from .local import copy_backbones
from .schema import Embedded
from .tokenizer import save_tokenizer, train_tokenizer
from .vision_encoder import build_vision_encoder, save_vision_encoder, warm_up_vision_encoder

PARAMS = ("backbones",)


def train_backbones(options: Embedded, folder: Path, num_workers: int) -> dict:
    """Train both backbones and the tokenizer, and write them below `folder`. Returns the metrics. UserError before
    anything is trained if an autoencoder is asked for and diffusers is not installed."""
    if options.autoencoder_steps:
        require("diffusers", KEY)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed on a GPU by use_deterministic_algorithms
    torch.set_num_threads(options.num_threads)
    # Positions of reduced frames are resized bicubically, for whose gradient CUDA has no deterministic kernel.
    torch.use_deterministic_algorithms(True, warn_only=options.vision_downsampling > 1)
    tokenizer = train_tokenizer(options.vocabulary_size, options.max_positions)
    torch.manual_seed(options.seed)
    language_model = build_language_model(options, tokenizer)
    language_metrics = warm_up_language_model(language_model, tokenizer, options)
    save_language_model(language_model, folder / "language_model")
    save_tokenizer(tokenizer, folder / "language_model")
    torch.manual_seed(options.seed)
    vision_encoder = build_vision_encoder(options)
    vision_metrics = warm_up_vision_encoder(vision_encoder, options, num_workers)
    save_vision_encoder(vision_encoder, folder / "vision_encoder")
    autoencoder = {}
    if options.autoencoder_steps:
        frames = rendered(options, num_workers)
        autoencoder["autoencoder"] = train_autoencoder(options, folder / "autoencoder", frames)
    return autoencoder | {
        "kind": "embedded",
        "vision_encoder": {"num_parameters": count(vision_encoder), **vision_metrics},
        "language_model": {"num_parameters": count(language_model), "num_tokens": len(tokenizer), **language_metrics},
    }


def count(module: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--out", type=Path, default=Path("data/backbones"))
    parser.add_argument("--metrics", type=Path, default=Path("outputs/metrics/backbones.json"))
    arguments = parser.parse_args()
    parameters = params.read(arguments.params, *PARAMS)
    section = parameters.backbones

    check_outputs(folders=[arguments.out], files=[arguments.metrics])
    with replaced_folder(arguments.out) as folder:
        if section.kind == "embedded":
            metrics = train_backbones(section.embedded, folder, parameters.runtime.backbone_workers)
        elif section.kind == "hub":
            metrics = download_backbones(section.hub, folder)
        else:
            metrics = copy_backbones(section.local, folder)
    write_text(arguments.metrics, json.dumps(metrics, indent=2) + "\n")
    print(f"{arguments.out}: {json.dumps(metrics)}")


if __name__ == "__main__":
    run_main(main)
