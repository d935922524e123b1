"""Checkpointing, compilation and mixed precision change no result of any option."""

import copy

import pytest
import torch

from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration
from tests.model.tiny import (
    MODES,
    VISUAL,
    fine,
    make_batch,
    make_model,
    rows_of,
)


@pytest.mark.parametrize("options", [{}, {"attention": "shallow"}, {"hard_attention": "top_k"}], ids=str)
def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(options):
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = make_model(**options).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.vision_encoder.gradient_checkpointing
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = fine(model, num_plans=2).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        kept.append(sum(sizes))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("options", [{}, {"attention": "shallow"}], ids=str)
@torch.no_grad()
def test_compiled_hot_paths_are_whole_graphs_with_the_same_results(options):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = make_model(**options)
    names = set(model.state_dict())
    expected = {mode: fine(model, mode=mode) for mode in MODES}
    model.compile_hot_paths(backend=count)
    for mode in MODES:
        torch.testing.assert_close(fine(model, mode=mode).token_loss, expected[mode].token_loss, atol=1e-5, rtol=0)
    assert len(graphs) >= (3 if not options else 2)
    before = len(graphs)
    for mode in MODES:
        fine(model, mode=mode)
    assert len(graphs) == before  # nothing is compiled again
    shapes = ([0, 1], [0, 0, 3], [2], [3] * 5, [0, 2, 3, 0, 2, 3, 0], [0], [1, 0, 2, 1])  # samples of the batch
    seen = []
    for rows in (*shapes, *shapes):
        for mode in MODES:
            model(**rows_of(make_batch(), rows), mode=mode)
        seen.append(len(graphs))
    assert seen[-1] == seen[len(shapes) - 1] <= 30  # numbers of samples, frames and tokens are dynamic
    assert set(model.state_dict()) == names  # B27: no prefix in a checkpoint
    torch._dynamo.reset()


def steps_of(options, compiled=None):
    """(loss, gradients) of batches of four, three, five and one samples."""
    model = make_model(**options).train()
    if compiled is not None:
        model.compile_hot_paths(**compiled)
    found = []
    for rows in ([0, 1, 2, 3], [0, 0, 3], [3] * 5, [2]):
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(**rows_of(make_batch(), rows), mode="fine", options={"num_plans": 2}).loss
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    return found


def assert_compiled_trains_alike(options, **compiled):
    torch._dynamo.reset()
    for (loss, gradients), (expected, own) in zip(steps_of(options, compiled), steps_of(options), strict=True):
        assert loss == pytest.approx(expected, abs=1e-5)
        assert gradients.keys() == own.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"attention_temperature": 0.5, "learnable_temperature": True}, marks=pytest.mark.slow),
        pytest.param({"hard_attention": "top_k"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_layers_train_as_plain_ones_do(options):
    assert_compiled_trains_alike(options, backend="aot_eager")


@pytest.mark.slow
@torch.no_grad()
def test_layers_are_compiled_for_any_number_of_heads():
    """torch.compile may treat widths as variable after a second network, as `dynamic=True` does at once."""
    torch._dynamo.reset()
    model = make_model()
    expected = fine(model).loss
    model.compile_hot_paths(backend="eager", dynamic=True)
    torch.testing.assert_close(fine(model).loss, expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()


@pytest.mark.slow
def test_layers_compiled_to_machine_code_train_as_plain_ones_do():
    """torch.compile's own backend: minutes of compilation."""
    assert_compiled_trains_alike({})


@pytest.mark.slow
def test_one_compilation_serves_all_layers():
    """Two layers or six: as many graphs."""
    numbers = []
    for num_layers in (2, 6):
        torch._dynamo.reset()
        graphs, model = [], make_model(attention_temperature=0.5)
        vision, text = copy.deepcopy(model.config.vision_config), copy.deepcopy(model.config.text_config)
        vision.num_hidden_layers = text.num_hidden_layers = num_layers
        options = {"query_dim": 24, "visual_scale": 0.1, "visual_token_id": VISUAL, "attention_temperature": 0.5}
        model = FoveatedVLMForConditionalGeneration(FoveatedVLMConfig(vision, text, **options)).train()
        model.compile_hot_paths(backend=lambda graph, inputs, graphs=graphs: graphs.append(graph) or graph.forward)
        for rows in ([0, 1, 2, 3], [0, 0, 3], [3] * 5):
            model(**rows_of(make_batch(), rows), mode="fine").loss.backward()
        numbers.append(len(graphs))
    assert numbers[0] == numbers[1] > 0
    torch._dynamo.reset()


def residual_streams(model, **inputs):
    """(output, dtypes that reach the language model's layers, those that reach the vision encoder's)."""
    seen = {"language": set(), "vision": set()}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen["language"].add((args or tuple(kwargs.values()))[0].dtype), with_kwargs=True
        )
        for layer in model.language_model.model.layers
    ]
    for layer in model.vision_encoder.encoder.layer:
        hooks.append(layer.norm1.register_forward_pre_hook(lambda _, args: seen["vision"].add(args[0].dtype)))
        hooks.append(layer.norm2.register_forward_pre_hook(lambda _, args: seen["vision"].add(args[0].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    for hook in hooks:
        hook.remove()
    return output, seen


@pytest.mark.parametrize(
    "options", [{}, {"attention": "shallow"}, {"query_update": "add"}, {"query_update": "gated"}], ids=str
)
@torch.no_grad()
def test_mixed_precision_is_the_same_in_all_modes(options):
    """The residual streams are fp32 in all of them (frame by frame it was bf16), and so are queries and losses."""
    model, outputs = make_model(num_passes=3, **options), {}
    for mode in MODES:
        outputs[mode], seen = residual_streams(model, **make_batch(), mode=mode)
        assert seen == {"language": {torch.float32}, "vision": {torch.float32}}, mode
        assert {outputs[mode][name].dtype for name in ("queries", "token_loss")} == {torch.float32}
    assert len({output.visual_tokens.dtype for output in outputs.values()}) == 1
    # three plans settle clips of three frames, so that only rounding is left
    fine_loss, loss = (outputs[mode].token_loss for mode in ("fine", "autoregressive"))
    torch.testing.assert_close(fine_loss, loss, atol=0.02, rtol=0)
    exact = make_model(num_passes=3, **options)(**make_batch(), mode="autoregressive").token_loss
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0)
