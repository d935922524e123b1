"""SmolTalk: text-only chats, split into three disjoint parts for the three training stages.

A hash of its text assigns each chat to source `smoltalk_stage1`, `_stage2` or `_stage3`, in the ratio 4 : 2 : 1.
"""

import hashlib
import json

from pipeline_steps.sources.hub.adapter import Adapter, Draft, Table, chat, entries, text

PARTS = ("stage1",) * 4 + ("stage2",) * 2 + ("stage3",)  # the part of a chat is PARTS[hash % 7]


def part_of(messages):
    """Return the part of a chat: stage1, stage2 or stage3."""
    content = json.dumps(messages, sort_keys=True, default=repr)
    return PARTS[int.from_bytes(hashlib.sha256(f"smoltalk {content}".encode()).digest()[:8]) % len(PARTS)]


def sample(row, table):
    if part_of(row.get("messages")) != table.subset:
        return None
    turns = [(text(message, "role"), text(message, "content")) for message in entries(row, "messages")]
    return Draft(name="", items=(chat(turns, "text"),))


ADAPTER = Adapter(
    repo="HuggingFaceTB/smoltalk",
    revision="5feaf2fd3ffca7c237fc38d1861bc30365d48ffa",
    licence="per part; new parts Apache 2.0",
    download="there are no media",
    columns=("messages",),
    tables=tuple(
        Table(stage, "data/all/train-*.parquet", f"smoltalk_{stage}") for stage in ("stage1", "stage2", "stage3")
    ),
    sample=sample,
)
