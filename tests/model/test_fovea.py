"""The fovea: low-resolution frames, a window where the query looks, in every mode alike.

Frames of 56 px have 4 x 4 patches; reduced by 2, 2 x 2. The window has 2 x 2 or 3 x 3 patches.
"""

import pytest
import torch

from model import FoveatedVLMConfig, visual_tokens
from model.fovea import allowed_at_low_resolution, downsample, on_full_grid, window_around_peak
from model.option_checks import RANGES
from model.queries import QueryAttention
from tests import checkpoints
from tests.model.test_frame_step import assert_equal, both, captured, lively  # noqa: F401 - a fixture
from tests.model.tiny import MODES, NUM_FRAMES, make_batch, make_model, one_sample, rows_of

FOVEA = {"frame_downsampling": 2, "fovea_size": 2}
NETWORKS = [
    FOVEA,
    {**FOVEA, "fovea_size": 3, "num_visual_tokens_per_frame": 3, "query_update": "add"},
    {**FOVEA, "hard_attention": "top_k", "attention_top_k": 3, "attention_temperature": 0.5},
    {**FOVEA, "query_update": "gated"},
    {**FOVEA, "tie_first_query": False, "frame_time_embedding": "sinusoidal"},
    {"frame_downsampling": 2},
    {"frame_downsampling": 2, "attention": "shallow"},
]


def batch_for(model):
    return make_batch(model.config.tokens_per_frame)


# ---------------------------------------------------------------- parts


def test_downsampling_averages_squares():
    frames = torch.arange(16.0).view(1, 1, 4, 4)
    assert downsample(frames, 2, 1).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert downsample(frames, 1, 1) is frames
    with pytest.raises(ValueError, match=r"42 x 42 px. With frame_downsampling=2 and patches of 14 px.*multiple of 28"):
        downsample(torch.zeros(1, 3, 42, 42), 2, 14)
    with pytest.raises(ValueError, match="28 x 56 px"):
        downsample(torch.zeros(1, 3, 28, 56), 2, 14)


@pytest.mark.parametrize(
    ("peak", "factor", "size", "rows", "columns"),
    [
        (0, 2, 2, (0, 2), (0, 2)),
        (3, 2, 2, (2, 4), (2, 4)),
        (1, 2, 3, (0, 3), (1, 4)),  # one patch beyond the right edge: moved inwards
        (2, 4, 2, (5, 7), (1, 3)),  # the middle of the low-resolution patch
        (0, 2, 4, (0, 4), (0, 4)),
    ],
)
def test_the_window_lies_around_the_peak_within_the_frame(peak, factor, size, rows, columns):
    attention = torch.full((1, 2, 1, 5), 0.05)
    attention[..., 0] = 0.9  # the class token is no place
    attention[0, :, :, 1 + peak] = 0.1
    side = 2 * factor
    grid = torch.arange(side**2).view(side, side)
    found = window_around_peak(attention, factor, size)
    assert found.tolist() == [grid[slice(*rows), slice(*columns)].flatten().tolist()]


def test_a_window_larger_than_the_frame_is_refused():
    with pytest.raises(ValueError, match="fovea_size=5 exceeds the 4 x 4 patches"):
        window_around_peak(torch.ones(1, 1, 1, 5), 2, 5)


def test_attention_on_the_full_grid_keeps_its_sum_and_its_places():
    weights = torch.rand(2, 3, 4, 1, 1 + 4 + 4).softmax(-1)
    window = torch.tensor([[0, 1, 4, 5], [10, 11, 14, 15], [5, 6, 9, 10]])
    full = on_full_grid(weights, 2, window)
    assert full.shape == (2, 3, 4, 1, 17)
    torch.testing.assert_close(full.sum(-1), weights.sum(-1))
    torch.testing.assert_close(full[..., 0], weights[..., 0])
    torch.testing.assert_close(full[:, 1, :, :, 16], weights[:, 1, :, :, 4] / 4 + weights[:, 1, :, :, 8])
    torch.testing.assert_close(full[:, 0, :, :, 16], weights[:, 0, :, :, 4] / 4)  # outside of the window


def test_a_low_resolution_patch_is_allowed_if_a_part_is():
    allowed = torch.zeros(1, 17, dtype=torch.bool)
    allowed[0, 1 + 7] = True  # row 1, column 3
    assert allowed_at_low_resolution(allowed, 2)[0].tolist() == [False, False, True, False, False]


# ---------------------------------------------------------------- the network


@torch.no_grad()
def test_the_window_is_the_whole_frame_at_its_largest():
    """With a window of all patches the token depends on every pixel; with a small one only on its own, beyond what the
    low resolution shows."""
    model = make_model(**FOVEA)
    sample = one_sample(make_batch(), 2)  # one frame
    sample.pop("labels")

    def token(pixels):
        options = {"output_attentions": True}
        return model.encode_frames(**{**sample, "pixel_values": pixels}, options=options)[-1]

    pixels = sample["pixel_values"]
    before = token(pixels)
    window = before.attention_weights[-1, 0, :, 0, 1:].mean(0).topk(4).indices  # has weight beyond the low patches'
    checkerboard = torch.ones(56, 56)
    checkerboard[::2, ::2] = checkerboard[1::2, 1::2] = -1  # invisible at half the resolution
    changed = [
        (token(pixels + mask(patch) * checkerboard).visual_tokens - before.visual_tokens).abs().max() > 1e-4
        for patch in range(16)
    ]
    assert sorted(window.tolist()) == [number for number, is_changed in enumerate(changed) if is_changed]
    assert len(window) == 4


def mask(patch: int) -> torch.Tensor:
    """1 in one of the 4 x 4 patches of a frame."""
    row, column = divmod(patch, 4)
    found = torch.zeros(56, 56)
    found[14 * row : 14 * row + 14, 14 * column : 14 * column + 14] = 1
    return found


@torch.no_grad()
def test_the_coarse_pass_and_a_reduced_network_see_the_low_resolution_alone():
    pixels = make_batch()["pixel_values"]
    checkerboard = torch.ones(56, 56)
    checkerboard[::2, ::2] = checkerboard[1::2, 1::2] = -1
    for model in (make_model(**FOVEA), make_model(frame_downsampling=2)):
        found = [
            model(**{**make_batch(), "pixel_values": frames}, mode="coarse").visual_tokens
            for frames in (pixels, pixels + checkerboard)
        ]
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    fine = [
        make_model(**FOVEA)(**{**make_batch(), "pixel_values": frames}).visual_tokens
        for frames in (pixels, pixels + checkerboard)
    ]
    assert (fine[0] - fine[1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_network_of_low_resolution_is_one_for_reduced_frames():
    low, plain = make_model(frame_downsampling=2), make_model()
    batch = make_batch()
    small = {**batch, "pixel_values": downsample(batch["pixel_values"], 2, 14)}
    for mode in MODES:
        torch.testing.assert_close(low(**batch, mode=mode).token_loss, plain(**small, mode=mode).token_loss)


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@torch.no_grad()
def test_planning_as_often_as_there_are_frames_ends_at_the_autoregressive_tokens(network):
    model = lively(**network)
    batch = {name: value for name, value in batch_for(model).items() if name != "labels"}
    options = {"num_plans": max(NUM_FRAMES), "output_attentions": True}
    parallel = model.encode_frames(**batch, mode="fine", options=options)[-1]
    for kind in ("dynamic", "static"):
        options = {"frame_step": kind, "output_attentions": True}
        assert_equal(parallel, model.encode_frames(**batch, mode="autoregressive", options=options)[-1])


def recorded_windows(monkeypatch) -> list:
    """To which every window is appended."""
    windows = []

    def recorded(*arguments):
        windows.append(window_around_peak(*arguments))
        return windows[-1]

    monkeypatch.setattr(visual_tokens, "window_around_peak", recorded)
    return windows


@torch.no_grad()
def test_another_query_moves_the_window_to_its_own_peak(monkeypatch):
    """Of the attention to the four low-resolution patches of one frame, each of which covers 2 x 2 patches."""
    model, windows = lively(**FOVEA), recorded_windows(monkeypatch)
    encoded, _ = model._encode(make_batch()["pixel_values"][:1], torch.zeros(1), None, QueryAttention(), False)
    corners = (0, 2, 8, 10)
    for query in torch.randn(32, 1, 1, 24, generator=torch.Generator().manual_seed(0)):
        model._attend(query, encoded, torch.zeros(1), QueryAttention(), False)
        _, seen = model.vision_encoder.attend(model._query_rows(query), encoded, output_attentions=True)
        corner = corners[seen[-1, 0, :, 0, 1:].mean(0).argmax()]
        assert windows[-1].tolist() == [[corner, corner + 1, corner + 4, corner + 5]]
    assert len({window[0, 0].item() for window in windows}) > 2


@pytest.mark.parametrize("step", [None, "dynamic", "static"])
@torch.no_grad()
def test_the_window_lies_where_the_planned_query_looks(step, monkeypatch):
    """At the peak of the attention that the same query has at the low-resolution patches alone."""
    model, windows = lively(**FOVEA), recorded_windows(monkeypatch)
    batch = {name: value for name, value in batch_for(model).items() if name != "labels"}
    mode = "autoregressive" if step else "fine"
    passes = model.encode_frames(**batch, mode=mode, options={"frame_step": step, "num_plans": 1})
    encoded, _ = model._encode(batch["pixel_values"], torch.zeros(6), None, QueryAttention(), False)
    expected = []
    for one in passes:
        _, seen = model.vision_encoder.attend(
            model._query_rows(one.queries),
            encoded,
            output_attentions=True,
            query_attention=QueryAttention(explicit=True),
        )
        expected.append(window_around_peak(seen[-1], 2, 2))
    if mode == "fine":  # a window for the planned pass, none for the coarse one
        assert torch.equal(windows[-1], expected[-1])
        assert not torch.equal(expected[0], expected[-1])
    else:  # one call per time; of a growing cache, with the samples that are as long, else with all that have frames
        text = model.packed_text(batch["input_ids"], batch["attention_mask"], batch["num_frames"])
        in_order = [expected[-1][text.places.time_of_frame == time] for time in range(max(NUM_FRAMES))]
        counts = batch["num_frames"][batch["num_frames"] > 0]
        if step == "static":
            windows = [window[counts > time] for time, window in enumerate(windows)]
        assert torch.equal(torch.cat(windows), torch.cat(in_order))
    assert len(set(map(tuple, expected[-1].tolist()))) > 1


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_captured_step_sees_the_same(network, captured):  # noqa: F811
    model = lively(**network)
    for rows in ([0, 3, 2], [3, 2, 0]):
        part = rows_of(batch_for(model), rows)
        assert_equal(*both(model, part))
    assert len(captured) == 1


@pytest.mark.parametrize("source", ["static", "random", "fixed", "oracle"])
def test_every_query_source_has_a_window(source, captured):  # noqa: F811
    targets = torch.zeros(6, 16, dtype=torch.bool)
    targets[range(5), [3, 9, 1, 15, 4]] = True
    given = {"target_patches": targets} if source == "oracle" else {}
    found = both(lively(**FOVEA), make_batch(), query_source=source, **given)
    assert_equal(*found)
    if source == "oracle":  # patches at full resolution get weight from the low-resolution patch around them only
        off_target = found[0].attention_weights[:, 3, ..., 1:][..., [0, 1, 4, 5]]  # the other corner of frame 3
        assert off_target.abs().max() == 0
        assert found[0].attention_weights[:, 3, ..., 1 + 15].min() > 0


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(mode, network):
    model = lively(**network)
    batch = batch_for(model)
    losses = model(**batch, mode=mode).token_loss
    for row in (0, 2, 3):
        alone = one_sample(batch, row)
        found = model(**alone, mode=mode).token_loss[0]
        torch.testing.assert_close(losses[row, : len(found)], found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_every_trained_parameter(frozen):
    model = make_model(**FOVEA)
    model.vision_encoder.requires_grad_(not frozen)
    model.train()
    model(**make_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lm_head" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_frozen_and_checkpointed_vision_gives_the_same_loss():
    losses = []
    for change in (
        lambda model: None,
        lambda model: model.vision_encoder.requires_grad_(False),
        lambda model: model.gradient_checkpointing_enable(),
    ):
        model = make_model(**FOVEA).train()
        change(model)
        loss = model(**make_batch()).loss
        loss.backward()
        losses.append((loss.item(), model.planner.weight.grad.norm().item()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@torch.no_grad()
def test_a_session_sees_what_the_model_sees(made):
    from pipeline_steps.common.checkpoint import load_checkpoint

    processor = load_checkpoint(made.checkpoint)[1]
    model = checkpoints.make_lively_model(layout="question_first", **FOVEA).eval()
    frames = list(torch.randint(0, 256, (3, 70, 70, 3), dtype=torch.uint8).numpy())
    session = model.stream(processor, "Which digits does red show?")
    maps = [session.push(frame) for frame in frames]
    inputs = processor(text="Which digits does red show?", videos=frames)
    found = model.encode_frames(**inputs, mode="autoregressive", options={"output_attentions": True})[-1]
    torch.testing.assert_close(session.visual_tokens[:3], found.visual_tokens, atol=1e-5, rtol=1e-5)
    assert maps[0].shape == (4, 4)
    assert maps[0].sum().item() == pytest.approx(1)


def test_the_option_survives_saving_and_a_default_has_none(tmp_path):
    model = make_model(**FOVEA)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert (again.config.frame_downsampling, again.config.fovea_size) == (2, 2)
    torch.testing.assert_close(again(**make_batch()).loss, model(**make_batch()).loss)
    assert (FoveatedVLMConfig().frame_downsampling, FoveatedVLMConfig().fovea_size) == (1, 0)
    assert RANGES["fovea_size"][0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fovea_size": 2}, "fovea_size=2 with frame_downsampling=1: the whole frame has full resolution"),
        ({**FOVEA, "attention": "shallow"}, "attention='shallow'.*Set attention to 'deep'"),
        ({**FOVEA, "coarse_only": True}, "coarse_only=True.*query_source='static'"),
        ({**FOVEA, "architecture": "multi_token"}, "architecture='multi_token'"),
        ({"frame_downsampling": 0}, "frame_downsampling=0 must be an integer from 1"),
        ({"fovea_size": 1.5}, "fovea_size=1.5 must be an integer from 0"),
    ],
)
def test_what_has_no_window_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FoveatedVLMConfig(**options)


def test_compiled_layers_give_the_same():
    plain, compiled = make_model(**FOVEA), make_model(**FOVEA)
    compiled.compile_hot_paths(backend="eager")  # what a graph of a layer holds, without generating code
    for mode in ("coarse", "fine"):
        losses = [model(**make_batch(), mode=mode).loss for model in (plain, compiled)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    gradients = [model.planner.weight.grad for model in (plain, compiled)]
    torch.testing.assert_close(*gradients)
