"""A checkpoint of an untrained network as the training stages write it, with a few packed samples of the world."""

from dataclasses import dataclass
from pathlib import Path

from model import FoveatedVLMForConditionalGeneration
from pipeline_steps.backbones.tokenizer import save_tokenizer, train_tokenizer
from pipeline_steps.common import params
from pipeline_steps.common.checkpoint import save_checkpoint
from pipeline_steps.common.schemas import FramePolicy, RawSample
from pipeline_steps.shards.__main__ import make_manifest, publish
from pipeline_steps.shards.pack import Settings, pack_shard
from pipeline_steps.sources import folder, procedural
from pipeline_steps.tokens.__main__ import build
from tests.model import tiny

FRAMES = FramePolicy(image_size=56, resize_mode="crop", fps=2.0, max_frames=4, jpeg_quality=95)
VOCABULARY, MAX_POSITIONS = 400, 4096  # tokens
STILL_FRAMES = 3  # frames that a still becomes


@dataclass
class Made:
    """Where everything lies."""

    root: Path

    def __post_init__(self):
        self.raw, self.shards, self.tokens = self.root / "raw", self.root / "shards", self.root / "tokens"
        self.tokenizer, self.checkpoint = self.root / "language_model", self.root / "checkpoint"

    @property
    def video(self) -> Path:
        return self.raw / "procedural/test/card-000000.mp4"


def make(root: Path) -> Made:
    made = Made(root)
    parameters = params.read(params.ROOT / "params.yaml", "sources", "tokens")
    save_tokenizer(train_tokenizer(VOCABULARY, MAX_POSITIONS), made.tokenizer)
    samples = write_world(made.raw, parameters.sources.procedural)
    settings = Settings(raw_dir=str(made.raw), frames=FRAMES)
    reports = {}
    for split in sorted({sample.split for sample in samples}):
        group = [sample for sample in samples if sample.split == split]
        reports[split, "000000"] = pack_shard(group, settings, root / "packed" / split / "000000")
    made.shards.mkdir()
    publish(make_manifest(reports, len(samples), FRAMES), root / "packed", made.shards)
    build(parameters.tokens, made.shards, made.tokenizer, made.tokens)
    save(make_model(), made, made.checkpoint, parameters.tokens.prompt("*").system)
    return made


def write_world(raw: Path, section) -> list[RawSample]:
    """Two training clips, and for testing a clip of every task and a chat."""
    (raw / "procedural").mkdir(parents=True)
    few = {"num_train_clips": 2, "num_validation_clips": 0, "num_test_clips": 1}
    procedural.write(raw / "procedural", section.model_copy(update=few), 1)
    chat = {"user": "Say 314 backwards", "assistant": "413", "task": "text"}
    text = RawSample(key="chat-1", source="chat", split="test", video_id="chat-1", kind="text", items=(chat,))
    return [*folder.read(raw / "procedural", "procedural", relative_to=raw).samples, text]


def make_model(**options) -> FoveatedVLMForConditionalGeneration:
    """Random weights; the end-of-turn token is never the most likely one, so that answers are as long as allowed."""
    model = tiny.make_model(VOCABULARY, MAX_POSITIONS, **options)
    model.language_model.get_input_embeddings().weight.data[2] = 0
    return model


def make_lively_model(**options) -> FoveatedVLMForConditionalGeneration:
    """`make_model` whose answers differ with the question and the frames; that one repeats the chat's line break."""
    model = make_model(**options)
    for name, weight in model.language_model.model.layers.named_parameters():
        if name.endswith("proj.weight"):
            weight.data *= 12
    model.connector.weight.data *= 10
    return model


def save(model, made: Made, path: Path, system: str) -> None:
    options = FRAMES.model_dump() | {"image_replication": STILL_FRAMES, "system": system}
    save_checkpoint(path, model, made.tokenizer, **options)
