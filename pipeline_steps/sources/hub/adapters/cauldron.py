"""The Cauldron: 50 data sets of questions about images.

All images and all turns of a row form one sample of task `image_chat` and source `cauldron_<subset>`.
"""

from pipeline_steps.sources.hub.adapter import Adapter, Draft, Table, chat, entries, image_bytes, text

SUBSETS = (
    "ai2d", "aokvqa", "chart2text", "chartqa", "clevr", "clevr_math", "cocoqa", "datikz", "diagram_image_to_text",
    "docvqa", "dvqa", "figureqa", "finqa", "geomverse", "hateful_memes", "hitab", "iam", "iconqa", "infographic_vqa",
    "intergps", "localized_narratives", "mapqa", "mimic_cgd", "multihiertt", "nlvr2", "ocrvqa", "okvqa", "plotqa",
    "raven", "rendered_text", "robut_sqa", "robut_wikisql", "robut_wtq", "scienceqa", "screen2words", "spot_the_diff",
    "st_vqa", "tabmwp", "tallyqa", "tat_qa", "textcaps", "textvqa", "tqa", "vistext", "visual7w", "visualmrc", "vqarad",
    "vqav2", "vsr", "websight",
)  # fmt: skip


def sample(row, table):
    turns = []
    for entry in entries(row, "texts"):
        turns += [("user", text(entry, "user")), ("assistant", text(entry, "assistant"))]
    images = tuple(image_bytes(image, f"images[{i}]") for i, image in enumerate(entries(row, "images")))
    return Draft(name="", images=images, items=(chat(turns, "image_chat"),))


ADAPTER = Adapter(
    repo="HuggingFaceM4/the_cauldron",
    revision="847a98a779b1652d65111daf20c972dfcd333605",
    licence="per subset; prompts CC BY 4.0",
    download="the pictures are in the rows",
    columns=("images", "texts"),
    tables=tuple(Table(name, f"{name}/train-*.parquet", f"cauldron_{name}") for name in SUBSETS),
    sample=sample,
)
