"""The reference of the speed figures computes what the network computes, on the same weights."""

import pytest
import torch

from benchmarks.original import Original, pad
from model import FoveationOptions
from tests.model.tiny import LAYOUTS, MODES, make_batch, make_model, one_sample, rows_of

SETTINGS = [
    {},
    {"tie_first_query": False},
    {"query_update": "add"},
    {"query_update": "add", "tie_first_query": False, "query_bias": True, "frame_time_embedding": "sinusoidal"},
    {"attention": "shallow"},
    {"coarse_only": True},
    {"attention": "shallow", "coarse_only": True},
    {"architecture": "multi_token", "num_visual_tokens_per_frame": 4},
]
TOLERANCE = 1e-5


def lively(**options):
    """A network in which visual tokens and queries matter, so that a wrong one shows."""
    model = make_model(**{"visual_scale": 1.0} | options)
    for name in ("planner", "time_projection"):
        if hasattr(model, name):
            torch.nn.init.normal_(getattr(model, name).weight)
    for name, weight in model.language_model.model.layers.named_parameters():
        if name.endswith("proj.weight"):
            weight.data *= 8
    return model


def assert_equal(model, batch, mode, num_plans=None):
    ours = model(**batch, mode=mode, options=FoveationOptions(num_plans=num_plans, return_logits=True))
    reference = Original(model)(pad(model.config, **batch), mode, num_plans)
    assert abs(ours.loss - reference.loss) <= TOLERANCE
    mask = batch["attention_mask"].bool()
    for row, own in enumerate(mask):
        found = reference.logits[row, : int(own.sum())]
        assert (ours.logits[row, own] - found).abs().max() <= TOLERANCE
    return ours, reference


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_outputs_are_the_networks(options, layout, mode):
    """Of samples with 3, 0, 1 and 2 frames and different lengths, padded on either side, together and alone."""
    model = lively(**options)
    batch = make_batch(model.config.tokens_per_frame, layout)
    assert_equal(model, batch, mode)
    assert_equal(model, rows_of(batch, [0, 2, 3], left=2, right=3), mode)
    for row in range(4):
        assert_equal(model, one_sample(batch, row), mode)


@torch.no_grad()
@pytest.mark.parametrize("num_plans", [1, 2, 3])
def test_planning_again_is_the_networks(num_plans):
    model, batch = lively(query_update="add"), make_batch()
    assert_equal(model, batch, "fine", num_plans)


def test_the_modes_differ_on_this_network():
    """Else equal outputs would say nothing about the queries."""
    model, batch = lively(), pad(lively().config, **make_batch())
    with torch.no_grad():
        losses = [float(Original(model)(batch, mode).loss) for mode in MODES]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 100 * TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"attention": "shallow"}], ids=str)
def test_gradients_are_the_networks(options, mode):
    gradients = []
    for run in ("ours", "reference"):
        model, batch = lively(**options), make_batch()
        loss = (model(**batch, mode=mode) if run == "ours" else Original(model)(pad(model.config, **batch), mode)).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        if gradient.abs().max():
            torch.testing.assert_close(gradients[1][name], gradient, atol=TOLERANCE, rtol=1e-3, msg=name)
    extra = gradients[1].keys() - gradients[0].keys()
    assert not [name for name in extra if gradients[1][name].abs().max()]


def test_the_first_token_is_the_networks():
    model, batch = lively(), make_batch()
    for row in (0, 1, 3):
        sample = one_sample(batch, row)
        reference = Original(model).first_token(pad(model.config, **sample))
        del sample["labels"]
        assert reference.tolist() == model.generate(**sample, max_new_tokens=1)[:, 0].tolist()


def test_padded_frames_skip_the_vision_encoder_and_pass_the_language_model(monkeypatch):
    model = lively()
    frames, positions = [], []
    embeddings = model.vision_encoder.embeddings
    embeddings.register_forward_hook(lambda module, inputs, output: frames.append(len(inputs[0])))
    model.language_model.lm_head.register_forward_hook(
        lambda module, inputs, output: positions.append(output.shape[:2].numel())
    )
    batch = make_batch()
    padded = pad(model.config, **batch)
    with torch.no_grad():
        Original(model)(padded)
    assert frames == [6]  # of 4 x 3
    assert positions == [4 * (20 + 3)]  # the longest text and clip of any sample: more than the 62 + 6 real ones
    assert padded.pixel_values.shape[:2] == (4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_visual_tokens_per_frame": 4}, "num_visual_tokens_per_frame=4"),
        ({"hard_attention": "top_k"}, "hard_attention='top_k'"),
        ({"query_source": "random"}, "query_source='random'"),
        ({"query_update": "gated"}, "query_update='gated'"),
    ],
)
def test_a_network_that_the_original_could_not_be_is_refused(options, message):
    with pytest.raises(ValueError, match=f"the original had no {message}"):
        Original(make_model(**options))
