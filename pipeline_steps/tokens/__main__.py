"""Tokens: chat text of every item, with masks, in sidecar files aligned with the shards.

    python -m pipeline_steps.tokens [--params params.yaml] [--shards data/shards]
                                    [--tokenizer data/backbones/language_model] [--output data/tokens]

One sidecar (pipeline_steps/sidecar.py) per shard, one row per item, in the shard's order. Visual tokens are not in
input_ids: `visual_position` says where they go. Items longer than `max_tokens` are dropped and counted, never cut.
15,000 items: 10 s on one core.
"""

import argparse
import sys
import tarfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from pipeline_steps import params, records, sidecar
from pipeline_steps.params import UserError
from pipeline_steps.records import Dropped, PackedSample, ShardsManifest, TokensEntry, TokensManifest, TokensSplit
from pipeline_steps.tokens.chat import ChatRenderer, load_tokenizer, tokenize

PARAMS = ("tokens",)
MAX_LISTED = 20  # dropped items shown in the terminal


def build(section, shards_dir, tokenizer_dir, output):
    """The whole stage; returns the TokensManifest that was published to `output`/manifest.json."""
    shards = records.read_record(ShardsManifest, Path(shards_dir) / "manifest.json", "shards")
    tokenizer = load_tokenizer(tokenizer_dir)
    renderer = ChatRenderer(tokenizer, section.system, section.prompts)
    splits, dropped, families, scorable = {}, [], Counter(), Counter()
    seen_of, dropped_of = Counter(), Counter()  # items of each source
    with (
        records.replaced_folder(output) as folder,
        tqdm(total=shards.packed, desc="tokens", unit="sample", mininterval=0.5) as bar,
    ):
        for split, entry in shards.splits.items():
            (folder / split).mkdir()
            written = []
            for shard in entry.shards:
                samples, places = read_shard(Path(shards_dir) / split / shard.name, shard)
                before = len(dropped)
                rows = [
                    row | places[row["key"]] for row in tokenize_samples(samples, renderer, section.max_tokens, dropped)
                ]
                source_of = {sample.key: sample.source for sample in samples}
                seen_of.update(sample.source for sample in samples for _ in sample.items)
                dropped_of.update(source_of[entry.key] for entry in dropped[before:])
                families.update(row["family"] for row in rows)
                scorable[split] += sum(row["kind"] != "text" and any(row["score_mask"]) for row in rows)
                path = folder / split / Path(shard.name).with_suffix(sidecar.SUFFIX).name
                sidecar.write(path, rows)
                written.append(_entry(path, rows, shard))
                bar.update(len(samples))
            splits[split] = TokensSplit(
                shards=tuple(written),
                num_items=sum(w.num_items for w in written),
                num_tokens=sum(w.num_tokens for w in written),
            )
        manifest = TokensManifest(
            splits=splits,
            seen=families.total() + len(dropped),
            kept=families.total(),
            dropped=tuple(dropped),
            truncated=(),
            sources={},
            families=dict(sorted(families.items())),
            tokenizer_sha256=records.sha256_file(Path(tokenizer_dir) / "tokenizer.json"),
            vocabulary_size=len(tokenizer),
            max_tokens=section.max_tokens,
            system=section.system,
        )
        check_dropped(manifest, seen_of, dropped_of, section.max_dropped)
        records.write_json(folder / "manifest.json", manifest)
    for split in sorted(set(splits) - set(+scorable)):
        print(
            f"note: no item of split '{split}' has frames and an answer with a letter or digit after its cue. "
            "Evaluation cannot score this split: give it such samples (sources, shards) or choose another.",
            file=sys.stderr,
        )
    return manifest


def read_shard(path, entry):
    """(the PackedSamples of one tar in its order, {key: where its members lie in the tar}); UserError if it is not the
    tar that the manifest describes."""
    try:
        found = records.sha256_file(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing, but named in manifest.json. Rerun `python -m pipeline_steps.shards`."
        ) from None
    if found != entry.sha256:
        raise UserError(
            f"{path}: sha256 {found[:12]}... instead of {entry.sha256[:12]}... in manifest.json. "
            "Rerun `python -m pipeline_steps.shards`."
        )
    samples, places, frames = [], {}, []
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.name.endswith(".json"):
                frames.append(member)
                continue
            sample = records.parse(PackedSample, tar.extractfile(member).read(), f"{path}: {member.name}")
            samples.append(sample)
            places[sample.key] = {
                "frame_offsets": [frame.offset_data for frame in frames],
                "frame_sizes": [frame.size for frame in frames],
                "sample_offset": member.offset_data,
                "sample_size": member.size,
            }
            frames = []
    return samples, places


def tokenize_samples(samples, renderer, max_tokens, dropped):
    """Rows (see sidecar.SCHEMA) of all items that fit; the others are added to `dropped`."""
    items, chats = [], []
    for sample in samples:
        for number, item in enumerate(sample.items):
            messages = renderer.messages(sample, item)
            if any(token in content for _, content in messages for token in renderer.control_tokens):
                dropped.append(Dropped(key=sample.key, item=number, reason="control token in the text"))
                continue
            items.append((sample, number, item, messages[-1][1]))
            chats.append(renderer.render(messages, item.cue))
    rows = []
    for (sample, number, item, answer), encoded in zip(items, tokenize(renderer.tokenizer, chats), strict=True):
        length = len(encoded["input_ids"])
        if length > max_tokens:
            dropped.append(Dropped(key=sample.key, item=number, reason=f"{length} tokens, max_tokens is {max_tokens}"))
            continue
        if sum(encoded["answer_mask"]) < 2:  # nothing but the end-of-turn token
            raise UserError(f"sample '{sample.key}': the answer {answer!r} gives no token. Correct or remove it.")
        rows.append(
            {
                "key": sample.key,
                "item": number,
                "source": sample.source,
                "family": item.family,
                "kind": sample.kind,
                "num_frames": sample.frame_count,
                **encoded,
                "truncated_turns": 0,
                "answer": answer,
                "cue": item.cue,
                "target": item.target,
            }
        )
    return rows


def _entry(path, rows, shard):
    return TokensEntry(
        name=path.name,
        num_items=len(rows),
        num_tokens=sum(len(row["input_ids"]) for row in rows),
        shard_sha256=shard.sha256,
        sha256=records.sha256_file(path),
    )


def check_dropped(manifest, seen_of, dropped_of, max_dropped):
    """Lists the dropped items; UserError if they are too many of a source's, or if nothing is left to train on."""
    lines = [f"  {d.key} item {d.item}: {d.reason}" for d in manifest.dropped[:MAX_LISTED]]
    if len(manifest.dropped) > MAX_LISTED:
        lines.append(f"  ... and {len(manifest.dropped) - MAX_LISTED} more")
    listing = "\n".join(lines)
    for source, count in dropped_of.items():
        if count > max_dropped * seen_of[source]:
            raise UserError(
                f"{count} of {seen_of[source]} items of '{source}' were dropped, more than tokens.max_dropped allows "
                f"({max_dropped:.1%}):\n{listing}\nRaise tokens.max_tokens or tokens.max_dropped, or shorten the texts."
            )
    if manifest.splits["train"].num_items == 0:
        raise UserError(f"no training item is left of {manifest.seen}.\n{listing}")
    if manifest.dropped:
        print(f"dropped {len(manifest.dropped)} of {manifest.seen} items:\n{listing}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description="Tokenise the chat text of every packed sample.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--shards", default="data/shards")
    parser.add_argument("--tokenizer", default="data/backbones/language_model")
    parser.add_argument("--output", default="data/tokens")
    arguments = parser.parse_args()
    section = params.read(arguments.params, *PARAMS).tokens
    manifest = build(section, arguments.shards, arguments.tokenizer, arguments.output)
    counts = ", ".join(f"{split} {entry.num_items}" for split, entry in manifest.splits.items())
    print(f"{arguments.output}: {manifest.kept} of {manifest.seen} items kept ({counts})")


if __name__ == "__main__":
    params.run(main)
