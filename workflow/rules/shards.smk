# plan/<split>/<shard>.jsonl -> packed/<split>/<shard>.{tar,npz,json} (pipeline_steps/shards/pack.py), one job per shard.
SPLIT, SHARD = glob_wildcards("plan/{split,[a-z]+}/{shard,p[01]*}.jsonl")


rule shards:
    input:
        expand("packed/{split}/{shard}.json", zip, split=SPLIT, shard=SHARD),


rule pack_shard:
    input:
        plan="plan/{split}/{shard}.jsonl",
        settings="settings.json",
    output:
        "packed/{split}/{shard}.tar",
        "packed/{split}/{shard}.npz",
        "packed/{split}/{shard}.json",
    log:
        "logs/{split}/{shard}.log",
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    shell:
        "OMP_NUM_THREADS=1 PYTHONPATH={ROOT:q} {PYTHON:q} -m pipeline_steps.shards.pack"
        " --settings {input.settings} --split {wildcards.split} --plan {input.plan}"
        " --output packed/{wildcards.split}/{wildcards.shard} 2> {log}"
