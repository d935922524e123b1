"""What a run would serve, against counting what the loader really serves; the command and its file."""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml

from pipeline_steps.common import metrics, params
from pipeline_steps.common.errors import run_main
from pipeline_steps.streaming import __main__ as command
from pipeline_steps.streaming.loader import Loader, plan_stage
from pipeline_steps.streaming.statistics import count, table
from pipeline_steps.training.schema import MixtureEntry
from tests.pipeline_steps import packed
from tests.pipeline_steps.packed import clips, open_split, streaming, write

MIXTURE = (
    MixtureEntry(source="films", task="*", weight=1.0),
    MixtureEntry(source="*", task="card", weight=3.0),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("packed"), clips(90, text_every=6), 20)


def test_statistics_match_what_the_loader_serves(root):
    dataset, section = open_split(root), streaming()
    settings = packed.stage(mixture=MIXTURE, num_samples=200)
    sizes = {"tokens_per_frame": 1}
    plan = plan_stage(dataset, settings, section, stage="stage2", seed=1, batch_size=16, **sizes)
    counts = count(dataset, plan, image_replication=2, **sizes)
    seen = Counter()
    row_of = {row["key"]: row for row in dataset.rows}
    for batch in Loader(dataset, plan, packed.collator(), section, packed.runtime()):
        lengths = batch.attention_mask.sum(1).tolist()
        for key, frames, length in zip(batch.keys, batch.num_frames.tolist(), lengths, strict=True):
            place = (row_of[key]["source"], row_of[key]["task"])
            seen.update({(*place, "samples"): 1, (*place, "frames"): frames, (*place, "text"): length - frames})
    for source, rows in counts.sources.items():
        for task, row in rows.items():
            found = (row.num_samples, row.num_frames, row.text_tokens)
            assert found == tuple(seen[source, task, what] for what in ("samples", "frames", "text"))
            assert row.visual_tokens == row.num_frames
            assert row.epochs == row.num_samples / row.num_items
            assert row.share == row.num_samples / 200
    assert counts.total.num_samples == 200
    assert counts.total.num_items == 90
    assert counts.num_steps == 13
    assert counts.unmatched == {"world/image": counts.sources["world"]["image"].num_items}
    assert "not in the mixture: world/" in table("stage2", counts)


def test_truncated_chats_are_counted_each_time_they_are_served(root):
    dataset = open_split(root)
    dataset.index.truncated.setflags(write=True)
    dataset.index.truncated[[1, 2]] = True
    settings = packed.stage(mixture=(MixtureEntry(source="*", task="*", weight=1.0),), num_samples=900)
    plan = plan_stage(dataset, settings, streaming(), stage="stage1", seed=1, batch_size=16, tokens_per_frame=1)
    counts = count(dataset, plan, image_replication=1, tokens_per_frame=1)
    assert counts.total.num_truncated == sum(number in (1, 2) for number in plan.plan.order.tolist()) > 15


def run(monkeypatch, root, *arguments):
    document = yaml.safe_load((params.ROOT / "params.yaml").read_text())
    for stage in ("stage1", "stage2", "stage3"):
        document["training"][stage]["mixture"] = [entry.model_dump() for entry in MIXTURE]
    (root / "params.yaml").write_text(yaml.safe_dump(document))
    options = {"--params": "params.yaml", "--shards": "shards", "--tokens": "tokens", "--metrics": "metrics"}
    paths = [word for name, value in options.items() for word in (name, str(root / value))]
    monkeypatch.setattr(sys, "argv", ["streaming", "--stats", *paths, *arguments])
    with pytest.raises(SystemExit) as stop:
        run_main(command.main)
    return stop.value.code or 0


def test_command_output_is_deterministic(monkeypatch, root, capsys):
    assert run(monkeypatch, root) == 0
    content = (root / "metrics/streaming.json").read_bytes()
    assert run(monkeypatch, root) == 0
    assert (root / "metrics/streaming.json").read_bytes() == content
    result = metrics.StreamingResult.model_validate_json(content)
    assert result.stages["stage1"].total.num_samples == 5600
    assert result.stages["stage2"].sources["chat"]["text"].share == pytest.approx(0.14, abs=1e-4)
    training = params.load(params.ROOT / "params.yaml")["training"]
    num_steps = -(-training["stage3"]["num_samples"] // training["common"]["batch_size"])
    assert f"stage3, {num_steps:,} steps" in capsys.readouterr().out
    assert json.loads(content)["stages"]["stage3"]["total"]["num_items"] == 90


def test_num_samples_option_prints_without_writing(monkeypatch, root, capsys):
    (root / "metrics/streaming.json").unlink(missing_ok=True)
    assert run(monkeypatch, root, "--num-samples", "1000") == 0
    assert "stage1, 32 steps" in capsys.readouterr().out
    assert not (root / "metrics/streaming.json").exists()


def test_missing_source_is_named(monkeypatch, root, capsys):
    monkeypatch.setattr(sys.modules[__name__], "MIXTURE", (SimpleNamespace(model_dump=lambda: ENTRY),))
    assert run(monkeypatch, root) == 1
    assert "no items of nowhere/card" in capsys.readouterr().err


ENTRY = {"source": "nowhere", "task": "card", "weight": 1.0}
