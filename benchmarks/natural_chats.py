"""The text-only chats of `benchmarks.natural`: --chats, or the language model's own, made once in the user's cache."""

from importlib.util import find_spec
from pathlib import Path

from benchmarks.natural_plan import FOLDERS, folder_hash
from pipeline_steps.backbones import own_chats
from pipeline_steps.backbones.pretrained import cache_folder
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.hashing import fingerprint
from pipeline_steps.world.cutouts import SPLITS

CHATS_MINUTES = 6  # that the language model's own chats took on a CPU


def check_chats(path: Path) -> None:
    """UserError for chats that no run can use."""
    from pipeline_steps.sources.chat import chats

    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"--chats {path}: {found}, expected a .jsonl of chats (docs/data.md).")
    samples = list(chats(path))
    different = {sample.items[0].model_dump_json() for sample in samples}
    if len(different) < len(SPLITS):
        raise UserError(
            f"--chats {path}: {len(different)} different chat(s), expected at least one each for "
            f"{', '.join(SPLITS)}. Add chats, or leave --chats out: the language model then makes its own."
        )
    if not {None, "train"} & {sample.split for sample in samples}:
        raise UserError(f"--chats {path}: no chat has the split train. Add some, or remove the column split.")


def own_chats_path(pretrained: Path) -> Path:
    """Where the chats of this language model are kept; other questions are other chats."""
    asked = own_chats.questions(None), own_chats.MAX_TOKENS
    return cache_folder() / "chats" / f"{fingerprint(folder_hash(pretrained / FOLDERS['language']), *asked)}.jsonl"


def make_chats(pretrained: Path, device: str) -> Path:
    """Makes the language model's own chats; returns their path. UserError where no plan can be made for them."""
    path, language = own_chats_path(pretrained), pretrained / FOLDERS["language"]
    if find_spec("hydra") is None:
        raise UserError(
            "--chats is not given, and Hydra, which a plan for new chats needs, is not installed. Where it is, run "
            f"`{chats_command(pretrained)}` and --dry-run; copy the chats and plan.json."
        )
    print(
        f"{path}: asking {language} {len(own_chats.questions(None))} questions, about {CHATS_MINUTES} minutes on a "
        "CPU; stopped, the same command continues",
        flush=True,
    )
    own_chats.write_chats(language, path, device=device)
    return path


def made_later(pretrained: Path) -> str:
    """What --dry-run says where the chats are not made yet."""
    return (
        "\nThe chats are not made yet, so job keys, samples of text and plan.json are provisional. The run "
        f"will make them first: {len(own_chats.questions(None))} answers, about {CHATS_MINUTES} minutes on a "
        f"CPU, kept in {own_chats_path(pretrained)}. To plan for another machine, make them now:\n"
        f"  {chats_command(pretrained)}"
    )


def chats_command(pretrained: Path) -> str:
    path, language = own_chats_path(pretrained), pretrained / FOLDERS["language"]
    return f"python -m pipeline_steps.backbones.own_chats --language {language} --output {path}"
