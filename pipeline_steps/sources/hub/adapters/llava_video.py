"""LLaVA-Video-178K: chats about videos. Tasks: `caption`, `open_ended`, `multi_choice`.

Videos of llava_hound are folders of frames, 2 per second.
"""

from pipeline_steps.sources.hub.adapter import (
    Adapter,
    Draft,
    Table,
    UnusableRow,
    chat,
    entries,
    file_name,
    identifier,
    original_video,
    text,
)

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
FILES = {"caption": "cap", "open_ended": "oe", "multi_choice": "mc"}  # task -> part of the file name
KINDS = {
    "academic_v0_1": ("caption", "open_ended", "multi_choice"),
    "youtube_v0_1": ("caption", "open_ended", "multi_choice"),
    "activitynetqa": ("open_ended",),
    "nextqa": ("open_ended", "multi_choice"),
    "perceptiontest": ("multi_choice",),
}
DURATIONS = ("0_30_s", "30_60_s", "1_2_m", "2_3_m")
FRAMES_PER_SECOND = {"llava_hound": 2.0}  # of the subset whose videos are folders of frames


def sample(row, table):
    turns = []
    for turn in entries(row, "conversations"):
        role = text(turn, "from")
        if role not in ROLES:
            raise UnusableRow(f"conversations: unknown speaker {role[:40]!r}")
        turns.append((ROLES[role], _without_placeholder(text(turn, "value"))))
    video = file_name(text(row, "video"))
    return Draft(
        name=f"{table.subset}-{identifier(row, 'id')}",
        videos=(f"{table.subset}/{video}", video),
        video_id=original_video(video),
        picture_fps=FRAMES_PER_SECOND.get(table.subset),
        items=(chat(turns, table.task),),
    )


def _without_placeholder(value):
    """Remove the placeholder `<image>` or `<video>`."""
    rest = value.replace("<image>", "").replace("<video>", "").strip()
    if not rest:
        raise UnusableRow("conversations: a turn without text")
    return rest


def _tables():
    for duration in DURATIONS:
        for collection, tasks in KINDS.items():
            if collection == "perceptiontest" and duration in ("1_2_m", "2_3_m"):
                continue  # the collection has no videos this long
            for task in tasks:
                subset = f"{duration}_{collection}"
                yield Table(subset, f"{subset}/*{FILES[task]}*.json", "llava_video", task)
    yield Table("llava_hound", "llava_hound/*.json", "llava_video", "open_ended")


ADAPTER = Adapter(
    repo="lmms-lab/LLaVA-Video-178K",
    revision="6d8c562dc26d70042a0d9704d1cae58c94b89098",
    licence="texts Apache 2.0; research use",
    download="the videos of SUBSET/*.tar.gz, in one folder or one per subset",
    columns=("id", "conversations", "video"),
    tables=tuple(_tables()),
    sample=sample,
    media_subfolders=("",),
)
