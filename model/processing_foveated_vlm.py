"""The processor: questions and videos -> tensors for `forward` and `generate`.

Shapes: B questions, S sequence, T frames of one video, F frames of the whole batch, P visual tokens per frame. Frames
are sampled, resized and compressed as in the training data (model/frames.py), and the chat format is that of the
training data. A question therefore gives the same tensors as in the pipeline.
"""

import inspect
import io
import math
import os
from numbers import Integral, Real

import numpy as np
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from .configuration_foveated_vlm import LAYOUTS
from .frames import read_media
from .hdr import HDR_MODES
from .pictures import IMAGE_SUFFIXES, RESIZE_MODES, MediaError, jpeg, square, upright

IMAGE_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # DINOv2's image processor
IMAGE_STD = np.array([0.229, 0.224, 0.225], np.float32)
PROBE = "\N{REPLACEMENT CHARACTER}"


def normalise(frames: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [F, height, width, 3] -> normalised float32 [F, 3, height, width] for DINOv2, written to `out` if given."""
    if out is None:
        out = np.empty((len(frames), 3, *frames.shape[1:3]), np.float32)
    out[:] = frames.transpose(0, 3, 1, 2)  # channels first makes the rest several times faster
    out *= 1 / 255
    out -= IMAGE_MEAN[:, None, None]
    out /= IMAGE_STD[:, None, None]
    return out


def visual_places(
    layout: str, num_places: int, question_end: int, visual_id: int, bos_id: int
) -> tuple[int, np.ndarray]:
    """(position in the text's ids, int64 ids to insert there) of the placeholders of a sample.

    question_end: position of the question's end-of-turn token. num_places: number of placeholders; 0: nothing is
    inserted.
    """
    places = np.full(num_places, visual_id, np.int64)
    if layout == "vision_first" and num_places:
        return 0, np.concatenate([[bos_id], places])
    return question_end, places


class FoveatedVLMProcessor(ProcessorMixin):
    """Tokenizer, chat template and frame sampling of a FoveatedVLM checkpoint, as in its training.

    Args:
        tokenizer: tokenizer of the language model, with a chat template.
        image_size: side of the square frames in px.
        chat_template: Jinja template; default: the tokenizer's.
        fps: sampled frames per second of a video file, uniform over the whole clip.
        max_frames: largest number of frames sampled from a video file.
        jpeg_quality: 1 to 100, JPEG compression of the frames as in the training data; None: no compression.
        image_replication: number of frames that an image is repeated to.
        system: system message of the chat; "": default of the chat template.
        layout: of the model, `question_first` or `vision_first`.
        tokens_per_frame: of the model, the number of placeholders per frame.
        visual_token_id: of the model, the id of the placeholder; None: the first id after the tokenizer's.
        bos_token_id: id of the token before the frames in `vision_first`; None: the tokenizer's.
        resize_mode: how images are made square: `crop` (shorter side to image_size, centre of the longer one) or
            `letterbox` (longer side to image_size, black bars).
        hdr: files with PQ or HLG: `refuse` them, or `tone_map` them to SDR.

    Raises ValueError for an option outside its range, an unknown layout, resize_mode or hdr, or a tokenizer without
    chat template.
    """

    def __init__(
        self,
        tokenizer,
        image_size,
        chat_template=None,
        fps=2.0,
        max_frames=64,
        jpeg_quality=95,
        image_replication=1,
        system="",
        layout="question_first",
        tokens_per_frame=1,
        visual_token_id=None,
        bos_token_id=None,
        resize_mode="crop",
        hdr="refuse",
    ):
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode={resize_mode!r} is not one of {', '.join(RESIZE_MODES)}")
        if hdr not in HDR_MODES:
            raise ValueError(f"hdr={hdr!r} is not one of {', '.join(HDR_MODES)}")
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template. Pass chat_template")
        self.image_size = _integer("image_size", image_size)
        self.fps = _positive("fps", fps)
        self.max_frames = _integer("max_frames", max_frames)
        self.jpeg_quality = None if jpeg_quality is None else _integer("jpeg_quality", jpeg_quality, 100, " or None")
        self.image_replication = _integer("image_replication", image_replication)
        self.tokens_per_frame = _integer("tokens_per_frame", tokens_per_frame)
        self.system, self.layout, self.resize_mode, self.hdr = system, layout, resize_mode, hdr
        self.visual_token_id = len(tokenizer) if visual_token_id is None else visual_token_id
        self.bos_token_id = tokenizer.bos_token_id if bos_token_id is None else bos_token_id

    @classmethod
    def for_model(cls, config, tokenizer, **options) -> "FoveatedVLMProcessor":
        """The processor for a FoveatedVLMConfig. options: arguments that the network does not determine."""
        return cls(
            tokenizer,
            layout=config.layout,
            tokens_per_frame=config.tokens_per_frame,
            visual_token_id=config.visual_token_id,
            bos_token_id=config.text_config.bos_token_id,
            **options,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """The saved processor. Options of `FoveatedVLMProcessor` in `kwargs` override the saved ones."""
        names = [name for name in inspect.signature(cls).parameters if name != "tokenizer"]
        # transformers would also pass them to the config
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if not given:
            return processor
        return cls(processor.tokenizer, **({name: getattr(processor, name) for name in names} | given))

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "num_frames"]

    def __call__(self, text, videos=None, frame_times=None, return_tensors: str | None = "pt") -> BatchFeature:
        """Tensors for one question or a list of B questions, each with a video, an image or neither.

        text: a str or a list of str. videos: for one question a path of a video or image file, a list of PIL images
        (the frames), one PIL image, a uint8 array [T, height, width, 3], or None; for a list of questions a list of
        these. Frames passed as images or arrays are all used, regardless of `fps` and `max_frames`. frame_times:
        seconds of each such frame since the start of its clip (for a list of questions a list of such lists or None);
        by default they are 1 / `fps` apart. The times of a file are read from the file.

        Returns input_ids and attention_mask int64 [B, S], left-padded, num_frames int64 [B], and, where there are
        frames, pixel_values float32 [F, 3, image_size, image_size] and frame_times float32 [F]. Raises ValueError for
        an empty question or one with a control token, a file that cannot be read, or frames of another form.
        """
        given = [frame_times] if isinstance(text, str) else frame_times
        questions, videos = _as_batch(text, videos)
        given = [None] * len(videos) if given is None else given
        if len(given) != len(videos):
            raise ValueError(
                f"frame_times has {len(given)} entries for {len(videos)} videos. Pass one entry, or None, per video"
            )
        frames, times = zip(*(self._frames(*pair) for pair in zip(videos, given, strict=True)), strict=True)
        rows = [self._ids(question, len(shown)) for question, shown in zip(questions, frames, strict=True)]
        length = max(map(len, rows))
        pad_id = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        batch = {
            "input_ids": np.stack([np.pad(row, (length - len(row), 0), constant_values=pad_id) for row in rows]),
            "attention_mask": np.stack([np.arange(length) >= length - len(row) for row in rows]).astype(np.int64),
            "num_frames": np.array([len(shown) for shown in frames], np.int64),
        }
        if batch["num_frames"].any():
            batch["pixel_values"] = normalise(np.concatenate([shown for shown in frames if len(shown)]))
            batch["frame_times"] = np.concatenate(times)
        return BatchFeature(batch, tensor_type=return_tensors)

    def pixel_values(self, video) -> np.ndarray:
        """Frames of one video, in any form that `videos` of a call may have, as the model sees them: float32
        [T, 3, image_size, image_size]."""
        return normalise(self._frames(video, None)[0])

    def pictures(self, pixel_values) -> np.ndarray:
        """pixel_values [F, 3, height, width] -> images for drawing: uint8 [F, height, width, 3]."""
        scaled = np.asarray(pixel_values).transpose(0, 2, 3, 1) * IMAGE_STD + IMAGE_MEAN
        return np.clip(scaled * 255, 0, 255).round().astype(np.uint8)

    def _ids(self, question: str, num_frames: int) -> np.ndarray:
        """Token ids of the chat up to the answer, with placeholders: int64 [S]."""
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"text: expected a question, found {question!r}")
        question = question.strip()
        control = [token for token in self.tokenizer.all_special_tokens if token in question]
        if control:
            raise ValueError(
                f"text: {question!r} contains the control token {control[0]}. Pass the question only; the processor "
                "applies the chat template"
            )
        before = self._chat(PROBE).partition(PROBE)[0]
        chat = self._chat(question)
        if not chat.startswith(before + question):
            raise ValueError(
                f"the chat template changes the question {question!r} and gives {chat!r}. Use a template that inserts "
                "it unchanged"
            )
        encoded = self.tokenizer(chat, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        end = len(before) + len(question)
        question_end = next(i for i, (start, _) in enumerate(encoded["offset_mapping"]) if start >= end)
        num_places = num_frames * self.tokens_per_frame
        at, places = visual_places(self.layout, num_places, question_end, self.visual_token_id, self.bos_token_id)
        return np.insert(np.asarray(encoded["input_ids"], np.int64), at, places)

    def _chat(self, question: str) -> str:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": question})
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )

    def _frames(self, video, given) -> tuple[np.ndarray, np.ndarray]:
        """(frames uint8 [T, image_size, image_size, 3], times float32 [T]) of one entry of `videos`; T = 0 for None.
        given: its entry of `frame_times`."""
        if video is None:
            return np.zeros((0, self.image_size, self.image_size, 3), np.uint8), np.zeros(0, np.float32)
        pictures, times, is_still = self._pictures(video)
        if given is not None:
            if times is not None or len(given) != len(pictures):
                found = "a file or an image, which has its own" if times is not None else f"{len(pictures)} frames"
                raise ValueError(
                    f"frame_times: {len(given)} times for {found}. Pass one time per frame, for frames only"
                )
            times = given
        elif times is None:
            times = [number / self.fps for number in range(len(pictures))]
        times = np.asarray(times, np.float32)
        frames = np.stack([np.asarray(self._compressed(picture)) for picture in pictures])
        repeats = self.image_replication if is_still else 1
        return frames.repeat(repeats, axis=0), times.repeat(repeats)

    def _pictures(self, video) -> tuple[list[Image.Image], list | None, bool]:
        """(square RGB images, their times in seconds or None, whether it is a single image)."""
        if isinstance(video, str | os.PathLike):
            if os.path.isdir(video):
                raise ValueError(f"{os.fspath(video)} is a folder. Pass a file")
            is_still = os.path.splitext(video)[1].lower() in IMAGE_SUFFIXES
            try:
                media = read_media(
                    video,
                    "image" if is_still else "video",
                    fps=self.fps,
                    max_frames=self.max_frames,
                    image_size=self.image_size,
                    resize_mode=self.resize_mode,
                    hdr=self.hdr,
                )
            except MediaError as error:
                raise ValueError(f"{os.fspath(video)}: {error.reason}. Pass an intact video or image file") from None
            return media.frames, media.timestamps, is_still
        if isinstance(video, Image.Image):
            return [self._square(video)], [0.0], True
        if not isinstance(video, list | tuple) and not _is_rgb(np.asarray(video), 4):
            raise _wrong_form(video)
        pictures = [self._square(frame) for frame in video]
        if not pictures:
            raise ValueError("videos: found 0 frames, expected at least one. Pass None for a question without a video")
        return pictures, None, False

    def _square(self, frame) -> Image.Image:
        """A PIL image or array [height, width, 3], made square as in the training data."""
        if isinstance(frame, Image.Image):
            try:
                return square(upright(frame), self.image_size, self.resize_mode)
            except MediaError as error:
                raise ValueError(f"videos: PIL image: {error.reason}. Pass an intact 8-bit image") from None
        array = np.asarray(frame)
        if not _is_rgb(array, 3):
            raise _wrong_form(array)
        return square(Image.fromarray(array), self.image_size, self.resize_mode)

    def _compressed(self, picture: Image.Image) -> Image.Image:
        """The image after the JPEG compression of the training data."""
        return picture if self.jpeg_quality is None else Image.open(io.BytesIO(jpeg(picture, self.jpeg_quality)))


def _integer(name: str, value, largest=math.inf, otherwise="") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= largest:
        allowed = "of at least 1" if largest == math.inf else f"from 1 to {largest}"
        raise ValueError(f"{name}={value!r}, expected an integer {allowed}{otherwise}")
    return value


def _positive(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}, expected a finite number above 0")
    return value


def _is_rgb(array: np.ndarray, ndim: int) -> bool:
    """Whether an array is uint8 [..., height, width, 3] with `ndim` axes and at least one pixel per frame."""
    return array.dtype == np.uint8 and array.ndim == ndim and array.shape[-1] == 3 and 0 not in array.shape[-3:]


def _wrong_form(video) -> ValueError:
    return ValueError(
        f"videos: found {type(video).__name__} of shape {list(np.shape(video))} and type "
        f"{getattr(video, 'dtype', 'unknown')}, expected a path, PIL images, or an array [frames, height, width, 3] of "
        "type uint8"
    )


def _as_batch(text, videos) -> tuple[list, list]:
    """(questions, videos): two lists of equal length."""
    if isinstance(text, str):
        single = isinstance(videos, list | tuple) and not _is_frames(videos)  # [path] instead of path
        return _as_batch([text], videos if single else [videos])
    if not isinstance(text, list | tuple):
        raise ValueError(f"text: expected a question or a list of questions, found {type(text).__name__} {text!r}")
    questions = list(text)
    videos = [None] * len(questions) if videos is None else videos
    is_list = hasattr(videos, "__len__") and not isinstance(videos, str)
    found = len(videos) if is_list else 1
    if not is_list or found != len(questions) or not questions:
        raise ValueError(
            f"{len(questions)} questions but {found} videos. Pass a list with one video (or None) per question"
        )
    return questions, list(videos)


def _is_frames(video) -> bool:
    """Whether this is a list of PIL images or arrays [height, width, 3], which are the frames of one video."""
    return isinstance(video, list | tuple) and all(
        isinstance(frame, Image.Image) or getattr(frame, "ndim", 0) == 3 for frame in video
    )
