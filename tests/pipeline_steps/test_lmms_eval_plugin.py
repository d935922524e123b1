"""The plugin for lmms-eval, against the library where it is installed and against a stand-in of its interface
(tests/standins) where it is not."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline_steps.common.errors import UserError

if importlib.util.find_spec("lmms_eval") is None:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "standins"))

from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelRegistryV2

from model import FoveatedVLMProcessor, FoveationOptions
from model.constants import IGNORE_INDEX
from pipeline_steps.common.checkpoint import load_checkpoint
from pipeline_steps.common.params import ROOT
from pipeline_steps.evaluation.multiple_choice import Question, option_scores
from pipeline_steps.inference import lmms_eval_plugin
from pipeline_steps.inference.answers import answer_span, embedded_prompts, prompt_batch
from pipeline_steps.inference.likelihood import answer_ids
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards
from tests import checkpoints

OPTIONS = {"max_new_tokens": 5, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = checkpoints.make(tmp_path_factory.mktemp("lmms_eval"))
    checkpoints.save(checkpoints.make_lively_model(), made, made.checkpoint, "You watch videos.")
    return made


@pytest.fixture(scope="module")
def lm(made):
    """The plugin on a checkpoint, with a task of a video, a picture, two pictures and no picture."""
    registry = ModelRegistryV2()
    registry.register_manifest(lmms_eval_plugin.manifest())
    plugin = registry.get_model_class("foveated_vlm", force_simple=True)
    found = plugin.create_from_arg_string(f"pretrained={made.checkpoint}", {"batch_size": 2, "device": "cpu"})
    one, two = (
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 80, 3)).astype(np.uint8)) for seed in (1, 2)
    )
    shown = [[str(made.video)], [one], [one, two], []]
    found.task_dict["task"] = {"test": [{"shown": visuals, "answer": " red"} for visuals in shown]}
    return found


def request(kind, doc_id, context, second):
    arguments = (context, second, lambda doc: doc["shown"], doc_id, "task", "test")
    metadata = {"task": "task", "doc_id": doc_id, "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)


def test_the_entry_point_registers_a_model_of_the_library(lm):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lmms_eval.models"].items()
    manifest = EntryPoint(name, value, "lmms_eval.models").load()()
    assert (name, manifest.model_id) == ("foveated_vlm", "foveated_vlm")
    assert manifest.simple_class_path == "pipeline_steps.inference.lmms_eval_plugin.FoveatedVLM"
    assert isinstance(lm, lmms)
    assert (lm.rank, lm.world_size, lm.is_simple, lm.batch_size) == (0, 1, True, 2)


def test_answers_are_those_of_the_checkpoint(lm, made):
    model, processor = load_checkpoint(made.checkpoint)
    questions = ["Which digits does red show?", "What is it?", "Which one is red?", "Say 31 backwards"]
    requests = [request("generate_until", n, text, dict(OPTIONS)) for n, text in enumerate(questions)]
    answers = lm.generate_until(requests)
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        visuals = lm.task_dict["task"]["test"][number]["shown"]
        video = None if not visuals else visuals[0] if len(visuals) == 1 else visuals
        inputs = processor(text=question, videos=video)
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=2, eos_token_id=2)
        assert answer == processor.decode(ids[0], skip_special_tokens=True).strip()
    assert len(set(answers)) == 4
    assert lm.generate_until(requests[::-1]) == answers[::-1]


def test_requests_of_several_options_keep_their_order(lm):
    short = request("generate_until", 3, "Say 31", OPTIONS | {"max_new_tokens": 1})
    long = request("generate_until", 3, "Say 31", OPTIONS | {"max_new_tokens": 8})
    one, two = lm.generate_until([short])[0], lm.generate_until([long])[0]
    assert one != two
    assert lm.generate_until([short, long, short, long, short]) == [one, two, one, two, one]
    stopped = request("generate_until", 3, "Say 31", OPTIONS | {"max_new_tokens": 8, "until": [two[2:4]]})
    assert lm.generate_until([stopped])[0] == two[: two.index(two[2:4])].strip()


def test_losses_are_those_of_the_whole_network(lm, made):
    """Losses, not log-probabilities: lmms-eval's multiple-choice tasks take the smallest value."""
    model, processor = load_checkpoint(made.checkpoint)
    continuations = [" red", "top left: 31", lambda doc: doc["answer"], "7"]
    requests = [request("loglikelihood", n % 4, "What is it?", text) for n in range(4) for text in continuations]
    found = lm.loglikelihood(requests)
    for number, (loss, greedy) in enumerate(found):
        doc_id, text = number // 4, ["red", "top left: 31", "red", "7"][number % 4]
        visuals = lm.task_dict["task"]["test"][doc_id]["shown"]
        video = None if not visuals else visuals[0] if len(visuals) == 1 else visuals
        assert loss == pytest.approx(whole_loss(model, processor, "What is it?", video, text), abs=1e-4)
        assert greedy is False
        assert unwrap_generation_output(found[number]) == ((loss, False), None)  # as the evaluator hands it on
    assert found[0] == found[2]
    assert found[0] != found[4]  # another document


def whole_loss(model, processor, question, video, answer):
    inputs = processor(text=question, videos=video)
    ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    prompt = inputs["input_ids"]
    whole = torch.cat([prompt, torch.tensor([ids])], dim=1)
    labels = torch.cat([torch.full_like(prompt, IGNORE_INDEX), torch.tensor([ids])], dim=1)
    shown = {name: inputs[name] for name in ("pixel_values", "num_frames") if name in inputs}
    with torch.no_grad():
        return model(input_ids=whole, labels=labels, mode="autoregressive", **shown).token_loss.double().sum().item()


def test_frames_are_encoded_once_for_all_continuations(lm, monkeypatch):
    calls, encode_frames = [], lm.model.encode_frames
    monkeypatch.setattr(
        lm.model, "encode_frames", lambda *args, **options: calls.append(1) or encode_frames(*args, **options)
    )
    lm.loglikelihood([request("loglikelihood", n, "Which?", text) for text in "ABCD" for n in (0, 1)])
    assert len(calls) == 2


def test_an_empty_context_is_an_answer_without_a_question(lm):
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    unconditional = Instance(request_type="loglikelihood", arguments=("", "red"), idx=0, metadata=metadata)
    ((loss, _),) = lm.loglikelihood([unconditional])
    turn = lm.tokenizer("<|im_start|>assistant\nred", add_special_tokens=False, return_tensors="pt")
    labels = turn["input_ids"].clone()
    labels[:, : len(lm.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])] = IGNORE_INDEX
    with torch.no_grad():
        whole = lm.model(input_ids=turn["input_ids"], labels=labels).token_loss.double().sum().item()
    assert loss == pytest.approx(whole, abs=1e-4)


def test_options_of_tasks(lm):
    assert lm._options({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": True}) == (
        {"max_new_tokens": 16, "num_beams": 1, "do_sample": False},
        [],
    )
    assert lm._options({"temperature": 0.7, "until": "\n\n", "stop_sequences": ["Q:"]}) == (
        {"max_new_tokens": 128, "temperature": 0.7, "do_sample": True},
        ["\n\n", "Q:"],
    )
    for given, samples in (
        ({"do_sample": True}, True),
        ({"do_sample": True, "top_p": 0.9}, True),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, False),
        ({"do_sample": True, "temperature": 0.0, "top_k": 5}, False),
        ({"top_p": 0.9}, False),
    ):
        expected = {**given, "do_sample": True} if samples else {"do_sample": False}
        assert lm._options(dict(given))[0] == {"max_new_tokens": 128} | expected
    assert lm._options({"image_aspect_ratio": "original"})[0] == {"max_new_tokens": 128, "do_sample": False}
    with pytest.raises(UserError, match="contain unsupported visual_cot"):
        lm._options({"visual_cot": True})


def test_wrong_input_is_named(lm, made):
    with pytest.raises(UserError, match="batch_size is 'auto'"):
        lmms_eval_plugin.FoveatedVLM(str(made.checkpoint), batch_size="auto")
    with pytest.raises(UserError, match="mode is 'blind'"):
        lmms_eval_plugin.FoveatedVLM(str(made.checkpoint), mode="blind")
    with pytest.raises(UserError, match="task x, document 3: 2 visuals of type dict, str"):
        lmms_eval_plugin.as_video([{}, "a.mp4"], "task x, document 3")
    with pytest.raises(NotImplementedError, match="multi-round tasks are not supported"):
        lm.generate_until_multi_round([])


def test_a_misspelt_argument_is_named_with_the_right_one(made):
    with pytest.raises(
        UserError, match=r"unknown argument 'max_new_token' \(did you mean 'max_new_tokens'\?\)"
    ) as error:
        lmms_eval_plugin.FoveatedVLM.create_from_arg_string(f"pretrained={made.checkpoint},max_new_token=5")
    assert "The arguments are pretrained, device, batch_size, dtype, mode, max_new_tokens." in str(error.value)


def test_golden_items_score_the_same_in_the_plugin_and_in_the_evaluation(made, tmp_path):
    """Each video item's frames and question as the evaluation reads them from the shards, and as the plugin prepares
    them from the frames: the likelihoods of two answers agree."""
    system = json.loads((made.tokens / "manifest.json").read_text())["system"]
    checkpoints.save(checkpoints.make_lively_model(), made, tmp_path / "checkpoint", system)
    lm = lmms_eval_plugin.FoveatedVLM(str(tmp_path / "checkpoint"), device="cpu")
    model, processor = load_checkpoint(tmp_path / "checkpoint")
    dataset = TokenizedShards.for_model(model.config, made.shards, made.tokens, "test", checkpoints.STILL_FRAMES)
    collate = Collator.for_model(model.config, loss="answer_only", image_replication=checkpoints.STILL_FRAMES)
    videos = [number for number, row in enumerate(dataset.rows) if row["kind"] == "video"]
    asked_by_user = [n for n in videos if dataset.sample(n).items[dataset.rows[n]["item"]].user]
    numbers = asked_by_user[:3]
    assert len(numbers) == 3
    for place, number in enumerate(numbers):
        item, row = dataset[number], dataset.rows[number]
        start, _ = answer_span(row)
        ids = [answer_ids(processor.tokenizer, row["input_ids"][:start], text, "item") for text in ("red", "31 7")]
        asked = Question(number, ("red", "31 7"), 0, ids, ids)
        batch = prompt_batch(collate, [item])
        options = FoveationOptions(generator=torch.Generator().manual_seed(1))
        prompt = embedded_prompts(model, batch.inputs(), options=options)[:, -int(batch.attention_mask.sum()) :]
        expected, _ = option_scores(model, prompt, asked)
        question = dataset.sample(number).items[row["item"]].user
        pictures = [Image.fromarray(frame) for frame in item["frames"]]
        lm.task_dict["golden"] = {"test": {place: {"shown": pictures}}}
        arguments = [(question, text, lambda doc: doc["shown"], place, "golden", "test") for text in ("red", "31 7")]
        metadata = {"task": "golden", "doc_id": place, "repeats": 1}
        found = lm.loglikelihood(
            [Instance(request_type="loglikelihood", arguments=a, idx=0, metadata=metadata) for a in arguments]
        )
        assert [-loss for loss, _ in found] == pytest.approx(expected, abs=1e-3)


def test_visuals_become_what_the_processor_takes(made, tmp_path):
    picture = Image.new("RGB", (60, 60))
    picture.save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    assert lmms_eval_plugin.as_video(None, "x") is None
    assert lmms_eval_plugin.as_video([], "x") is None
    assert lmms_eval_plugin.as_video([path], "x") == path
    assert lmms_eval_plugin.as_video(picture, "x") is picture
    assert lmms_eval_plugin.as_video((picture, picture), "x") == [picture, picture]
    assert [image.size for image in lmms_eval_plugin.as_video([path, path], "x")] == [(60, 60)] * 2
    processor = FoveatedVLMProcessor.from_pretrained(made.checkpoint)
    assert processor(text="Which?", videos=lmms_eval_plugin.as_video([path, path], "x"))["num_frames"].tolist() == [2]
    assert processor(text="Which?", videos=lmms_eval_plugin.as_video([path], "x"))["num_frames"].tolist() == [
        checkpoints.STILL_FRAMES
    ]


# ---------------------------------------------------------------- the library's own command

GOLDEN = """
task: golden
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.visual
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
UTILS = """
def visual(doc):
    return [doc["video"]]
"""


@pytest.fixture
def library(tmp_path):
    """Runs the library's command on a task with files in tmp_path: function of further arguments -> process."""
    if "standins" in str(sys.modules["lmms_eval"].__file__):
        pytest.skip("lmms-eval is not installed (docs/metrics.md)")
    (tmp_path / "golden.yaml").write_text(GOLDEN % (tmp_path / "golden.json"))
    (tmp_path / "utils.py").write_text(UTILS)

    def run(model_args):
        places = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": places}
        command = [sys.executable, "-m", "lmms_eval", "--model", "foveated_vlm", "--model_args", model_args]
        command += ["--tasks", "golden", "--include_path", tmp_path, "--batch_size", "2", "--device", "cpu"]
        command += ["--log_samples", "--output_path", tmp_path / "results"]
        return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, cwd=tmp_path)

    return run


@pytest.mark.slow
def test_the_library_scores_golden_items_as_the_evaluation(made, tmp_path, library):
    """Clips of all tasks, three answers each; the accuracy is that of the answers that the network finds likeliest."""
    system = json.loads((made.tokens / "manifest.json").read_text())["system"]
    checkpoints.save(checkpoints.make_lively_model(), made, tmp_path / "checkpoint", system)
    model, processor = load_checkpoint(tmp_path / "checkpoint")
    options, docs, chosen = ["red", "top left: 31", "7"], [], []
    for number, video in enumerate(sorted((made.raw / "procedural").rglob("*.mp4"))):
        docs.append(
            {"video": str(video), "question": f"Which one, {number}?", "options": options, "answer": number % 3}
        )
        losses = [whole_loss(model, processor, docs[-1]["question"], video, text) for text in options]
        chosen.append(int(np.argmin(losses)))
    (tmp_path / "golden.json").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    done = library(f"pretrained={tmp_path / 'checkpoint'}")
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "results").rglob("*results.json")
    found = json.loads(results.read_text())["results"]["golden"]["acc,none"]
    assert found == pytest.approx(np.mean([choice == doc["answer"] for choice, doc in zip(chosen, docs, strict=True)]))
    (log,) = (tmp_path / "results").rglob("*samples_golden.jsonl")
    assert len(log.read_text().splitlines()) == len(docs)


@pytest.mark.slow
def test_the_library_shows_the_right_spelling_of_an_argument(made, tmp_path, library):
    (tmp_path / "golden.json").write_text("{}")
    done = library(f"pretrained={made.checkpoint},max_new_token=5")
    assert (
        "--model_args: unknown argument 'max_new_token' (did you mean 'max_new_tokens'?)" in done.stderr + done.stdout
    )
