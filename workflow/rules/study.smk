# Jobs of a study's plan (pipeline_steps/study/plan.py): one job per stage and distinct input; what runs share is made once.
# --directory: the folder of all studies; --config plan=<plan.json> gpus=<number, 0: none>.
import json

PLAN = json.loads(Path(config["plan"]).read_text()) if "plan" in config else {"jobs": []}
JOBS = {(job["stage"], job["key"]): job for job in PLAN["jobs"]}
ORDER = list(dict.fromkeys(job["stage"] for job in PLAN["jobs"]))  # a stage after those that it needs
GPUS = int(config.get("gpus", 0))
SLOTS = int(config.get("slots", 0))  # GPUs that jobs of this machine share out among themselves
ON_GPU = {"backbones", "stage1", "stage2", "stage3", "evaluation"}


rule study:
    input:
        [f"jobs/{stage}/{key}/done.json" for stage, key in JOBS],


for STAGE in ORDER:

    rule:
        name:
            f"study_{STAGE}"
        input:
            lambda wildcards, stage=STAGE: [
                f"jobs/{before}/{key}/done.json" for before, key in JOBS[stage, wildcards.key]["inputs"].values()
            ],
        output: # update: a study that runs beside this one may have made it meanwhile; Snakemake would delete it first
            update(f"jobs/{STAGE}/{{key}}/done.json"),
        threads:
            lambda wildcards, stage=STAGE: JOBS[stage, wildcards.key]["num_threads"]
        priority: ORDER.index(STAGE) # runs that have begun are finished first
        resources:
            gpu=int(GPUS > 0 and STAGE in ON_GPU),
            mem_mb=PLAN["memory_mb"],
            runtime=24 * 60,
        params:
            stage=STAGE,
            gpus=SLOTS if STAGE in ON_GPU else 0,
        shell:
            "exec env PYTHONPATH={ROOT:q} {PYTHON:q} -m pipeline_steps.study.job --studies . --plan {config[plan]:q}"
            " --stage {params.stage} --key {wildcards.key} --gpus {params.gpus}"
