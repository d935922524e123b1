"""ScienceQA-IMG: the questions of ScienceQA's test split that have an image (evaluation set).

Rows without an image are quarantined. A hint, if there is one, precedes the question. Lectures and solutions are not
used.
"""

from pipeline_steps.sources.hub.adapter import (
    Adapter,
    Draft,
    Table,
    UnusableRow,
    image_bytes,
    lettered_choice,
    number,
    optional_text,
    task_name,
    text,
    texts,
)


def sample(row, table):
    if row.get("image") is None:
        raise UnusableRow("no image: not part of ScienceQA-IMG")
    hint, question, correct = optional_text(row, "hint"), text(row, "question"), number(row, "answer")
    if correct != int(correct):
        raise UnusableRow(f"answer: {correct} is not an integer")
    task = task_name("scienceqa", text(row, "subject"))
    asked = f"{hint}\n{question}" if hint else question
    return Draft(
        name="test",
        images=(image_bytes(row["image"], "image"),),
        items=(lettered_choice(asked, texts(row, "choices"), int(correct), task),),
    )


ADAPTER = Adapter(
    repo="derek-thomas/ScienceQA",
    revision="f18b0a70359ebfb41f658fd564208d0355b013f4",
    licence="CC BY-NC-SA 4.0",
    download="the pictures are in the rows",
    columns=("image", "question", "choices", "answer", "hint", "subject"),
    tables=(Table("test", "data/test-*.parquet", "scienceqa"),),
    sample=sample,
    held_out=True,
)
