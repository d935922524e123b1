"""The backbones of `make pretrained`: they answer, stop, see and learn. Skipped where they have not been built.

Cost: 25 s of one core, 3 GB of memory.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config

from model import FoveatedVLMForConditionalGeneration
from model.constants import IGNORE_INDEX
from model.foveated_encoder import FoveatedEncoder
from model.loading import backbone_config
from pipeline_steps.backbones.frames import pixel_values
from pipeline_steps.backbones.pretrained import default_output

FOLDER = default_output()
LANGUAGE, VISION = FOLDER / "language_model", FOLDER / "vision_encoder"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "origin.json").exists(), reason=f"{FOLDER} is not built: run `make pretrained`"),
]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    options = {"query_dim": 384, "layout": "question_first", "visual_scale": "auto"}
    return FoveatedVLMForConditionalGeneration.from_backbones(VISION, LANGUAGE, **options)


def test_it_answers_a_chat_and_stops_at_the_end_of_turn():
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE)
    model = AutoModelForCausalLM.from_pretrained(LANGUAGE, dtype=torch.float32).eval()
    questions = {"What is the capital of France?": "Paris", "Name three fruits.": "Bananas"}
    for question, word in questions.items():
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert word in tokenizer.decode(ids)
        assert tokenizer.convert_ids_to_tokens(ids[-1].item()) == "<|im_end|>"
        assert len(ids) < 40


def pasted(thing, background, x, y):
    picture = background.copy()
    picture.paste(thing, (x, y))
    return pixels(picture)


def pixels(picture):
    """uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(picture))


def margin(encoder):
    """How much more alike the patches of an object on two backgrounds are than object and background (cosine)."""
    flower, china = (Image.fromarray(load_sample_image(name)) for name in ("flower.jpg", "china.jpg"))
    thing = flower.crop((150, 50, 430, 330)).resize((112, 112))
    backgrounds = china.resize((336, 224)).crop((0, 0, 224, 224)), china.resize((336, 224)).crop((112, 0, 336, 224))
    frames = torch.stack([pasted(thing, backgrounds[0], 14, 14), pasted(thing, backgrounds[1], 98, 84)])
    with torch.no_grad():
        features = encoder.encode(pixel_values(frames), need_patch_features=True).patch_features[:, 1:]
    grid = features.unflatten(1, (16, 16))
    first, second = grid[0, 1:9, 1:9], grid[1, 6:14, 7:15]
    around = grid[0, 10:16].flatten(0, 1).mean(0)
    similar = torch.nn.functional.cosine_similarity
    return (
        similar(first.flatten(0, 1).mean(0), second.flatten(0, 1).mean(0), 0)
        - similar(first.flatten(0, 1).mean(0), around, 0)
    ).item()


def test_patch_features_follow_the_object_and_not_its_place(network):
    torch.manual_seed(0)
    untrained = FoveatedEncoder(Dinov2Config(**backbone_config(VISION, "dinov2").to_dict())).eval()
    known, random = margin(network.vision_encoder.eval()), margin(untrained)
    assert known > 0.3, (known, random)
    assert known > 3 * random, (known, random)


def test_one_training_step_lowers_the_loss(network):
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE)
    placeholder = network.config.visual_token_id
    rows, labels = [], []
    for answer in ("a red flower", "a temple"):
        chat = [{"role": "user", "content": "What is shown?"}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        at = len(prompt) - 5  # somewhere after the question
        rows.append(ids[:at] + [placeholder] * 2 + ids[at:])
        labels.append([IGNORE_INDEX] * (len(prompt) + 2) + ids[len(prompt) :])
    size = max(map(len, rows))
    padded = [row + [tokenizer.pad_token_id] * (size - len(row)) for row in rows]
    pictures = [Image.fromarray(load_sample_image(name)).resize((224, 224)) for name in ("flower.jpg", "china.jpg")]
    batch = {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in rows]),
        "labels": torch.tensor([row + [IGNORE_INDEX] * (size - len(row)) for row in labels]),
        "pixel_values": pixel_values(torch.stack([pixels(picture) for picture in pictures for _ in range(2)])),
        "num_frames": torch.tensor([2, 2]),
    }
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    network.train()
    before = network(**batch, mode="fine").loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = network(**batch, mode="fine").loss
    assert 0.5 < before.item() < 10
    assert after.item() < before.item() - 0.05
