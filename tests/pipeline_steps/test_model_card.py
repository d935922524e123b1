"""The model card of a published checkpoint: true values, a readable front matter, nothing that is interpreted."""

import json
import re
import shutil

import pytest
import yaml

from pipeline_steps.common import model_card
from pipeline_steps.common.checkpoint import load_checkpoint
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.files import read_record
from pipeline_steps.common.markdown import escaped
from pipeline_steps.common.schemas import ShardsManifest, SourceCounts, TokensManifest
from pipeline_steps.inference.publish import publish
from tests.checkpoints import make_model

ROW = {"event": "validation", "task": "card", "source": "a_b", "mode": "fine", "loss": 0.25, "accuracy": 0.5}


def parts(card):
    """(front matter, {heading: text})"""
    _, header, body = card.split("---\n", 2)
    sections = re.split(r"^## (.+)\n", body, flags=re.MULTILINE)
    return yaml.safe_load(header), dict(zip(sections[1::2], sections[2::2], strict=True)) | {"": sections[0]}


@pytest.fixture
def card(made):
    def write(tokens=None, base=None, rows=(ROW,), **options):
        shards = read_record(ShardsManifest, made.shards / "manifest.json", "shards")
        tokens = tokens or read_record(TokensManifest, made.tokens / "manifest.json", "tokens")
        result = {"validation": list(rows)}
        return model_card.model_card(
            "stage2", make_model(**options), result, shards, tokens, 1234, base or {"kind": None}
        )

    return write


def test_the_card_has_the_true_values(card, made):
    header, sections = parts(card())
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "image-text-to-text"
    assert header["datasets"] == ["chat", "procedural"]
    assert "base_model" not in header
    assert {"video-text-to-text", "custom_code", "foveated"} <= set(header["tags"])
    model = make_model()
    assert f"with {sum(p.numel() for p in model.parameters()):,} parameters" in sections[""]
    assert "not recorded" in sections[""]
    tokens = read_record(TokensManifest, made.tokens / "manifest.json", "tokens")
    for name, counts in tokens.sources.items():
        assert f"|{name}|{counts.kept:,}|{counts.tokens:,}|" in sections["Training data"]
    assert "1,234 samples" in sections["Training data"]
    assert "|card|a\\_b|fine|0.2500|0.5000|" in sections["Validation"]
    assert sections["Evaluation"].strip() == model_card.NOT_EVALUATED
    assert f"At most {model.config.max_num_frames} frames" in sections["Limits"]
    assert "No licence is given" in sections["Licence"]


def test_base_models_and_kinds_of_networks_are_named(card):
    repositories = {role: {"repository": f"own/{role}", "revision": "a" * 40} for role in ("vision", "language")}
    header, sections = parts(card(base={"kind": "hub", "repositories": repositories}))
    assert header["base_model"] == ["own/vision", "own/language"]
    assert "own/vision (aaaaaaaaaaaa) and own/language" in sections[""]
    assert "trained from random weights" in card(base={"kind": "embedded"})
    assert "the language model plans the query" in card()
    assert "average-pooled" in card(architecture="multi_token", num_visual_tokens_per_frame=4)
    assert "one learned query is used for all frames" in card(coarse_only=True)
    assert "Nothing was measured" in card(rows=())


def test_names_from_data_are_not_interpreted(card, made):
    tokens = read_record(TokensManifest, made.tokens / "manifest.json", "tokens")
    name = "a: [x]\n---\n<b>|`"
    counts = SourceCounts(seen=1, kept=1, truncated=0, dropped=0, tokens=7)
    tokens = tokens.model_copy(update={"sources": {name: counts}, "system": "<script>\n# x"})
    header, sections = parts(card(tokens=tokens))
    assert header["datasets"] == ["a: [x] --- <b>|`"]
    assert "|a: \\[x\\] --- \\<b\\>\\|\\`|1|7|" in sections["Training data"]
    assert "\\<script\\> \\# x" in sections["Training data"]


def test_the_example_of_the_card_runs(card, made, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.+?)```", card(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) <= 6
    shutil.copy(made.video, tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("PATH_OR_NAME_OF_THIS_CHECKPOINT", str(made.checkpoint)), {})
    assert capsys.readouterr().out


@pytest.mark.slow
def test_every_stage_publishes_a_card_and_a_copy_has_the_evaluation(finished_run, tmp_path):
    for stage in ("stage1", "stage2", "stage3"):
        folder = finished_run / "outputs" / stage
        header, sections = parts((folder / "README.md").read_text())
        assert header["datasets"] == ["chat", "procedural"]
        assert "trained from random weights" in sections[""]
        assert "|autoregressive|" in sections["Validation"]
        assert json.loads((folder / "base_models.json").read_text()) == {"kind": "embedded", "repositories": None}
    evaluation = finished_run / "outputs/metrics/evaluation.json"
    publish(folder, evaluation, tmp_path / "copy")
    result = json.loads(evaluation.read_text())
    _, sections = parts((tmp_path / "copy/README.md").read_text())
    for task, modes in result["tasks"].items():
        score = modes["autoregressive"]
        row = [escaped(task), "autoregressive", f"{score['loss']:.4f}", f"{score['accuracy']:.4f}"]
        assert f"|{'|'.join(row)}|{score['num_items']:,}|" in sections["Evaluation"]
    assert list(sections)[-3:-1] == ["Limits", "Licence"]
    load_checkpoint(tmp_path / "copy")
    assert model_card.NOT_EVALUATED in (folder / "README.md").read_text()
    with pytest.raises(UserError, match="of a checkpoint with sha256"):
        publish(finished_run / "outputs/stage1", evaluation, tmp_path / "other")
    with pytest.raises(UserError, match="lies in the checkpoint"):
        publish(folder, evaluation, folder / "copy")
