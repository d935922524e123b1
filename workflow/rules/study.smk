# Jobs of a study's plan (pipeline_steps/study/plan.py): one job per stage and distinct input; what runs share is made once.
# --directory: the folder of all studies; --config plan=<plan.json> gpus=<slots, 0: none>.
import json

PLAN = json.loads(Path(config["plan"]).read_text()) if "plan" in config else {"jobs": []}
JOBS = {(job["stage"], job["key"]): job for job in PLAN["jobs"]}
GPUS = int(config.get("gpus", 0))
ON_GPU = {"backbones", "stage1", "stage2", "stage3", "evaluation"}


rule study:
    input:
        [f"jobs/{stage}/{key}/done.json" for stage, key in JOBS],


rule study_job:
    input:
        lambda wildcards: [
            f"jobs/{stage}/{key}/done.json" for stage, key in JOBS[wildcards.stage, wildcards.key]["inputs"].values()
        ],
    output:
        "jobs/{stage}/{key}/done.json",
    threads: 1
    resources:
        gpu=lambda wildcards: int(GPUS > 0 and wildcards.stage in ON_GPU),
        mem_mb=4000,
        runtime=24 * 60,
    params:
        gpus=lambda wildcards: GPUS if wildcards.stage in ON_GPU else 0,
    shell:
        "exec env PYTHONPATH={ROOT:q} {PYTHON:q} -m pipeline_steps.study.job --studies . --plan {config[plan]:q}"
        " --stage {wildcards.stage} --key {wildcards.key} --gpus {params.gpus}"
