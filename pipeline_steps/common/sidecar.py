"""Token sidecars: one uncompressed, memory-mappable Arrow IPC (Feather) file per shard, with one row per item.

`pandas.read_feather(path)` reads one as a table. `frame_offsets` and `frame_sizes` locate the frames in the shard's
tar, so readers need not parse tar headers.
"""

from pathlib import Path

import pyarrow as pa

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import writable

SUFFIX = ".arrow"
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "item": pa.int32(),  # number of the item within its sample
        "source": pa.string(),
        "task": pa.string(),
        "kind": pa.string(),  # video, image, text
        "num_frames": pa.int32(),  # packed frames of the sample
        "frame_times": pa.list_(pa.float32()),  # of every frame, seconds from the first frame of the source
        "frame_offsets": pa.list_(pa.int64()),  # of every frame's JPEG in the tar, in order
        "frame_sizes": pa.list_(pa.int32()),
        "sample_offset": pa.int64(),  # of {key}.json in the tar
        "sample_size": pa.int32(),
        "input_ids": pa.list_(pa.int32()),  # the whole chat without visual tokens
        "visual_position": pa.int32(),  # of the question's end-of-turn token in input_ids: visual tokens go before it
        "answer_mask": pa.list_(
            pa.bool_()
        ),  # over input_ids: answers with their end-of-turn tokens; a preference: the last
        "score_mask": pa.list_(pa.bool_()),  # over input_ids: answer tokens with a letter or digit, after the cue
        "rejected_ids": pa.list_(pa.int32()),  # the chat with the rejected answer at its end, or null
        "rejected_mask": pa.list_(pa.bool_()),  # over rejected_ids: that answer with its end-of-turn token, or null
        "truncated_turns": pa.int32(),  # answers left out at the end, with their questions (tokens.max_tokens)
        "answer": pa.string(),  # the last one, if there are several
        "cue": pa.string(),
        "target": pa.int32(),  # index into the sample's objects, or null
    }
)


def write(path: Path, rows: list[dict]) -> None:
    """Writes rows of SCHEMA to a new file. UserError if that fails."""
    table = pa.Table.from_pylist(rows, schema=SCHEMA).combine_chunks()
    with writable(path), pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(table)


def read(path: Path) -> pa.Table:
    """The memory-mapped table of a sidecar. UserError if the file is missing or invalid."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except FileNotFoundError:
        raise UserError(f"{path}: missing. Run `dvc repro tokens`, which writes it.") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a token sidecar ({error}). Run `dvc repro tokens`.") from None
    if table.schema != SCHEMA:
        raise UserError(f"{path}: its columns are not those of this version. Run `dvc repro tokens`.")
    return table
