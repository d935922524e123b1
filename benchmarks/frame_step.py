"""Autoregressive mode by the fixed frame step, compared with the same mode by a growing cache, in one run.

    python -m benchmarks.frame_step
    python -m benchmarks.frame_step --config outputs/stage3 --frames 6 64 --device cuda --dtype bfloat16

Random weights, which change no time. Every figure is the median of `--repeats` rounds in which the ways alternate, so
that the machine's load falls on all of them: frames per second of the whole encoding (vision encoder included) and
milliseconds of an answer of 16 tokens. On CUDA `graph` is the captured step and `static` the same step run eagerly.
Without --config the network is that of the embedded scale. Cost: about a minute on two cores.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.workload import network_config
from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration
from pipeline_steps.common.device import choose_device
from pipeline_steps.common.errors import run_main
from pipeline_steps.common.files import check_outputs, write_json

TEXT_BEFORE, TEXT_AFTER, ANSWER = 40, 8, 16  # tokens


def make_batch(config, num_frames: int, batch_size: int, device: str, dtype: torch.dtype) -> dict:
    visual = [config.visual_token_id] * (num_frames * config.tokens_per_frame)
    ids = torch.tensor([[5] * TEXT_BEFORE + visual + [7] * TEXT_AFTER] * batch_size, device=device)
    size = config.vision_config.image_size
    pixels = torch.randn(num_frames * batch_size, 3, size, size, device=device, dtype=dtype)
    counts = torch.full((batch_size,), num_frames, device=device)
    return {"input_ids": ids, "pixel_values": pixels, "num_frames": counts}


def seconds(run, device: str) -> float:
    """Processor time on a CPU, which other work on the machine does not stretch; wall time on CUDA."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    started = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def measure(model, batch: dict, kinds: tuple[str, ...], device: str, repeats: int) -> dict:
    """Per kind of step: median seconds of encoding all frames, and of an answer."""
    runs = {}
    for kind in kinds:
        options = {"mode": "autoregressive", "options": {"frame_step": kind}}
        runs[kind, "encode"] = lambda options=options: model.encode_frames(**batch, **options)
        length = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        runs[kind, "answer"] = lambda options=options, length=length: model.generate(**batch, **options, **length)
    times = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            seconds(run, device)
        for _ in range(repeats):
            for name, run in runs.items():
                times[name].append(seconds(run, device))
    return {kind: {what: statistics.median(times[kind, what]) for what in ("encode", "answer")} for kind in kinds}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The fixed frame step compared with a growing cache.")
    parser.add_argument("--config", type=Path, help="folder with the config.json of a model (default: embedded sizes)")
    parser.add_argument("--frames", type=int, nargs="+", default=[6, 64])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    device, dtype = choose_device(arguments.device, "--device"), getattr(torch, arguments.dtype)
    if arguments.output:
        check_outputs(files=[arguments.output])
    torch.set_num_threads(arguments.num_threads)
    config = FoveatedVLMConfig.from_pretrained(arguments.config) if arguments.config else network_config("tiny")
    torch.manual_seed(0)
    model = FoveatedVLMForConditionalGeneration(config).to(device, dtype).eval()
    kinds = ("dynamic", "static", "graph") if device == "cuda" else ("dynamic", "static")
    rows = []
    print(f"{'frames':>6} {'batch':>6} {'step':>8} {'frames/s':>9} {'ratio':>6} {'answer ms':>10} {'ratio':>6}")
    for num_frames in arguments.frames:
        for batch_size in arguments.batch_sizes:
            batch = make_batch(config, num_frames, batch_size, device, dtype)
            result = measure(model, batch, kinds, device, arguments.repeats)
            for kind, found in result.items():
                gain = {what: result["dynamic"][what] / found[what] for what in found}
                rate = num_frames * batch_size / found["encode"]
                line = f"{num_frames:6} {batch_size:6} {kind:>8} {rate:9.0f} {gain['encode']:6.2f}"
                print(f"{line} {found['answer'] * 1e3:10.1f} {gain['answer']:6.2f}")
                rows.append({"frames": num_frames, "batch_size": batch_size, "step": kind, **found})
    if arguments.output:
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "dtype": arguments.dtype, "num_threads": arguments.num_threads}
        write_json(arguments.output, {"device": name, **versions, "rows": rows})


if __name__ == "__main__":
    run_main(main)
