"""Stage `parameters`: validates the whole params.yaml before any other stage starts.

    python -m pipeline_steps.parameters

Every other stage depends on outputs/parameters.json, whose content never changes. A changed parameter therefore reruns
this stage (a second) and then only the stages that list the parameter. Misspelt keys and impossible values fail here
with exit code 1 and one message that lists all of them. So does an `ablation` without a file in conf/ablation/ or with
other values than that file sets, and so do options of the network that contradict each other or, where the patches of
the vision encoder are known, the size of the frames.
"""

import argparse
import difflib
from collections.abc import Iterator
from pathlib import Path

from model.option_checks import check_options
from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, listing, run_main
from pipeline_steps.common.files import check_outputs, write_json
from pipeline_steps.streaming.compatibility import check_frames

PARAMS = params.RESULT_KEYS
BACKBONES = Path("data/backbones")  # of the stage of that name; training may start from a checkpoint instead
MAX_LISTED = 10  # differences in a message


def main() -> None:
    parser = argparse.ArgumentParser(description="Validate the whole params.yaml.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--ablations", type=Path, default=Path("conf/ablation"), help="folder with the ablations")
    parser.add_argument("--out", type=Path, default=Path("outputs/parameters.json"))
    arguments = parser.parse_args()
    parameters = params.read(arguments.params, *PARAMS)
    check_ablation(arguments.params, parameters.as_dict(), arguments.ablations)
    check_network(arguments.params, parameters)
    check_outputs(files=[arguments.out])
    write_json(arguments.out, {"valid": True})
    print(f"{arguments.params}: all parameters are valid")


def check_network(path: str, parameters) -> None:
    """UserError if options in section `model` contradict each other, or do not fit frames of shards.image_size. The
    latter is known only of embedded backbones: of others, and of a checkpoint, the training stages find it. path:
    parameter file, for the message."""
    try:
        check_options(parameters.model)
    except ValueError as error:
        raise UserError(f"{path}: model.{error}.") from None
    if parameters.backbones.kind == "embedded" and Path(parameters.training.init_from) == BACKBONES:
        check_frames(parameters.model, parameters.backbones.embedded.patch_size, parameters.shards.image_size, path)


def check_ablation(path: str, content: dict, folder: Path) -> None:
    """UserError if `folder` has no ablation of this name, or if the parameters differ from what it sets: the results
    would be taken for those of the ablation. path: parameter file, for the message. content: what it holds."""
    name, known = content["ablation"], sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        guess = f"Did you mean '{close[0]}'? " if close else ""
        raise UserError(
            f"{path}: ablation is '{name}', but there is no {folder / name}.yaml. {guess}Known: {', '.join(known)}."
        )
    file = folder / f"{name}.yaml"
    lines = list(differences(params.load(file), content)) if name != "none" else []
    if lines:
        raise UserError(
            f"{path}: ablation is '{name}', but {len(lines)} parameter(s) differ from {file}:\n"
            f"{listing(lines[:MAX_LISTED], len(lines))}\nCompose them with `dvc exp run -S ablation={name}` or `python "
            f"-m pipeline_steps.common.params --compose ablation={name}`, or set ablation to none."
        )


def differences(wanted: dict, found: dict, prefix: str = "") -> Iterator[str]:
    """A line for every value of `wanted` that `found` has otherwise or not at all."""
    for key, value in wanted.items():
        own = found.get(key)
        if isinstance(value, dict) and isinstance(own, dict):
            yield from differences(value, own, f"{prefix}{key}.")
        elif own != value:
            yield f"{prefix}{key}: {own!r}, the ablation has {value!r}"


if __name__ == "__main__":
    run_main(main)
