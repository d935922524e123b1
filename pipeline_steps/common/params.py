"""The strict reader of params.yaml.

    python -m pipeline_steps.common.params                             check params.yaml (under a second)
    python -m pipeline_steps.common.params --compose [OVERRIDE ...]    write params.yaml from conf/, as `dvc exp run`

params.yaml holds `seed`, `ablation` and one section per `pipeline_steps/<name>/schema.py`, whose class
`Section(StrictModel)` lists its keys. Schemas have no default values: every value is in conf/ and in params.yaml.
Usage in an entry point:

    PARAMS = ("seed", "training.common")                         # the same list as the stage's params in dvc.yaml
    parameters = params.read("params.yaml", *PARAMS)
    parameters.training.common.batch_size                        # a key outside PARAMS is an AttributeError
    parameters.runtime.num_workers                               # always there, and never in PARAMS
"""

import argparse
import difflib
import importlib
import json
import re
import typing
from functools import cache, reduce
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from pipeline_steps.common.errors import UserError, run_main

ROOT = Path(__file__).resolve().parents[2]
OTHER_SECTIONS = {  # sections without a stage of their own
    "model": "pipeline_steps.training.model_schema",
    "runtime": "pipeline_steps.common.runtime_schema",
}
MAX_DEPTH, MAX_VALUES = 50, 100_000  # of a YAML file
NESTED = re.compile(r"[\[{]|- ?|^ {80}", re.MULTILINE)  # what a level of nesting needs
TRAINING_STAGES = ("stage1", "stage2", "stage3")
RUNTIME = "runtime"  # available to every stage; results do not depend on it


class StrictModel(BaseModel):
    """Base of all sections: read-only, no unknown keys, no type conversion (except from int to float)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Parameters:
    """A read-only namespace of the requested keys."""

    def __init__(self, path, values):
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_values", values)

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._values:
            dotted = f"{self._path}.{name}" if self._path else name
            raise AttributeError(
                f"parameter '{dotted}' was not requested: add it to PARAMS and to the stage's params in dvc.yaml"
            )
        return self._values[name]

    def __setattr__(self, name, value):
        raise AttributeError(f"parameters are read-only, cannot set '{name}'")

    def as_dict(self):
        """Plain nested dict of the requested keys (for fingerprints and provenance), without section `runtime`."""
        return {name: _plain(value) for name, value in self._values.items() if name != RUNTIME}


def _plain(value):
    if isinstance(value, Parameters):
        return value.as_dict()
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def section_modules():
    """{section: module whose class `Section` describes it}: the schema.py of every stage, and OTHER_SECTIONS."""
    names = sorted(path.parent.name for path in (ROOT / "pipeline_steps").glob("*/schema.py"))
    return {name: f"pipeline_steps.{name}.schema" for name in names} | OTHER_SECTIONS


MAX_SEED = 2**63 - 1  # what torch and NumPy both take
# top-level keys of params.yaml that results may depend on: all but `runtime`
RESULT_KEYS = ("seed", "ablation", *sorted(section_modules().keys() - {"runtime"}))


@cache
def schema():
    """The model of the whole file: `seed`, `ablation` and one section per entry of `section_modules`."""
    sections = {
        name: (importlib.import_module(module).Section, ...) for name, module in sorted(section_modules().items())
    }
    seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
    return create_model("Params", __base__=StrictModel, seed=(seed, ...), ablation=(str, ...), **sections)


def read(path, *keys):
    """Validates the WHOLE file; returns a read-only namespace of the requested dotted keys and section `runtime`.

    UserError for an invalid file or an unknown key.
    """
    document = check(path, load(path))
    tree = {}
    for key in keys:
        parts = key.split(".")
        for depth, part in enumerate(parts):
            parent = reduce(getattr, parts[:depth], document)
            if part not in getattr(type(parent), "model_fields", {}):
                raise UserError(
                    f"{path}: no parameter '{key}'" + _suggest(part, getattr(type(parent), "model_fields", {}))
                )
        branch = reduce(lambda node, part: node.setdefault(part, {}), parts[:-1], tree)
        branch[parts[-1]] = reduce(getattr, parts, document)
    return _namespace("", tree | {RUNTIME: document.runtime})


def _namespace(path, tree):
    children = {
        name: _namespace(f"{path}.{name}".lstrip("."), value) if isinstance(value, dict) else value
        for name, value in tree.items()
    }
    return Parameters(path, children)


def check(path, content):
    """The content as a validated pydantic object. UserError with all problems at once. path: for messages."""
    model = schema()
    try:
        return model.model_validate_json(json.dumps(content))  # JSON mode: a yaml list is a valid tuple
    except ValidationError as error:
        raise UserError(_explain(path, model, error)) from None


def load(path, expected="sections such as 'model:'"):
    """The YAML file as a plain dict. UserError for a missing file, a syntax error or a duplicate key. expected: at its
    top level, for messages."""
    try:
        text = _read(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Run in the repository root, pass the file with --params, or "
            "regenerate it with `python -m pipeline_steps.common.params --compose`."
        ) from None
    return parse(path, text, expected)


def _read(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from None


def parse(path, text, expected="sections such as 'model:'"):
    """YAML text as a plain dict. path, expected: for messages."""
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise UserError(f"{path}: expected {expected} at the top level, found {found}")
    return content


class _Loader(yaml.SafeLoader):
    """SafeLoader that, like Hydra, reads 1e-4 as a float and dates as text, and rejects duplicate keys, deep nesting
    and aliases that expand to many values."""

    _depth = 0

    def compose_node(self, parent, index):
        if self._depth >= MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels of nesting", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count_values(node, counted):
    """Number of values in a YAML node with all aliases expanded. counted: {id of a node: its number, None while it is
    counted}. ComposerError above MAX_VALUES, or for a node that contains itself."""
    if id(node) not in counted:
        counted[id(node)] = None
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        entries = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        counted[id(node)] = 1 + sum(_count_values(entry, counted) for entry in entries)
    count = counted[id(node)]
    if count is None or count > MAX_VALUES:
        problem = (
            "an alias of its own parent" if count is None else f"aliases expand to more than {MAX_VALUES:,} values"
        )
        raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
    return count


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _explain(path, model, error):
    """A message with every problem of a ValidationError: dotted key, problem, allowed keys and a suggestion."""
    problems = error.errors()
    parents = {p["loc"][:depth] for p in problems for depth in range(len(p["loc"]))}
    # of a list with a wrong entry, pydantic counts only the others
    problems = [p for p in problems if p["type"] != "too_short" or p["loc"] not in parents]
    missing = {tuple(p["loc"]) for p in problems if p["type"] == "missing"}
    lines, guessed = [], set()
    for problem in (p for p in problems if p["type"] == "extra_forbidden"):
        loc = tuple(problem["loc"])
        fields = _fields(model, loc[:-1])
        absent = [name for name in fields if (*loc[:-1], name) in missing]
        close = difflib.get_close_matches(loc[-1], absent, 1, 0.6)
        if close:
            guessed.add((*loc[:-1], close[0]))
        lines.append(
            f"{_dotted(loc)}: unknown key" + _suggest(loc[-1], close or fields, allowed=fields, others=_all_keys(model))
        )
    for problem in problems:
        loc = tuple(problem["loc"])
        if problem["type"] == "missing" and loc not in guessed:
            lines.append(f"{_dotted(loc)}: missing (this section needs: {', '.join(_fields(model, loc[:-1]))})")
        elif problem["type"] not in ("missing", "extra_forbidden"):
            text = problem["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
            of_section = problem["type"] == "value_error" and isinstance(problem["input"], dict)  # names the values
            found = "" if of_section else f", found {json.dumps(problem['input'])[:200]}"
            lines.append(f"{_dotted(loc) or 'the whole file'}: {text}{found}")
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n  ".join(
        [
            f"{path}: {count}",
            *lines,
            "Fix conf/ and run `python -m pipeline_steps.common.params --compose`, or fix this file only.",
        ]
    )


def _dotted(loc):
    return ".".join(str(part) for part in loc)


def _suggest(name, candidates, allowed=None, others=(), what="keys"):
    """A suffix for messages: the closest candidate, or the same key in another section, and the allowed ones."""
    close = difflib.get_close_matches(name, list(candidates), 1, 0.6)
    elsewhere = [key for key in others if key.split(".")[-1] == name]
    guess = (
        f"probably a typo: did you mean '{close[0]}'? "
        if close
        else f"did you mean '{elsewhere[0]}'? "
        if elsewhere
        else ""
    )
    return f" ({guess}Allowed {what}: {', '.join(allowed or candidates) or 'none'})"


def _fields(model, loc):
    """Field names of the sub-model at `loc`, where numbers are places in a list; [] below a tagged union."""
    for part in (part for part in loc if isinstance(part, str)):  # `submodel` is that of a list's entries
        model = submodel(model.model_fields[part].annotation) if model and part in model.model_fields else None
    return list(model.model_fields) if model else []


def submodel(annotation):
    """The pydantic model in an annotation such as `Stage` or `Stage | None`; None if there is none."""
    candidates = [annotation, *typing.get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _all_keys(model, prefix=""):
    for name, field in model.model_fields.items():
        yield prefix + name
        if inner := submodel(field.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


def compose(overrides=(), config_dir=ROOT / "conf"):
    """The text of params.yaml composed from conf/, byte for byte as `dvc exp run -S OVERRIDE ...` writes it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        for file in Path(config_dir).rglob("*.yaml"):
            text = _read(file)
            if "&" in text or len(NESTED.findall(text)) > MAX_DEPTH:  # Hydra limits neither aliases nor nesting
                yaml.load(text, Loader=_Loader)
        with initialize_config_dir(str(Path(config_dir).resolve()), version_base=None):
            config = hydra_compose(config_name="config", overrides=list(overrides))
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{config_dir} {' '.join(overrides)}: {_composition_problem(error)}") from None
    return OmegaConf.to_yaml(config)


def _composition_problem(error):
    """What Hydra says, on one line; of a misspelt key or option, what to write instead."""
    text = " ".join(str(error).split())
    if unknown := re.match(r"Could not override '([^']+)'", text):
        return _unknown_key([int(part) if part.isdecimal() else part for part in unknown[1].split(".")])
    if absent := re.search(r"Could not find '([^/']+)/([^']+)' Available options in '[^']+': (.*) Config search", text):
        return f"{absent[1]}: unknown name '{absent[2]}'" + _suggest(absent[2], absent[3].split(), what="names")
    return text


def _unknown_key(loc):
    """What is wrong with a key that does not exist: its first part that is unknown, and what could be meant."""
    model = schema()
    depth = next((d for d, part in enumerate(loc) if isinstance(part, str) and part not in _fields(model, loc[:d])), -1)
    if depth < 0:
        return f"{_dotted(loc)}: no such entry"
    fields, others = _fields(model, loc[:depth]), _all_keys(model) if depth == len(loc) - 1 else ()
    if not fields:
        return f"{_dotted(loc)}: {_dotted(loc[:depth])} is a value, without keys"
    return f"{_dotted(loc[: depth + 1])}: unknown key" + _suggest(loc[depth], fields, others=others)


def compose_checked(overrides=(), config_dir=ROOT / "conf"):
    """`compose`. UserError if the selected ablation changes no other parameter."""
    text = compose(overrides, config_dir)
    content = yaml.load(text, Loader=_Loader)
    if content.get("ablation") != "none":
        plain = yaml.load(compose([*overrides, "ablation=none"], config_dir), Loader=_Loader)
        if {**plain, "ablation": content.get("ablation")} == content:
            raise UserError(
                f"conf/ablation/{content.get('ablation')}.yaml changes no parameter of this run (overrides: "
                f"{' '.join(overrides)}). Change its value, or use ablation=none."
            )
    return text


def main():
    parser = argparse.ArgumentParser(description="Check params.yaml, or write it from conf/.")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for --compose, e.g. ablation=A6 seed=2")
    parser.add_argument("--params", default="params.yaml", help="the file to check or write (default: params.yaml)")
    parser.add_argument("--compose", action="store_true", help="write the file from conf/ first")
    arguments = parser.parse_args()
    if arguments.overrides and not arguments.compose:
        parser.error("overrides need --compose")
    if arguments.compose:
        text = compose_checked(arguments.overrides)
        check(f"conf/ ({' '.join(arguments.overrides)})" if arguments.overrides else "conf/", parse("conf/", text))
        Path(arguments.params).write_text(text, encoding="utf-8")
    check(arguments.params, load(arguments.params))
    print(f"{arguments.params}: every value is allowed; `dvc repro parameters` checks whether they fit each other")


if __name__ == "__main__":
    from pipeline_steps.common import params  # the module object that the schemas import

    run_main(params.main)
