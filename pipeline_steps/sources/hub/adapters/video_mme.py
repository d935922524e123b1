"""Video-MME: 2,700 multiple-choice questions (A to D) about 900 YouTube videos (evaluation set)."""

from pipeline_steps.sources.hub.adapter import (
    Adapter,
    Draft,
    Table,
    UnusableRow,
    file_name,
    lettered_choice,
    task_name,
    text,
    texts,
)

LETTERS = "ABCDEFGH"


def sample(row, table):
    options = [_without_letter(option, i) for i, option in enumerate(texts(row, "options"))]
    answer = text(row, "answer")
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        raise UnusableRow(f"answer: {answer[:40]!r} is not the letter of one of the {len(options)} options")
    video, task = text(row, "videoID"), task_name("video_mme", text(row, "task_type"))
    return Draft(
        name=text(row, "question_id"),
        videos=tuple(file_name(f"{video}{suffix}") for suffix in (".mp4", ".MP4", ".mkv")),
        video_id=video,
        items=(lettered_choice(text(row, "question"), options, LETTERS.index(answer), task),),
    )


def _without_letter(option, number):
    """Strip the option's letter: "B. Two" -> "Two". Raises UnusableRow if option `number` lacks its letter."""
    letter = f"{LETTERS[number : number + 1]}."
    if number >= len(LETTERS) or not option.startswith(letter) or not option[2:].strip():
        raise UnusableRow(f"options[{number}]: {option[:40]!r} does not start with '{letter}'")
    return option[2:].strip()


ADAPTER = Adapter(
    repo="lmms-lab/Video-MME",
    revision="ead1408f75b618502df9a1d8e0950166bf0a2a0b",
    licence="research use only",
    download="the videos of videos_chunked_*.zip, as VIDEOID.mp4",
    columns=("videoID", "question_id", "task_type", "question", "options", "answer"),
    tables=(Table("test", "videomme/test-*.parquet", "video_mme"),),
    sample=sample,
    media_subfolders=("", "data", "video"),
    held_out=True,
)
