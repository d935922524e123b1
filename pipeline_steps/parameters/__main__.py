"""Stage `parameters`: validates the whole params.yaml before any other stage starts.

    python -m pipeline_steps.parameters

Every other stage depends on outputs/parameters.json, whose content never changes. A changed parameter therefore reruns
this stage (a second) and then only the stages that list the parameter. Misspelt keys and impossible values fail here
with exit code 1 and one message that lists all of them, and so does an `ablation` without a file in conf/ablation/.
"""

import argparse
import difflib
from pathlib import Path

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs, write_json

PARAMS = params.RESULT_KEYS


def main() -> None:
    parser = argparse.ArgumentParser(description="Validate the whole params.yaml.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--ablations", type=Path, default=Path("conf/ablation"), help="folder with the ablations")
    parser.add_argument("--out", type=Path, default=Path("outputs/parameters.json"))
    arguments = parser.parse_args()
    check_ablation(arguments.params, params.read(arguments.params, *PARAMS).ablation, arguments.ablations)
    check_outputs(files=[arguments.out])
    write_json(arguments.out, {"valid": True})
    print(f"{arguments.params}: all parameters are valid")


def check_ablation(path: str, name: str, folder: Path) -> None:
    """UserError if `folder` has no ablation of this name. path: parameter file, for the message."""
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        guess = f"Did you mean '{close[0]}'? " if close else ""
        raise UserError(
            f"{path}: ablation is '{name}', but there is no {folder / name}.yaml. {guess}Known: {', '.join(known)}."
        )


if __name__ == "__main__":
    run_main(main)
