"""The pretrained path in full size: SmolLM2-135M and DINOv2-small in the published format, with random weights.

Data and steps are few, the network is not: 157 M parameters, frames of 224 px in 16 x 16 patches.
Cost: 72 s of one core, 3.4 GB of memory, some GB of disk (`/usr/bin/time -v python -m pytest THIS_FILE`).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from pipeline_steps.common.modes import SCORED_MODES
from tests import pipeline, published
from tests.pipeline_steps import clips

pytestmark = pytest.mark.slow
FEW = (
    "scale=smollm2_135m",
    "data=folder",
    "backbones.kind=local",
    "sources.chat.num_train=4",
    "sources.chat.num_validation=1",
    "sources.chat.num_test=1",
    "streaming.image_replication=2",
    "runtime.num_workers=1",
    "training.common.batch_size=2",
    "training.common.micro_batch_size=1",
    "training.common.optimizer=adamw",  # Muon's iterations would take most of the time
    "training.common.precision=fp32",
    "training.common.device=cpu",
    "training.common.num_threads=1",
    "runtime.checkpoint_every=1",
    "runtime.keep_checkpoints=1",
    "training.common.max_validation_items=1",
    "runtime.tensorboard=false",
    "runtime.dvclive=false",
    "runtime.heatmaps_every=null",
    "training.common.record_every=1",
    "training.stage1.num_samples=4",
    "training.stage2.num_samples=2",
    "training.stage2.text_share=0.5",
    "evaluation.batch_size=4",
    "evaluation.max_answers_per_task=1",
    "evaluation.max_answer_tokens=3",
    "evaluation.bootstrap_samples=20",
    "evaluation.num_threads=1",
)
LOAD = """
import sys
import numpy as np, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
frames = np.random.default_rng(0).integers(0, 256, (2, 240, 320, 3), dtype=np.uint8)
inputs = processor(text="Which digits does red show?", videos=frames)
with torch.no_grad():
    answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
print(sum(p.numel() for p in model.parameters()), model.dtype, tuple(inputs["pixel_values"].shape), answer.shape[1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with params.yaml, in which the stages up to `tokens` have run."""
    place = tmp_path_factory.mktemp("pretrained")
    vision = published.write_dinov2_small(place / "pair/dinov2-small")
    language = published.write_smollm2_135m(place / "pair/smollm2-135m")
    write_clips(place / "clips")
    paths = (f"backbones.local.vision_path={vision}", f"backbones.local.language_path={language}")
    paths += (f"sources.folder.path={place / 'clips'}",)
    (place / "params.yaml").write_text(pipeline.params.compose([*FEW, *paths]))
    pipeline.run_all(place, "backbones", "sources", "shards", "tokens")
    shutil.rmtree(place / "pair")
    yield place
    shutil.rmtree(place)  # gigabytes


def test_it_trains_resumes_evaluates_and_exports(folder):
    killed_after(folder, "stage1", "step-00000001")
    done = pipeline.run(folder, "stage1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from step" in done.stdout
    pipeline.run_all(folder, "stage2")
    summary = json.loads((folder / "outputs/stage1/training.json").read_text())
    counts = {row["group"]: (row["parameters"], row["learning_rate"]) for row in summary["parameters"]}
    assert counts == {"connector": (591_168, 1e-3), "vision": (22_056_192, 1e-5), "language": (134_515_008, 1e-5)}
    with safe_open(folder / "data/backbones/language_model/model.safetensors", "pt") as before:
        started = before.get_tensor("model.embed_tokens.weight")
    with safe_open(folder / "outputs/stage2/model.safetensors", "pt") as after:
        trained = after.get_tensor("language_model.model.embed_tokens.weight")
    assert (started.dtype, trained.dtype) == (torch.bfloat16, torch.float32)
    assert 0 < (trained - started.float()).abs().max() < 1e-2

    (folder / "outputs/stage2").rename(folder / "outputs/stage3")  # two stages show it; a third costs time alone
    pipeline.run_all(folder, "evaluation", "flops")
    result = json.loads((folder / "outputs/metrics/evaluation.json").read_text())
    assert set(result["tasks"]) == {"question"}
    assert all(0 < result["tasks"]["question"][mode]["loss"] < 20 for mode in SCORED_MODES)

    command = [sys.executable, "-c", LOAD, str(folder / "outputs/stage3")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    settings = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    loaded = subprocess.run(command, check=False, **settings)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.split("\n")[0] == "157162368 torch.float32 (2, 3, 224, 224) 3"


def write_clips(folder):
    """Four clips of two frames to train on, one to validate and one to test with."""
    splits = ["train"] * 4 + ["validation", "test"]
    rows = []
    for number, split in enumerate(splits):
        clips.write_clip(folder / f"{number}.mp4", [frame + number for frame in clips.grey_frames(2, 320, 240)])
        rows.append({"file_name": f"{number}.mp4", "question": "How bright is it?", "answer": "Dark, then bright."})
        rows[-1]["split"] = split
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def killed_after(folder, stage, state):
    """Start a stage and kill it as soon as it has written a state, or while it does."""
    process = subprocess.Popen(
        pipeline.command(stage), cwd=folder, env=pipeline.environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if list(folder.glob(f".scratch/{stage}/*/{state}")):
            break
        time.sleep(0.02)
    assert process.poll() is None, "the stage ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(folder.glob(f".scratch/{stage}/*/step-*"))
