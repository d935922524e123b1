"""transformers' Trainer, TRL's SFTTrainer and PEFT train the network as they train any causal language model."""

import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import can_return_loss, find_labels
from trl import SFTConfig, SFTTrainer

from model import FoveatedVLMForConditionalGeneration, FoveatedVLMProcessor
from model.constants import IGNORE_INDEX
from pipeline_steps.common.params import ROOT
from tests.model.tiny import MODES, PAD, make_batch, make_model, one_sample

PROJECTIONS = r"language_model\..*\.(q|k|v|o)_proj"


def dataset() -> list[dict]:
    """Processed samples of 3, 0, 1 and 2 frames: input_ids, attention_mask and labels [S], pixel_values [T, 3, 56, 56],
    num_frames []."""
    batch = make_batch()
    samples = [one_sample(batch, row) for row in range(4)]
    return [{name: value if name == "pixel_values" else value[0] for name, value in own.items()} for own in samples]


def collate(samples: list[dict]) -> dict:
    """Pads the text on the right and concatenates the frames."""
    length = max(len(own["input_ids"]) for own in samples)
    padding = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORE_INDEX}
    text = {
        name: torch.stack([F.pad(own[name], (0, length - len(own[name])), value=value) for own in samples])
        for name, value in padding.items()
    }
    frames = torch.cat([own["pixel_values"] for own in samples])
    return text | {"pixel_values": frames, "num_frames": torch.stack([own["num_frames"] for own in samples])}


def documented_collator(processor):
    """The collator that docs/training.md shows."""
    page = (ROOT / "docs/training.md").read_text().split("\n## With other libraries\n")[1]
    names = {"processor": processor}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), names)
    return names["collate"]


def test_the_call_of_the_network_in_the_documentation_gives_a_loss(made):
    page = (ROOT / "docs/model.md").read_text().split("\n## Call the network\n")[1]
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    processor = FoveatedVLMProcessor.from_pretrained(made.checkpoint)
    model = FoveatedVLMForConditionalGeneration.from_pretrained(made.checkpoint)
    inputs = processor(text="Which digits does red show?", videos=str(made.video))
    names = {"model": model, "inputs": inputs, "collate": documented_collator(processor)}
    exec(snippet.replace("clip.mp4", str(made.video)), names)
    labels = names["batch"]["labels"]
    assert processor.decode(labels[labels != IGNORE_INDEX]) == "red: 31415" + processor.tokenizer.eos_token
    assert names["output"].loss.isfinite()


def questions(made) -> list[dict]:
    """Two clips and text alone."""
    texts = (("Which digits does red show?", "314"), ("Where is blue?", "left"), ("Say 12 backwards", "21"))
    videos = (str(made.video), str(made.video), None)
    return [
        {"question": question, "answer": answer, "video": video}
        for (question, answer), video in zip(texts, videos, strict=True)
    ]


def trainer(model, tmp_path, **options) -> Trainer:
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **options)
    return Trainer(model, arguments, train_dataset=dataset(), eval_dataset=dataset(), data_collator=collate)


def test_the_library_finds_one_label():
    assert find_labels(FoveatedVLMForConditionalGeneration) == ["labels"]
    assert not can_return_loss(FoveatedVLMForConditionalGeneration)


def test_trainer_trains_and_evaluates_with_its_defaults(tmp_path):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = trainer(model, tmp_path, max_steps=2)
    own.train()
    assert all(not torch.equal(before[name], model.state_dict()[name]) for name in ("static_query", "planner.weight"))
    found = own.evaluate()
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(float(model.eval()(**collate(dataset())).loss), abs=1e-5)
    predicted = own.predict(dataset())
    assert predicted.predictions.shape == (4, make_batch()["input_ids"].shape[1], 64)  # logits and nothing else
    again = FoveatedVLMForConditionalGeneration.from_pretrained(tmp_path / "out/checkpoint-2")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_accumulated_batches_take_the_step_of_the_whole_one(tmp_path):
    """The loss is a mean over the tokens of all micro-batches, although these have different numbers of them."""
    models = []
    for size in (1, 4):
        model = make_model()
        rows = dataset()
        rows[0]["labels"][:-1] = IGNORE_INDEX  # one labelled token, the others have four
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        own = trainer(model, tmp_path, **options, optim="sgd", learning_rate=1.0, max_grad_norm=1e9)
        own.train_dataset = rows
        own.train()
        models.append(model.state_dict())
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("adapters", [False, True])
def test_sft_trainer_takes_a_step_on_frames(made, tmp_path, adapters):
    processor = FoveatedVLMProcessor.from_pretrained(made.checkpoint)
    model = FoveatedVLMForConditionalGeneration.from_pretrained(made.checkpoint)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collator = documented_collator(processor)
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    data = Dataset.from_list(questions(made))
    data = {"train_dataset": data, "eval_dataset": data, "data_collator": collator}
    settings = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=PROJECTIONS) if adapters else None
    own = SFTTrainer(model, arguments, **data, processing_class=processor.tokenizer, peft_config=settings)
    own.train()
    trained = own.model.state_dict()
    if adapters:
        assert any(value.any() for name, value in trained.items() if "lora_B" in name)  # zeros at the start
        assert torch.equal(before["planner.weight"], own.model.get_base_model().planner.weight)
    else:
        assert not torch.equal(before["planner.weight"], trained["planner.weight"])
    found = own.evaluate()["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(float(own.model.eval()(**collator(questions(made))).loss), abs=1e-4)


def test_the_documented_collator_labels_the_answer_and_nothing_else(made):
    processor = FoveatedVLMProcessor.from_pretrained(made.checkpoint)
    samples = questions(made)
    batch = documented_collator(processor)(samples)
    assert batch["num_frames"].tolist() == [4, 4, 0]
    prompts = processor(text=[own["question"] for own in samples], videos=[own["video"] for own in samples])
    length = prompts["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], prompts["input_ids"])
    for ids, mask, labels, own in zip(
        *(batch[n] for n in ("input_ids", "attention_mask", "labels")), samples, strict=True
    ):
        asked = labels != IGNORE_INDEX
        assert processor.decode(ids[asked]) == own["answer"] + processor.tokenizer.eos_token
        assert torch.equal(ids[asked], labels[asked])
        assert mask[asked].all()
        assert not mask[length:][~asked[length:]].any()


@pytest.fixture
def lora():
    """A network with adapters at the language model's projections that change its outputs."""
    torch.manual_seed(0)
    own = get_peft_model(
        make_model(visual_scale=3.0), LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=PROJECTIONS)
    )
    for name, weight in own.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return own


def test_peft_trains_adapters_of_the_language_model(lora):
    lora.train()
    output = lora(**make_batch())
    assert output.logits.shape[-1] == 64
    output.loss.backward()
    trained = {name for name, weight in lora.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in lora.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * 4 * 2  # layers, projections, A and B
    assert all(lora.get_parameter(name).grad.abs().max() > 0 for name in trained)


@pytest.mark.parametrize("mode", MODES)
def test_adapters_answer_as_when_merged_and_after_loading(lora, tmp_path, mode):
    sample = one_sample(make_batch(), 0)
    prompt = {name: value for name, value in sample.items() if name != "labels"} | {"mode": mode}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True}
    lora.eval()
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(visual_scale=3.0), tmp_path).eval()
    base = make_model(visual_scale=3.0)
    found = [
        torch.stack(own.generate(**prompt, **options, return_dict_in_generate=True).logits)
        for own in (lora, loaded, lora.merge_and_unload().eval(), base)
    ]
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[2], found[0], atol=1e-4, rtol=0)
    assert (found[3] - found[0]).abs().max() > 1e-2


def test_trainer_trains_adapters(lora, tmp_path):
    before = {name: value.clone() for name, value in lora.state_dict().items()}
    own = trainer(lora, tmp_path, max_steps=1, gradient_checkpointing=True)
    own.train()
    changed = {name for name, value in lora.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {name for name in before if "lora_" in name}
    assert own.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("adapter", "message"),
    [(PromptTuningConfig, "forward needs input_ids, not inputs_embeds"), (PrefixTuningConfig, "no key-value cache")],
)
def test_adapters_that_add_to_the_prompt_are_refused(adapter, message):
    settings = adapter(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=2,
        token_dim=48,
        num_layers=2,
        num_attention_heads=2,
        num_transformer_submodules=1,
    )
    batch = make_batch()
    with pytest.raises(ValueError, match=message):
        get_peft_model(make_model(), settings)(**{name: batch[name][1:2] for name in ("input_ids", "attention_mask")})
