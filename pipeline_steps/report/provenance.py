"""Where the numbers come from: files by their hashes, versions and seeds. Nothing of the place or the moment."""


def seeds(parameters):
    """{what is drawn: seed} of nested parameters: every key named `seed`, "training" for the one at the top."""
    found = {}

    def visit(values, path):
        for name, value in values.items():
            if isinstance(value, dict):
                visit(value, (*path, name))
            elif name == "seed":
                found[".".join(path) or "training"] = value

    visit(parameters, ())
    return found


def origin(inputs, parameters):
    """[(name, value)] of the results: the same wherever and whenever the report is written; parameters: nested dict."""
    found = inputs.current.result.provenance
    rows = [
        ("ablation", inputs.current.ablation),
        ("seeds", ", ".join(f"{name} {value}" for name, value in seeds(parameters).items())),
        ("torch, transformers", f"{found.get('torch')}, {found.get('transformers')}"),
        ("evaluated checkpoint", found.get("checkpoint_sha256")),
        ("shards manifest", found.get("shards_sha256")),
        ("tokens manifest", found.get("tokens_sha256")),
        ("parameters of the evaluation", found.get("parameters_sha256")),
    ]
    return [(name, str(value)) for name, value in rows]
