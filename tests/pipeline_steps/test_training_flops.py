"""Training FLOPs of a run against the count of its single steps, and what the count depends on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline_steps.common import params
from pipeline_steps.common.flop_results import FlopsResult
from pipeline_steps.common.metrics import StreamingResult
from pipeline_steps.common.params import TRAINING_STAGES
from pipeline_steps.flops.__main__ import measure
from pipeline_steps.monitoring.mfu import StepFlops
from pipeline_steps.report import training_flops
from pipeline_steps.streaming.loader import Loader, plan_stage
from pipeline_steps.streaming.statistics import count
from pipeline_steps.training.parameters import GROUPS, group_of
from pipeline_steps.training.schema import MixtureEntry
from tests.model.tiny import make_model
from tests.pipeline_steps import packed
from tests.pipeline_steps.packed import clips, open_split, streaming, write

EVERYTHING = (MixtureEntry(source="*", task="*", weight=1.0),)
BATCH, SAMPLES = 8, 200
LOSSES = dict(zip(TRAINING_STAGES, ("all_text", "answer_only", "answer_only"), strict=True))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_split(write(tmp_path_factory.mktemp("packed"), clips(90, text_every=4), 30))


def settings_of(stage, **objective):
    """Section training.<stage>, with its loss and without second passes unless said."""
    section = getattr(params.read(params.ROOT / "params.yaml", "training").training, stage)
    objective = section.objective.model_copy(update={"second_pass_probability": 0.0, **objective})
    return section.model_copy(update={"loss": LOSSES[stage], "objective": objective})


def run(dataset, model):
    """(stages' json, what was read, FLOPs of every step of all stages) of a run with one plan per step."""
    stages, counted, steps = {}, {}, 0.0
    flops, section = StepFlops(model, packed.SIZE), streaming()
    trained = {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for stage in TRAINING_STAGES:
        asked = packed.stage(mixture=EVERYTHING, text_share=0.25, num_samples=SAMPLES)
        sizes = {"batch_size": BATCH, "tokens_per_frame": model.config.tokens_per_frame}
        plan = plan_stage(dataset, asked, section, stage=stage, seed=1, **sizes)
        collate = packed.Collator.for_model(model.config, loss=LOSSES[stage], image_replication=1)
        steps += sum(
            flops.of_batch(batch, 1) for batch in Loader(dataset, plan, collate, section, packed.runtime(num_workers=0))
        )
        parameters = [{"group": group, "trainable": int(group in trained)} for group in GROUPS]
        stages[stage] = {"mixture": plan.mixture.statistics(), "parameters": parameters}
        counted[stage] = count(dataset, plan, image_replication=1, tokens_per_frame=model.config.tokens_per_frame)
    return json.loads(json.dumps(stages)), StreamingResult(stages=counted), steps


def result_of(dataset):
    """A `FlopsResult` with the mean lengths of the items with frames."""
    rows = [measure(row, "question_first", 1) for row in dataset.rows if row["kind"] != "text"]
    names = ("num_frames", "num_text_tokens", "num_tokens_before", "num_labels")
    means = {f"mean_{name}": float(np.mean([getattr(row, name) for row in rows])) for name in names}
    return FlopsResult.model_construct(assumptions=means)


@pytest.mark.parametrize("groups", [GROUPS, ("connector",), ("connector", "vision")], ids=" ".join)
@pytest.mark.parametrize(
    "options", [{}, {"coarse_only": True}, {"architecture": "multi_token", "num_visual_tokens_per_frame": 4}], ids=str
)
def test_a_run_costs_what_its_steps_cost(dataset, groups, options):
    model = make_model(max_positions=512, **options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in groups)
    stages, counted, steps = run(dataset, model)
    config = model.config
    config.vision_config.image_size = packed.SIZE
    training = SimpleNamespace(**{stage: settings_of(stage) for stage in TRAINING_STAGES})
    budget = training_flops.budget_of(stages, counted, result_of(dataset), config, training)
    assert budget.num_samples == 3 * SAMPLES
    assert budget.flops == pytest.approx(steps, rel=0.03)


def test_text_and_frozen_weights_cost_less_and_second_passes_more(dataset):
    model = make_model(max_positions=512)
    stages, counted, _ = run(dataset, model)
    flops = result_of(dataset)

    def total(changes=(), **objective):
        training = SimpleNamespace(**{stage: settings_of(stage, **objective) for stage in TRAINING_STAGES})
        given = {stage: values | dict(changes) for stage, values in stages.items()}
        return training_flops.budget_of(given, counted, flops, model.config, training)

    whole = total().flops
    text = {"mixture": {"text": {"num_samples": SAMPLES}}}
    assert total(text).flops < 0.5 * whole
    frozen = [{"group": group, "trainable": int(group == "connector")} for group in GROUPS]
    assert total({"parameters": frozen}).flops < 0.8 * whole
    once, always = whole, total(second_pass_probability=1.0).flops
    assert total(second_pass_probability=0.25).flops == pytest.approx(once + 0.25 * (always - once))
    assert always > once


def test_a_budget_is_unknown_without_a_stage_its_lengths_or_its_configuration(dataset):
    model = make_model(max_positions=512)
    stages, counted, _ = run(dataset, model)
    training = SimpleNamespace(**{stage: settings_of(stage) for stage in TRAINING_STAGES})
    rest = (result_of(dataset), model.config, training)
    assert training_flops.budget_of(stages, counted, *rest) is not None
    assert training_flops.budget_of(stages, None, *rest) is None
    assert training_flops.budget_of(stages, counted, rest[0], None, training) is None
    assert training_flops.budget_of({**stages, "stage2": {"num_steps": 3}}, counted, *rest) is None
    assert training_flops.budget_of({**stages, "stage2": {"mixture": {}}}, counted, *rest) is None
    other = {**stages, "stage2": stages["stage2"] | {"mixture": {"unheard": {"num_samples": 1}}}}
    assert training_flops.budget_of(other, counted, *rest) is None
    assert training_flops.budget_of({"stage1": stages["stage1"]}, counted, *rest) is None
    assert training_flops.read_config("nowhere/config.json", 56) is None
