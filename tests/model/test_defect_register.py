"""Mistakes that research code of this kind has made before, each with the test that guards against it.

Ids in the register: B01 to B35 were known to those who made them, N01 to N21 were found later by reading and
rerunning. REGISTER says of every id where its guard is; the marker `register` names the id that a test below guards.
"""

import ast
import inspect
import math
import re
from dataclasses import dataclass

import pytest
import torch

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration
from model.constants import IGNORE_INDEX
from pipeline_steps.training.objectives.entropy import attention_entropy
from tests.model.tiny import MODES, PAD, as_batch, make_batch, make_model, one_sample, rows_of, with_options
from tests.objectives import step, training_model
from tests.pipeline import ROOT


@dataclass(frozen=True)
class Elsewhere:
    """`file::test` below tests/."""

    test: str


@dataclass(frozen=True)
class NotApplicable:
    reason: str


HERE = "here"  # a test of this file with the marker register(id)
REGISTER = {
    "B01": HERE,
    "B02": HERE,
    "B03": HERE,
    "B04": HERE,
    "B05": HERE,
    "B06": HERE,
    "B07": Elsewhere("pipeline_steps/test_evaluation.py::test_every_scored_token_weighs_the_same"),
    "B08": HERE,
    "B09": Elsewhere("pipeline_steps/test_mixture.py::test_mixture_statistics_count_the_served_samples"),
    "B10": Elsewhere("pipeline_steps/test_tokens.py::test_too_many_dropped_items_or_none_left_fail_the_stage"),
    "B11": Elsewhere("test_end_to_end.py::test_every_stage_changed_the_weights_and_served_its_text_share"),
    "B12": Elsewhere("pipeline_steps/test_shards.py::test_webdataset_reads_the_shard"),
    "B13": Elsewhere("pipeline_steps/test_shards.py::test_full_disk_error_names_the_path"),
    "B14": HERE,
    "B15": HERE,
    "B16": Elsewhere("pipeline_steps/test_training_kills.py::test_twenty_kills_do_not_change_the_result"),
    "B17": Elsewhere("pipeline_steps/test_tokens.py::test_foreign_or_missing_shards_are_rejected"),
    "B18": Elsewhere("model/test_foveated_encoder.py::test_patch_features_equal_the_librarys"),
    "B19": HERE,
    "B20": Elsewhere("test_params.py::test_composition_is_the_one_of_dvc_exp_run"),
    "B21": HERE,
    "B22": Elsewhere("pipeline_steps/test_chat.py::test_prompts_depend_on_source_and_kind"),
    "B23": Elsewhere("pipeline_steps/test_evaluation.py::test_nothing_to_score_is_a_user_error"),
    "B24": Elsewhere("pipeline_steps/test_plan.py::test_batches_fill_but_never_exceed_the_budget"),
    "B25": HERE,
    "B26": Elsewhere("benchmarks/test_modes.py::test_memory_is_linear_in_the_frames"),
    "B27": HERE,
    "B28": Elsewhere("pipeline_steps/test_collate.py::test_question_first_inserts_the_frames_after_the_question"),
    "B29": HERE,
    "B30": Elsewhere("test_end_to_end.py::test_evaluation_has_every_task_in_every_mode"),
    "B31": Elsewhere("test_end_to_end.py::test_report_is_one_self_contained_page"),
    "B32": Elsewhere("test_end_to_end.py::test_evaluation_has_every_task_in_every_mode"),
    "B33": Elsewhere("pipeline_steps/test_mixture.py::test_empty_group_is_an_error"),
    "B34": HERE,
    "B35": NotApplicable("no fused loss kernel is used: only labelled positions are projected to the vocabulary"),
    "N01": Elsewhere("pipeline_steps/test_mixture.py::test_every_item_occurs_once_per_epoch_of_its_task"),
    "N02": Elsewhere("test_end_to_end.py::test_every_stage_changed_the_weights_and_served_its_text_share"),
    "N03": Elsewhere(
        "model/test_modeling_foveated_vlm.py::test_loss_and_logits_of_a_sample_do_not_depend_on_its_batch"
    ),
    "N04": HERE,
    "N05": Elsewhere("model/test_wrong_input.py::test_backbones_saved_in_bf16_are_trained_in_fp32"),
    "N06": Elsewhere("pipeline_steps/test_shard_plan.py::test_same_media_in_two_given_splits_are_rejected"),
    "N07": Elsewhere("pipeline_steps/test_evaluation.py::test_scores_cover_all_modes_and_do_not_depend_on_the_batch"),
    "N08": Elsewhere(
        "pipeline_steps/test_distributed_training.py::test_the_learning_curve_does_not_depend_on_the_number_of_processes"
    ),
    "N09": Elsewhere("test_end_to_end.py::test_the_commands_of_dvc_give_the_same_bytes"),
    "N10": Elsewhere("pipeline_steps/test_training_kills.py::test_twenty_kills_do_not_change_the_result"),
    "N11": Elsewhere("test_pipeline_contract.py::test_every_parameter_is_read"),
    "N12": Elsewhere(
        "pipeline_steps/test_optimizers.py::"
        "test_every_parameter_is_in_exactly_one_group_and_only_backbones_are_not_connector"
    ),
    "N13": Elsewhere("test_end_to_end.py::test_a_missing_stage_is_named"),
    "N14": NotApplicable("a stage publishes its last weights, or those of the lowest loss over the validation items"),
    "N15": Elsewhere("pipeline_steps/test_frames.py::test_frames_are_uniform_over_the_whole_clip"),
    "N16": Elsewhere("pipeline_steps/test_multiple_choice.py::test_scores_are_those_of_each_option_alone"),
    "N17": HERE,
    "N18": Elsewhere("test_end_to_end.py::test_every_stage_changed_the_weights_and_served_its_text_share"),
    "N19": Elsewhere("model/test_compiled.py::test_compiled_hot_paths_are_whole_graphs_with_the_same_results"),
    "N20": HERE,
    "N21": HERE,
}


def functions_of(file) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def marks(test) -> list[pytest.Mark]:
    return getattr(test, "pytestmark", []) if inspect.isfunction(test) else []


def test_every_id_has_one_entry_and_every_guard_exists():
    assert list(REGISTER) == [f"B{n:02}" for n in range(1, 36)] + [f"N{n:02}" for n in range(1, 22)]
    here = [mark.args[0] for test in globals().values() for mark in marks(test) if mark.name == "register"]
    assert sorted(here) == [name for name, entry in REGISTER.items() if entry == HERE]
    for name, entry in REGISTER.items():
        if isinstance(entry, Elsewhere):
            file, test = entry.test.split("::")
            assert test in functions_of(ROOT / "tests" / file), f"{name}: {entry.test} is not there"
        if isinstance(entry, NotApplicable):
            assert len(entry.reason) > 30


def run(model, **changes):
    return model(**with_options(make_batch(model.config.tokens_per_frame) | {"mode": "fine"} | changes))


# ---------------------------------------------------------------- queries that look


def likeness_of_looks(**options) -> float:
    """Mean correlation between the tokens of eight queries on the same frame, at the start of training."""
    model = make_model(num_visual_tokens_per_frame=8, **options)
    if model.query_projection.bias is not None:
        torch.nn.init.normal_(model.query_projection.bias, std=0.088)
    with torch.no_grad():
        tokens = run(model, mode="coarse").visual_tokens
    return torch.stack([torch.corrcoef(frame) for frame in tokens])[:, ~torch.eye(8, dtype=torch.bool)].mean().item()


@pytest.mark.register("B01")
@pytest.mark.parametrize("attention", ["deep", "shallow"])
def test_different_queries_find_different_things_from_the_start(attention):
    """Queries started at a spread of .02 beside a bias: planned and static looks were the same vector."""
    assert FoveatedVLMConfig().query_init_std == 1.0
    assert make_model(query_dim=2000).static_query.std().item() == pytest.approx(1.0, rel=0.1)
    assert likeness_of_looks(attention=attention) < 0.4
    assert likeness_of_looks(attention=attention, query_init_std=0.02, query_bias=True) > 0.9  # the defect


@pytest.mark.register("B02")
def test_the_query_projection_has_no_bias():
    """A bias was most of what entered the vision encoder, so that all queries attended alike."""
    model = make_model()
    assert FoveatedVLMConfig().query_bias is False
    assert model.query_projection.bias is None
    assert torch.equal(model.query_projection(torch.zeros(1, 24)), torch.zeros(1, 32))


@pytest.mark.register("B03")
@torch.no_grad()
def test_a_batch_has_one_mode():
    """The mode was drawn for every sample of a batch, and the loss rose."""
    model = make_model()
    with pytest.raises(ValueError, match="must be one of coarse, fine, autoregressive"):
        run(model, mode=["coarse", "fine", "coarse", "fine"])
    assert (run(model, mode="coarse").queries == model.static_query).all()
    planned = run(model, mode="fine").queries
    assert [(query == model.static_query).all().item() for query in planned] == [True, False, False, True, True, False]


@pytest.mark.register("B04")
@torch.no_grad()
def test_a_shallow_query_chooses_where_to_look():
    """Attention of the shallow query was uniform, whatever the query."""
    model = make_model(attention="shallow", num_visual_tokens_per_frame=2)
    weights = run(model, mode="coarse", output_attentions=True).attention_weights  # [1, F, H, 2, N + 1]
    assert attention_entropy(weights).mean() < 0.95 * math.log(17)
    assert (weights[..., 0, :] - weights[..., 1, :]).abs().sum(-1).mean() > 0.2


def changes_between_paths(training: bool, **options) -> None:
    """Every kind of attention in every mode after every other, for a while: finite, and the same each time."""
    for attention in ("deep", "shallow"):
        model, losses = make_model(attention=attention).train(training), {}
        for _ in range(3):
            for mode in MODES:
                output = run(model, mode=mode, **options)
                assert torch.isfinite(output.loss)
                assert losses.setdefault(mode, output.loss.item()) == output.loss.item()
        assert len(set(losses.values())) == 3


@pytest.mark.register("B05")
def test_deep_and_shallow_share_one_cache_of_keys_and_values_in_training():
    """The fine pass assumed the shallow query's cache and failed after 26 steps, when the other kind came."""
    changes_between_paths(training=True)


@pytest.mark.register("B06")
@torch.no_grad()
def test_deep_and_shallow_share_one_cache_of_keys_and_values_in_evaluation():
    """Validation had its own path to the cache with the same assumption, and failed at step 500."""
    changes_between_paths(training=False, output_attentions=True)


@pytest.mark.register("N04")
@torch.no_grad()
def test_a_shallow_model_is_shallow_frame_by_frame_too():
    """Autoregressive mode used the deep walk whatever the configuration said."""
    model, walks = make_model(attention="shallow"), []
    model.vision_encoder.attend = lambda *arguments, **options: walks.append(1)
    assert run(model, mode="autoregressive", output_attentions=True).attention_weights.shape[0] == 1
    assert walks == []
    one_frame = one_sample(make_batch(), 2)
    fine, autoregressive = (model(**one_frame, mode=mode).token_loss for mode in ("fine", "autoregressive"))
    torch.testing.assert_close(fine, autoregressive, atol=1e-5, rtol=0)


@pytest.mark.register("B08")
@torch.no_grad()
def test_a_pass_reads_the_whole_batch_at_once():
    """A loop over samples made every batch one of size 1, and the counted FLOPs and samples wrong."""
    model, walks, readings = make_model(), [], []
    model.vision_encoder.encoder.layer[0].register_forward_hook(lambda module, args, output: walks.append(len(args[0])))
    model.language_model.model.layers[0].register_forward_hook(lambda module, args, out: readings.append(len(args[0])))
    # all rows (71); text before the frames (12), text alone (15) and 6 frames, then the rest; one frame per sample
    expected = {"coarse": [71], "fine": [33, 44], "autoregressive": [3, 3, 3, 3, 71]}
    for mode in MODES:
        walks.clear(), readings.clear()
        run(model, mode=mode)
        assert readings == expected[mode]
        assert walks[0] == 6  # the frames of all samples


# ---------------------------------------------------------------- options that are read


# A change of every option, and what it needs beside it to show
CHANGES = {
    "architecture": ("multi_token", {}),
    "attention": ("shallow", {}),
    "query_dim": (10, {}),
    "query_init_std": (0.5, {}),
    "query_bias": (True, {}),
    "tie_first_query": (False, {}),
    "query_source": ("static", {}),
    "attention_temperature": (0.5, {}),
    "learnable_temperature": (True, {"attention_temperature": 0.5}),
    "hard_attention": ("top_k", {}),
    "attention_top_k": (2, {"hard_attention": "top_k"}),
    "num_visual_tokens_per_frame": (4, {}),
    "token_aggregation": ("mean", {"num_visual_tokens_per_frame": 4}),
    "num_passes": (2, {}),
    "frame_downsampling": (2, {}),
    "fovea_size": (2, {"frame_downsampling": 2}),
    "query_update": ("add", {}),
    "coarse_only": (True, {}),
    "blind": (True, {}),
    "frame_time_embedding": ("sinusoidal", {}),
    "visual_scale": (0.3, {}),
    "max_num_frames": (2, {}),
    "visual_token_id": (65, {}),
}
READ_BY_THE_PIPELINE = {"layout": "pipeline_steps/streaming/collate.py"}


def effect(**options) -> dict:
    """What a network of these options does with a batch: losses, parameters, gradients, refusals."""
    model = make_model(**options).train()
    try:
        output = model(**make_batch(model.config.tokens_per_frame), mode="fine")
    except ValueError as error:
        return {"refused": str(error)}
    output.loss.backward()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": round(output.loss.item(), 5), "learns": shapes}


@pytest.mark.register("B19")
@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_what_the_network_does(name):
    """An ablation equalled its baseline because nothing read its option."""
    options = set(inspect.signature(FoveatedVLMConfig.__init__).parameters) - {"self", "kwargs"}
    assert set(CHANGES) | set(READ_BY_THE_PIPELINE) | {"vision_config", "text_config"} == options
    assert all(f"config.{option}" in (ROOT / file).read_text() for option, file in READ_BY_THE_PIPELINE.items())
    value, besides = CHANGES[name]
    assert value != getattr(make_model().config, name)
    assert effect(**besides) != effect(**besides | {name: value})


@pytest.mark.register("B21")
def test_a_coarse_only_network_has_nothing_to_plan_with():
    """The option for training without planned queries was not read, and the fine network was trained."""
    model = make_model(coarse_only=True).train()
    output = run(model, mode="fine", num_plans=2)
    assert (output.queries == model.static_query).all()
    assert not [name for name, _ in model.named_parameters() if "planner" in name or "first_query" in name]


# ---------------------------------------------------------------- types, files, compilation


@pytest.mark.register("B14")
@torch.no_grad()
def test_a_model_loads_in_the_type_that_is_asked_for(tmp_path):
    """The keyword for the type had another name in the installed library, so the weights came in another one."""
    make_model().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = FoveatedVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
        assert {p.dtype for p in model.parameters()} == {dtype}
        batch = make_batch()
        for mode in MODES:
            output = model(**batch | {"pixel_values": batch["pixel_values"].to(dtype)}, mode=mode)
            assert torch.isfinite(output.loss)


@pytest.mark.register("B15")
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_mask_of_any_type_is_the_same_mask(mode):
    """Masks of integers met masks of floats."""
    model, batch = make_model(), rows_of(make_batch(), [0, 1, 2, 3], 2, 1)
    expected = model(**batch, mode=mode).token_loss
    for dtype in (torch.bool, torch.int32, torch.uint8, torch.float32):
        mask = batch["attention_mask"].to(dtype)
        assert torch.equal(model(**batch | {"attention_mask": mask}, mode=mode).token_loss, expected)


def trained(**switches) -> list[float]:
    """Losses of three optimizer steps."""
    model = make_model().train()
    if "checkpointing" in switches:
        model.gradient_checkpointing_enable()
    if "backend" in switches:
        model.compile_hot_paths(backend=switches["backend"], dynamic=False)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(3):
        loss = run(model).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.register("B25")
def test_compilation_and_checkpointing_together_train_as_neither_does():
    """The loss was not a number from the first step on."""
    torch._dynamo.reset()
    expected = trained()
    assert expected[0] > expected[1] > expected[2]
    assert trained(checkpointing=True, backend="aot_eager") == pytest.approx(expected, abs=1e-5)
    torch._dynamo.reset()


@pytest.mark.register("B27")
@torch.no_grad()
def test_a_compiled_model_is_saved_under_the_plain_names(tmp_path):
    """Compilation put a prefix before every name of a checkpoint, which then fitted nothing."""
    model = make_model()
    expected = run(model).token_loss
    model.compile_hot_paths(backend="eager")
    model.save_pretrained(tmp_path)
    again, loaded = FoveatedVLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded.values())
    assert torch.equal(run(again.eval()).token_loss, expected)


# ---------------------------------------------------------------- what is learned


@pytest.mark.register("B29")
def test_the_end_of_turn_is_learned_although_it_is_the_padding():
    """The id that the loss left out was the padding's, which is the end of turn's: models never learned to stop."""
    model, batch = make_model().train(), make_batch()
    last = batch["attention_mask"].sum(1) - 1
    batch["labels"].fill_(IGNORE_INDEX)
    batch["input_ids"][torch.arange(4), last] = PAD
    batch["labels"][torch.arange(4), last] = PAD
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        output = model(**batch, mode="fine")
        assert (output.token_loss > 0).sum().item() == 4
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    assert all((model(**batch, mode=mode).correct.sum() == 4).item() for mode in MODES)


@pytest.mark.register("N17")
def test_a_batch_of_text_only_is_trained_like_any_other():
    """A batch without frames crashed on an empty tensor of frames."""
    model, batch = make_model().train(), rows_of(make_batch(), [1, 1])
    assert len(batch["pixel_values"]) == 0
    without = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    for mode in MODES:
        model.zero_grad()
        loss = model(**batch, mode=mode).loss
        assert loss.item() == model(**without, mode=mode).loss.item() > 0
        loss.backward()
        assert model.language_model.model.embed_tokens.weight.grad.abs().max() > 0


@pytest.mark.register("N20")
def test_losses_of_all_passes_are_over_the_same_tokens_and_the_coarse_one_is_not_zero():
    """Each mode scored another span of tokens, and the coarse loss was logged as 0 throughout."""
    model, batch = make_model(), make_batch()
    asked = batch["labels"] != IGNORE_INDEX
    losses = {}
    for mode in MODES:
        output = model(**batch, mode=mode)
        assert torch.equal(output.token_loss > 0, asked)
        losses[mode] = output.loss.item()
    assert len(set(losses.values())) == 3
    values, _ = step(training_model(model, coarse={"weight": 0.5}), as_batch(batch))
    assert values["loss_coarse"] == pytest.approx(losses["coarse"], abs=1e-6)
    assert "loss_coarse" not in step(training_model(model), as_batch(batch))[0]  # not computed: not 0


# ---------------------------------------------------------------- errors that are not swallowed

BLANKET = {"Exception", "BaseException", "RuntimeError", "OutOfMemoryError", "MemoryError"}


def handlers():
    """(file and line, names of the exceptions, whether it raises) of every exception handler of the code."""
    for file in (file for folder in ("model", "pipeline_steps", "workflow") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "BaseException"
                raises = any(isinstance(inner, ast.Raise) for part in node.body for inner in ast.walk(part))
                yield f"{file.relative_to(ROOT)}:{node.lineno}", set(re.findall(r"\w+", caught)), raises


@pytest.mark.register("B34")
def test_running_out_of_memory_stops_the_run():
    """Steps that ran out of memory were skipped: half of the batches of a run, the long clips among them."""
    found = [place for place, names, raises in handlers() if names & BLANKET and not raises]
    assert [place.split(":")[0] for place in found] == ["pipeline_steps/training/checks.py"]  # before the first step
    model = make_model()
    model.vision_encoder.encode = lambda *arguments, **options: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        run(model)


@pytest.mark.register("N21")
def test_no_handler_catches_whatever_comes():
    """Fifteen handlers caught everything: evaluation, logging and decoding failed without a word."""
    found = list(handlers())
    assert len(found) > 10
    broad = [place for place, names, raises in found if names & {"Exception", "BaseException"} and not raises]
    assert broad == []
