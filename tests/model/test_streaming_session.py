"""A session that takes frames one by one sees, and answers, what the model does with the whole video."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from model import frame_step, streaming_session
from pipeline_steps.common.checkpoint import load_checkpoint
from tests import checkpoints
from tests.model.test_frame_step import record

QUESTION, OTHER = "Which digits does red show?", "Where is the blue card?"
NUM_FRAMES = 5
HOUR = 3_600  # frames, at one per second


@pytest.fixture(scope="module")
def processor(made):
    return load_checkpoint(made.checkpoint)[1]


@pytest.fixture(scope="module")
def frames():
    return list(np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 70, 90, 3), dtype=np.uint8))


def pair(made, tmp_path, **options):
    """A model whose answers depend on what it sees, and its processor."""
    model = checkpoints.make_lively_model(**options).eval()
    checkpoints.save(model, made, tmp_path, "")
    return load_checkpoint(tmp_path)


NETWORKS = [
    {"layout": "question_first"},
    {"layout": "vision_first"},
    {"layout": "question_first", "num_visual_tokens_per_frame": 2, "query_update": "add", "tie_first_query": False},
    {"layout": "vision_first", "attention": "shallow", "frame_time_embedding": "sinusoidal"},
    {"layout": "vision_first", "attention_temperature": 0.3},
    {"layout": "question_first", "query_update": "gated"},
]


@pytest.mark.parametrize("kind", ["static", "graph"])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
@torch.no_grad()
def test_frames_one_by_one_are_the_video(made, tmp_path, frames, network, kind, monkeypatch):
    model, processor = pair(made, tmp_path, **network)
    if network.get("frame_time_embedding"):
        model.time_projection.weight.normal_()
    session = model.stream(processor, QUESTION)
    if kind == "graph":
        monkeypatch.setattr(frame_step, "capture_cuda", record)
        session._kind = "graph"
    maps, answers = [], set()
    for number, frame in enumerate(frames):
        shown = Image.fromarray(frame) if number % 2 else frame
        maps.append(session.push(shown))
        inputs = processor(text=QUESTION, videos=frames[: number + 1])
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.add(session.ask(max_new_tokens=8))
        assert processor.decode(answer[0], skip_special_tokens=True).strip() in answers
        assert len(answers) <= number + 1
    assert len(answers - {""}) > 1
    whole = model(**inputs, mode="autoregressive", options={"output_attentions": True, "frame_step": "dynamic"})
    torch.testing.assert_close(session.visual_tokens[:NUM_FRAMES], whole.visual_tokens, atol=1e-4, rtol=1e-4)
    expected = whole.attention_weights[-1].mean((1, 2))[:, 1:]
    expected = (expected / expected.sum(1, keepdim=True)).view(NUM_FRAMES, 4, 4)
    torch.testing.assert_close(torch.stack(maps), expected, atol=1e-5, rtol=1e-4)
    assert (maps[0] - maps[1]).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["question_first", "vision_first"])
@torch.no_grad()
def test_questions_disturb_nothing(made, tmp_path, frames, layout):
    model, processor = pair(made, tmp_path, layout=layout)
    quiet, asked = model.stream(processor, QUESTION), model.stream(processor, QUESTION)
    before = asked.ask(max_new_tokens=6)  # without a frame: from the text alone
    text = model.generate(**processor(text=QUESTION), max_new_tokens=6, do_sample=False)
    assert before == processor.decode(text[0], skip_special_tokens=True).strip()
    for frame in frames:
        one = quiet.push(frame)
        other = asked.push(frame)
        first, second = asked.ask(OTHER, max_new_tokens=6), asked.ask(max_new_tokens=6)
        assert torch.equal(one, other)
    assert torch.equal(quiet.visual_tokens, asked.visual_tokens)
    assert asked.ask(OTHER, max_new_tokens=6) == first
    assert quiet.ask(max_new_tokens=6) == second


@pytest.mark.parametrize("layout", ["question_first", "vision_first"])
@torch.no_grad()
def test_another_question_is_answered_from_the_tokens_that_were_seen(made, tmp_path, frames, layout):
    model, processor = pair(made, tmp_path, layout=layout)
    session = model.stream(processor, QUESTION)
    for frame in frames:
        session.push(frame)
    inputs = processor(text=OTHER, videos=frames)
    embeddings = model.embed(inputs["input_ids"], session.visual_tokens[:NUM_FRAMES])
    ids = model.language_model.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
    assert session.ask(OTHER, max_new_tokens=8) == processor.decode(ids[0], skip_special_tokens=True).strip()
    if layout == "vision_first":  # the gaze is the same for every question, and needs none
        free = model.stream(processor)
        for frame in frames:
            free.push(frame)
        assert free.ask(OTHER, max_new_tokens=8) == session.ask(OTHER, max_new_tokens=8)
        with pytest.raises(ValueError, match="started without a question: give ask one"):
            free.ask()


@torch.no_grad()
def test_a_closed_session_takes_nothing_more(made, processor, frames):
    model, _ = load_checkpoint(made.checkpoint)
    with model.stream(processor, QUESTION) as session:
        session.push(frames[0])
    for use in (session.ask, lambda: session.push(frames[1])):
        with pytest.raises(ValueError, match="the session was closed after 1 frames"):
            use()


@torch.no_grad()
def test_the_length_of_an_answer_is_the_one_that_was_asked_for(made, tmp_path, frames, monkeypatch):
    model, processor = pair(made, tmp_path)
    session = model.stream(processor, QUESTION)
    session.push(frames[0])
    length = processor(text=QUESTION, videos=frames[:1])["input_ids"].shape[1]
    lengths, decode = [], processor.tokenizer.decode
    monkeypatch.setattr(
        processor.tokenizer, "decode", lambda ids, **own: lengths.append(len(ids)) or decode(ids, **own)
    )
    for options in ({}, {"max_length": length + 3}, {"max_new_tokens": None, "max_length": length + 3}):
        session.ask(eos_token_id=None, **options)
    assert lengths == [streaming_session.ANSWER_TOKENS, 3, 3]
    with pytest.raises(ValueError, match="max_new_tokens=None and no max_length: pass one"):
        session.ask(max_new_tokens=None)
    with pytest.raises(ValueError, match="num_return_sequences=2, but ask returns 1 answer"):
        session.ask(do_sample=True, num_return_sequences=2)
    with pytest.raises(ValueError, match=f"max_length={length} counts the prompt, which has {length} tokens"):
        session.ask(max_length=length)


def test_without_attention_to_patches_the_map_is_zero(made, processor, frames):
    model, _ = load_checkpoint(made.checkpoint)
    session = model.stream(processor, QUESTION)
    session.push(frames[0])
    step = session._step

    def to_the_class_token(model, inputs):
        seen = step(model, inputs)
        seen.attention_weights = torch.zeros_like(seen.attention_weights).index_fill(-1, torch.tensor([0]), 1)
        return seen

    session._step = to_the_class_token
    assert torch.equal(session.push(frames[1]), torch.zeros(4, 4))


@torch.no_grad()
def test_beams_answer_as_generate_does_and_prompt_lookup_is_refused(made, tmp_path, frames):
    model, processor = pair(made, tmp_path)
    session = model.stream(processor, QUESTION)
    for frame in frames:
        session.push(frame)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    expected = model.generate(**processor(text=QUESTION, videos=frames), **options)
    assert session.ask(**options) == processor.decode(expected[0], skip_special_tokens=True).strip()
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens=3 is not supported"):
        session.ask(max_new_tokens=8, prompt_lookup_num_tokens=3)


def test_a_session_goes_on_in_and_outside_of_inference_mode(made, tmp_path, frames):
    model, processor = pair(made, tmp_path)
    with torch.inference_mode():
        session = model.stream(processor, QUESTION)
        session.push(frames[0])
        session.ask(max_new_tokens=2)
    session.push(frames[1])
    answer = session.ask(max_new_tokens=4)
    with torch.inference_mode():
        assert session.ask(max_new_tokens=4) == answer
        session.push(frames[2])


def test_sessions_do_not_disturb_each_other(made, tmp_path, frames, monkeypatch):
    captures = []
    monkeypatch.setattr(
        frame_step, "capture_cuda", lambda function, device: captures.append(device) or record(function, device)
    )
    model, processor = pair(made, tmp_path)

    def start(question):
        session = model.stream(processor, question)
        session._kind = "graph"
        return session

    expected = {}
    for question in (QUESTION, OTHER):
        with start(question) as alone:
            expected[question] = [alone.push(frame) for frame in frames]
    assert len(captures) == 1  # given back and taken again: both questions need as many places
    first, second = start(QUESTION), start(OTHER)
    for number, frame in enumerate(frames):
        assert torch.equal(first.push(frame), expected[QUESTION][number])
        assert torch.equal(second.push(frame), expected[OTHER][number])
    assert len(captures) == 2


def test_limits(made, processor, frames):
    model, _ = load_checkpoint(made.checkpoint)
    session = model.stream(processor, QUESTION, max_num_frames=2)
    for frame in frames[:2]:
        session.push(frame)
    with pytest.raises(ValueError, match=r"holds 2 frames, as many as it can.*trained with at most 64"):
        session.push(frames[2])
    assert session.ask(max_new_tokens=2) == session.ask(max_new_tokens=2)
    with pytest.raises(ValueError, match=r"of the language model's 4096 positions.*max_new_tokens=5000 does not fit"):
        session.ask(max_new_tokens=5000)
    with pytest.raises(ValueError, match=r"max_num_frames=4096 .*give from 1 to 40\d\d"):
        model.stream(processor, QUESTION, max_num_frames=4096)
    with pytest.raises(ValueError, match="max_num_frames=0"):
        model.stream(processor, QUESTION, max_num_frames=0)
    with pytest.raises(ValueError, match="question comes before the frames: give question"):
        model.stream(processor)
    fresh = model.stream(processor, QUESTION)
    for wrong in (torch.zeros(3, 56, 56, dtype=torch.uint8), torch.zeros(1, 3, 56, 56)):
        with pytest.raises(ValueError, match="expected normalised floats"):
            fresh.push(wrong)
    assert fresh.num_frames == 0
    model.language_model.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="forward hooks are registered"):
        model.stream(processor, QUESTION)


@pytest.mark.parametrize(
    "options", [{"architecture": "multi_token"}, {"coarse_only": True}, {"query_source": "static"}]
)
def test_a_model_without_planned_queries_has_no_session(processor, options):
    model = checkpoints.make_model(**options)
    with pytest.raises(ValueError, match="plans every query from the frames before"):
        model.stream(processor, QUESTION)


@pytest.mark.slow
def test_an_hour_of_video(made, processor):
    """One frame per second: memory is taken at the start, a frame late in the hour costs what an early one does."""
    model, _ = load_checkpoint(made.checkpoint)
    session = model.stream(processor, QUESTION, max_num_frames=HOUR)
    pixels = torch.randn(8, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    session.push(pixels[0])
    state = [session.visual_tokens, session._step.cache.keys, session._step.cache.values, session._step.queries]
    places = [tensor.data_ptr() for tensor in state]
    taken = sum(tensor.numel() for tensor in state)
    seconds = []
    for number in range(1, HOUR):
        started = time.process_time()
        seen = session.push(pixels[number % 8])
        seconds.append(time.process_time() - started)
    assert session.num_frames == HOUR
    assert seen.isfinite().all()
    assert [tensor.data_ptr() for tensor in state] == places
    per_frame = 48 + 2 * 2 * 2 * 12  # a visual token, and its keys and values: 2 layers, 2 heads, 12 wide
    assert taken < (HOUR + 200) * per_frame
    assert np.median(seconds[-500:]) < 3 * np.median(seconds[:500])
    answer = session.ask(max_new_tokens=4)
    assert answer == session.ask(max_new_tokens=4)
    with pytest.raises(ValueError, match="holds 3600 frames"):
        session.push(pixels[0])
