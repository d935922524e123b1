"""What callers of the processor may pass as conversations, images, videos and options; and where the visual tokens of
a text go."""

import numpy as np

from .video_processing_foveated_vlm import is_frames


def visual_places(
    layout: str, num_places: int, question_end: int, visual_id: int, bos_id: int | None
) -> tuple[int, np.ndarray]:
    """(position in the text's ids, int64 ids to insert there) of the placeholders of a sample.

    question_end: position of the question's end-of-turn token. num_places: number of placeholders; 0: nothing is
    inserted. bos_id: of the token before the frames in vision_first. ValueError if it is None there.
    """
    places = np.full(num_places, visual_id, np.int64)
    if layout == "vision_first" and num_places:
        if bos_id is None:
            raise ValueError(
                "layout='vision_first' puts a BOS token before the frames, but bos_token_id is None and the tokenizer "
                "has none. Set bos_token_id"
            )
        return 0, np.concatenate([[bos_id], places])
    return question_end, places


def are_conversations(conversations) -> bool:
    """Whether this is a list of conversations, not a single one."""
    first = conversations[0] if isinstance(conversations, list | tuple) and conversations else None
    return isinstance(first, list | tuple) or hasattr(first, "messages")


def per_text(kind: str, media, is_single: bool, kinds: list[list[str]]) -> list[list]:
    """The images or videos of every text, from the forms that a call takes. kinds: the placeholders of every text."""
    if not kinds:
        raise ValueError(f"questions: 0, {kind}s: {0 if media is None else len(media)}. Pass at least one question")
    if media is None:
        return [[] for _ in kinds]
    is_list = isinstance(media, list | tuple)
    if is_single:
        if not is_list or (kind == "video" and is_frames(media)):
            return [[media]]
        nested = (
            len(media) == 1 and isinstance(media[0], list | tuple) and not (kind == "video" and is_frames(media[0]))
        )
        own = list(media[0] if nested else media)
        if kind == "video" and len(own) != 1 and not kinds[0]:
            raise ValueError(f"questions: 1, videos: {len(own)}. Pass a list with one video (or None) per question")
        return [own]
    counts = [own.count(kind) for own in kinds]
    is_list = hasattr(media, "__len__") and not isinstance(media, str)
    flat = is_list and not any(isinstance(own, list | tuple) or own is None for own in media)
    if flat and sum(counts) == len(media) and sum(counts):  # one for each placeholder
        left = iter(media)
        return [[next(left) for _ in range(count)] for count in counts]
    found = len(media) if is_list else 1
    if not is_list or found != len(kinds):
        raise ValueError(
            f"questions: {len(kinds)}, {kind}s: {found}. Pass a list with one {kind} (or None) per question"
        )
    return [_as_list(kind, own) for own in media]


def _as_list(kind: str, own) -> list:
    """The images or videos of one text."""
    if own is None:
        return []
    if isinstance(own, list | tuple) and not (kind == "video" and own and is_frames(own)):
        return list(own)
    return [own]


def with_options(part, options: dict):
    """The image or video processor with other options."""
    if not options:
        return part
    options = {"size" if name == "image_size" else name: value for name, value in options.items()}
    options.pop("return_tensors", None)
    saved = {name: value for name, value in part.to_dict().items() if name != "auto_map"}
    return type(part)(**(saved | options))
