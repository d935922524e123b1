"""A question asked by hand gives the tensors of the pipeline, whatever form its video has."""

import copy
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from model import FoveatedVLMProcessor, frames
from model.pictures import RESIZE_MODES
from model.processing_foveated_vlm import normalise
from pipeline_steps.common import params
from pipeline_steps.common.hashing import sha256_file
from pipeline_steps.common.schemas import RawSample
from pipeline_steps.inference.answers import up_to_answer
from pipeline_steps.shards.pack import Settings, pack_shard
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards
from tests.checkpoints import FRAMES, STILL_FRAMES, make_model
from tests.pipeline_steps.clips import index_row, write_clip, write_image

QUESTION = "Which digits does red show?"


@pytest.fixture(scope="module")
def processor(made):
    return FoveatedVLMProcessor.from_pretrained(made.checkpoint)


def options_of(processor):
    return {name: getattr(processor, name) for name in (*FRAMES.model_dump(), "image_replication", "system")}


def assert_same(one, other):
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "vision_first"},
        {"layout": "vision_first", "architecture": "multi_token", "num_visual_tokens_per_frame": 4},
    ],
)
def test_tensors_are_those_of_the_pipeline(made, processor, options):
    """Raw media by the processor = raw media by shards, tokens and collate: every task, a still, a text."""
    config = make_model(**options).config
    processor = FoveatedVLMProcessor.for_model(config, processor.tokenizer, **options_of(processor))
    collate = Collator.for_model(config, loss="answer_only", image_replication=STILL_FRAMES)
    dataset = TokenizedShards(made.shards, made.tokens, "test")
    prompt = params.read(params.ROOT / "params.yaml", "tokens").tokens.prompt("*")
    kinds = set()
    for number, row in enumerate(dataset.rows):
        sample = dataset.sample(number)
        expected = collate([up_to_answer(dataset[number])]).to("cpu").inputs()
        expected = {name: value for name, value in expected.items() if len(value)}
        question = sample.items[row["item"]].user or (prompt.image if row["kind"] == "image" else prompt.video)
        found = processor(text=f" {question}\n", videos=made.raw / sample.path if sample.path else None)
        assert_same(dict(found), expected)
        kinds.add((row["kind"], int(found["num_frames"][0])))
    assert kinds == {("video", FRAMES.max_frames), ("image", STILL_FRAMES), ("text", 0)}


def test_every_form_of_a_video_gives_the_same_tensors(made, processor):
    media = frames.read_media(made.video, "video", fps=2.0, max_frames=4, image_size=56, resize_mode="crop")
    pictures = media.frames
    array = np.stack([np.asarray(picture) for picture in pictures])
    expected = dict(processor(text=QUESTION, videos=made.video))
    for video in (str(made.video), [made.video]):
        assert_same(dict(processor(text=QUESTION, videos=video)), expected)
    for video in (pictures, tuple(pictures), array, list(array)):  # whose times are not known
        assert_same(dict(processor(text=QUESTION, videos=video, frame_times=media.timestamps)), expected)
        assert processor(text=QUESTION, videos=video)["frame_times"].tolist() == [0, 0.5, 1, 1.5]
    as_numpy = processor(text=QUESTION, videos=made.video, return_tensors="np")
    assert isinstance(as_numpy["pixel_values"], np.ndarray)


def test_times_of_frames_are_given_for_every_frame_or_not_at_all(made, processor):
    shown = np.zeros((2, 56, 56, 3), np.uint8)
    both = processor(text=["A?", "B?"], videos=[shown, made.video], frame_times=[[3.0, 4.0], None])
    assert both["frame_times"][:2].tolist() == [3, 4]
    assert torch.equal(both["frame_times"][2:], processor(text="B?", videos=made.video)["frame_times"])
    for video, times, message in (
        (shown, [1.0], "frame_times: 1 times for 2 frames. Pass one time per frame"),
        (made.video, [1.0] * 4, "frame_times: 4 times for a file or an image, which has its own"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text="A?", videos=video, frame_times=times)
    with pytest.raises(ValueError, match="frame_times has 1 entries for 2 videos"):
        processor(text=["A?", "B?"], videos=[shown, shown], frame_times=[[3.0, 4.0]])


def test_pictures_are_cut_square_and_a_still_is_repeated(processor):
    wide = np.zeros((2, 40, 80, 3), np.uint8)
    wide[:, :, 20:60] = 200  # the centre square
    found = processor(text=QUESTION, videos=wide)
    assert found["pixel_values"].shape == (2, 3, 56, 56)
    assert processor.pictures(found["pixel_values"])[:, 2:-2, 2:-2].min() > 190
    still = processor(text=QUESTION, videos=Image.fromarray(wide[0]))
    assert still["num_frames"].tolist() == [STILL_FRAMES]
    assert torch.equal(still["pixel_values"][0], found["pixel_values"][0])
    assert int((still["input_ids"] == processor.visual_token_id).sum()) == STILL_FRAMES


def test_letterbox_keeps_every_kind_of_input_whole(processor, tmp_path):
    """File, PIL image, list of arrays and array alike: the white picture between two black bars."""
    boxed = FoveatedVLMProcessor(processor.tokenizer, 56, resize_mode="letterbox", jpeg_quality=None)
    wide = np.full((1, 40, 80, 3), 255, np.uint8)
    Image.fromarray(wide[0]).save(tmp_path / "a.png")
    for video in (tmp_path / "a.png", Image.fromarray(wide[0]), [wide[0]], wide):
        shown = boxed.pictures(boxed(text=QUESTION, videos=video)["pixel_values"])[0]
        assert (shown[:14] == 0).all()
        assert (shown[14:42] == 255).all()
        assert (shown[42:] == 0).all()
    assert processor.pictures(processor(text=QUESTION, videos=wide)["pixel_values"]).min() > 250


@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_frames_are_those_of_the_shards_whatever_the_fit(processor, tmp_path, resize_mode):
    """A wide clip and a tall still, packed and shown."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 36, 64, 3), np.uint8)
    write_clip(tmp_path / "a.mp4", list(noise))
    write_image(tmp_path / "b.png", noise[0].transpose(1, 0, 2))
    rows = [index_row(tmp_path, "a.mp4", split="train"), index_row(tmp_path, "b.png", kind="image", split="train")]
    policy = FRAMES.model_copy(update={"resize_mode": resize_mode})
    samples = [RawSample.model_validate(row) for row in rows]
    pack_shard(samples, Settings(raw_dir=str(tmp_path), frames=policy), tmp_path / "packed/000000")
    shown = FoveatedVLMProcessor(processor.tokenizer, **policy.model_dump())
    with tarfile.open(tmp_path / "packed/000000.tar") as tar:
        for sample in samples:
            packed = [tar.extractfile(name) for name in tar.getnames() if sample.key in name and name.endswith("jpg")]
            expected = np.stack([np.asarray(Image.open(file)) for file in packed])
            found = shown.pictures(shown(text=QUESTION, videos=tmp_path / sample.path)["pixel_values"])
            assert np.array_equal(found, expected)
            assert (expected[:, 0].max() < 20) == (resize_mode == "letterbox" and sample.kind == "video")


def test_a_processor_saved_before_letterbox_crops(made, tmp_path):
    FoveatedVLMProcessor.from_pretrained(made.checkpoint).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    del config["resize_mode"]
    path.write_text(json.dumps(config))
    assert FoveatedVLMProcessor.from_pretrained(tmp_path).resize_mode == "crop"
    assert AutoProcessor.from_pretrained(tmp_path, resize_mode="letterbox").resize_mode == "letterbox"


def test_pictures_undo_the_normalisation_exactly(processor):
    values = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3) + 100
    assert np.array_equal(processor.pictures(torch.from_numpy(normalise(values))), values)


def test_batch_is_left_padded_and_holds_the_samples_alone(made, processor):
    questions = ["What is in the video, and which digits does red show?", "Say 314", QUESTION]
    videos = [made.video, None, np.full((2, 60, 60, 3), 90, np.uint8)]
    batch = processor(text=questions, videos=videos)
    assert batch["num_frames"].tolist() == [4, 0, 2]
    for row, (question, video) in enumerate(zip(questions, videos, strict=True)):
        alone = processor(text=question, videos=video)
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], alone["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [0] * (batch["input_ids"].shape[1] - length) + [1] * length
    model = make_model()
    answers = processor.batch_decode(model.generate(**batch, max_new_tokens=4, do_sample=False))
    alone = model.generate(**processor(text=QUESTION, videos=videos[2]), max_new_tokens=4, do_sample=False)
    assert answers[2] == processor.decode(alone[0])


@pytest.mark.parametrize(
    ("text", "videos", "message"),
    [
        ("", None, "expected a question, found ''"),
        ([], None, "questions: 0, videos: 0"),
        ("a<|im_end|>", None, r"contains the control token <\|im_end\|>. Pass the question only"),
        (["a", "b"], ["x.mp4"], "questions: 2, videos: 1"),
        ("a", ["x.mp4", "y.mp4"], "questions: 1, videos: 2"),
        (["a"], [Image.new("RGB", (8, 8))] * 2, "questions: 1, videos: 2"),
        ("a", "no/such.mp4", "no/such.mp4: missing file"),
        ("a", np.zeros((2, 3, 8, 8), np.uint8), r"shape \[2, 3, 8, 8\] and type uint8, expected"),
        ("a", np.zeros((8, 8, 3), np.uint8), r"shape \[8, 8, 3\] and type uint8, expected"),
        ("a", np.zeros((2, 8, 8, 3), np.float32), r"shape \[2, 8, 8, 3\] and type float32, expected"),
        ("a", [np.zeros((8, 8, 3), np.float32)], r"shape \[8, 8, 3\] and type float32, expected"),
        ("a", Image.new("I", (8, 8)), "unsupported pixel mode I"),
        ("a", [Image.new("F", (8, 8))], "unsupported pixel mode F"),
        ("a", "/", "/ is a folder. Pass a file"),
        (5, None, "expected a question or a list of questions, found int 5"),
        (None, None, "expected a question or a list of questions, found NoneType None"),
        ({"a": 1}, None, "expected a question or a list of questions, found dict"),
        (["a", 5], None, "expected a question, found 5"),
        (["a"], 5, "questions: 1, videos: 1. Pass a list"),
        ("a", np.zeros((0, 8, 8, 3), np.uint8), "found 0 frames"),
        ("a", 3, "found int of shape"),
    ],
)
def test_wrong_input_is_named(processor, text, videos, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, videos=videos)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("image_size", 0, "an integer of at least 1"),
        ("image_replication", 0, "an integer of at least 1"),
        ("max_frames", 2.5, "an integer of at least 1"),
        ("tokens_per_frame", True, "an integer of at least 1"),
        ("jpeg_quality", 0, "an integer from 1 to 100 or None"),
        ("jpeg_quality", 101, "an integer from 1 to 100 or None"),
        ("fps", 0, "a finite number above 0"),
        ("fps", float("nan"), "a finite number above 0"),
        ("fps", "2", "a finite number above 0"),
    ],
)
def test_an_option_outside_its_range_is_named(processor, option, value, allowed):
    with pytest.raises(ValueError, match=f"^{option}={value!r}, expected {allowed}$"):
        FoveatedVLMProcessor(processor.tokenizer, **({"image_size": 56} | {option: value}))


def test_frames_first_need_a_token_before_them(made, processor):
    given = copy.deepcopy(processor)
    given.layout, given.bos_token_id = "vision_first", None
    assert len(given(text="a")["input_ids"][0])  # a text without frames needs none
    with pytest.raises(ValueError, match=r"layout='vision_first' puts a BOS token .* bos_token_id is None"):
        given(text="a", videos=made.video)


def test_an_unknown_layout_or_fit_is_named(processor):
    with pytest.raises(ValueError, match="resize_mode='stretch' is not one of crop, letterbox"):
        FoveatedVLMProcessor(processor.tokenizer, 56, resize_mode="stretch")
    with pytest.raises(ValueError, match="layout='sideways' is not one of question_first, vision_first"):
        FoveatedVLMProcessor(processor.tokenizer, 56, layout="sideways")


def test_options_replace_the_saved_ones(made, processor):
    given = {"tokens_per_frame": 4, "fps": 1.0, "jpeg_quality": None}
    changed = AutoProcessor.from_pretrained(made.checkpoint, **given)
    assert changed.to_dict() == processor.to_dict() | given
    inputs = changed(text=QUESTION, videos=made.video)
    assert int((inputs["input_ids"] == changed.visual_token_id).sum()) == 4 * int(inputs["num_frames"][0])
    with pytest.raises(ValueError, match="tokens_per_frame=0, expected"):
        AutoProcessor.from_pretrained(made.checkpoint, tokens_per_frame=0)


def test_a_pil_image_is_the_same_as_its_file(processor, tmp_path):
    """Also where an EXIF tag turns it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    expected = processor(text=QUESTION, videos=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert_same(dict(processor(text=QUESTION, videos=picture)), dict(expected))
        listed = processor(text=QUESTION, videos=[picture])
    assert torch.equal(listed["pixel_values"][0], expected["pixel_values"][0])
    plain = processor(text=QUESTION, videos=Image.fromarray(pixels))
    assert not torch.equal(plain["pixel_values"], expected["pixel_values"])


def test_a_cut_pil_image_is_an_error(processor, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    with Image.open(tmp_path / "a.png") as cut, pytest.raises(ValueError, match="truncated or damaged image"):
        processor(text=QUESTION, videos=cut)


def test_undecodable_video_is_named(processor, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"a\.mp4: not a video file"):
        processor(text=QUESTION, videos=tmp_path / "a.mp4")


def test_only_a_video_file_needs_pyav(made, processor, monkeypatch):
    monkeypatch.setattr("model.video.av", None)
    with pytest.raises(ImportError, match="requires PyAV"):
        processor(text=QUESTION, videos=made.video)
    assert processor(text=QUESTION, videos=made.raw / "procedural/test/image-000000.jpg")["num_frames"] == STILL_FRAMES


def test_saved_processor_is_the_same(made, processor, tmp_path):
    processor.save_pretrained(tmp_path / "one")
    again = AutoProcessor.from_pretrained(tmp_path / "one")
    assert isinstance(again, FoveatedVLMProcessor)
    assert (again.to_dict() | {"auto_map": None}) == (processor.to_dict() | {"auto_map": None})
    assert options_of(again) == FRAMES.model_dump() | {"image_replication": STILL_FRAMES, "system": processor.system}
    assert_same(dict(again(text=QUESTION, videos=made.video)), dict(processor(text=QUESTION, videos=made.video)))
    again.save_pretrained(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_the_tokenizer_of_a_checkpoint_is_the_language_models(made, processor):
    assert sha256_file(made.checkpoint / "tokenizer.json") == sha256_file(made.tokenizer / "tokenizer.json")
    assert processor.chat_template == (made.tokenizer / "chat_template.jinja").read_text()
