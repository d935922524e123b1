"""Packed reading under other libraries' ways to run a model, and what it refuses."""

import copy
import inspect

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers import Qwen3Config, Qwen3ForCausalLM

from model import FoveatedVLMConfig, packed_language
from model.packing import Continuation, Packing, continuation, packing
from tests.model.tiny import LAYOUTS, make_batch, make_model
from tests.model.varlen import attend_causally, attend_equal_heads


def test_offloaded_weights_give_the_same_loss():
    expected = make_model()(**make_batch()).loss
    model = cpu_offload(make_model(), execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(**make_batch()).loss, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_either_kind_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpoints in (False, True):
        model = make_model(num_passes=2).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**make_batch(), mode="fine").loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def text_of(model, batch, **options):
    return model.packed_text(batch["input_ids"], batch["attention_mask"], batch["num_frames"], **options)


def test_a_text_without_labels_is_refused_where_labels_are_given():
    model, batch = make_model(), make_batch()
    with pytest.raises(ValueError, match="the packed text was made without labels"):
        model(**batch, options={"text": text_of(model, batch)})
    text = text_of(model, batch, labels=batch["labels"])
    assert torch.equal(model(**batch, options={"text": text}).loss, model(**batch).loss)


def test_a_text_of_another_network_is_refused():
    model, batch = make_model(), make_batch()
    text = text_of(copy.deepcopy(model), batch, labels=batch["labels"])
    with pytest.raises(ValueError, match="the packed text belongs to another network"):
        model(**batch, options={"text": text})


def test_a_text_first_read_without_gradients_gives_them_later():
    found = []
    for first in (False, True):
        model, batch = make_model().train(), make_batch()
        text = text_of(model, batch, labels=batch["labels"])
        if first:
            with torch.no_grad():
                model(**batch, options={"text": text})
        model(**batch, options={"text": text}).loss.backward()
        found.append(model.language_model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(found[1], found[0])


def test_layers_of_another_architecture_are_refused():
    config = make_model().config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = Qwen3Config(**{name: getattr(config.text_config, name) for name in sizes}, num_key_value_heads=2)
    with pytest.raises(ValueError, match="model_type='qwen3' is not supported, only 'llama'"):
        FoveatedVLMConfig(config.vision_config, text, query_dim=24, visual_scale=0.1, visual_token_id=64)
    with pytest.raises(ValueError, match="Qwen3DecoderLayer is not supported"):
        packed_language.read_packed_rows(Qwen3ForCausalLM(text))


@pytest.fixture(params=[attend_causally, attend_equal_heads], ids=["grouped heads", "equal heads"])
def kernel(request, monkeypatch):
    """A stand-in for either form of the variable-length kernel, without CUDA."""
    monkeypatch.setattr(packed_language, "varlen_attn", request.param)
    monkeypatch.setattr(packed_language, "_VARLEN", inspect.signature(request.param).parameters)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("before", [None, (4, 0, 2, 7)])
def test_attention_by_the_variable_length_kernel_is_that_of_padded_sequences(before, groups, kernel):
    """Of 6 heads, with another scale than the kernel's own. before: earlier rows of every sequence."""
    heads, width, scale, lengths = 6, 8, 0.9, (3, 5, 1, 2)
    generator, num_rows = torch.Generator().manual_seed(4), sum(lengths)
    kind = Packing if before is None else Continuation
    arrays = packing([lengths]) if before is None else continuation(np.array(before), np.array(lengths))
    places = kind(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    angles = (torch.ones(num_rows, width), torch.zeros(num_rows, width))
    inputs = [torch.randn(num_rows, (heads + 2 * groups) * width, generator=generator)]
    if before is not None:
        inputs.append(torch.randn(sum(before), 2 * groups, width, generator=generator))
    weights = torch.randn(num_rows, heads * width, generator=generator)
    found = []
    for is_varlen in (False, True):
        rows, *earlier = given = [own.clone().requires_grad_() for own in inputs]
        reading = packed_language.Reading.of(rows, angles, places, is_varlen)
        mixed, _ = packed_language.attend(rows, None, *(earlier or [None]), reading, groups, 0, scale, 0.0)
        found.append((mixed, *torch.autograd.grad((mixed * weights).sum(), given)))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_passes", [1, 2])
def test_the_path_of_the_variable_length_kernel_is_the_padded_one(num_passes, layout, kernel, monkeypatch):
    """With the kernel itself, on CUDA: tests/gpu."""
    found = []
    for is_varlen in (False, True):
        monkeypatch.setattr(packed_language, "uses_varlen", lambda *_, chosen=is_varlen: chosen)
        model = make_model(num_passes=num_passes).train()
        loss = model(**make_batch(layout=layout)).loss
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (loss, others) = found
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(others, gradients, atol=2e-6, rtol=1e-4)
