"""The video processor: video files or frames -> normalised square frames and their times, sampled as in training.

Shapes: T frames of one video, F frames of all videos, S side of the square in px.
"""

import os

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import VideosKwargs

from .frames import read_media
from .image_processing_foveated_vlm import (
    SquareFrames,
    is_rgb,
    local_file,
    normalise,
    positive_integer,
    positive_number,
    wrong_form,
)
from .pictures import IMAGE_SUFFIXES, MediaError

try:
    from transformers.video_processing_utils import VideoProcessorMixin
except ImportError:  # before transformers 5.23
    from transformers.video_processing_utils import BaseVideoProcessor as VideoProcessorMixin


class FoveatedVLMVideosKwargs(VideosKwargs, total=False):
    resize_mode: str
    jpeg_quality: int | None
    hdr: str
    max_frames: int


class FoveatedVLMVideoProcessor(SquareFrames, VideoProcessorMixin):
    """Samples the frames of videos, makes them square and normalises them.

    Args:
        size, resize_mode, jpeg_quality, image_mean, image_std, hdr: as of FoveatedVLMImageProcessor.
        fps: sampled frames per second of a video file, uniform over the whole clip.
        max_frames: largest number of frames sampled from a video file.

    Raises ValueError for an unknown option or a value outside its range.
    """

    _auto_class = "AutoVideoProcessor"  # wherever it was loaded from, a saved configuration names its class
    model_input_names = ["pixel_values", "num_frames", "frame_times"]
    valid_kwargs = FoveatedVLMVideosKwargs
    jpeg_quality = 95

    def __init__(
        self,
        size,
        resize_mode="crop",
        jpeg_quality=95,
        image_mean=None,
        image_std=None,
        fps=2.0,
        max_frames=64,
        hdr="refuse",
        **others,
    ):
        options = self._set_options(size, resize_mode, jpeg_quality, hdr, image_mean, image_std, others)
        options |= {"fps": positive_number("fps", fps), "max_frames": positive_integer("max_frames", max_frames)}
        BaseImageProcessor.__init__(self, **options)

    def to_dict(self) -> dict:
        """The options that the constructor takes, and the class."""
        found = super().to_dict()
        kept = (
            "size",
            "resize_mode",
            "jpeg_quality",
            "hdr",
            "image_mean",
            "image_std",
            "fps",
            "max_frames",
            "auto_map",
        )
        return {name: found[name] for name in (*kept, "video_processor_type") if name in found}

    def preprocess(self, videos, return_tensors: str | None = "pt") -> BatchFeature:
        """pixel_values float32 [F, 3, S, S], num_frames int64 [videos] and frame_times float32 [F] (s) of one video or
        a list of videos, each in a form that `read` takes."""
        videos = list(videos) if isinstance(videos, list | tuple) and not is_frames(videos) else [videos]
        found = [self.read(video) for video in videos]
        data = {
            "pixel_values": normalise(np.concatenate([frames for frames, _, _ in found])),
            "num_frames": np.array([len(frames) for frames, _, _ in found], np.int64),
            "frame_times": np.concatenate([times for _, times, _ in found]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def read(self, video, given_times=None) -> tuple[np.ndarray, np.ndarray, bool]:
        """(frames uint8 [T, S, S, 3], their times float32 [T] in seconds, whether it is a single image) of a video.

        video: a path or URL of a video or image file, a PIL image, a list of frames (PIL images, arrays, paths of
        images), or a uint8 array [T, height, width, 3]. given_times: of frames; by default they are 1 / `fps` apart.
        """
        pictures, times, is_still = self._pictures(video)
        if given_times is not None:
            if times is not None or len(given_times) != len(pictures):
                found = "a file or an image, which has its own" if times is not None else f"{len(pictures)} frames"
                raise ValueError(
                    f"frame_times: {len(given_times)} times for {found}. Pass one time per frame, for frames only"
                )
            times = given_times
        elif times is None:
            times = [number / self.fps for number in range(len(pictures))]
        return self.frames(pictures), np.asarray(times, np.float32), is_still

    def _pictures(self, video) -> tuple[list[Image.Image], list | None, bool]:
        """(square RGB images, their times in seconds or None, whether it is a single image)."""
        if isinstance(video, str | os.PathLike):
            with local_file(video) as path:
                return self._file(path, os.fspath(video))
        if isinstance(video, Image.Image):
            return [self.square(video, "videos")], [0.0], True
        if not isinstance(video, list | tuple) and not is_rgb(np.asarray(video), 4):
            raise wrong_form(video, "videos")
        pictures = [self.square(frame, "videos") for frame in video]
        if not pictures:
            raise ValueError("videos: found 0 frames, expected at least one. Pass None for a question without a video")
        return pictures, None, False

    def _file(self, path: str, name: str) -> tuple[list[Image.Image], list, bool]:
        if os.path.isdir(path):
            raise ValueError(f"{name} is a folder. Pass a file")
        is_still = os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES
        try:
            media = read_media(
                path,
                "image" if is_still else "video",
                fps=self.fps,
                hdr=self.hdr,
                max_frames=self.max_frames,
                image_size=self.image_size,
                resize_mode=self.resize_mode,
            )
        except MediaError as error:
            raise ValueError(f"{name}: {error.reason}. Pass an intact video or image file") from None
        return media.frames, media.timestamps, is_still


def is_frames(video) -> bool:
    """Whether this is a list of PIL images or arrays [height, width, 3], which are the frames of one video."""
    return isinstance(video, list | tuple) and all(
        isinstance(frame, Image.Image) or getattr(frame, "ndim", 0) == 3 for frame in video
    )
