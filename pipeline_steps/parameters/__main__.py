"""Stage `parameters`: checks the whole of params.yaml, before any other stage starts.

    python -m pipeline_steps.parameters

Every other stage depends on outputs/parameters.json, whose content is always the same: a changed parameter runs this
stage again (a second) and then the stages that list that parameter, no others. A misspelt key or an impossible value
ends here with exit code 1 and one message that names all of them. So does an `ablation` without a file in
conf/ablation/.
"""

import argparse
import difflib
from pathlib import Path

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs, write_json

PARAMS = params.RESULT_KEYS


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the whole of params.yaml.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--ablations", type=Path, default=Path("conf/ablation"), help="folder of the ablations")
    parser.add_argument("--out", type=Path, default=Path("outputs/parameters.json"))
    arguments = parser.parse_args()
    check_ablation(arguments.params, params.read(arguments.params, *PARAMS).ablation, arguments.ablations)
    check_outputs(files=[arguments.out])
    write_json(arguments.out, {"valid": True})
    print(f"{arguments.params}: all parameters are valid")


def check_ablation(path: str, name: str, folder: Path) -> None:
    """UserError if `folder` holds no ablation of this name. path: of the parameters, for the message."""
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        guess = f"Did you mean '{close[0]}'? " if close else ""
        raise UserError(
            f"{path}: ablation is '{name}', but there is no {folder / name}.yaml. {guess}Known: {', '.join(known)}."
        )


if __name__ == "__main__":
    run_main(main)
