"""The processor: chats with images and videos -> tensors for `forward` and `generate`.

Shapes: B samples, S sequence, T frames of one video, F frames of the whole batch, P visual tokens per frame. Frames
are sampled, resized and compressed as in the training data (model/frames.py), and the chat format is that of the
training data. A question therefore gives the same tensors as in the pipeline.
"""

import inspect

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from .chat_messages import (
    IMAGE_TOKEN,
    MEDIA,
    TEXTS_ONLY,
    VIDEO_TOKEN,
    placeholders,
    standard_messages,
    text_without_placeholders,
    without_placeholders,
)
from .image_processing_foveated_vlm import (
    IMAGE_MEAN,
    IMAGE_STD,
    FoveatedVLMImageProcessor,
    normalise,
    positive_integer,
)
from .option_checks import LAYOUTS
from .processing_inputs import are_conversations, per_text, visual_places, with_options
from .video_processing_foveated_vlm import FoveatedVLMVideoProcessor

PROBE = "\N{REPLACEMENT CHARACTER}"
MEDIA_OPTIONS = (
    "image_size",
    "resize_mode",
    "jpeg_quality",
    "hdr",
    "fps",
    "max_frames",
)  # of the image and video processor
PADDINGS = {True: "longest", "longest": "longest", "max_length": "max_length", False: None, "do_not_pad": None}


class FoveatedVLMProcessor(ProcessorMixin):
    """Tokenizer, chat template, image and video processor of a FoveatedVLM checkpoint, as in its training.

    Args:
        tokenizer: tokenizer of the language model, with a chat template.
        image_size: side of the square frames in px.
        chat_template: Jinja template; default: the tokenizer's.
        fps: sampled frames per second of a video file, uniform over the whole clip.
        max_frames: largest number of frames sampled from a video file.
        jpeg_quality: 1 to 100, JPEG compression of the frames as in the training data; None: no compression.
        image_replication: number of frames that an image is repeated to.
        system: system message of chats that bring none, as in training; "": default of the chat template.
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

    image_token, video_token = IMAGE_TOKEN, VIDEO_TOKEN  # placeholders in rendered chats

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
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template. Pass chat_template")
        self.image_processor = FoveatedVLMImageProcessor(image_size, resize_mode, jpeg_quality, hdr=hdr)
        self.video_processor = FoveatedVLMVideoProcessor(
            image_size, resize_mode, jpeg_quality, hdr=hdr, fps=fps, max_frames=max_frames
        )
        self.image_replication = positive_integer("image_replication", image_replication)
        self.tokens_per_frame = positive_integer("tokens_per_frame", tokens_per_frame)
        self.system, self.layout = system, layout
        self.visual_token_id = len(tokenizer) if visual_token_id is None else visual_token_id
        self.image_token_id = self.video_token_id = self.visual_token_id
        self.bos_token_id = tokenizer.bos_token_id if bos_token_id is None else bos_token_id
        tokenizer.padding_side = "left"  # for pipelines, which pad batches themselves, and then generate
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def image_size(self) -> int:
        return self.video_processor.image_size

    @property
    def resize_mode(self) -> str:
        return self.video_processor.resize_mode

    @property
    def jpeg_quality(self) -> int | None:
        return self.video_processor.jpeg_quality

    @property
    def hdr(self) -> str:
        return self.video_processor.hdr

    @hdr.setter
    def hdr(self, mode: str) -> None:
        self.image_processor = with_options(self.image_processor, {"hdr": mode})
        self.video_processor = with_options(self.video_processor, {"hdr": mode})

    @property
    def fps(self) -> float:
        return self.video_processor.fps

    @property
    def max_frames(self) -> int:
        return self.video_processor.max_frames

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
        """The saved processor. Options of `FoveatedVLMProcessor` in `kwargs` override the saved ones.

        ValueError if the configuration of the image or video processor was changed in one of the files only.
        """
        names = [name for name in inspect.signature(cls).parameters if name != "tokenizer"]
        # transformers would also pass them to the config
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor._check_files(pretrained_model_name_or_path, kwargs)
        if not given:
            return processor
        return cls(processor.tokenizer, **({name: getattr(processor, name) for name in names} | given))

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers. preprocessor_config.json and video_preprocessor_config.json are written too, for
        AutoImageProcessor and AutoVideoProcessor."""
        for part in (self.image_processor, self.video_processor):
            part.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def to_dict(self) -> dict:
        found = super().to_dict() | {name: getattr(self, name) for name in MEDIA_OPTIONS}
        return dict(sorted(found.items()))

    def _check_files(self, place, kwargs: dict) -> None:
        readers = {
            "preprocessor_config.json": (self.image_processor, "get_image_processor_dict"),
            "video_preprocessor_config.json": (self.video_processor, "get_video_processor_dict"),
        }
        where = {
            name: value for name, value in kwargs.items() if name in ("revision", "token", "cache_dir", "subfolder")
        }
        for file, (part, read) in readers.items():
            try:
                found = getattr(type(part), read)(place, **where)[0]
            except OSError:
                continue  # saved before these files were
            for name, value in part.to_dict().items():
                if not name.endswith("_type") and name != "auto_map" and found.get(name, value) != value:
                    raise ValueError(
                        f"{place}: {name} is {found[name]!r} in {file}, but {value!r} by processor_config.json. Change "
                        "both files"
                    )

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "num_frames"]

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        *,
        frame_times=None,
        padding: bool | str = True,
        padding_side: str = "left",
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = "pt",
        text_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        videos_kwargs: dict | None = None,
        **options,
    ) -> BatchFeature:
        """Tensors for one text or a list of B texts, each with images, videos or neither.

        text: a question, around which the chat is written, or a chat rendered by `apply_chat_template`, with a
        placeholder for every medium; a str or a list of str. images: for one text an image or a list of images (PIL
        image, uint8 array [height, width, 3], path, URL or base64), for a list of texts a list with one entry (image,
        list or None) per text, or with one image per placeholder. videos: likewise; a video is a path or URL of a video
        or image file, a list of PIL images or arrays (its frames), a uint8 array [T, height, width, 3], or a PIL image.
        Frames passed as images or arrays are all used, regardless of `fps` and `max_frames`. frame_times: seconds of
        each such frame since the start of its clip (for a list of texts a list of such lists or None); by default they
        are 1 / `fps` apart. The times of a file are read from the file.

        padding, padding_side, truncation (keeps the first max_length tokens), max_length, pad_to_multiple_of and
        return_tensors are those of tokenizers. options, text_kwargs, images_kwargs and videos_kwargs may hold them and
        `image_size`, `resize_mode`, `jpeg_quality`, `hdr`, `fps` and `max_frames` for this call.

        Returns input_ids and attention_mask int64 [B, S], num_frames int64 [B], and, where there are frames,
        pixel_values float32 [F, 3, image_size, image_size] and frame_times float32 [F]. Raises ValueError for an empty
        question or one with a control token, placeholders that do not match the media, a file that cannot be read,
        frames of another form, or truncation of visual tokens.
        """
        padding_options = {
            "padding": padding,
            "padding_side": padding_side,
            "truncation": truncation,
            "max_length": max_length,
            "pad_to_multiple_of": pad_to_multiple_of,
            "return_tensors": return_tensors,
        }
        asked = {**options, **(text_kwargs or {})}
        padding_options |= {name: asked.pop(name) for name in padding_options if name in asked}
        still, moving = self._media_processors(asked, images_kwargs or {}, videos_kwargs or {}, audio)
        texts, times = ([text], [frame_times]) if isinstance(text, str) else (text, frame_times)
        if not isinstance(texts, list | tuple):
            raise ValueError(f"text: expected a question or a list of questions, found {type(text).__name__} {text!r}")
        is_single, kinds = isinstance(text, str), [placeholders(t) if isinstance(t, str) else [] for t in texts]
        own_videos = per_text("video", videos, is_single, kinds)
        own_images = per_text("image", images, is_single, kinds)
        times = [None] * len(texts) if times is None else times
        if len(times) != len(texts):
            raise ValueError(
                f"frame_times has {len(times)} entries for {len(texts)} videos. Pass one entry, or None, per video"
            )
        samples = [
            self._sample(number, *sample, still, moving)
            for number, sample in enumerate(zip(texts, kinds, own_images, own_videos, times, strict=True))
        ]
        batch = self._padded([ids for ids, _, _ in samples], padding_options)
        frames = [shown for _, shown, _ in samples]
        batch["num_frames"] = np.array([len(shown) for shown in frames], np.int64)
        if batch["num_frames"].any():
            batch["pixel_values"] = normalise(np.concatenate([shown for shown in frames if len(shown)]))
            batch["frame_times"] = np.concatenate([seconds for _, _, seconds in samples])
        return BatchFeature(batch, tensor_type=padding_options["return_tensors"])

    def apply_chat_template(self, conversation, chat_template=None, *, return_tensors="pt", **options):
        """As in transformers, for a conversation or a list of conversations, with images and videos in the contents.

        A conversation without a system message gets the one of the training. Another `chat_template` must take contents
        that are texts. Returns the rendered text; with `tokenize=True` the ids, or with `return_dict=True` all tensors.
        Raises ValueError for a message of another form, and as a call does.
        """
        is_batch = are_conversations(conversation)
        conversations = [
            standard_messages(getattr(messages, "messages", messages), self.system, self.tokenizer.all_special_tokens)
            for messages in (conversation if is_batch else [conversation])
        ]
        template = TEXTS_ONLY + (chat_template or self.chat_template)
        conversations = conversations if is_batch else conversations[0]
        return super().apply_chat_template(conversations, template, return_tensors=return_tensors, **options)

    def check_question(self, question: str) -> None:
        """ValueError if a question contains a control token of the chat, with which it could write turns."""
        control = [token for token in self.tokenizer.all_special_tokens if token in question]
        if control:
            raise ValueError(
                f"text: {question!r} contains the control token {control[0]}. Pass the question only; the processor "
                "applies the chat template"
            )

    def pixel_values(self, video) -> np.ndarray:
        """Frames of one video, in any form that `videos` of a call may have, as the model sees them: float32
        [T, 3, image_size, image_size]."""
        return normalise(self._video(video, None, self.video_processor)[0])

    def pictures(self, pixel_values) -> np.ndarray:
        """pixel_values [F, 3, height, width] -> images for drawing: uint8 [F, height, width, 3]."""
        scaled = np.asarray(pixel_values).transpose(0, 2, 3, 1) * IMAGE_STD + IMAGE_MEAN
        return np.clip(scaled * 255, 0, 255).round().astype(np.uint8)

    # ---- one sample

    def _sample(self, number, text, kinds, images, videos, times, still, moving) -> tuple:
        """(ids int64 [S], frames uint8 [T, side, side, 3], times float32 [T]) of one text with its media."""
        media = {"image": images, "video": videos}
        is_chat = isinstance(text, str) and self._is_chat(text)
        if not is_chat and len(kinds) == len(images) + len(videos):
            kinds = kinds if kinds.count("image") == len(images) else []  # LLaVA writes <image> for videos, too
        elif kinds or is_chat:
            for kind, token in MEDIA.items():
                if kinds.count(kind) != len(media[kind]):
                    raise ValueError(
                        f"text {number} has {kinds.count(kind)} placeholders {token} for {len(media[kind])} {kind}s. "
                        f"Pass one {kind} for each"
                    )
        order = kinds or ["image"] * len(images) + ["video"] * len(videos)
        left = {"image": iter(images), "video": iter(videos)}
        if times is not None and len(order) != 1:
            raise ValueError(f"frame_times: {len(times)} times for {len(order)} images and videos. Pass them for one")
        shown = []
        for kind in order:
            if kind == "video":
                shown.append(self._video(next(left[kind]), times, moving))
                continue
            frames = still.frames([still.square(next(left[kind]))]).repeat(self.image_replication, axis=0)
            shown.append((frames, np.zeros(len(frames), np.float32)))
        if not shown:
            shown = [(np.zeros((0, self.image_size, self.image_size, 3), np.uint8), np.zeros(0, np.float32))]
        frames, seconds = (np.concatenate(parts) for parts in zip(*shown, strict=True))
        return self._ids(text, len(frames)), frames, seconds

    def _video(self, video, times, moving) -> tuple[np.ndarray, np.ndarray]:
        """(frames, times) of a video as by `FoveatedVLMVideoProcessor.read`, stills replicated."""
        frames, seconds, is_still = moving.read(video, times)
        repeats = self.image_replication if is_still else 1
        return frames.repeat(repeats, axis=0), seconds.repeat(repeats)

    def _is_chat(self, text: str) -> bool:
        """Whether a text is a rendered chat: chats begin with a control token, questions do not."""
        return text.lstrip().startswith(tuple(self.tokenizer.all_special_tokens))

    def _ids(self, text: str, num_frames: int) -> np.ndarray:
        """Token ids of a rendered chat, or of the chat of a question up to the answer, with visual placeholders: int64
        [S]."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text: expected a question, found {text!r}")
        control = self.tokenizer.all_special_tokens
        if not self._is_chat(text):
            if placeholders(text):
                text = text_without_placeholders(text)
            chat, end = self._chat_of_question(text.strip())
        elif placeholders(text):
            chat, end = without_placeholders(text, control)
        else:
            chat, end = text, len(text)
        encoded = self.tokenizer(chat, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in encoded["offset_mapping"]]
        question_end = next((i for i, start in enumerate(starts) if start >= end), len(starts))
        num_places = num_frames * self.tokens_per_frame
        at, places = visual_places(self.layout, num_places, question_end, self.visual_token_id, self.bos_token_id)
        return np.insert(np.asarray(encoded["input_ids"], np.int64), at, places)

    def _chat_of_question(self, question: str) -> tuple[str, int]:
        """(the chat up to the answer, where the question ends in it)."""
        self.check_question(question)
        if not question:
            raise ValueError("text: expected a question beside the placeholders, found none")
        before = self._chat(PROBE).partition(PROBE)[0]
        chat = self._chat(question)
        if not chat.startswith(before + question):
            raise ValueError(
                f"the chat template changes the question {question!r} and gives {chat!r}. Use a template that inserts "
                "it unchanged"
            )
        return chat, len(before) + len(question)

    def _chat(self, question: str) -> str:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": question})
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )

    # ---- options and batches

    def _media_processors(self, asked: dict, images_kwargs: dict, videos_kwargs: dict, audio) -> tuple:
        """(image processor, video processor) with the options of this call. ValueError for what is not supported."""
        own = {name: asked.pop(name) for name in MEDIA_OPTIONS if name in asked}
        asked.pop("add_special_tokens", None)  # the chat template writes them
        wrong = {name: value for name, value in (asked | {"audio": audio}).items() if value not in (None, False)}
        if videos_kwargs.get("do_sample_frames", asked.get("do_sample_frames")) is False:
            wrong["do_sample_frames"] = False
        if wrong.pop("do_sample_frames", True) is False:
            raise ValueError("do_sample_frames=False: files are sampled. Pass decoded frames to use all of them")
        if wrong:
            raise ValueError(
                f"{type(self).__name__} does not support {', '.join(sorted(wrong))}. Leave it out or correct its name"
            )
        still, moving = own | images_kwargs, own | videos_kwargs
        moving.pop("do_sample_frames", None)
        still = {name: value for name, value in still.items() if name not in ("fps", "max_frames")}
        return with_options(self.image_processor, still), with_options(self.video_processor, moving)

    def _padded(self, rows: list[np.ndarray], options: dict) -> dict:
        """input_ids and attention_mask of the rows: arrays [B, S], or lists without padding."""
        length, side, padding = options["max_length"], options["padding_side"] or "left", options["padding"]
        if padding not in PADDINGS or side not in ("left", "right"):
            raise ValueError(
                f"padding={padding!r} must be one of {', '.join(map(repr, PADDINGS))}; padding_side={side!r} left or "
                "right"
            )
        if options["truncation"] not in (False, None, "do_not_truncate"):
            rows = [self._truncated(row, length) for row in rows]
        if PADDINGS[padding] is None:
            masks = [np.ones(len(row), np.int64) for row in rows]
            if len({len(row) for row in rows}) == 1:
                return {"input_ids": np.stack(rows), "attention_mask": np.stack(masks)}
            return {"input_ids": [row.tolist() for row in rows], "attention_mask": [mask.tolist() for mask in masks]}
        size = max(map(len, rows))
        if PADDINGS[padding] == "max_length":
            if length is None:
                raise ValueError("padding='max_length' needs max_length. Pass a number of tokens")
            size = max(size, length)
        multiple = options["pad_to_multiple_of"] or 1
        size = -(-size // multiple) * multiple
        pad_id = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids = np.full((len(rows), size), pad_id, np.int64)
        mask = np.zeros((len(rows), size), np.int64)
        for number, row in enumerate(rows):
            own = slice(size - len(row), None) if side == "left" else slice(len(row))
            ids[number, own], mask[number, own] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def _truncated(self, row: np.ndarray, length: int | None) -> np.ndarray:
        length = self.tokenizer.model_max_length if length is None else length
        kept, places = row[:length], int((row == self.visual_token_id).sum())
        left = int((kept == self.visual_token_id).sum())
        if left < places:
            raise ValueError(
                f"truncation to max_length={length} leaves {left} of {places} visual tokens in a chat of {len(row)} "
                f"tokens. Raise max_length or lower max_frames"
            )
        return kept
