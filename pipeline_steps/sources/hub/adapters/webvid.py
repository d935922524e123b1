"""WebVid, and other data with its columns: videoid, contentUrl, duration, page_dir, name (the caption)."""

from pipeline_steps.sources.hub.adapter import Adapter, Draft, Table, file_name, identifier, optional_text, text


def sample(row, table):
    video = identifier(row, "videoid")
    name = file_name(f"{video}.mp4")
    folder = optional_text(row, "page_dir")
    names = (file_name(f"{folder}/{name}"), name) if folder else (name,)
    return Draft(
        name=video,
        videos=names,
        video_id=f"webvid-{video}",
        url=optional_text(row, "contentUrl"),
        items=({"user": None, "assistant": text(row, "name"), "task": "caption"},),
    )


ADAPTER = Adapter(
    repo="TempoFunk/webvid-10M",
    revision="461f7da9a310b67c7fa05fcbd6e312ddbffc8ba5",
    licence="none; publishers own the videos",
    download="the videos as PAGE_DIR/VIDEOID.mp4 or VIDEOID.mp4",
    columns=("videoid", "contentUrl", "page_dir", "name"),
    tables=(Table("train", "data/train/**/*.csv", "webvid"),),
    sample=sample,
    media_subfolders=("", "videos"),
    has_urls=True,
)
