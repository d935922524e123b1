"""Copy a checkpoint for others, with the results of its evaluation in the model card.

    python -m pipeline_steps.inference.publish --checkpoint outputs/stage3 \\
        --evaluation outputs/metrics/evaluation.json --output shared/foveated

Writes the folder --output, which can be uploaded to the Hugging Face Hub as it is. outputs/ itself stays unchanged,
because DVC tracks it. Needs no GPU; takes seconds.
"""

import argparse
import shutil
from pathlib import Path

from pipeline_steps.common import metrics, model_card
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import read_text, replaced_folder
from pipeline_steps.common.hashing import fingerprint, sha256_file


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy a checkpoint, with its evaluation in the model card.")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/stage3"))
    parser.add_argument("--evaluation", type=Path, default=Path("outputs/metrics/evaluation.json"))
    parser.add_argument("--output", type=Path, required=True, help="folder to write; an existing one is replaced")
    arguments = parser.parse_args()
    publish(arguments.checkpoint, arguments.evaluation, arguments.output)
    print(f"{arguments.output}: checkpoint and model card written")


def publish(checkpoint: Path, evaluation: Path, output: Path) -> None:
    """Writes `output`. UserError if the evaluation is of another checkpoint, or the checkpoint has no card."""
    if output.resolve() == checkpoint.resolve() or checkpoint.resolve() in output.resolve().parents:
        raise UserError(f"{output}: --output lies in the checkpoint {checkpoint}. Choose a folder elsewhere.")
    result = metrics.read_json(evaluation, metrics.EvaluationResult, "dvc repro evaluation")
    card = read_text(checkpoint / "README.md", "stage3")
    weights = sorted(checkpoint.glob("*.safetensors"))
    found = result.provenance.get("checkpoint_sha256")
    own = sha256_file(weights[0]) if len(weights) == 1 else fingerprint(*weights)
    if found != own:
        raise UserError(
            f"{evaluation}: of a checkpoint with sha256 {str(found)[:12]}, but {checkpoint} has {own[:12]}. Run "
            "`dvc repro evaluation`."
        )
    rows = [
        [task, mode, f"{score.loss:.4f}", f"{score.accuracy:.4f}", f"{score.num_items:,}"]
        for task, modes in sorted(result.tasks.items())
        for mode, score in sorted(modes.items())
    ]
    try:
        text = model_card.with_evaluation(card, rows, str(result.provenance.get("split")))
    except ValueError as error:
        raise UserError(f"{checkpoint / 'README.md'}: {error}. Train the checkpoint again.") from None
    with replaced_folder(output) as folder:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        model_card.write(folder, text)


if __name__ == "__main__":
    run_main(main)
