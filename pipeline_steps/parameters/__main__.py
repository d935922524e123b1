"""Stage `parameters`: validates the whole params.yaml before any other stage starts.

    python -m pipeline_steps.parameters

Every other stage depends on outputs/parameters.json, whose content never changes. A changed parameter therefore reruns
this stage (a second) and then only the stages that list the parameter. Misspelt keys and impossible values fail here
with exit code 1 and one message that lists all of them. So does an `ablation` without a file in conf/ablation/ or with
other values than that file sets, and so do options of the network that contradict each other or, where the patches of
the vision encoder are known, the size of the frames, and objectives that do not fit the network, each other, the stage
before or the backbones.
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
from pipeline_steps.training import objectives

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
    check_objectives(arguments.params, parameters)
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


def check_objectives(path: str, parameters) -> None:
    """UserError if the objectives of a training stage contradict each other or the network, continue heads that no
    stage before trains, or need an autoencoder that the backbones do not have. path: parameter file, for the message.
    """
    starts_new = Path(parameters.training.init_from) == BACKBONES
    before = set() if starts_new else None  # heads of the stage before; None: of a checkpoint, not known
    for stage in params.TRAINING_STAGES:
        settings = getattr(parameters.training, stage)
        own, key = settings.objective, f"{path}: training.{stage}.objective"
        try:
            objectives.check(stage, settings, parameters.model)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        heads = objectives.with_modules(settings)
        if own.initial_modules == "previous" and (not heads or before not in (None, heads)):
            theirs = "" if before is None else f", those of the stage before: {', '.join(sorted(before)) or 'none'}"
            raise UserError(
                f"{key}.initial_modules is previous, but the objectives of {stage} with a head are: "
                f"{', '.join(sorted(heads)) or 'none'}{theirs}. Set it to new, or give both stages the same ones."
            )
        if "next_frame" in heads and own.next_frame.autoencoder is not None:
            check_autoencoder(f"{key}.next_frame.autoencoder", Path(own.next_frame.autoencoder), parameters.backbones)
        before = heads


def check_autoencoder(key: str, folder: Path, backbones) -> None:
    """UserError if `folder` is that of the stage `backbones`, which makes none. key: what names it, for the message."""
    if folder != BACKBONES / "autoencoder" or (backbones.kind == "embedded" and backbones.embedded.autoencoder_steps):
        return
    if backbones.kind == "embedded":
        reason, step = "backbones.embedded.autoencoder_steps is 0", "Set it to 1000, or name"
    else:
        reason, step = f"backbones.kind is {backbones.kind}", "Name"
    raise UserError(
        f"{key} is {folder}, but {reason}, so the stage backbones makes no autoencoder. {step} the folder of another "
        "(`python -m pipeline_steps.backbones.autoencoder --shards data/shards --steps 1000 --out FOLDER` trains one)."
    )


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
