"""Vript: scenes of videos. Tasks: `caption` (long), `shot_type`, `camera_movement`, `scene_title`."""

from pipeline_steps.sources.hub.adapter import (
    Adapter,
    Draft,
    Table,
    UnusableRow,
    file_name,
    optional_text,
    original_video,
    text,
)

QUESTIONS = {
    "shot_type": "What is the shot type?",
    "camera_movement": "How does the camera move?",
    "scene_title": "Give this scene a title.",
}


def sample(row, table):
    clip, caption = text(row, "clip_id"), row.get("caption")
    if not isinstance(caption, dict):
        raise UnusableRow("caption: expected an object with 'content'")
    items = [{"user": None, "assistant": text(caption, "content"), "task": "caption"}]
    for field, question in QUESTIONS.items():
        answer = optional_text(caption, field)
        if answer:
            items.append({"user": question, "assistant": answer, "task": field})
    video = _video(row, clip)
    name = file_name(f"{clip}.mp4")
    return Draft(
        name=clip,
        videos=(file_name(f"{video}/{name}"), name),
        video_id=original_video(video),
        items=tuple(items),
    )


def _video(row, clip):
    """Return the id of the clip's video: from the row's meta, or from the clip id VIDEO-Scene-NUMBER."""
    meta = row.get("meta")
    if isinstance(meta, dict) and optional_text(meta, "video_id"):
        return text(meta, "video_id")
    video, separator, _ = clip.rpartition("-Scene-")
    if not separator:
        raise UnusableRow(f"clip_id: {clip[:60]!r} does not name its video")
    return video


ADAPTER = Adapter(
    repo="Mutonix/Vript",
    revision=None,
    licence="academic use only, own terms",
    download="the clips of vript_{long,short}_videos_clips/*.zip, as VIDEO/CLIP.mp4",
    columns=("clip_id", "caption"),
    tables=(
        Table("long", "vript_captions/vript_long_videos_captions.jsonl", "vript"),
        Table("short", "vript_captions/vript_short_videos_captions.jsonl", "vript"),
    ),
    sample=sample,
    media_subfolders=("", "*"),
)
