"""The stages on a device: training in every precision, resuming, micro-batches, model FLOPs; evaluation."""

import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("pydantic", reason="the parameters of the stages need pydantic")
pytest.importorskip("pyarrow", reason="the items of the stages need pyarrow")
pytest.importorskip("simplejpeg", reason="the frames of the stages need simplejpeg")

from benchmarks.workload import clips
from pipeline_steps.backbones.tokenizer import save_tokenizer, train_tokenizer
from pipeline_steps.common import modes, params
from pipeline_steps.common.checkpoint import save_checkpoint
from pipeline_steps.monitoring.metrics_logger import MetricsLogger
from pipeline_steps.training import train_loop
from pipeline_steps.training.checkpointing import save_state
from pipeline_steps.training.distributed import DistributedContext
from pipeline_steps.training.train_loop import prepare, train_step
from tests.model.tiny import as_batch, make_batch, make_model, preference_batch
from tests.objectives import ALL
from tests.pipeline_steps import packed
from tests.pipeline_steps.test_golden_losses import NUM_STEPS, RUNS, make_run

STEPS = {"fp32": 0.01, "bf16": 0.05}  # optimizers divide small differences of gradients by small gradients


def batch_of(run):
    """As the loader gives it: for a GPU in pinned memory."""
    batch = as_batch(preference_batch() if run.stage == "stage3" else make_batch())
    return batch if run.device == "cpu" else batch.pin_memory()


def run_on(device: str, name: str, folder, objective: dict | None = None, **common):
    """name: of RUNS; objective: changes of the section; common: of training.common."""
    stage, _, optimizer = name.partition(", ")
    run = make_run(stage, "question_first", folder, optimizer or "adamw", objective)
    run.model.to(device)
    run.distributed = DistributedContext(device=device)
    run.common.__dict__.update(common)
    run.runtime.keep_checkpoints = 1
    return run


def steps(run, trainer, first: int = 0, last: int = NUM_STEPS) -> list[float]:
    return [train_step(run, trainer, batch_of(run), step)["loss"] for step in range(first, last)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RUNS)
def test_every_stage_trains_as_on_the_cpu_in_fp32(name, precision, device, tmp_path):
    runs = run_on("cpu", name, tmp_path), run_on(device, name, tmp_path, precision=precision)
    expected, found = (steps(run, prepare(run)) for run in runs)
    assert found == pytest.approx(expected, abs=STEPS[precision])


def test_other_objectives_train_as_on_the_cpu(device, tmp_path):
    losses = []
    for own in ("cpu", device):
        run = run_on(own, "stage2", tmp_path, ALL)
        losses.append(steps(run, prepare(run)))
    assert losses[1] == pytest.approx(losses[0], abs=STEPS["fp32"])


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_add_up_on_the_device(size, device, tmp_path):
    losses = []
    for micro_batch_size in (None, size):
        run = run_on(device, "stage2", tmp_path, micro_batch_size=micro_batch_size)
        losses.append(steps(run, prepare(run)))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_goes_on_from_the_same_numbers(name, ema_decay, device, tmp_path):
    """Weights, optimizer and average come back bit by bit; the steps after are those of an uninterrupted run."""
    run = run_on(device, name, tmp_path, ema_decay=ema_decay)
    loader = {"quarantined": {}, "check_quarantined": lambda found: None, "state_dict": lambda: {"step": 2}, "step": 2}
    run.loader.__dict__.update(loader)
    trainer = prepare(run)
    steps(run, trainer, 0, 2)
    save_state(run, trainer, 2)
    weights = {key: value.detach().clone() for key, value in run.model.state_dict().items()}
    state = {key: value.clone() for key, value in trainer.optimizer.tensors(trainer.names).items()}
    expected = steps(run, trainer, 2)
    again = run_on(device, name, tmp_path, ema_decay=ema_decay)
    again.loader.__dict__.update(step=2, load_state_dict=lambda values: None)
    if name == "stage3":
        again.model.load_state_dict(run.reference.state_dict())  # what the stage before had left
    resumed = prepare(again)
    assert all(torch.equal(value, weights[key]) for key, value in again.model.state_dict().items())
    restored = resumed.optimizer.tensors(resumed.names)
    assert restored.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in restored.items())
    assert {value.device.type for value in weights.values()} == {device}
    assert steps(again, resumed, 2) == (expected if device == "cpu" else pytest.approx(expected, abs=1e-3))


def auto_run(device: str, folder, batch_size: int):
    """A run with samples of three frames, as `choose_micro_batch_size` sees it."""
    run = run_on(device, "stage2", folder, batch_size=batch_size, micro_batch_size="auto")
    run.stage_plan.plan.__dict__.update(starts=np.array([0, batch_size]), order=np.arange(batch_size))
    index = SimpleNamespace(num_tokens=np.full(batch_size, 48), shown_frames=lambda repeats: np.full(batch_size, 3))
    run.train = Numbers(index)
    run.streaming = SimpleNamespace(image_replication=1)
    run.loader.collate = lambda numbers: clips(run.model.config, len(numbers), 3)
    return run


@dataclass
class Numbers:
    """A split whose items are their numbers."""

    index: SimpleNamespace
    image_size: int = 56

    def __getitem__(self, number: int) -> int:
        return number


def test_no_micro_batch_is_chosen_on_a_cpu(tmp_path):
    run = auto_run("cpu", tmp_path, 8)
    assert train_loop.choose_micro_batch_size(run) is None
    train_loop.try_micro_batch(run, run.loader.collate(range(8)), accumulates=True)  # which would be tried


def test_the_micro_batch_that_is_chosen_fits_the_memory(cuda, tmp_path):
    run = auto_run(cuda, tmp_path, 1024)
    assert train_loop.choose_micro_batch_size(run) == 1024
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train_loop.try_micro_batch(run, run.loader.collate(range(256)), accumulates=True)
    needed = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5 * needed / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert 128 <= train_loop.choose_micro_batch_size(run) < 1024
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("name", ["stage1", "stage3"])
def test_model_flops_are_counted(name, device, tmp_path):
    run = run_on(device, name, tmp_path, precision="bf16")
    settings = SimpleNamespace(peak_tflops=None, tensorboard=False, dvclive=False, wandb_project=None)
    if device == "cpu":
        settings.peak_tflops = 1.0  # no table knows it
    run.logger = MetricsLogger(settings, name, NUM_STEPS, tmp_path, run.distributed, "bf16")
    run.logger.bar = SimpleNamespace(set_postfix_str=lambda text: None)
    run.train.image_size = 56
    if run.logger.peak is None:
        pytest.skip(f"the peak of {torch.cuda.get_device_name()} is not in the table: no figure is right")
    steps(run, prepare(run))
    assert 0 < run.logger.speed()["speed/mfu"] < 1


# ---------------------------------------------------------------- evaluation

VOCABULARY, MAX_POSITIONS = 400, 256  # tokens
IMAGE_SIZE = 56
DIGIT = {"colour": "red", "place": "top left", "digits": (1,) * 4, "boxes": ((0.3, 0.3, 0.45, 0.45),) * 4}
EVALUATION = {"split": "train", "batch_size": 4, "max_answers_per_task": 3, "max_answer_tokens": 6}
EVALUATION |= {"bootstrap_samples": 20, "num_threads": torch.get_num_threads()}
DRAWN = ("random", "fixed")  # query sources for which a GPU draws other numbers


@pytest.fixture
def to_evaluate(tmp_path, monkeypatch):
    """A folder with what the stage reads: an untrained network and clips of one to four frames with known boxes."""
    monkeypatch.setattr(packed, "SIZE", IMAGE_SIZE)
    monkeypatch.setattr(packed, "POLICY", packed.POLICY.model_copy(update={"image_size": IMAGE_SIZE}))
    plain = packed.packed_sample

    def with_box(clip):
        objects, item = (DIGIT,), {"assistant": "1", "task": clip.tasks[0], "target": 0}
        return type(plain(clip)).model_validate(plain(clip).model_dump() | {"items": (item,), "objects": objects})

    monkeypatch.setattr(packed, "packed_sample", with_box)
    samples = [packed.Clip(f"clip-{n}", num_frames=1 + n % 4, num_tokens=10 + n % 3) for n in range(6)]
    samples += [packed.Clip(f"caption-{n}", num_frames=2, tasks=("caption",)) for n in range(3)]
    packed.write(tmp_path, samples, 9)
    save_tokenizer(train_tokenizer(VOCABULARY, MAX_POSITIONS), tmp_path / "tokenizer")
    model = make_model(VOCABULARY, MAX_POSITIONS, visual_scale=3.0, query_init_std=30.0)
    options = {**packed.POLICY.model_dump(), "image_replication": 2, "system": ""}
    save_checkpoint(tmp_path / "checkpoint", model, tmp_path / "tokenizer", **options)
    document = yaml.safe_load((params.ROOT / "params.yaml").read_text())
    captions = {} if find_spec("nltk") and find_spec("sacrebleu") else {"max_captions_per_task": 0}
    document["evaluation"] |= EVALUATION | captions
    document["runtime"]["num_workers"] = 0
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


def evaluate(device: str, folder, monkeypatch):
    """(item table, rows of answers and captions, result) of the stage on a device."""
    import pandas as pd

    from pipeline_steps.evaluation import __main__ as evaluation

    places = {"params": "params.yaml", "checkpoint": "checkpoint", "shards": "shards", "tokens": "tokens"}
    places |= {"outputs": f"{device}/evaluation", "metrics": f"{device}/metrics"}
    words = [word for name, place in places.items() for word in (f"--{name}", str(folder / place))]
    monkeypatch.setattr(sys, "argv", ["evaluation", *words])
    monkeypatch.setattr(evaluation, "choose_device", lambda: device)
    evaluation.main()
    written = folder / device / "evaluation"
    texts = [(written / f"{name}.jsonl").read_text() for name in ("answers", "captions")]
    result = json.loads((folder / device / "metrics/evaluation.json").read_text())
    return pd.read_parquet(written / "items.parquet"), texts, result


def test_the_evaluation_gives_the_scores_of_the_cpu(to_evaluate, device, monkeypatch):
    """Scores of all modes and controls, answers, parts of clips, probes and other temperatures."""
    pytest.importorskip("pandas", reason="the stage evaluation needs pandas")
    expected, found = (evaluate(own, to_evaluate, monkeypatch) for own in ("cpu", device))
    assert found[2]["provenance"]["device"] == device
    assert found[1] == expected[1]
    drawn = {name for name, mode in modes.REGISTRY.items() if mode.query_source in DRAWN}
    tables = [table[~table["mode"].isin(drawn)] for table in (expected[0], found[0])]
    assert {"static_query", "oracle_query", "autoregressive"} <= set(tables[0]["mode"])
    for name in ("key", "mode", "num_correct"):
        assert tables[1][name].tolist() == tables[0][name].tolist()
    assert tables[1]["loss_sum"].to_numpy() == pytest.approx(tables[0]["loss_sum"].to_numpy(), abs=1e-3)
    for part in ("temporal", "preliminary", "gaze"):
        one, other = (numbers(result[part]) for result in (expected[2], found[2]))
        assert other == pytest.approx(one, abs=1e-3), part
        assert one
    temperatures = numbers(found[2]["preliminary"]["temperature"])
    assert temperatures["/0/entropy"] < 0.9 * temperatures["/5/entropy"]


def numbers(content, name: str = "") -> dict[str, float]:
    """{place: number} of JSON content, but not of random queries."""
    if "random" in name:
        return {}
    if isinstance(content, dict | list):
        entries = content.items() if isinstance(content, dict) else enumerate(content)
        return {place: value for key, own in entries for place, value in numbers(own, f"{name}/{key}").items()}
    return {} if content is None or isinstance(content, str) else {name: float(content)}
