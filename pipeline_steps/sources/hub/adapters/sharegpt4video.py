"""ShareGPT4Video: 40,000 videos, each with a caption (task `caption`) and one per key frame (task `key_frames`)."""

from pipeline_steps.sources.hub.adapter import (
    Adapter,
    Draft,
    Table,
    UnusableRow,
    entries,
    file_name,
    identifier,
    original_video,
    text,
)

WHOLE = "-1"  # `idx` of the caption of the whole video
KEY_FRAMES = "Describe the video key frame by key frame."


def sample(row, table):
    rows = entries(row, "captions")
    captions = {identifier(entry, "idx"): text(entry, "content") for entry in rows}
    if len(captions) < len(rows):
        raise UnusableRow("captions: an idx occurs twice")
    if WHOLE not in captions:
        raise UnusableRow(f"captions: none with idx {WHOLE}, the caption of the whole video")
    items = [{"user": None, "assistant": captions.pop(WHOLE), "task": "caption"}]
    if captions:
        if not all(idx.isdecimal() for idx in captions):
            raise UnusableRow("captions: an idx is not a number")
        parts = [captions[idx] for idx in sorted(captions, key=int)]
        items.append({"user": KEY_FRAMES, "assistant": "\n".join(parts), "task": "key_frames"})
    video, path = text(row, "video_id"), file_name(text(row, "video_path"))
    return Draft(name=video, videos=(path,), video_id=original_video(video), items=tuple(items))


ADAPTER = Adapter(
    repo="ShareGPT4Video/ShareGPT4Video",
    revision=None,
    licence="CC BY-NC 4.0",
    download="the videos of zip_folder/*/*.zip, as in `video_path` or one folder per collection",
    columns=("video_id", "video_path", "captions"),
    tables=(Table("train", "sharegpt4video_40k.jsonl", "sharegpt4video"),),
    sample=sample,
    media_subfolders=("", "*"),
)
