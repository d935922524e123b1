"""POPE: yes-or-no questions whether an object is in the image (evaluation set for object hallucination)."""

from pipeline_steps.sources.hub.adapter import (
    Adapter,
    Draft,
    Table,
    identifier,
    image_bytes,
    multiple_choice,
    task_name,
    text,
)

OPTIONS = ["yes", "no"]


def sample(row, table):
    category = text(row, "category")
    item = multiple_choice(text(row, "question"), OPTIONS, text(row, "answer"), task_name("pope", category))
    return Draft(
        name=f"{category}-{identifier(row, 'question_id')}",
        images=(image_bytes(row.get("image"), "image"),),
        video_id=text(row, "image_source"),
        items=(item,),
    )


ADAPTER = Adapter(
    repo="lmms-lab/POPE",
    revision=None,
    licence="questions MIT; pictures COCO",
    download="the pictures are in the rows",
    columns=("question_id", "question", "answer", "image_source", "image", "category"),
    tables=(Table("test", "data/test-*.parquet", "pope"),),
    sample=sample,
    held_out=True,
)
