"""The files in conf/study: what they compose to, and what is refused before anything runs."""

import pytest
import yaml

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.flop_formulas import training_step
from pipeline_steps.common.params import ROOT
from pipeline_steps.flops import iso, scales
from pipeline_steps.study import design, plan, results
from pipeline_steps.study.design import Seeds
from tests.pipeline_steps.studies import ALL, TRAINING, make

NAMES = sorted(path.stem for path in (ROOT / "conf/study").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_study_of_the_repository_can_be_read(name):
    design.read_study(name)


@pytest.mark.slow  # a third of a second per arm
@pytest.mark.parametrize("name", NAMES)
def test_every_study_of_the_repository_is_valid(name):
    study = design.read_study(name)
    cells, _ = design.with_factors(design.cells_of(study), {})
    for arm in study.arms:
        design.parameters_of(next(cell for cell in cells if cell.arm == arm))


def test_every_arm_meets_every_seed_and_budget():
    cells = design.cells_of(make(budgets={"x1": 1, "x2": 2}))
    assert [cell.name for cell in cells][:4] == [
        "none-x1-seed1.1.1",
        "none-x1-seed2.2.2",
        "none-x2-seed1.1.1",
        "none-x2-seed2.2.2",
    ]
    assert len(cells) == 8


def test_an_arm_may_have_its_own_seeds_and_budgets():
    arms = {"none": {}, "A6": {"overrides": ["ablation=A6"], "seeds": [7], "budgets": ["x2"]}}
    cells = design.cells_of(make(arms=arms, budgets={"x1": 1, "x2": 2}))
    assert [cell.name for cell in cells if cell.arm == "A6"] == ["A6-x2-seed7.7.7"]


def test_seeds_set_training_backbones_and_data():
    cell = design.cells_of(make(seeds=[{"training": 5, "backbones": 6, "data": 7}]))[0]
    found = design.parameters_of(cell)
    assert found["seed"] == 5
    assert found["backbones"]["embedded"]["seed"] == 6
    assert found["sources"]["procedural"]["seed"] == found["sources"]["chat"]["seed"] == found["shards"]["seed"] == 7


def test_a_budget_scales_the_samples_of_every_stage():
    found = [
        design.parameters_of(cell)["training"] for cell in design.cells_of(make(budgets={"x1": 1, "half": 0.5}))[::2]
    ]
    for stage in params.TRAINING_STAGES:
        assert found[1][stage]["num_samples"] == found[0][stage]["num_samples"] / 2


def test_an_arm_with_a_factor_has_that_many_samples_of_every_budget():
    arms = {"none": {}, "A6": {"overrides": ["ablation=A6"], "sample_factor": 0.25}}
    study = make(arms=arms, budgets={"x1": 1, "x2": 2, "same": {"flops_of": "x2"}}, seeds=[1])
    flops = {"none-x2-seed1.1.1": 3e14, "A6-x2-seed1.1.1": 1e14}
    ready, _ = design.with_factors(design.cells_of(study), flops)
    assert {cell.name.partition("-seed")[0]: cell.factor for cell in ready} == {
        **{"none-x1": 1, "none-x2": 2},
        **{"A6-x1": 0.25, "A6-x2": 0.5, "A6-same": 1.5},
    }


def test_an_arm_with_a_rate_factor_has_that_multiple_of_every_learning_rate():
    converging = [
        "training.stage3.schedule=converging",
        "training.stage3.converged_learning_rate={connector:0.004,vision:0.002,language:0.001}",
    ]
    arms = {"none": {"overrides": converging}, "double": {"overrides": converging, "rate_factor": 2}}
    study = make(arms=arms, seeds=[1])
    plain, double = (design.parameters_of(cell)["training"] for cell in design.cells_of(study))
    assert design.arm_parameters(study, "double")["training"]["stage2"] == double["stage2"]
    for stage in params.TRAINING_STAGES:
        for name in ("learning_rate", "converged_learning_rate"):
            rates, doubled = plain[stage].pop(name), double[stage].pop(name)
            assert doubled == (rates and {group: 2 * rate for group, rate in rates.items()})
    assert double == plain
    assert design.composed(tuple(converging))["training"]["stage3"]["converged_learning_rate"]["connector"] == 0.004


def test_equal_flops_follow_from_the_runs_at_another_budget():
    study = make(budgets={"x2": 2, "same": {"flops_of": "x2"}}, seeds=[1, 2])
    cells = design.cells_of(study)
    assert [cell.name for cell in cells if cell.budget == "same"] == ["A6-same-seed1.1.1", "A6-same-seed2.2.2"]
    ready, waiting = design.with_factors(cells, {"none-x2-seed1.1.1": 3e14, "A6-x2-seed1.1.1": 2e14})
    assert [cell.name for cell in waiting] == ["A6-same-seed2.2.2"]
    (cell,) = (cell for cell in ready if cell.budget == "same")
    assert cell.factor == 3.0
    assert design.parameters_of(cell)["training"]["stage3"]["num_samples"] == 3 * TRAINING["stage3"]["num_samples"]


def test_training_flops_set_the_samples_of_pretrained_backbones():
    study = make(arms={"big": {"overrides": ["scale=smollm2_135m"]}}, budgets={"C": {"flops": 1.6e16}}, seeds=[1])
    (cell,), waiting = design.with_factors(design.cells_of(study), {})
    assert not waiting
    config = scales.scaled("135M", design.composed(cell.overrides)["model"])
    objective = params.check("conf", design.composed(cell.overrides)).training.stage3.objective
    expected = 1.6e16 / training_step(config, iso.BUDGET_SAMPLE, objective)
    found = design.parameters_of(cell)["training"]
    samples = [found[stage]["num_samples"] for stage in params.TRAINING_STAGES]
    assert sum(samples) == pytest.approx(expected, abs=3)
    assert samples[0] == samples[1] == pytest.approx(12 * samples[2], rel=0.01)  # 1,000,000 to 83,000 as in conf/scale


@pytest.mark.parametrize(
    ("overrides", "flops", "message"),
    [
        ([], 1e16, r"arm a: budget C gives training FLOPs, which are counted for SmolLM2 of 135M, 360M, 1.7B"),
        (["scale=smollm2_135m", "shards.image_size=448"], 1e16, "DINOv2-small and frames of 224 px"),
        (["scale=smollm2_135m"], 8e11, "and each of 3 stages needs one"),
        (["scale=smollm2_135m"], 1e9, r"arm a: budget C has 1e\+09 FLOPs, but a training sample costs \d"),
    ],
)
def test_training_flops_that_cannot_be_counted_are_refused(overrides, flops, message):
    study = make(arms={"a": {"overrides": overrides}}, budgets={"C": {"flops": flops}}, seeds=[1])
    with pytest.raises(UserError, match=message):
        design.with_factors(design.cells_of(study), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"series": {"one": ["none"], "two": ["A6", "none"]}},
            "have different numbers: one 1, two 2",
        ),
        (
            {"series": {"one": ["none"], "two": ["none"]}},
            "belongs to one place of one series, but none has several",
        ),
        ({"series": {"one": []}}, "series.one"),
        ({"series": {"one": ["none", "A7"]}}, r"series one: there is no arm A7 \(there are: none, A6\)"),
        ({"budgets": {"C": {"flops": 0}}}, "budgets.C"),
        ({"budgets": {"x1": 1, "same": {"flops_of": "x3"}}}, "budget same: flops_of is 'x3', expected one of: x1"),
        (
            {"arms": {"none": {}, "A6": {"budgets": ["same"]}}, "budgets": {"x1": 1, "same": {"flops_of": "x1"}}},
            "arm A6: budget same needs budget x1 of arm A6",
        ),
        (
            {"arms": {"none": {}, "A6": {"seeds": [9]}}, "budgets": {"x1": 1, "same": {"flops_of": "x1"}}},
            "arm A6: budget same needs seeds training=9 backbones=9 data=9 of arm none",
        ),
        ({"arms": {"none": {"overrides": ["seed=9"]}}}, "arm none: seed=9: seeds come from `seeds`"),
        ({"arms": {"none": {}, "A6": {"baseline": "A7"}}}, "arm A6: its baseline 'A7' is no arm of this study"),
        ({"headline": ["B1"]}, "headline 'B1' is no comparison of this study"),
        ({"arms": {"A 6": {}}}, "arm 'A 6': use letters"),
        ({"budgets": {"x0": 0}}, "budget x0 is 0.0: expected a factor above 0"),
        ({"arms": {"none": {"budgets": ["x3"]}}}, r"arm none: there is no budget 'x3' \(there are: x1\)"),
        ({"arms": {"none": {"sample_factor": 0}}}, "arms.none.sample_factor"),
        ({"arms": {"none": {"rate_factor": -1}}}, "arms.none.rate_factor"),
        (
            {"arms": {"none": {"sample_factor": 0.5}}, "budgets": {"C": {"flops": 1e15}}},
            "arm none: sample_factor 0.5 changes nothing, as its budgets are FLOPs. Remove it",
        ),
        ({"armz": {}}, "armz: Extra inputs"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": [True]}, "seeds.0.*: Input should be a valid integer"),
        ({"seeds": ["1", 2.0]}, "seeds.0.*: Input should be a valid integer"),
        ({"budgets": {}}, "budgets: .* at least 1 item"),
        ({"budgets": {"x1": True}}, "budgets.x1.float: Input should be a valid number"),
        ({"arms": {"none": {"seeds": []}}}, "arms.none.seeds: .* at least 1 item"),
        ({"arms": {"none": {"budgets": []}}}, "arms.none.budgets: .* at least 1 item"),
        ({"arms": {"none": None}}, "arm none: nothing follows its name. Write `none: {}`"),
        ({"arms": None}, "arms: Input should be"),
        ({"groups": {"gaze": []}}, "groups.gaze: .* at least 1 item"),
        ({"groups": {"gaze": ["card", "follow", "card"]}}, "group gaze: card is listed twice"),
        ({"groups": {"all": ["card"]}}, "group all: this is the name of every scored task"),
    ],
)
def test_a_wrong_design_is_refused_with_the_file(study_files, changes, message):
    (study_files / "mine.yaml").write_text(yaml.safe_dump(ALL | changes, sort_keys=False))
    with pytest.raises(UserError, match=message) as error:
        design.cells_of(design.read_study("mine"))
    assert "mine.yaml" in str(error.value)


def test_an_empty_file_names_the_keys_of_a_study(study_files):
    (study_files / "mine.yaml").write_text("# later\n")
    with pytest.raises(UserError, match=r"mine.yaml: expected keys such as 'question:' and 'arms:' .* found nothing"):
        design.read_study("mine")


def test_an_unknown_study_lists_those_that_exist(study_files):
    (study_files / "mine.yaml").write_text(yaml.safe_dump(ALL))
    with pytest.raises(UserError, match=r"other.yaml: there is no such study \(there are: mine\)"):
        design.read_study("other")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ablation=A66", "A66"),
        ("model.query_dims=3", "query_dims"),
        ("model.query_dim=three", "model.query_dim"),
        ("model.fovea_size=4", "model.fovea_size=4 with frame_downsampling=1"),
        ("training.stage2.objective.text.weight=0.0", "training.stage2"),
    ],
)
def test_an_arm_that_cannot_be_trained_is_refused_by_name(override, message):
    study = make(arms={"none": {}, "mine": {"overrides": [override]}})
    with pytest.raises(UserError, match=f"(?s)arm mine: .*{message}"):
        design.parameters_of(design.cells_of(study)[-1])


def test_an_ablation_that_changes_nothing_is_refused():
    study = make(base=["model.coarse_only=true"])
    with pytest.raises(UserError, match=r"arm A6: .*changes no parameter"):
        design.parameters_of(design.cells_of(study)[-1])


OBJECTS = ["sources.procedural.world=objects", "sources.procedural.objects.cutouts=/tmp"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": {"gaze": ["card", "folow"]}}, r"group gaze: arm none has no task folow \(there are: card, follow"),
        ({"base": OBJECTS, "groups": {"gaze": ["card"]}}, r"group gaze: arm none has no task card \(there are: become"),
        ({"base": OBJECTS, "groups": {"new": ["place_new"]}}, None),
        ({"base": OBJECTS}, None),  # the default groups
        ({"base": ["sources.collect=[folder]"], "groups": {"gaze": ["card", "folow"]}}, None),
    ],
)
def test_a_group_of_unknown_tasks_is_refused_before_training(clean_tree, changes, message):
    study = make(**changes)
    if message is None:
        design.check_tasks(study)
        return
    with pytest.raises(UserError, match=message):
        plan.make_plan("mine", study)


def test_the_same_run_twice_is_refused():
    with pytest.raises(UserError, match=r"1 run.s. twice: none-x1-seed1.1.1"):
        design.cells_of(make(arms={"none": {"seeds": [1, {"training": 1, "backbones": 1, "data": 1}]}}))


def test_the_split_is_that_of_the_composed_parameters_and_of_every_arm(clean_tree):
    assert design.split_of(make(base=["++evaluation.split=validation"])) == "validation"
    validated = {"overrides": ["evaluation.split=validation"]}
    assert design.split_of(make(arms={"none": validated})) == "validation"
    with pytest.raises(UserError, match=r"arm A6: evaluation.split is validation, but test in arm none"):
        plan.make_plan("mine", make(arms={"none": {}, "A6": validated}))


NO_ANSWERS = [f"training.{stage}.objective.{term}" for stage in ("stage2", "stage3")
              for term in ("text.weight=0.0", "next_frame.weight=1.0")]  # fmt: skip


@pytest.mark.parametrize(
    ("seeds", "b1", "text"),
    [
        ([1, 2, 3], {}, "With 3 pair(s) of runs and 4 questions no difference can be significant (smallest"),
        (list(range(8)), {}, None),
        (list(range(8)), {"seeds": [1, 2, 3]}, "With 3 pair(s) of runs and 4 questions no difference of B1 can be"),
        (list(range(8)), {"seeds": [91]}, None),  # without a pair
        ([1], {"seeds": [1, 2]}, "With 1 pair(s) of runs and 4 questions no difference can be"),
        ([1, 2, 3], {"overrides": NO_ANSWERS}, "With 3 pair(s) of runs and 2 questions no difference can be"),
    ],
)
def test_a_design_that_cannot_decide_says_so(seeds, b1, text):
    arms = {"none": {}, "A6": {"overrides": ["ablation=A6"]}, "B1": {"overrides": ["ablation=B1"]} | b1}
    found = results.power_warning(make(arms=arms, seeds=seeds))
    assert found is None if text is None else found.startswith(text)


def test_seeds_are_non_negative():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Seeds(training=-1, backbones=0, data=0)
