"""MVBench: 20 multiple-choice tasks about videos of eleven collections (evaluation set).

Folders and segments follow the benchmark's official evaluation. TVQA videos are folders of frames, 3 per second.
"""

from pathlib import PurePosixPath

from pipeline_steps.sources.hub.adapter import (
    Adapter,
    Draft,
    Table,
    file_name,
    multiple_choice,
    number,
    original_video,
    text,
    texts,
)

FOLDERS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
WITH_SEGMENT = ("action_sequence", "action_prediction", "object_interaction", "action_localization")
WITH_SEGMENT += ("episodic_reasoning",)
FRAMES_PER_SECOND = {"episodic_reasoning": 3.0}


def sample(row, table):
    task = table.subset
    video = file_name(f"{FOLDERS[task]}/{text(row, 'video')}")
    return Draft(
        name=f"{task}-{PurePosixPath(video).stem}",
        videos=(video,),
        video_id=original_video(video),
        picture_fps=FRAMES_PER_SECOND.get(task),
        segment=(number(row, "start"), number(row, "end")) if task in WITH_SEGMENT else None,
        items=(multiple_choice(text(row, "question"), texts(row, "candidates"), text(row, "answer"), table.task),),
    )


ADAPTER = Adapter(
    repo="OpenGVLab/MVBench",
    revision="230a2d4fac8900333c61754641c7a13e069ac9c6",
    licence="questions MIT; videos keep theirs",
    download="the folders of video/*.zip; NTU RGB+D and TVQA from their owners",
    columns=("video", "question", "candidates", "answer"),
    tables=tuple(Table(task, f"json/{task}.json", "mvbench", f"mvbench_{task}") for task in FOLDERS),
    sample=sample,
    media_subfolders=("", "video"),
    held_out=True,
)
