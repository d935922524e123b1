"""A tiny DINOv2, warmed up to be promptable: a query that names a colour or a place finds that object's digit.

The warm-up trains three tasks jointly on single frames of the procedural world (training digits only):
- patch features -> digit and colour in that patch (first on crowded frames, where most patches hold a digit),
- class token -> which digits and colours are in the frame, the card's border, the box and the background,
- learned queries (6 colours, 4 places) -> the digit of the named object, through the encoder call that the foveated
  model uses later.
The heads and the learned queries are discarded afterwards. What remains is an encoder whose query pathway can select. A
randomly initialised encoder does not learn this within minutes. THE WARM-UP PRE-TRAINS SELECTION; all runs of a
comparison start from the same file. `vision_queries` chooses two controls: `reading` helps a static query as much (one
learned query reports the digits of all colours and places), `none` leaves the third task out.

Shapes: B frames, N patches, D vision width, Q = 10 learned queries.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Dinov2Config

from model.foveated_encoder import EncodedFrames, FoveatedEncoder
from pipeline_steps.common.device import choose_device
from pipeline_steps.world import digits as world

from .frames import Frames, pixel_values
from .schema import Embedded
from .warm_up import optimise

CROWDED_SHARE = 0.4  # of the steps, at the start
QUERY_WEIGHT, CLASS_TOKEN_WEIGHT = 6.0, 0.3  # loss weights; the patch losses have weight 1
NUM_HELD_OUT = 1024  # frames with digits of the validation pool
PIXELS = 1024 * 56**2  # per forward pass on the held-out frames
NUM_DIGITS, NUM_COLOURS, NUM_PLACES = world.NO_DIGIT, world.NO_COLOUR, world.NO_PLACE  # 10, 6, 4
NUM_ASKED = NUM_COLOURS + NUM_PLACES
CLASS_TOKEN_SIZES = {
    "digits": NUM_DIGITS,
    "colours": NUM_COLOURS,
    "border": NUM_COLOURS + 1,
    "box": NUM_PLACES + 1,
    "background": len(world.BACKGROUNDS),
}


def build_vision_encoder(options: Embedded) -> FoveatedEncoder:
    """Build a randomly initialised DINOv2."""
    grid = options.image_size // options.patch_size
    config = Dinov2Config(
        image_size=options.image_size,
        patch_size=options.patch_size,
        hidden_size=options.vision_width,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=options.vision_heads,
        mlp_ratio=4,
        layerscale_value=1.0,
        architectures=["Dinov2Model"],
    )
    encoder = FoveatedEncoder(config)
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(encoder.embeddings.cls_token, std=0.02)
    rows, columns = torch.randn(2, grid, options.vision_width)
    grid = rows[:, None] + columns[None]  # row plus column embedding: place queries are learned much sooner
    encoder.embeddings.position_embeddings.data[0, 1:] = grid.flatten(0, 1)
    return encoder


class Heads(nn.Module):
    """The learned queries and the linear heads, both discarded after the warm-up."""

    def __init__(self, width: int, vision_queries: str):
        """vision_queries: as in `Embedded`."""
        super().__init__()
        num_queries = {"selecting": NUM_ASKED, "reading": 1, "none": 0}[vision_queries]
        self.queries = nn.Parameter(torch.randn(num_queries, width))  # unit variance, like the model's
        self.patch_digit = nn.Linear(width, NUM_DIGITS + 1)
        self.patch_colour = nn.Linear(width, NUM_COLOURS + 1)
        num_answers = NUM_ASKED // max(1, num_queries)  # of each query
        self.query_digit = nn.Linear(width, num_answers * (NUM_DIGITS + 1))
        self.class_token = nn.ModuleDict({name: nn.Linear(width, size) for name, size in CLASS_TOKEN_SIZES.items()})

    def query_logits(self, query_output: Tensor) -> Tensor:
        """query_output [B, 10 or 1, D] -> logits of the digit of each colour and place [B, 10, 11]."""
        return self.query_digit(query_output).reshape(len(query_output), NUM_ASKED, NUM_DIGITS + 1)


def class_token_loss(heads: Heads, class_token: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """class_token [B, D] -> sum of the losses on frame-level labels."""
    logits = {name: head(class_token) for name, head in heads.class_token.items()}
    digits = F.one_hot(batch["colour_digit"], NUM_DIGITS + 1).amax(1)[:, :NUM_DIGITS]
    colours = batch["colour_digit"] != NUM_DIGITS
    return (
        F.binary_cross_entropy_with_logits(logits["digits"], digits.float())
        + F.binary_cross_entropy_with_logits(logits["colours"], colours.float())
        + F.cross_entropy(logits["border"], batch["border_colour"])
        + F.cross_entropy(logits["box"], batch["box_place"])
        + F.cross_entropy(logits["background"], batch["background"])
    )


def warm_up_vision_encoder(encoder: FoveatedEncoder, options: Embedded, num_workers: int) -> dict[str, float]:
    """Train in place, with frames from `num_workers` processes. Returns
    {"loss", "query_digit_accuracy" (not for `vision_queries: none`), "patch_digit_accuracy", "patch_colour_accuracy"}.
    """
    heads, steps = Heads(options.vision_width, options.vision_queries), options.vision_steps
    sizes = {"size": options.image_size, "grid": options.image_size // options.patch_size}
    num_crowded = round(CROWDED_SHARE * steps)
    frames = Frames("train", steps, options.vision_batch_size, options.seed, num_crowded, **sizes)
    stream = iter(DataLoader(frames, batch_size=None, num_workers=num_workers, prefetch_factor=8))
    device = choose_device(options.device, "backbones.embedded.device")
    encoder.to(device).train()
    heads.to(device)
    loss = optimise(
        [*encoder.parameters(), *heads.parameters()],
        lambda step: batch_loss(
            encoder, heads, reduced(on_device(next(stream), device), options.vision_downsampling if step % 2 else 1)
        ),
        num_steps=steps,
        learning_rate=options.vision_learning_rate,
        precision=options.precision,
        title="vision warm-up",
    )
    accuracies = held_out_accuracies(encoder, heads, options)
    encoder.to("cpu")
    return {"loss": loss, **accuracies}


def on_device(batch: dict[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
    """Return the batch on `device`."""
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}


def reduced(batch: dict[str, Tensor], factor: int) -> dict[str, Tensor]:
    """The batch with frames reduced by `factor`, and the labels of their patches."""
    if factor == 1:
        return batch
    frames = F.avg_pool2d(batch["frames"].permute(0, 3, 1, 2).float(), factor).permute(0, 2, 3, 1)
    labels = {}
    for name in ("patch_digit", "patch_colour"):
        side = round(batch[name].shape[1] ** 0.5)
        labels[name] = batch[name].unflatten(1, (side, side))[:, ::factor, ::factor].flatten(1)
    return {**batch, **labels, "frames": frames}


def batch_loss(encoder: FoveatedEncoder, heads: Heads, batch: dict[str, Tensor]) -> Tensor:
    """Weighted sum of the losses for which the batch has labels."""
    if "colour_digit" not in batch:
        encoded = encoder.encode(pixel_values(batch["frames"]), need_patch_features=True)
        return patch_loss(heads, encoded, batch)
    encoded = encode_with_queries(encoder, heads, batch)
    class_loss = class_token_loss(heads, encoded.patch_features[:, 0], batch)
    if encoded.query_output is None:
        return patch_loss(heads, encoded, batch) + CLASS_TOKEN_WEIGHT * class_loss
    query_logits = heads.query_logits(encoded.query_output)
    query_loss = F.cross_entropy(query_logits.flatten(0, 1), query_labels(batch).flatten())
    return patch_loss(heads, encoded, batch) + QUERY_WEIGHT * query_loss + CLASS_TOKEN_WEIGHT * class_loss


def encode_with_queries(encoder: FoveatedEncoder, heads: Heads, batch: dict[str, Tensor]) -> EncodedFrames:
    """Encode the frames of a batch with all learned queries, if there are any."""
    frames = pixel_values(batch["frames"])
    queries = heads.queries.expand(len(frames), -1, -1) if len(heads.queries) else None
    return encoder.encode(frames, queries, need_patch_features=True)


def query_labels(batch: dict[str, Tensor]) -> Tensor:
    """Return the digit that each learned query asks for: int64 [B, Q]; 10 if its colour or place is absent."""
    return torch.cat([batch["colour_digit"], batch["place_digit"]], dim=1)


def patch_loss(heads: Heads, encoded: EncodedFrames, batch: dict[str, Tensor]) -> Tensor:
    """Return the sum of the losses on patch-level labels."""
    patches = encoded.patch_features[:, 1:]
    return F.cross_entropy(heads.patch_digit(patches).flatten(0, 1), batch["patch_digit"].flatten()) + F.cross_entropy(
        heads.patch_colour(patches).flatten(0, 1), batch["patch_colour"].flatten()
    )


@torch.no_grad()
def held_out_accuracies(encoder: FoveatedEncoder, heads: Heads, options: Embedded) -> dict[str, float]:
    """Return accuracies on frames with validation digits, without empty patches and absent objects."""
    encoder.eval()
    sizes = {"size": options.image_size, "grid": options.image_size // options.patch_size}
    frames = Frames("validation", 1, NUM_HELD_OUT, options.seed, **sizes)[0]
    found = [held_out_logits(encoder, heads, part) for part in frames["frames"].split(PIXELS // options.image_size**2)]
    digits, colours, *queries = (torch.cat(parts) for parts in zip(*found, strict=True))

    def accuracy(logits: Tensor, labels: Tensor, none: int) -> float:
        shown = labels != none
        return (logits.argmax(-1)[shown] == labels[shown]).float().mean().item()

    accuracies = {
        "patch_digit_accuracy": accuracy(digits, frames["patch_digit"], NUM_DIGITS),
        "patch_colour_accuracy": accuracy(colours, frames["patch_colour"], NUM_COLOURS),
    }
    if queries:
        accuracies["query_digit_accuracy"] = accuracy(queries[0], query_labels(frames), NUM_DIGITS)
    return accuracies


def held_out_logits(encoder: FoveatedEncoder, heads: Heads, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of patch digits, patch colours and, with learned queries, query digits, on the CPU."""
    encoded = encode_with_queries(encoder, heads, {"frames": frames.to(heads.queries.device)})
    patches = encoded.patch_features[:, 1:]
    logits = [heads.patch_digit(patches), heads.patch_colour(patches)]
    if encoded.query_output is not None:
        logits.append(heads.query_logits(encoded.query_output))
    return tuple(values.cpu() for values in logits)


def save_vision_encoder(encoder: FoveatedEncoder, folder: Path) -> None:
    """Write config.json and model.safetensors with the weight names of the published DINOv2 checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder.config.save_pretrained(folder)
    weights = {name: tensor.detach().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
