"""The processor and the pipeline of transformers on standard messages: chats, frames and answers of the training."""

import base64
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # without torchvision

from model import FoveatedVLMProcessor
from pipeline_steps.common import params
from pipeline_steps.common.checkpoint import load_checkpoint
from pipeline_steps.common.schemas import Item, PackedSample
from pipeline_steps.tokens.chat import ChatRenderer, tokenize
from tests import checkpoints
from tests.checkpoints import FRAMES, STILL_FRAMES
from tests.model.test_processing import QUESTION, assert_same

SYSTEM = params.read(params.ROOT / "params.yaml", "tokens").tokens.prompt("*").system
TURNS = [("user", " Which digits does red show? "), ("assistant", "red: 3 1"), ("user", "And\nblue?")]


@pytest.fixture(scope="module")
def processor(made):
    return FoveatedVLMProcessor.from_pretrained(made.checkpoint)


@pytest.fixture(scope="module")
def still(made):
    return made.raw / "procedural/test/image-000000.jpg"


def asked(kind, place, text=QUESTION, **more):
    return [
        {"role": "user", "content": [{"type": kind, **({"path": str(place)} | more)}, {"type": "text", "text": text}]}
    ]


def applied(processor, messages, **options):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True} | options
    return processor.apply_chat_template(messages, **options)


# ---------------------------------------------------------------- the chats of the training


def test_ids_of_a_chat_are_those_of_the_tokens_stage(made, processor):
    """Several turns, with and without a system line, complete and up to the answer, texts and typed contents."""
    renderer = ChatRenderer(processor.tokenizer, params.read(params.ROOT / "params.yaml", "tokens").tokens)
    own_system = ("system", "Speak of colours.")
    for turns in (TURNS[:2], [*TURNS, ("assistant", "4 2")], [own_system, *TURNS[:2]]):
        messages = [{"role": role, "content": content} for role, content in turns]
        item = Item(task="card", messages=tuple(messages))
        sample = PackedSample.model_construct(key="a", source="procedural", kind="video", items=(item,))
        chat = renderer.render(renderer.messages(sample, item))
        expected = tokenize(processor.tokenizer, [chat])[0]
        typed = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        for same in (messages, typed):
            ids = applied(processor, same, add_generation_prompt=False)["input_ids"][0].tolist()
            assert ids[: len(expected.input_ids)] == expected.input_ids
            assert processor.decode(ids[len(expected.input_ids) :]) == "\n"
        typed[int(turns[0] == own_system)]["content"].insert(0, {"type": "video", "path": str(made.video)})
        ids = applied(processor, typed, add_generation_prompt=False)["input_ids"][0]
        places = (ids == processor.visual_token_id).nonzero()[:, 0]
        assert places.tolist() == list(range(expected.visual_position, expected.visual_position + FRAMES.max_frames))
        assert ids[ids != processor.visual_token_id].tolist()[: len(expected.input_ids)] == expected.input_ids
        up_to_answer = applied(processor, typed[:-1])["input_ids"][0].tolist()
        assert up_to_answer == ids[: len(up_to_answer)].tolist()


def test_the_trained_system_line_is_added_where_there_is_none(processor):
    question = [{"role": "user", "content": "Say 314"}]
    assert processor.system == SYSTEM == "You watch videos."
    expected = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nSay 314<|im_end|>\n"
    assert processor.apply_chat_template(question) == expected
    own = [{"role": "system", "content": "Be brief."}, *question]
    assert SYSTEM not in processor.apply_chat_template(own)
    assert question == [{"role": "user", "content": "Say 314"}]  # the caller's messages are left alone


@pytest.mark.parametrize("layout", ["question_first", "vision_first"])
def test_messages_give_the_tensors_of_a_question(made, processor, still, layout):
    options = {name: getattr(processor, name) for name in (*FRAMES.model_dump(), "image_replication", "system")}
    processor = FoveatedVLMProcessor.for_model(
        checkpoints.make_model(layout=layout).config, processor.tokenizer, **options
    )
    expected = dict(processor(text=QUESTION, videos=made.video))
    picture = Image.open(still)
    with_video = [
        {"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "video", "url": str(made.video)}]}
    ]
    for messages in (asked("video", made.video), with_video):
        assert_same(dict(applied(processor, messages)), expected)
    expected = dict(processor(text=QUESTION, videos=still))
    encoded = base64.b64encode(still.read_bytes()).decode()
    for value in (
        {"path": str(still)},
        {"image": picture},
        {"base64": encoded},
        {"url": f"data:image/jpeg;base64,{encoded}"},
    ):
        messages = [{"role": "user", "content": [{"type": "image", **value}, {"type": "text", "text": QUESTION}]}]
        assert_same(dict(applied(processor, messages)), expected)
    openai = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(still)}}, QUESTION]}]
    assert_same(dict(applied(processor, openai)), expected)
    plain = [{"role": "user", "content": QUESTION}]
    assert_same(dict(applied(processor, plain)), dict(processor(text=QUESTION)))


def test_a_rendered_chat_is_taken_with_its_media(made, processor, still):
    rendered = processor.apply_chat_template(asked("video", made.video), add_generation_prompt=True)
    assert rendered.count("<video>") == 1
    expected = dict(processor(text=QUESTION, videos=made.video))
    for chat in (
        rendered,
        rendered.replace("<video>", "<video>\n"),
        rendered.replace("<video>", "").replace("red show?", "red show? <video>"),
    ):
        for videos in (made.video, [made.video], [[made.video]]):
            assert_same(dict(processor(text=chat, videos=videos)), expected)
    assert_same(dict(processor(text=[rendered], videos=[[str(made.video)]])), expected)
    assert_same(dict(processor(text=f"<video>\n{QUESTION}", videos=made.video)), expected)
    assert_same(dict(processor(text=f"<image>\n{QUESTION}", videos=made.video)), expected)  # as LLaVA writes it
    assert_same(dict(applied(processor, asked("video", made.video, f"<video>\n{QUESTION}"))), expected)
    both = dict(processor(text=[rendered, QUESTION], videos=[made.video, None], images=[None, still]))
    assert both["num_frames"].tolist() == [FRAMES.max_frames, STILL_FRAMES]
    same = dict(processor(text=[rendered, "<image>" + QUESTION], videos=[made.video], images=[still]))
    assert_same(same, both)


def test_images_are_stills_in_every_form(processor, still):
    expected = dict(processor(text=QUESTION, videos=still))
    picture = Image.open(still)
    for images in (picture, str(still), still, [picture], [[picture]], [str(still)]):
        assert_same(dict(processor(text=QUESTION, images=images)), expected)
    two = processor(text=QUESTION, images=[still, picture])
    assert two["num_frames"].tolist() == [2 * STILL_FRAMES]
    assert torch.equal(two["pixel_values"][:STILL_FRAMES], two["pixel_values"][STILL_FRAMES:])
    assert two["frame_times"].tolist() == [0.0] * 2 * STILL_FRAMES
    messages = asked("image", still)
    messages[0]["content"].insert(0, {"type": "image", "image": picture})
    assert_same(dict(applied(processor, messages)), dict(two))


def test_a_batch_of_conversations_holds_each_alone(made, processor, still):
    conversations = [asked("video", made.video), asked("image", still, "What?"), [{"role": "user", "content": "Say 1"}]]
    batch = applied(processor, conversations)
    assert batch["num_frames"].tolist() == [FRAMES.max_frames, STILL_FRAMES, 0]
    for row, messages in enumerate(conversations):
        alone = applied(processor, messages)["input_ids"][0]
        assert torch.equal(batch["input_ids"][row, -len(alone) :], alone)
        assert int(batch["attention_mask"][row].sum()) == len(alone)


def test_the_last_answer_can_be_continued(processor):
    messages = [{"role": "user", "content": "Say 314"}, {"role": "assistant", "content": "red: 3"}]
    chat = processor.apply_chat_template(messages, continue_final_message=True)
    assert chat.endswith("assistant\nred: 3")


# ---------------------------------------------------------------- padding, truncation, options of a call


def test_padding_and_truncation_are_those_of_tokenizers(made, processor):
    texts = [QUESTION, "Say 1"]
    left, right = processor(text=texts), processor(text=texts, padding_side="right")
    short = int(left["attention_mask"][1].sum())
    assert left["attention_mask"][1].tolist() == right["attention_mask"][1].flip(0).tolist()
    assert torch.equal(left["input_ids"][1, -short:], right["input_ids"][1, :short])
    assert processor(text="Say 1", padding="max_length", max_length=90)["input_ids"].shape == (1, 90)
    assert processor(text="Say 1", pad_to_multiple_of=32)["input_ids"].shape[1] % 32 == 0
    lists = processor(text=texts, padding=False, return_tensors=None)["input_ids"]
    assert [len(row) for row in lists] == left["attention_mask"].sum(1).tolist()
    cut = processor(text=QUESTION, truncation=True, max_length=9)
    assert cut["input_ids"].tolist() == processor(text=QUESTION)["input_ids"][:, :9].tolist()
    assert processor(text=QUESTION, text_kwargs={"padding_side": "right"})["input_ids"].shape[0] == 1
    ids = processor(text=QUESTION, videos=made.video)["input_ids"][0]
    length = int((ids == processor.visual_token_id).nonzero()[1])
    message = f"max_length={length} leaves 1 of 4 visual tokens in a chat of {len(ids)} tokens"
    with pytest.raises(ValueError, match=message):
        processor(text=QUESTION, videos=made.video, truncation=True, max_length=length)


def test_options_of_a_call_hold_for_it_alone(made, processor):
    assert processor(text=QUESTION, videos=made.video, max_frames=2)["num_frames"].tolist() == [2]
    small = applied(processor, asked("video", made.video), processor_kwargs={"videos_kwargs": {"max_frames": 1}})
    assert small["num_frames"].tolist() == [1]
    assert processor(text=QUESTION, videos=made.video)["num_frames"].tolist() == [FRAMES.max_frames]


def test_hdr_of_a_processor_is_that_of_both_parts(made):
    changed = FoveatedVLMProcessor.from_pretrained(made.checkpoint)
    assert (changed.hdr, changed.image_processor.hdr) == ("refuse", "refuse")
    changed.hdr = "tone_map"
    assert (changed.image_processor.hdr, changed.video_processor.hdr, changed.to_dict()["hdr"]) == ("tone_map",) * 3
    with pytest.raises(ValueError, match="hdr='show' is not one of"):
        changed.hdr = "show"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"text": "<image><image>a", "images": [Image.new("RGB", (8, 8))]},
            "text 0 has 2 placeholders <image> for 1 images",
        ),
        ({"text": "<video>a"}, "text 0 has 1 placeholders <video> for 0 videos"),
        (
            {"text": "<|im_start|>user\na<|im_end|>", "images": Image.new("RGB", (8, 8))},
            "0 placeholders <image> for 1 images",
        ),
        ({"text": ["a", "<image>b"], "images": [Image.new("RGB", (8, 8))] * 3}, "questions: 2, images: 3"),
        ({"text": "a", "fsp": 3}, "does not support fsp"),
        ({"text": "a", "videos_kwargs": {"do_sample_frames": False}}, "do_sample_frames=False: files are sampled"),
        ({"text": "a", "images_kwargs": {"do_resize": False}}, "FoveatedVLMImageProcessor has no option do_resize"),
        ({"text": "a", "audio": [1]}, "does not support audio"),
        ({"text": "a", "padding": "longer"}, "padding='longer' must be one of True, 'longest'"),
        ({"text": "a", "images": "no.png"}, "no.png: missing file"),
        ({"text": "a", "images": "http://a b/c.png"}, "http://a b/c.png: cannot be downloaded .*Check the URL"),
        ({"text": "a", "images": "http://127.0.0.1:9/ä.png"}, "ä.png: cannot be downloaded .*Check the URL"),
        ({"text": "<image>", "images": Image.new("RGB", (8, 8))}, "expected a question beside the placeholders"),
    ],
)
def test_wrong_calls_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a<|im_end|>"}], r"message 0: .* contains the control token <\|im_end\|>"),
        ([{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}], "message 0: a part is .*audio"),
        ([{"role": "user"}], "message 0: found .*expected a dict with role and content"),
        ([{"role": "user", "content": 5}], "message 0: its content is int"),
        ([{"role": "user", "content": [{"type": "image"}, "Which?"]}], "1 placeholders <image> for 0 images"),
        ([{"role": "user", "content": [{"type": "image", "path": "a", "url": "b"}]}], "its image has url and path"),
        (
            [
                {"role": role, "content": [{"type": "image", "image": Image.new("RGB", (8, 8))}, "a"]}
                for role in ("user", "user")
            ],
            "2 messages have images or videos, expected 1",
        ),
    ],
)
def test_wrong_messages_are_named(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        applied(processor, messages)


def test_media_are_fetched_by_url(made, processor, still):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(made.raw))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        for kind, path in (("video", made.video), ("image", still)):
            messages = asked(kind, path, path=f"{base}/{path.relative_to(made.raw)}")
            assert_same(dict(applied(processor, messages)), dict(applied(processor, asked(kind, path))))
        with pytest.raises(ValueError, match=r"no\.mp4: cannot be downloaded .*404"):
            processor(text=QUESTION, videos=f"{base}/no.mp4")
        server.shutdown()


# ---------------------------------------------------------------- files


def test_image_and_video_processors_are_saved_and_loaded(made, processor, still):
    image_processor = AutoImageProcessor.from_pretrained(made.checkpoint)
    assert type(image_processor).__name__ == "FoveatedVLMImageProcessor"
    expected = processor(text=QUESTION, images=still)["pixel_values"][:1]
    assert torch.equal(image_processor(Image.open(still), return_tensors="pt")["pixel_values"], expected)
    video_processor = type(processor.video_processor).from_pretrained(made.checkpoint)
    found, expected = video_processor(str(made.video)), processor(text=QUESTION, videos=made.video)
    for name in ("pixel_values", "num_frames", "frame_times"):
        assert torch.equal(found[name], expected[name])
    saved = json.loads((made.checkpoint / "video_preprocessor_config.json").read_text())
    assert (saved["size"], saved["fps"]) == ({"height": 56, "width": 56}, FRAMES.fps)
    assert saved["auto_map"] == {"AutoVideoProcessor": "video_processing_foveated_vlm.FoveatedVLMVideoProcessor"}
    assert json.loads((made.checkpoint / "preprocessor_config.json").read_text())["jpeg_quality"] == FRAMES.jpeg_quality


def test_files_that_disagree_are_an_error(made, processor, tmp_path):
    shutil.copytree(made.checkpoint, tmp_path / "copy")
    path = tmp_path / "copy/video_preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fps": 7.0}))
    with pytest.raises(ValueError, match=r"fps is 7\.0 in video_preprocessor_config\.json, but 2\.0 by"):
        AutoProcessor.from_pretrained(tmp_path / "copy")
    path.unlink()  # a checkpoint from before
    AutoProcessor.from_pretrained(tmp_path / "copy")
    changed = AutoProcessor.from_pretrained(made.checkpoint, fps=1.0, jpeg_quality=None)
    changed.save_pretrained(tmp_path / "changed")
    again = AutoProcessor.from_pretrained(tmp_path / "changed")
    assert (again.fps, again.jpeg_quality, again.image_processor.jpeg_quality) == (1.0, None, None)
    assert_same(dict(again(text=QUESTION, videos=made.video)), dict(changed(text=QUESTION, videos=made.video)))


# ---------------------------------------------------------------- the pipeline of transformers


@pytest.fixture(scope="module")
def lively(made, tmp_path_factory):
    """A published checkpoint whose answers differ with the question and the frames."""
    folder = tmp_path_factory.mktemp("lively") / "checkpoint"
    checkpoints.save(checkpoints.make_lively_model(), made, folder, SYSTEM)
    return folder


def answer(model, processor, **inputs):
    ids = model.generate(**processor(**inputs), max_new_tokens=6, do_sample=False)
    return processor.decode(ids[0], skip_special_tokens=True)


def test_the_pipeline_answers_as_the_model_does(made, lively, still):
    model, processor = load_checkpoint(lively)
    answers = pipeline("image-text-to-text", model=str(lively), trust_remote_code=True, max_new_tokens=6)
    questions = [asked("video", made.video), asked("image", still), asked("video", made.video, "And blue?")]
    expected = [
        answer(model, processor, text=QUESTION, videos=made.video),
        answer(model, processor, text=QUESTION, images=still),
        answer(model, processor, text="And blue?", videos=made.video),
    ]
    assert len(set(expected)) > 1
    for question, own in zip(questions, expected, strict=True):
        assert answers(text=question, return_full_text=False)[0]["generated_text"] == own
        assert answers(question)[0]["generated_text"][-1] == {"role": "assistant", "content": own}
    for size in (1, 3):
        found = answers(text=questions, return_full_text=False, batch_size=size)
        assert [
            rows[0]["generated_text"] if isinstance(rows, list) else rows["generated_text"] for rows in found
        ] == expected
    plain = answers(images=str(still), text=QUESTION, return_full_text=False)
    assert plain[0]["generated_text"] == expected[1]


PIPELINE = """
import importlib.util, json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
assert not any(importlib.util.find_spec(name) for name in ("model", "pipeline_steps"))
from transformers import pipeline
folder, video, question = sys.argv[1:]
answers = pipeline("image-text-to-text", model=folder, trust_remote_code=True, max_new_tokens=6)
messages = [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": question}]}]
print(json.dumps([type(answers.model).__module__.split(".")[0], answers(text=messages, return_full_text=False)]))
"""


def test_the_pipeline_needs_the_folder_only(made, lively, tmp_path):
    shutil.copytree(lively, tmp_path / "copy")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    command = [sys.executable, "-I", "-c", PIPELINE, tmp_path / "copy", made.video, QUESTION]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    module, found = json.loads(done.stdout.splitlines()[-1])
    assert module == "transformers_modules"
    assert found[0]["generated_text"] == answer(*load_checkpoint(lively), text=QUESTION, videos=made.video)
    assert "is not supported for" not in done.stderr
