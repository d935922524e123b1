"""The fixed frame step: equal to autoregressive mode with a growing cache, few launches, no wait for the host."""

import copy
import gc
import itertools
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import frame_step, modeling_foveated_vlm
from tests.model.launches import Launches, true_depths
from tests.model.test_generate import left_padded, question
from tests.model.tiny import LAYOUTS, NUM_FRAMES, make_batch, make_model, rows_of

MAX_LAUNCHES = 1_100  # of a frame step at the depths of DINOv2-small and SmolLM2-135M; views launch nothing
NETWORKS = [
    {},
    {"query_update": "add", "tie_first_query": False},
    {"num_visual_tokens_per_frame": 3},
    {"num_visual_tokens_per_frame": 3, "query_update": "add"},
    {"num_visual_tokens_per_frame": 3, "query_update": "gated"},
    {"num_visual_tokens_per_frame": 2, "token_aggregation": "weighted"},
    {"attention": "shallow"},
    {"attention_temperature": 0.3},
    {"learnable_temperature": True, "hard_attention": "top_k", "attention_top_k": 3},
    {"hard_attention": "gumbel", "attention": "shallow"},
    {"frame_time_embedding": "sinusoidal", "query_bias": True},
]


def lively(**options):
    """A network whose biases, scales and time projection are not at their neutral start."""
    model = make_model(**({"visual_scale": 2.0} | options))
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter.abs().max() == 0:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


class Recording(TorchDispatchMode):
    """Operations with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.calls.append((function, args, kwargs or {}, results))
        return results


def record(function, device):
    """What `capture_cuda` does, without CUDA: a replay repeats the operations on the same memory, and runs no code."""
    with Recording() as recording:
        outputs = function()

    def replay():
        for operation, args, kwargs, results in recording.calls:
            again = operation(*args, **kwargs)
            for kept, value in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if torch.is_tensor(kept) and kept is not value:
                    kept.copy_(value)

    return replay, outputs


@pytest.fixture
def captured(monkeypatch):
    """Takes the captured step wherever it is possible, its capture replaced; the devices of all captures."""
    captures = []

    def capture(function, device):
        captures.append(device)
        return record(function, device)

    monkeypatch.setattr(frame_step, "capture_cuda", capture)
    choose = modeling_foveated_vlm.choose_step

    def chosen(model, wanted=None):
        kind = choose(model, wanted)
        return "graph" if kind == "static" and frame_step.graph_obstacle(model) is None else kind

    monkeypatch.setattr(modeling_foveated_vlm, "choose_step", chosen)
    return captures


@torch.no_grad()
def both(model, batch, **options):
    batch = {name: value for name, value in batch.items() if name != "labels"}
    found = []
    for kind in ("dynamic", None):
        torch.manual_seed(2)  # for random queries
        given = options | {"output_attentions": True, "frame_step": kind}
        found.append(model.encode_frames(**batch, mode="autoregressive", options=given)[-1])
    return found


def assert_equal(one, other):
    for name in ("visual_tokens", "queries", "attention_weights"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_equal_to_the_growing_cache(network, layout):
    model = lively(**network)
    batch = make_batch(model.config.tokens_per_frame, layout)
    assert (model.config.tokens_per_frame > 1) == (network.get("num_visual_tokens_per_frame") == 3)
    for rows in ([0], [0, 3, 2], [1, 2, 0, 3]):  # frames 3; 3, 2, 1; 0, 1, 3, 2
        part = rows_of(batch, rows, left=2, right=1)
        part["frame_times"] = torch.arange(len(part["pixel_values"])) * 0.7
        dynamic, static = both(model, part)
        assert len(static.visual_tokens) == sum(NUM_FRAMES[row] for row in rows)
        assert (static.queries - static.queries[0]).abs().max() > 0.1
        assert_equal(dynamic, static)


@pytest.mark.parametrize("network", [{}, {"num_visual_tokens_per_frame": 3, "query_update": "add"}], ids=str)
@pytest.mark.parametrize("source", ["static", "random", "fixed", "oracle"])
def test_equal_for_every_query_source(source, network, captured):
    model = lively(**network)
    targets = torch.zeros(6, 16, dtype=torch.bool)
    targets[range(5), [3, 9, 1, 15, 4]] = True
    given = {"target_patches": targets} if source == "oracle" else {}
    batch = make_batch(model.config.tokens_per_frame)
    assert_equal(*both(model, batch, query_source=source, **given))
    assert captured


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_captured_step_is_used_again_and_equal(network, captured):
    model = lively(**network)
    for layout in LAYOUTS:
        batch = make_batch(model.config.tokens_per_frame, layout)
        for rows in ([0, 3, 2], [3, 2, 0]):
            part = rows_of(batch, rows)
            part["pixel_values"] = part["pixel_values"] + len(captured)
            assert_equal(*both(model, part))
    assert len(captured) == 1
    assert_equal(*both(model, rows_of(batch, [0])))  # another number of samples
    assert len(captured) == 2
    with torch.no_grad():
        model.planner.bias += 1
        model.language_model.model.layers[0].mlp.up_proj.weight *= 2
    assert_equal(*both(model, rows_of(batch, [0])))  # changed in place: the same step
    assert len(captured) == 2
    model.planner.weight.data = model.planner.weight.data * 2
    assert_equal(*both(model, rows_of(batch, [0])))  # weights elsewhere: another step
    assert len(captured) == 3


@pytest.mark.parametrize("network", [{}, {"attention": "shallow"}], ids=str)
def test_a_captured_step_serves_every_temperature(network, captured):
    model, weights = lively(**network), []
    for temperature in (0.3, 0.6, 2.0, 1.0, 0.3):
        model.config.attention_temperature = temperature
        found = both(model, rows_of(make_batch(), [0, 3, 2]))
        assert_equal(*found)
        weights.append(found[1].attention_weights)
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(weights))
    assert torch.equal(weights[-1], weights[0])
    assert len(captured) == 2  # no logits are divided at 1


def test_a_clip_without_numbers_leaves_nothing_in_a_captured_step(captured):
    model = make_model()
    long, short = rows_of(make_batch(), [0]), rows_of(make_batch(), [3])
    expected = both(model, short)
    both(model, long | {"pixel_values": torch.full_like(long["pixel_values"], torch.nan)})
    assert_equal(expected[0], both(model, short)[1])
    assert captured == [model.device]


def test_a_step_serves_in_and_outside_of_inference_mode(captured):
    model, batch = make_model(), rows_of(make_batch(), [0])
    with torch.inference_mode():
        first = both(model, batch)
    assert_equal(*first)
    assert_equal(*both(model, batch))
    with torch.inference_mode():
        assert_equal(*both(model, batch))
    assert len(captured) == 1


def test_few_captured_steps_are_kept_and_none_beyond_the_model(captured):
    model, batch = make_model(), make_batch()
    for size in range(1, frame_step.MAX_GRAPHS + 3):
        both(model, rows_of(batch, [0] * size))
    assert len(captured) == frame_step.MAX_GRAPHS + 2
    assert len(frame_step._graphs[model]) == frame_step.MAX_GRAPHS
    copy.deepcopy(model)  # holds none of them
    kept = len(frame_step._graphs)
    del model
    gc.collect()
    assert len(frame_step._graphs) < kept


def test_a_capture_is_on_the_device_of_the_model(monkeypatch):
    """And not on the current one. CUDA's part of a capture is replaced, so it says nothing about the capture itself."""
    current, seen = ["cuda:0"], []

    @contextmanager
    def on(device):
        before, current[0] = current[0], str(device)
        yield
        current[0] = before

    @contextmanager
    def graph(made, stream):
        seen.append(f"{made} on {stream}, current {current[0]}")
        yield

    class Graph:
        def __init__(self):
            self.device = current[0]

        def __str__(self):
            return f"graph of {self.device}"

        def replay(self):
            pass

    replaced = {"device": on, "graph": graph, "CUDAGraph": Graph, "synchronize": lambda: seen.append(current[0])}
    for name, value in (replaced | {"Stream": lambda device: f"stream of {device}"}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(frame_step, "_capture_stream", cache(frame_step._capture_stream.__wrapped__))
    for device in (torch.device("cuda", 1), torch.device("cuda", 2)):
        _, outputs = frame_step.capture_cuda(lambda: current[0], device)
        assert outputs == str(device)
        assert seen == [str(device), f"graph of {device} on stream of {device}, current {device}"]
        seen.clear()
    assert current == ["cuda:0"]


def test_a_captured_step_is_of_one_device(monkeypatch):
    model, keys = make_model(), []
    inputs = frame_step.FrameInputs([], [], torch.zeros(1), torch.ones(1, dtype=torch.bool))
    for index in (0, 1, 0):
        monkeypatch.setattr(type(model), "device", torch.device("cuda", index))
        keys.append(frame_step.step_key(model, inputs, 1, 8, "planned"))
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


@pytest.mark.parametrize("kind", ["static", "graph"])
@torch.no_grad()
def test_answers_go_on_from_the_frames_and_are_those_of_the_whole_prompt(kind, request):
    if kind == "graph":
        request.getfixturevalue("captured")
    model = make_model(visual_scale=3.0)
    settings = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    read = []
    model.language_model.model.embed_tokens.register_forward_hook(lambda _, args, out: read.append(args[0].shape))
    inputs = [question(layout=layout) for layout in LAYOUTS]
    inputs.append(left_padded(rows_of(make_batch(), [0, 1, 2, 3], 0, 2)))
    for asked in inputs:
        whole = model.generate(**asked, **settings, options={"frame_step": "dynamic"})
        model.language_model.model.embed_tokens._forward_hooks.clear()
        going_on = model.generate(**asked, **settings)
        assert torch.equal(whole.sequences, going_on.sequences)
        for one, other in zip(whole.logits, going_on.logits, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert "StaticCache" in type(going_on.past_key_values).__name__


def test_what_follows_the_frames_is_all_that_an_answer_reads():
    model, lengths = make_model(), []
    norm = model.language_model.model.norm
    norm_forward = norm.forward
    norm.forward = lambda rows: lengths.append(rows.shape[1]) or norm_forward(rows)
    model.generate(**question(), max_new_tokens=3, eos_token_id=None, do_sample=False)
    assert lengths == [20 - 4, 1, 1]  # 20 tokens of text, 4 of them before the frames


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
    ],
)
def test_other_ways_to_generate_read_the_whole_prompt(options):
    model = make_model(visual_scale=3.0)
    found = []
    for kind in ("dynamic", None):
        torch.manual_seed(0)
        settings = {"max_new_tokens": 5, "eos_token_id": None, "do_sample": False} | options
        found.append(model.generate(**question(), **settings, options={"frame_step": kind}))
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
@torch.no_grad()
def test_a_cuda_graph_is_the_eager_step(network, dtype):
    """Captured once and replayed for other frames, for one sample and three; and answers follow."""
    model = lively(**network).to("cuda", dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for rows in ([0], [0, 3, 2], [3, 2, 0]):
        part = rows_of(make_batch(model.config.tokens_per_frame), rows)
        part = {name: value.to("cuda") for name, value in part.items() if name != "labels"}
        found = []
        for kind in ("static", "graph", None, "graph"):
            given = {"output_attentions": True, "frame_step": kind}
            found.append(model.encode_frames(**part, mode="autoregressive", options=given)[-1])
        for other in found[1:]:
            for name in ("visual_tokens", "queries", "attention_weights"):
                one, two = getattr(found[0], name), getattr(other, name)
                torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)
    assert len(frame_step._graphs[model]) == 2
    asked = {name: value.to("cuda") for name, value in question().items()}
    if model.config.tokens_per_frame == 1:
        settings = {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
        answers = [model.generate(**asked, **settings, options={"frame_step": kind}) for kind in ("static", "graph")]
        assert torch.equal(*answers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("source", ["static", "random", "fixed", "oracle"])
@torch.no_grad()
def test_a_cuda_graph_takes_the_queries_and_targets_of_every_call(source):
    """Several samples, whose static queries are one tensor; other noise or targets for the same frames."""
    model, batch = lively().to("cuda"), rows_of(make_batch(), [0, 3, 2])
    batch = {name: value.to("cuda") for name, value in batch.items() if name != "labels"}
    found = []
    for seed in (1, 2):
        targets = torch.zeros(6, 16, dtype=torch.bool, device="cuda")
        targets[:, 5 * seed] = True
        given = {"query_source": source} | ({"target_patches": targets} if source == "oracle" else {})
        for kind in ("static", "graph"):
            torch.manual_seed(seed)
            options = given | {"output_attentions": True, "frame_step": kind}
            found.append(model.encode_frames(**batch, mode="autoregressive", options=options)[-1])
    for eager, captured in (found[:2], found[2:]):
        for name in ("visual_tokens", "queries", "attention_weights"):
            torch.testing.assert_close(getattr(eager, name), getattr(captured, name), atol=1e-4, rtol=1e-4)
    assert len(frame_step._graphs[model]) == 1
    assert torch.equal(found[0].visual_tokens, found[2].visual_tokens) == (source == "static")


# ---------------------------------------------------------------- where the fixed step is not possible


def with_hook(model):
    model.language_model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def with_other_angles(model):
    model.language_model.model.rotary_emb.rope_type = "dynamic"


def with_other_linear(model):
    class Other(torch.nn.Linear):
        pass

    model.language_model.model.layers[0].self_attn.q_proj.__class__ = Other


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_hook, "forward hooks are registered"),
        (with_other_angles, "rope_type='dynamic'"),
        (with_other_linear, "a linear layer is a Other"),
    ],
)
@torch.no_grad()
def test_where_it_is_not_possible_the_growing_cache_reads_with_a_note(change, reason, monkeypatch):
    model, said = make_model(), []
    change(model)
    monkeypatch.setattr(frame_step.logger, "warning_once", said.append)
    assert frame_step.choose_step(model) == "dynamic"
    assert len(said) == 1
    assert reason in said[0]
    with pytest.raises(ValueError, match=f"frame_step='static' is not possible: .*{reason}"):
        frame_step.choose_step(model, "static")


def test_autocast_gradients_and_training_take_the_growing_cache(monkeypatch):
    model, said = make_model(), []
    monkeypatch.setattr(frame_step.logger, "warning_once", said.append)
    assert frame_step.choose_step(model) == "dynamic"  # gradients are on: no note
    with torch.no_grad():
        assert frame_step.choose_step(model.train()) == "dynamic"
        model.eval()
        assert not said
        with torch.autocast("cpu", torch.bfloat16):
            assert frame_step.choose_step(model) == "dynamic"
        assert len(said) == 1
        assert frame_step.choose_step(model) == "static"
        assert frame_step.choose_step(model, "dynamic") == "dynamic"
        with pytest.raises(ValueError, match="a graph needs cuda"):
            frame_step.choose_step(model, "graph")
        with pytest.raises(ValueError, match="frame_step='fast' is not one of graph, static, dynamic or None"):
            frame_step.choose_step(model, "fast")


# ---------------------------------------------------------------- launches


@pytest.mark.parametrize("options", [{}, {"num_visual_tokens_per_frame": 2, "query_update": "add"}], ids=str)
@torch.no_grad()
def test_a_frame_step_has_few_launches_and_never_waits(options):
    """The whole of a frame's work, the choice of its keys and values included, as the difference of 3 and 2 frames."""
    model, counts = true_depths(**options), {}
    for frames in (2, 3):
        ids = torch.tensor([[5] * 4 + [64] * frames * model.config.tokens_per_frame + [7]] * 2)
        pixels, num_frames = torch.randn(2 * frames, 3, 28, 28), torch.tensor([frames] * 2)
        with Launches() as launches:
            model.encode_frames(ids, None, pixels, num_frames, mode="autoregressive")
        counts[frames] = launches
    assert 500 < counts[3].count - counts[2].count <= MAX_LAUNCHES
    assert len(counts[3].waits) == len(counts[2].waits)
    assert "repeat_interleave" not in counts[3].waits  # whose size the host knows


@torch.no_grad()
def test_the_count_sees_launches_and_waits_of_the_growing_cache():
    model, counts = true_depths(), []
    for frames in (2, 3):
        ids = torch.tensor([[5] * 4 + [64] * frames + [7]])
        given = {"pixel_values": torch.randn(frames, 3, 28, 28), "num_frames": torch.tensor([frames])}
        with Launches() as launches:
            model.encode_frames(ids, **given, mode="autoregressive", options={"frame_step": "dynamic"})
        counts.append(launches)
    assert counts[1].count - counts[0].count > MAX_LAUNCHES
    assert len(counts[1].waits) - len(counts[0].waits) == 2
