"""Ask a checkpoint a question about a video or an image, or a text-only question.

    python -m pipeline_steps.inference.ask --checkpoint outputs/stage3 --video clip.mp4 \\
        --question "Which digits does red show?"

Streams the greedy answer to stdout and writes an animation of the model's attention to --output (default:
NAME.heatmap.gif in the current folder). Without --video the question is text-only. Needs no shards and no params.yaml:
the checkpoint contains its preprocessing. Cost: library imports and two forward passes over the frames; about five
seconds and 0.5 GB for an embedded checkpoint.
"""

import argparse
import io
import json
import os
import signal
import sys
from pathlib import Path

from model.constants import MODES
from model.hdr import HDR_MODES
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs, write_bytes
from pipeline_steps.inference import follow

SIDE = 224  # px, of one frame of the animation
FRAME_MILLISECONDS = 700
WORLDS = {"procedural": "the moving-digits world", "objects": "the world of objects"}  # sources that are rendered
WITHOUT_FRAMES = ("chat",)  # sources of text-only samples
SEED = 1  # for random query sources: the animation repeats the queries that produced the answer


def main():
    try:
        ask(read_arguments())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as in `ask ... | head -c 1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return 128 + signal.SIGPIPE
    return 0


def command():
    """The console script foveated-ask."""
    run_main(main)


def ask(arguments):
    """Prints the answer and writes the animation. UserError for invalid input."""
    output = check(arguments)
    from transformers.utils import logging as transformers_logging

    from pipeline_steps.common.checkpoint import load_checkpoint
    from pipeline_steps.common.device import choose_device

    transformers_logging.disable_progress_bar()
    model, processor = load_checkpoint(arguments.checkpoint)
    model.to(choose_device())
    processor.hdr = arguments.hdr or processor.hdr
    try:
        processor.check_question(arguments.question)
    except ValueError as error:
        raise UserError(str(error)) from None
    if arguments.follow:
        print_notice(arguments.checkpoint)
        follow.run(arguments, model, processor)
        return
    try:
        inputs = processor(text=arguments.question, videos=arguments.video)
        print_notice(arguments.checkpoint)  # not before an error about the video
        answer = stream_answer(model, processor, inputs, arguments.mode, arguments.max_new_tokens)
    except ValueError as error:
        raise UserError(str(error)) from None
    if output is None:
        return
    if model.config.architecture != "foveated":
        print(f"{output}: not written: the model has no queries, so there is no attention to draw")
        return
    write_bytes(output, animation(model, processor, inputs, arguments.mode, arguments.question, answer))
    print(f"{output}: attention animation written")


def read_arguments():
    parser = argparse.ArgumentParser(description="Ask a checkpoint about a video.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a trained model, e.g. outputs/stage3")
    parser.add_argument("--question", required=True)
    parser.add_argument("--video", type=Path, help="video or image file; without it the question is text only")
    parser.add_argument("--mode", choices=MODES, default="autoregressive", help="inference mode")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="maximum length of the answer, in tokens")
    parser.add_argument("--output", type=Path, help="the animation (default: NAME.heatmap.gif in the current folder)")
    parser.add_argument("--hdr", choices=HDR_MODES, help="media with PQ or HLG (default: as in training)")
    parser.add_argument("--follow", action="store_true", help="--video is still growing: a file, or a folder of frames")
    parser.add_argument("--every", type=int, help="with --follow: answer after so many frames (default: at the end)")
    parser.add_argument("--idle", type=float, help="with --follow: end after so many seconds without growth (10)")
    parser.add_argument("--max-num-frames", type=int, help="with --follow: frames to take (default: as in training)")
    return parser.parse_args()


def check(arguments):
    """The output path of the animation, None without a video. Raises UserError before any weight is loaded."""
    if not arguments.question.strip():
        raise UserError("--question is empty, expected text")
    try:
        arguments.question.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--question {arguments.question!r}: not UTF-8 text at character {error.start + 1}. Write it in UTF-8."
        ) from None
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {arguments.max_new_tokens}, expected at least 1")
    follow.check(arguments)
    if arguments.follow:
        return None
    if arguments.video is None:
        if arguments.output is not None:
            raise UserError(
                f"--output {arguments.output}: there is no attention to draw without --video. Give both or neither."
            )
        return None
    if arguments.video.is_dir():
        raise UserError(f"{arguments.video}: a folder, expected a file. For a folder of frames, add --follow.")
    if not arguments.video.is_file():
        raise UserError(f"{arguments.video}: no such file. Correct --video.")
    output = arguments.output or Path(f"{arguments.video.stem}.heatmap.gif")
    if output.suffix.lower() != ".gif":
        raise UserError(f"{output}: the animation is a GIF file, give --output a name that ends with .gif")
    if output.exists() and output.samefile(arguments.video):
        raise UserError(f"{output}: --output and --video are the same file. Give --output another name.")
    check_outputs(files=[output])
    return output


def print_notice(checkpoint):
    """Prints which rendered worlds the model was trained on, if training.json, which its training wrote, records these
    and nothing else with frames; nothing if there are other sources, or no record."""
    path = checkpoint / "training.json"
    sources = json.loads(path.read_text(encoding="utf-8")).get("sources", {}) if path.exists() else {}
    shown = {name: count for name, count in sources.items() if name not in WITHOUT_FRAMES}
    if not shown or not shown.keys() <= WORLDS.keys():
        return
    listed = " and ".join(f"{WORLDS[name]} ({count:,} samples)" for name, count in shown.items())
    print(
        f"note: this model was trained only on pictures from {listed}; do not rely on its answers about other "
        "pictures.",
        file=sys.stderr,
    )


def stream_answer(model, processor, inputs, mode, max_new_tokens):
    """Prints the greedy answer word by word and returns it."""
    import torch
    from transformers import TextStreamer

    from model.input_checks import check_new_tokens

    tokenizer = processor.tokenizer
    check_new_tokens(model.config, inputs["input_ids"].shape[1], max_new_tokens)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with torch.inference_mode():
            ids = model.generate(
                **inputs.to(model.device),
                mode=mode,
                options={"generator": generator(model)},
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
                streamer=streamer,
            )
    except KeyboardInterrupt:
        print(flush=True)  # end the partial line
        raise
    return processor.decode(ids[0], skip_special_tokens=True).strip()


def animation(model, processor, inputs, mode, question, answer):
    """The bytes of a GIF: every frame, and the last layer's attention over it."""
    import torch

    from pipeline_steps.inference import drawing, gaze

    with torch.inference_mode():
        options = {"generator": generator(model), "output_attentions": True, "return_logits": False}
        output = model(**inputs.to(model.device), mode=mode, options=options)
    maps = gaze.attention_maps(output.attention_weights.float().cpu().numpy())[-1]  # [F, N]
    clip = drawing.Clip(
        frames=processor.pictures(inputs["pixel_values"].cpu()),
        maps={"coarse" if model.config.coarse_only else mode: maps},
        boxes=None,
        title="",
        question=question,
        answer=None,
        prediction=answer,
    )
    file = io.BytesIO()
    drawing.save_animation(drawing.animation(clip, SIDE), file, FRAME_MILLISECONDS)
    return file.getvalue()


def generator(model):
    import torch

    return torch.Generator(model.device).manual_seed(SEED)


if __name__ == "__main__":
    run_main(main)
