"""Folders with metadata for the tests of the source `folder`."""

import json

from pipeline_steps.sources import folder


def media(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def jsonl(root, *rows):
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def items(root, *rows):
    """The items of one video with these rows."""
    media(root, "a.mp4")
    jsonl(root, *({"file_name": "a.mp4", **row} for row in rows))
    (sample,) = folder.read(root, "mine").samples
    return [item.model_dump(exclude_defaults=True) for item in sample.items]
