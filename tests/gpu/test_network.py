"""The network on a device: modes, precisions, answers, the reference. Needs torch and transformers."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.original import Original, pad
from benchmarks.workload import mixture, network_config
from model import FoveatedVLMForConditionalGeneration, FoveationOptions
from tests.model.tiny import MODES, PAD, VISUAL, make_batch, make_model, one_sample

FP32 = 1e-4  # kernels of a GPU sum in another order
BF16 = 0.05
STEPS = {"fp32": 0.01, "bf16": 0.05}  # AdamW divides small differences of gradients by small gradients
LAYOUTS = ("question_first", "vision_first")
PRECISIONS = ("fp32", "bf16")
WIDTHS = (48, 64)  # of the language model: in bf16 on CUDA, heads of 12 take the padded path, of 16 the varlen kernel
OPTIONS = [{}, {"attention": "shallow"}, {"architecture": "multi_token", "num_visual_tokens_per_frame": 4}]
MORE_OPTIONS = [  # which the reference does not have
    {"frame_downsampling": 2, "fovea_size": 2, "frame_time_embedding": "sinusoidal"},
    {"learnable_temperature": True, "hard_attention": "top_k", "attention_top_k": 3, "tie_first_query": False},
    {"num_visual_tokens_per_frame": 2, "token_aggregation": "weighted", "query_update": "add"},
    {"query_update": "gated"},
]


def moved(batch: dict, device: str) -> dict:
    return {name: value.to(device) for name, value in batch.items()}


def autocast(device: str, precision: str):
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


def train(model, batch: dict, precision: str, num_steps: int, learning_rate: float = 3e-3) -> list[float]:
    """The loss of every step on one batch."""
    device, losses = model.device.type, []
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=learning_rate, fused=True)
    for _ in range(num_steps):
        with autocast(device, precision):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS + MORE_OPTIONS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_losses_are_those_of_the_cpu(width, options, layout, precision, device):
    model = make_model(layout=layout, language_width=width, **options)
    batch = make_batch(model.config.tokens_per_frame, layout)
    expected = [float(model(**batch, mode=mode).loss) for mode in MODES]
    model, batch = model.to(device), moved(batch, device)
    with autocast(device, precision):
        found = [float(model(**batch, mode=mode).loss) for mode in MODES]
    assert found == pytest.approx(expected, abs=FP32 if precision == "fp32" else BF16)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options", [{}, {"query_update": "add"}, {"query_update": "gated"}, {"attention": "shallow"}], ids=str
)
def test_autoregressive_mode_is_fine_mode_that_plans_once_per_frame(options, layout, device):
    """Each plan settles the queries of one more frame."""
    model = make_model(layout=layout, **options).to(device)
    batch = moved(make_batch(layout=layout), device)
    settled = int(batch["num_frames"].max()) - 1
    fine = model(**batch, options=FoveationOptions(num_plans=settled, return_logits=True))
    stepwise = model(**batch, mode="autoregressive", options=FoveationOptions(return_logits=True))
    assert (fine.queries - stepwise.queries).abs().max() <= FP32
    assert (fine.logits - stepwise.logits)[batch["attention_mask"].bool()].abs().max() <= FP32


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_is_equal_on_the_device_too(options, mode, device):
    model = make_model(**options)
    batch = make_batch(model.config.tokens_per_frame)
    padded = pad(model.config, **batch).to(device)
    model, batch = model.to(device), moved(batch, device)
    assert float(model(**batch, mode=mode).loss) == pytest.approx(float(Original(model)(padded, mode).loss), abs=FP32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", [{}, {"attention": "shallow"}, {"num_passes": 2}], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_steps_train_in_every_precision(width, options, precision, device):
    options = {"language_width": width, **options}
    expected = train(make_model(**options), make_batch(), "fp32", 5)
    found = train(make_model(**options).to(device), moved(make_batch(), device), precision, 5)
    assert found == pytest.approx(expected, abs=STEPS[precision])
    assert found[-1] < found[0]


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_the_cpu(mode, device):
    model = make_model()
    for row in (0, 1, 3):
        sample = one_sample(make_batch(), row)
        del sample["labels"]
        expected = model.to("cpu").generate(**sample, mode=mode, max_new_tokens=6, do_sample=False)
        found = model.to(device).generate(**moved(sample, device), mode=mode, max_new_tokens=6, do_sample=False)
        assert found.tolist() == expected.tolist()


class Processor:
    """What a session asks of a processor. The chat has the same ids around the frames, whatever the question."""

    fps, image_size = 1.0, 56
    tokenizer = SimpleNamespace(eos_token_id=PAD, pad_token_id=PAD, decode=lambda ids, **options: str(ids.tolist()))

    def check_question(self, question: str) -> None:
        pass

    def __call__(self, text: str, videos=None) -> dict:
        return {"input_ids": torch.tensor([[3, 4, 5, *([] if videos is None else [VISUAL]), 6, 7]])}


@pytest.mark.parametrize("options", [{}, {"attention": "shallow"}, MORE_OPTIONS[-1]], ids=str)
def test_a_session_sees_and_answers_what_it_does_on_the_cpu(options, device):
    frames, seen = make_batch()["pixel_values"], []
    for own in ("cpu", device):
        session = make_model(**options).to(own).stream(Processor(), "Where?", max_num_frames=8)
        maps = [session.push(frame).cpu() for frame in frames]
        seen.append((torch.stack(maps), session.visual_tokens.cpu(), session.ask(max_new_tokens=6)))
    torch.testing.assert_close(seen[1][:2], seen[0][:2], atol=FP32, rtol=FP32)
    assert seen[1][2] == seen[0][2]


def test_a_root_mean_square_is_one_operation_each_way(cuda):
    """The trace of launches on a CPU counts it so (tests/model/launches.py)."""
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function._schema.name.removeprefix("aten::"))
            return function(*args, **(kwargs or {}))

    rows, weight = (torch.ones(shape, device=cuda, requires_grad=True) for shape in ((8, 64), (64,)))
    with Names():
        nn.functional.rms_norm(rows, (64,), weight, 1e-5).sum().backward()
    assert [name for name in seen if "norm" in name] == ["_fused_rms_norm", "_fused_rms_norm_backward"]
    assert not {"pow", "rsqrt"} & set(seen)


def small_gpu_losses(device: str, num_samples: int, num_steps: int) -> list[float]:
    torch.manual_seed(0)
    model = FoveatedVLMForConditionalGeneration(network_config("small_gpu")).to(device)
    batch = mixture(model.config, num_samples).to(device)
    inputs = batch.inputs() | {"labels": batch.labels}
    return train(model, inputs, "bf16" if device == "cuda" else "fp32", num_steps, learning_rate=1e-3)


def test_the_scale_small_gpu_trains_on_the_cpu():
    """The body of the next test, at a size of seconds."""
    losses = small_gpu_losses("cpu", 1, 2)
    assert losses[1] < losses[0]


def test_the_scale_small_gpu_learns_a_batch_in_50_steps(cuda):
    losses = small_gpu_losses(cuda, 32, 50)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.8 * losses[0]
