"""The model card of a published checkpoint: README.md with the front matter that the Hugging Face Hub reads."""

import json
from pathlib import Path

import yaml

from pipeline_steps.common.markdown import escaped, table
from pipeline_steps.common.schemas import ShardsManifest, TokensManifest

EVALUATION = "## Evaluation\n"
NOT_EVALUATED = "No evaluation on test data had been made when this card was written."
USE = """```python
from transformers import pipeline

answers = pipeline("image-text-to-text", model="PATH_OR_NAME_OF_THIS_CHECKPOINT", trust_remote_code=True)
content = [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What happens?"}]
messages = [{"role": "user", "content": content}]
print(answers(text=messages, max_new_tokens=32, return_full_text=False)[0]["generated_text"])
```"""


def model_card(
    stage: str,
    model,
    result: dict,
    shards: ShardsManifest,
    tokens: TokensManifest,
    num_samples: int,
    base: dict,
) -> str:
    """The card's text. result: the content of training.json. num_samples: of this stage. base: as from
    `base_models`."""
    config = model.config
    origin, repositories = _base_models(base)
    header = {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["video-text-to-text", "vision-language-model", config.architecture.replace("_", "-"), "custom_code"],
        **({"base_model": repositories} if repositories else {}),
        "datasets": [" ".join(name.split()) for name in sorted(tokens.sources)],
    }
    total = count(model)
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=10**6)}---",
        f"# Foveated vision-language model, {escaped(stage)}",
        f"A vision-language model with {total:,} parameters: a DINOv2 vision encoder of "
        f"{count(model.vision_encoder):,} and a Llama language model of {count(model.language_model):,}. "
        f"{_tokens(config)} {origin}",
        f"## Use\n\n{USE}\n\n`trust_remote_code=True` runs the Python files of this folder: read them first.",
        "## Training data\n\n"
        f"The stage {escaped(stage)} trained on {num_samples:,} samples, drawn from these sources (all splits):\n\n"
        + table(
            ["source", "chats", "text tokens"],
            [[name, f"{counts.kept:,}", f"{counts.tokens:,}"] for name, counts in sorted(tokens.sources.items())],
        )
        + f"\n\nSystem line of the chats: {escaped(tokens.system.strip() or 'that of the chat template')}",
        "## Validation\n\nAt the end of the training, teacher-forced:\n\n" + _validation(result["validation"]),
        f"{EVALUATION}\n{NOT_EVALUATED}",
        f"## Limits\n\n{_limits(config, shards.frames)}",
        "## Licence\n\nNo licence is given for these weights. The licences of the base models and of the data apply to "
        "them too; ask their owners before you share or sell anything made with them.",
    ]
    return "\n\n".join(parts) + "\n"


def with_evaluation(card: str, rows: list[list[str]], split: str) -> str:
    """The card with a table of evaluation results: rows of task, mode, loss, accuracy and items. ValueError if the card
    has no section for it."""
    before, found, rest = card.partition(EVALUATION)
    if not found:
        raise ValueError(f"no section {EVALUATION.strip()!r}")
    _, heading, after = rest.partition("\n## ")
    listing = table(["task", "mode", "loss (nats per token)", "token accuracy", "items"], rows)
    return f"{before}{EVALUATION}\nOn the split {escaped(split)}, teacher-forced:\n\n{listing}\n{heading}{after}"


def count(module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def write(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(text, encoding="utf-8")


def _tokens(config) -> str:
    per_frame = f"{config.tokens_per_frame} visual token{'s' if config.tokens_per_frame > 1 else ''}"
    if config.architecture == "multi_token":
        return f"Every frame becomes {per_frame}, average-pooled patches (a baseline)."
    source = {
        "planned": "the language model plans the query of each frame from the frames before it",
        "static": "one learned query is used for all frames",
    }.get("static" if config.coarse_only else config.query_source, f"the queries are of the kind {config.query_source}")
    place = "after the question" if config.layout == "question_first" else "before the question"
    return f"Every frame becomes {per_frame}: a query attends to its patches, and {source}. Frames stand {place}."


def base_models(path: Path) -> dict:
    """{"kind", "repositories"} from the metrics of the stage `backbones` or the record in a checkpoint; kind None if
    there is no such file."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: found.get(name) for name in ("kind", "repositories")}


def _base_models(base: dict) -> tuple[str, list[str]]:
    """(a sentence about the base models, their repositories)."""
    kind = base["kind"]
    if kind == "hub":
        found = [base["repositories"][role] for role in ("vision", "language")]
        listing = " and ".join(f"{escaped(own['repository'])} ({own['revision'][:12]})" for own in found)
        return f"Base models: {listing}.", [own["repository"] for own in found]
    if kind == "embedded":
        return "Both base models were trained from random weights on synthetic data, for experiments.", []
    if kind == "local":
        return "The base models came from local folders, whose names are not recorded.", []
    return "The base models are not recorded.", []


def _validation(rows: list[dict]) -> str:
    own = [row for row in rows if row["event"] == "validation"]
    if not own:
        return "Nothing was measured: the validation split has no items."
    order = sorted(own, key=lambda row: (row["task"], row["source"], row["mode"]))
    cells = [[row["task"], row["source"], row["mode"], f"{row['loss']:.4f}", f"{row['accuracy']:.4f}"] for row in order]
    return table(["task", "source", "mode", "loss (nats per token)", "token accuracy"], cells)


def _limits(config, frames) -> str:
    lines = [
        f"At most {config.max_num_frames} frames per chat, all in one message; a file gives {frames.fps:g} per second, "
        f"at most {frames.max_frames}.",
        f"Frames are {frames.image_size} x {frames.image_size} px ({frames.resize_mode}): small text and details are "
        "lost. Sound is ignored.",
        f"Questions, frames and answer share {config.text_config.max_position_embeddings:,} positions.",
        "The answers follow the training data above. Elsewhere they may be wrong, and they are not checked for bias or "
        "harm. Do not use them for decisions about people.",
    ]
    return "\n".join(f"- {line}" for line in lines)
