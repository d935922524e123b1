"""OpenVid-1M: a million captioned clips (captions: OpenVid-1M.csv, clips: OpenVid_part*.zip)."""

from pipeline_steps.sources.hub.adapter import Adapter, Draft, Table, file_name, original_video, text


def sample(row, table):
    name = file_name(text(row, "video"))
    return Draft(
        name=name.rsplit(".", 1)[0],
        videos=(name,),
        video_id=original_video(name),
        items=({"user": None, "assistant": text(row, "caption"), "task": "caption"},),
    )


ADAPTER = Adapter(
    repo="nkp37/OpenVid-1M",
    revision="d8a63bd22989c80b5734ec2bb989f4e1b61a5807",
    licence="CC BY 4.0",
    download="the clips of OpenVid_part*.zip, in one folder or one per part",
    columns=("video", "caption"),
    tables=(Table("train", "data/train/OpenVid-1M.csv", "openvid"),),
    sample=sample,
    media_subfolders=("", "video", "*"),
)
