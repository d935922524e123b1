"""RLAIF-V: preference pairs (chosen and rejected answer) about an image."""

from pipeline_steps.sources.hub.adapter import Adapter, Draft, Table, UnusableRow, image_bytes, optional_text, text


def sample(row, table):
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    if chosen == rejected:
        raise UnusableRow("rejected: the same as chosen")
    item = {"user": text(row, "question"), "assistant": chosen, "rejected": rejected, "task": "preference"}
    return Draft(
        name=optional_text(row, "origin_dataset") or "",
        images=(image_bytes(row.get("image"), "image"),),
        items=(item,),
    )


ADAPTER = Adapter(
    repo="openbmb/RLAIF-V-Dataset",
    revision=None,
    licence="CC BY-NC 4.0",
    download="the pictures are in the rows",
    columns=("image", "question", "chosen", "rejected"),
    tables=(Table("train", "RLAIF-V-Dataset*.parquet", "rlaif_v"),),
    sample=sample,
)
