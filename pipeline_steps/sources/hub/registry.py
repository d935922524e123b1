"""All adapters by name. A new data set is one module beside these, and a name in sources/schema.py."""

from pipeline_steps.sources.hub import (
    cauldron,
    llava_video,
    mlvu,
    mvbench,
    openvid,
    pope,
    rlaif_v,
    scienceqa,
    sharegpt4video,
    smoltalk,
    video_mme,
    vript,
    webvid,
)

MODULES = (openvid, webvid, cauldron, smoltalk, llava_video, vript, sharegpt4video, rlaif_v)
MODULES += (mvbench, video_mme, mlvu, scienceqa, pope)
ADAPTERS = {module.ADAPTER.name: module.ADAPTER for module in MODULES}
