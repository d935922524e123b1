"""MLVU: multiple choice about videos of minutes to hours (evaluation set).

Covers the seven multiple-choice tasks; the two generation tasks (sub-scene captions, summaries) are left out.
"""

from pathlib import PurePosixPath

from pipeline_steps.sources.hub.adapter import (
    Adapter,
    Draft,
    Table,
    file_name,
    multiple_choice,
    task_name,
    text,
    texts,
)

TASKS = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")


def sample(row, table):
    video = file_name(text(row, "video"))
    stem, task = PurePosixPath(video).stem, task_name("mlvu", text(row, "question_type"))
    return Draft(
        name=f"{table.subset}-{stem}",
        videos=(f"{table.subset}/{video}", video),
        video_id=f"mlvu-{stem}",
        items=(multiple_choice(text(row, "question"), texts(row, "candidates"), text(row, "answer"), task),),
    )


ADAPTER = Adapter(
    repo="MLVU/MVLU",
    revision="06ddc388aa34746b3abba77972b7a7dfd977f7a3",
    licence="CC BY-NC-SA 4.0",
    download="the folders of MLVU/video",
    columns=("video", "question", "candidates", "answer", "question_type"),
    tables=tuple(Table(task, f"MLVU/json/{task}.json", "mlvu") for task in TASKS),
    sample=sample,
    media_subfolders=("", "video", "MLVU/video"),
    held_out=True,
)
