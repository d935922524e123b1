"""The strict reader, conf/ and params.yaml."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError

from pipeline_steps.common import params
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs
from pipeline_steps.common.params import ROOT, StrictModel
from pipeline_steps.parameters.__main__ import check_ablation, check_network
from pipeline_steps.world.digits import KINDS
from tests import pipeline

PARAMS_FILE = ROOT / "params.yaml"
FILES = sorted(path.relative_to(ROOT / "conf") for path in (ROOT / "conf").glob("*/*.yaml"))
GROUP_FILES = [path for path in FILES if path.parent.name != "study"]  # a study is no group: it names overrides
ABLATIONS = [path.stem for path in GROUP_FILES if path.parent.name == "ablation" and path.stem != "none"]


def message(path, *keys):
    with pytest.raises(UserError) as error:
        params.read(path, *keys)
    return str(error.value)


def test_params_file_is_what_conf_composes_to():
    assert PARAMS_FILE.read_text() == params.compose(), "run `python -m pipeline_steps.common.params --compose`"


@pytest.mark.parametrize("overrides", [[], ["ablation=A6", "seed=2"], ["data=folder", "sources.folder.path=/clips"]])
def test_composition_is_the_one_of_dvc_exp_run(overrides, tmp_path):
    from dvc.utils.hydra import compose_and_dump

    compose_and_dump(tmp_path / "params.yaml", str(ROOT / "conf"), None, "config", str(ROOT), overrides)
    assert (tmp_path / "params.yaml").read_text() == params.compose(overrides)


def test_every_group_has_none():
    groups = {path.parent.name for path in GROUP_FILES}
    assert groups >= {"scale", "data", "ablation"}
    assert all((ROOT / "conf" / group / "none.yaml").exists() for group in groups)


@pytest.mark.parametrize("path", GROUP_FILES, ids=str)
def test_every_group_file_composes_to_valid_parameters(path):
    assert (ROOT / "conf" / path).read_text().startswith("# @package _global_\n")
    text = params.compose([f"{path.parent.name}={path.stem}"])
    check_network(str(path), params.check(str(path), params.parse(str(path), text)))


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_is_named_and_changes_something(name):
    assert f"-S ablation={name}" in (ROOT / "conf/ablation" / f"{name}.yaml").read_text()
    content = yaml.safe_load(params.compose_checked([f"ablation={name}"]))
    assert content["ablation"] == name
    check_ablation("params.yaml", content, ROOT / "conf/ablation")


def test_an_ablation_without_effect_is_an_error(tmp_path):
    (tmp_path / "ablation").mkdir()
    (tmp_path / "config.yaml").write_text("defaults: [_self_, ablation: none]\nablation: none\nmodel: {width: 8}\n")
    (tmp_path / "ablation/none.yaml").write_text("# @package _global_\n")
    (tmp_path / "ablation/A9.yaml").write_text("# @package _global_\nablation: A9\nmodel: {width: 8}\n")
    with pytest.raises(UserError, match=r"A9\.yaml changes no parameter"):
        params.compose_checked(["ablation=A9"], tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ablation=A66", r"ablation: unknown name 'A66' \(probably a typo: did you mean 'A6'\? Allowed names: A1, A2"),
        (
            "modle.layout=vision_first",
            r": modle: unknown key \(probably a typo: did you mean 'model'\? Allowed keys: seed, ablation",
        ),
        ("sed.x=2", r": sed: unknown key \(probably a typo: did you mean 'seed'\?"),
        ("seed.x=2", r": seed\.x: seed is a value, without keys"),
        (
            "tokens.prompts.0.sorce=2",
            r"prompts\.0\.sorce: unknown key \(probably a typo: did you mean 'source'",
        ),
        ("training.common.batchsize=3", r"batchsize: unknown key \(probably a typo: did you mean 'batch_size'\?"),
        ("sed=2", r"sed: unknown key \(probably a typo: did you mean 'seed'\? Allowed keys: seed, ablation"),
        ("scale=tiny=2", "scale=tiny=2: "),
    ],
)
def test_a_wrong_override_is_a_user_error(override, message):
    with pytest.raises(UserError, match=message) as error:
        params.compose([override])
    assert "\n" not in str(error.value)
    assert "Config search path" not in str(error.value)


def test_an_empty_override_is_a_wrong_value():
    text = params.compose(["seed="])
    with pytest.raises(UserError, match="seed: should be a valid integer"):
        params.check("conf/", params.parse("conf/", text))


def test_an_ablation_holds_its_values_with_other_groups():
    content = yaml.safe_load(params.compose(["scale=smollm2_135m", "data=objects", "ablation=D1"]))
    check_ablation("params.yaml", content, ROOT / "conf/ablation")


def test_reads_the_requested_keys_only():
    read = params.read(PARAMS_FILE, "seed", "model", "training.stage1")
    assert read.as_dict().keys() == {"seed", "model", "training"}
    assert read.model.layout in ("question_first", "vision_first")
    assert read.training.stage1.num_samples > 0
    with pytest.raises(AttributeError, match=r"'training\.stage2' was not requested.*dvc\.yaml"):
        _ = read.training.stage2
    with pytest.raises(AttributeError, match="'shards' was not requested"):
        _ = read.shards
    with pytest.raises(AttributeError, match="read-only"):
        read.seed = 2
    with pytest.raises(ValueError, match="frozen"):
        read.model.layout = "vision_first"


def test_a_requested_key_that_does_not_exist_is_named():
    assert "no parameter 'training.stge1' (probably a typo: did you mean 'stage1'?" in message(
        PARAMS_FILE, "training.stge1"
    )


def test_a_misspelt_key_is_named_with_the_allowed_keys_and_a_guess(edited):
    content = yaml.safe_load(PARAMS_FILE.read_text())
    path = edited("shards.jpeg_quality", None, "shards.jpg_quality", 95)
    text = message(path)
    assert str(path) in text
    assert "1 problem" in text
    assert "shards.jpg_quality: unknown key (probably a typo: did you mean 'jpeg_quality'?" in text
    assert ", ".join(content["shards"]) in text


@pytest.mark.parametrize(
    ("key", "given", "found", "guess", "allowed"),
    [
        (
            "training.stage2.mixture",
            {"source": "*", "task": "*", "wieght": 1.0},
            "training.stage2.mixture.0.wieght",
            "weight",
            "source, task, weight",
        ),
        (
            "tokens.prompts",
            {"source": "*", "sytem": "", "video": "v", "image": "i", "choice": "c"},
            "tokens.prompts.0.sytem",
            "system",
            "source, system, video, image, choice",
        ),
    ],
)
def test_a_misspelt_key_in_a_list_is_the_only_problem(edited, key, given, found, guess, allowed):
    text = message(edited(key, [given]))
    assert f"{found}: unknown key (probably a typo: did you mean '{guess}'? Allowed keys: {allowed})" in text
    assert "1 problem\n" in text


def test_a_missing_key_in_a_list_is_named_with_what_an_entry_needs(edited):
    text = message(edited("training.stage2.mixture", [{"source": "*", "weight": 1.0}]))
    assert "training.stage2.mixture.0.task: missing (this section needs: source, task, weight)" in text
    assert "mixture: Tuple should have at least 1 item" in message(edited("training.stage2.mixture", []))


def test_an_unknown_section_and_a_key_of_another_section(edited):
    text = message(edited("trainings", {"common": 1}, "report.jpeg_quality", 3))
    assert "trainings: unknown key (probably a typo: did you mean 'training'?" in text
    assert "report.jpeg_quality: unknown key (did you mean 'shards.jpeg_quality'?" in text


def test_all_problems_are_named_at_once_in_one_paragraph(edited):
    path = edited("model.layout", "left", "seed", "two", "tokens.max_dropped", None, "shards.fps", True, "shards.fp", 2)
    text = message(path, "seed")
    assert "5 problems" in text
    for part in (
        "model.layout: should be 'question_first' or 'vision_first', found \"left\"",
        'seed: should be a valid integer, found "two"',
        "tokens.max_dropped: missing",
        "shards.fps: should be a valid number, found true",
        "shards.fp: unknown key",
    ):
        assert part in text
    assert "\n\n" not in text


@pytest.mark.parametrize(
    ("seed", "bound"), [(-1, "greater than or equal to 0"), (2**63, f"less than or equal to {2**63 - 1}")]
)
def test_a_seed_that_no_generator_takes(edited, seed, bound):
    assert f"seed: should be {bound}, found {seed}" in message(edited("seed", seed), "seed")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "backbones.embedded.vision_heads",
            7,
            "backbones.embedded: vision_width is 64, expected a multiple of vision_heads (7)",
        ),
        (
            "backbones.embedded.language_heads",
            32,
            "language_width is 96, expected a multiple of 2 * language_heads (64)",
        ),
        (
            "backbones.embedded.language_kv_heads",
            3,
            "language_heads is 4, expected a multiple of language_kv_heads (3)",
        ),
        ("backbones.embedded.vocabulary_size", 258, "vocabulary_size: should be greater than or equal to 259"),
        ("sources.procedural.train_mix", dict.fromkeys(KINDS, 0), "train_mix: all tasks have weight 0"),
        ("shards.test_share", 0.9, "shards: validation_share and test_share add up to 1"),
        ("training.common.betas", [0.9, 1.0], "training.common.betas.1: should be less than 1"),
    ],
)
def test_values_that_could_not_work(edited, key, value, expected):
    assert expected in message(edited(key, value), "seed")


def test_values_are_not_converted(edited):
    assert "seed: should be a valid integer, found 1.5" in message(edited("seed", 1.5))
    assert 'seed: should be a valid integer, found "1"' in message(edited("seed", "1"))
    assert params.read(edited("shards.fps", 2), "shards.fps").shards.fps == 2.0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: [1", "not valid yaml"),
        ("seed: 1\nseed: 2\n", "the key 'seed' is given twice"),
        ("1: 2\n", "the key 1 is not text"),
        ("- seed\n", "expected sections"),
        ("", "expected sections"),
    ],
)
def test_a_file_that_is_no_params_file(text, part, tmp_path):
    (tmp_path / "params.yaml").write_text(text)
    found = message(tmp_path / "params.yaml")
    assert part in found
    assert "\n" not in found


def test_a_missing_file(tmp_path):
    assert "cannot be read (No such file or directory)" in message(tmp_path / "params.yaml")


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    for path in (tmp_path / "config.yaml", tmp_path / "data/mine.yaml"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes("name: café\n".encode("latin-1"))
        with pytest.raises(UserError, match=rf"{path}: not UTF-8 text \(.*\)\. Save it as UTF-8"):
            params.compose(config_dir=tmp_path)
        assert f"{path}: not UTF-8 text" in message(path)
        path.write_text("name: café\n", encoding="utf-8")


def test_numbers_and_dates_read_as_hydra_reads_them():
    content = params.parse("text", "rate: 1e-4\nrevision: 2024-01-02\nnumber: 3\nsmall: .5\n")
    assert content == {"rate": 1e-4, "revision": "2024-01-02", "number": 3, "small": 0.5}


def test_schemas_hold_no_values():
    def visit(model, place):
        for name, field in model.model_fields.items():
            assert field.is_required(), f"{place}{name} has a default: values belong in conf/"
            for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(part, type) and issubclass(part, StrictModel):
                    visit(part, f"{place}{name}.")

    visit(params.schema(), "")


def test_reading_needs_only_pydantic_and_yaml():
    code = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'torch', 'transformers', 'numpy', 'dvc'): sys.modules[name] = None\n"
        "from pipeline_steps.common import params\n"
        "params.read('params.yaml', 'seed')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_command_checks_the_file(edited):
    command = [sys.executable, "-m", "pipeline_steps.common.params", "--params"]
    done = subprocess.run([*command, PARAMS_FILE], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command, edited("sed", 1)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "sed: unknown key (probably a typo: did you mean 'seed'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_command_composes_and_writes_nothing_when_it_fails(tmp_path):
    command = [sys.executable, "-m", "pipeline_steps.common.params", "--params", tmp_path / "params.yaml", "--compose"]
    done = subprocess.run([*command, "seed=two"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'conf/ (seed=two): 1 problem\n  seed: should be a valid integer, found "two"' in done.stderr
    assert not (tmp_path / "params.yaml").exists()
    subprocess.run([*command, "ablation=A6", "seed=2"], cwd=ROOT, check=True, timeout=60)
    assert (tmp_path / "params.yaml").read_text() == params.compose(["ablation=A6", "seed=2"])


def test_outputs_that_could_not_be_written_are_found_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    check_outputs(folders=[tmp_path, tmp_path / "new/folder"], files=[tmp_path / "file", tmp_path / "new/file"])
    assert not list((tmp_path / "new").iterdir())
    for options, message in (
        ({"folders": [tmp_path / "file"]}, "file: is a file, but the output is a folder"),
        ({"files": [tmp_path]}, "is a folder, but the output is a file"),
        ({"files": [tmp_path / "file/below"]}, "file/below: cannot be written"),
        ({"folders": ["/proc/none/below"]}, "/proc/none/below: cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            check_outputs(**options)


def test_interrupted_while_it_imports():
    process = subprocess.Popen(
        pipeline.interruptible(sys.executable, "-m", "pipeline_steps.tokens"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and "pydantic_core" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.005)  # until the package is imported and its first dependency is being
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode in (-signal.SIGINT, 130)


def test_run_turns_user_errors_into_exit_codes(capsys, tmp_path):
    def fail(error):
        raise error

    def code(main):
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        return stop.value.code

    assert not code(lambda: None)
    assert code(lambda: fail(UserError("data/raw: missing"))) == 1
    assert capsys.readouterr().err == "error: data/raw: missing\n"
    (tmp_path / "file").touch()
    assert code(lambda: (tmp_path / "file/below").write_text("")) == 1
    assert "file/below: Not a directory" in capsys.readouterr().err
    assert code(lambda: Path("/dev/full").write_text("x" * 100)) == 1
    assert capsys.readouterr().err.startswith("error: an output: No space left on device.")
    with open("/dev/full", "wb", buffering=0) as full:
        assert code(lambda: torch.save(torch.zeros(99_999), full)) == 1
    assert code(lambda: fail(SafetensorError("I/O error: No space left on device (os error 28)"))) == 1
    assert capsys.readouterr().err.count("error: an output: No space left on device.") == 2
    with pytest.raises(RuntimeError, match="shapes"):
        run_main(lambda: fail(RuntimeError("shapes")))
    assert code(lambda: fail(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "aliases expand to more than 100,000 values"),
        ("seed: " + "[" * 5000 + "]" * 5000, "more than 50 levels of nesting"),
        ("seed: " + "{a: " * 5000 + "}" * 5000, "more than 50 levels of nesting"),
        ("- " * 5000 + "x", "more than 50 levels of nesting"),
        ("a: &a [*a]", "an alias of its own parent"),
    ],
    ids=["bomb", "brackets", "braces", "dashes", "cycle"],
)
def test_yaml_bombs_and_deep_nesting_are_refused(tmp_path, text, problem):
    path, started = tmp_path / "params.yaml", time.monotonic()
    path.write_text(text)
    assert problem in message(path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=problem):
        params.compose(config_dir=tmp_path)
    assert time.monotonic() - started < 20


def test_a_modest_alias_is_read():
    assert params.parse("x", "a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}
