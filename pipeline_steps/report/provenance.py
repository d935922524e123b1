"""Provenance of the results: file hashes, versions and seeds. Independent of machine and time."""


def seeds(parameters):
    """{section: seed} of every key named `seed` in nested parameters; the top-level one is named "training"."""
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
    """[(name, value)], identical on every machine and day. parameters: nested dict."""
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
