"""Answers by the library's own generation, in every mode; and that all modes score exactly the same tokens."""

import copy
import pickle
import re

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from model import FoveatedVLMForConditionalGeneration
from model.constants import IGNORE_INDEX
from tests.model.tiny import LAYOUTS, MODES, PAD, make_batch, make_model, one_sample, rows_of

QUESTION = ("input_ids", "attention_mask", "pixel_values", "num_frames")
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
}


def question(row: int = 0, layout: str = "question_first") -> dict:
    sample = one_sample(make_batch(layout=layout), row)
    return {name: sample[name] for name in QUESTION}


def left_padded(batch: dict) -> dict:
    """The same samples with their padding moved to the left."""
    moved = {name: batch[name] for name in QUESTION}
    for row, mask in enumerate(batch["attention_mask"].bool()):
        padding = int((~mask).sum())
        moved["input_ids"][row] = batch["input_ids"][row].roll(padding)
        moved["attention_mask"][row] = batch["attention_mask"][row].roll(padding)
    return moved


def log_probs(model, sample: dict, answer: torch.Tensor, mode: str) -> torch.Tensor:
    """Teacher-forced log-probability of every token of the answer [S'], by `forward`."""
    ids = torch.cat([sample["input_ids"], answer[None]], dim=1)
    logits = model(
        ids, None, sample["pixel_values"], sample["num_frames"], mode=mode, options={"return_logits": True}
    ).logits.log_softmax(-1)
    return logits[0, -len(answer) - 1 : -1].gather(1, answer[:, None])[:, 0]


@pytest.fixture(scope="module")
def model():
    """Visual tokens large enough that the modes answer differently."""
    return make_model(visual_scale=3.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_what_is_generated_has_the_probability_that_forward_gives_it(model, mode, strategy):
    for layout in LAYOUTS:
        sample = question(layout=layout)
        torch.manual_seed(3)
        out = model.generate(
            **sample,
            mode=mode,
            max_new_tokens=5,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **STRATEGIES[strategy],
        )
        answer = out.sequences[0]
        assert answer.shape == (5,)
        expected = log_probs(model, sample, answer, mode)
        if strategy == "beam":
            torch.testing.assert_close(out.sequences_scores[0], expected.mean(), atol=1e-4, rtol=0)
        else:
            got = torch.stack(out.logits, dim=1)[0].log_softmax(-1).gather(1, answer[:, None])[:, 0]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        if strategy == "greedy":
            best = torch.stack(out.logits, dim=1)[0].log_softmax(-1).amax(-1)
            torch.testing.assert_close(expected, best, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_mode_and_the_frames_decide_what_is_generated(model):
    def logits(sample, mode):
        options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        return model.generate(**sample, mode=mode, **options).logits[0]

    by_mode = [logits(question(), mode) for mode in MODES]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (by_mode[one] - by_mode[other]).abs().max() > 1e-3
    black = question() | {"pixel_values": torch.zeros(3, 3, 56, 56)}
    for mode, seen in zip(MODES, by_mode, strict=True):
        assert (logits(black, mode) - seen).abs().max() > 1e-3


def test_sampling_follows_the_seed(model):
    def sampled(seed):
        torch.manual_seed(seed)
        return model.generate(**question(), max_new_tokens=8, eos_token_id=None, **STRATEGIES["sampling"]).tolist()

    assert sampled(1) == sampled(1)
    assert len({str(sampled(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_answers_do_not_depend_on_the_batch(model, mode, strategy):
    """Neither the tokens nor their logits: many answers stay the same when the padding is read by mistake."""
    options = {"mode": mode, "max_new_tokens": 5, "eos_token_id": None, **STRATEGIES[strategy]}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    together = model.generate(**left_padded(rows_of(make_batch(), [0, 1, 2, 3], 0, 2)), **options)
    beams = STRATEGIES[strategy].get("num_beams", 1)
    for row in range(4):
        alone = model.generate(**question(row), **options)
        assert alone.sequences[0].tolist() == together.sequences[row].tolist()
        for one, all_rows in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(one, all_rows[row * beams : (row + 1) * beams], atol=1e-4, rtol=0)


def test_generation_stops_at_the_end_of_turn(model):
    bias = torch.zeros(64)
    bias[PAD] = 100.0
    always_ends = [lambda ids, scores: scores + bias]
    answer = model.generate(**question(), max_new_tokens=5, do_sample=False, logits_processor=always_ends)
    assert answer.tolist() == [[PAD]]


def test_options_come_as_the_librarys_configuration(model):
    options = GenerationConfig(max_new_tokens=4, num_beams=2, num_return_sequences=2, eos_token_id=None)
    assert model.generate(**question(), generation_config=options).shape == (2, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_all_modes_score_exactly_the_labelled_tokens(model, layout):
    """Every labelled token once, the first one too, and none besides, whether it follows text or a visual token."""
    batch = make_batch(layout=layout)
    batch["labels"] = torch.where(
        (batch["attention_mask"] == 1) & (batch["input_ids"] != model.config.visual_token_id),
        batch["input_ids"],
        IGNORE_INDEX,
    )
    batch["labels"][:, 0] = IGNORE_INDEX  # nothing comes before it
    asked = batch["labels"] != IGNORE_INDEX
    for mode in MODES:
        output = model(**batch, mode=mode, options={"return_logits": True})
        assert torch.equal(output.token_loss > 0, asked)
        torch.testing.assert_close(output.loss, output.token_loss[asked].mean())
        before = output.logits.log_softmax(-1).roll(1, dims=1)  # the state at s - 1 predicts the token at s
        expected = -before.gather(2, batch["labels"].clamp_min(0)[..., None])[..., 0]
        torch.testing.assert_close(output.token_loss[asked], expected[asked], atol=1e-5, rtol=0)
        assert torch.equal(output.correct, (before.argmax(-1) == batch["labels"]) & asked)


def test_the_models_own_generation_configuration_counts(model, tmp_path):
    asked = question()
    model = copy.deepcopy(model)
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    again = FoveatedVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    for kept in (model, again):
        assert kept.generate(**asked, do_sample=False).shape == (1, 3)
    with pytest.raises(ValueError, match="of the language model's 128 positions, so max_new_tokens=500 does not fit"):
        model.generate(**asked, max_new_tokens=500)


@pytest.mark.parametrize(("options", "count"), [({}, 20), ({"max_length": 30}, 7), ({"max_new_tokens": 4}, 4)])
@pytest.mark.parametrize("mode", MODES)
def test_an_answer_is_as_long_as_its_options_allow(model, mode, options, count):
    """The prompt has 23 tokens, 3 of them visual."""
    settings = {"mode": mode, "do_sample": False, "eos_token_id": None}
    answer = model.generate(**question(), **settings, **options)
    assert torch.equal(answer, model.generate(**question(), **settings, max_new_tokens=count))
    assert answer.shape == (1, count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "take 23 of the language model's 32 positions, so max_new_tokens=20 does not fit. Lower it to at most 9"),
        ({"max_length": 33}, "take 23 of the language model's 32 positions, so max_new_tokens=10 does not fit"),
        ({"max_length": 23}, "max_length=23 counts the prompt, which has 23 tokens.* or pass max_new_tokens"),
    ],
)
def test_an_answer_beyond_the_context_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(max_positions=32).generate(**question(), **options)


def test_a_model_can_be_pickled(model):
    again = pickle.loads(pickle.dumps(model))
    assert again.can_generate()
    assert torch.equal(again.static_query, model.static_query)


REFUSED = {
    "prompt_lookup_num_tokens": (3, "needs the ids of the whole prompt"),
    "guidance_scale": (1.5, "needs the ids of the whole prompt"),
    "token_healing": (True, "needs the ids of the whole prompt"),
    "encoder_repetition_penalty": (1.5, "needs the ids of the whole prompt"),
    "encoder_no_repeat_ngram_size": (2, "needs the ids of the whole prompt"),
    "prefill_chunk_size": (4, "needs the ids of the whole prompt"),
    "assistant_early_exit": (1, "assisted_generation is not supported, expected one of greedy_search"),
    "dola_layers": ("low", "dola_generation is not supported"),
    "force_words_ids": ([[5]], "constrained_beam_search is not supported"),
    "penalty_alpha": (0.6, "contrastive_search is not supported"),
    "assistant_model": (object(), "a draft model does not see the frames"),
    "inputs_embeds": (torch.zeros(1, 5, 48), "Pass input_ids and pixel_values"),
    "past_key_values": (DynamicCache(), "may hold other frames or another question"),
    "position_ids": (torch.arange(23)[None], "counted from attention_mask"),
    "cache_position": (torch.arange(23), "counted from attention_mask"),
    "negative_prompt_ids": (torch.tensor([[5]]), "without the frames"),
    "custom_generate": ("a/repository", "Use an option of the library's own"),
    "cache_implementation": ("paged", "continuous batching reads ids, without frames"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ways_to_generate_that_would_be_wrong_are_refused(model, name):
    value, message = REFUSED[name]
    options = {"do_sample": False, "top_k": 4} if name == "penalty_alpha" else {"do_sample": False}
    for mode in MODES:
        with pytest.raises(ValueError, match=message) as caught:
            model.generate(**question(), mode=mode, max_new_tokens=2, **options, **{name: value})
        assert re.search(rf"generate: .*({name}|_search|_generation)", str(caught.value))


def test_group_beams_and_continuous_batching_are_refused(model):
    with pytest.raises(ValueError, match="group_beam_search is not supported"):
        model.generate(**question(), max_new_tokens=2, do_sample=False, num_beams=4, num_beam_groups=2)
    for entrance in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(ValueError, match="Pass a batch of samples to generate"):
            entrance([[3, 4, 5]])


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"num_beams": 3, "cache_implementation": "static", "disable_compile": True},
    ],
    ids=["static", "dynamic", "no cache", "beams on a static cache"],
)
@pytest.mark.parametrize("mode", MODES)
def test_other_caches_give_the_same_answers(model, mode, options):
    common = {"max_new_tokens": 5, "eos_token_id": None, "do_sample": False}
    common |= {"mode": mode, "return_dict_in_generate": True, "output_logits": True}
    beams = {name: options[name] for name in options if name == "num_beams"}
    for row in range(4):
        usual, other = (model.generate(**question(row), **common, **own) for own in (beams, options))
        assert usual.sequences.tolist() == other.sequences.tolist()
        torch.testing.assert_close(torch.stack(other.logits), torch.stack(usual.logits), atol=1e-4, rtol=0)
