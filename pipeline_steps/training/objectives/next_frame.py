"""Prediction of the next frame from the language model's state after a frame.

Shapes: F frames, n pairs of consecutive frames, B samples, S sequence, P visual tokens per frame, E language width, C
latent channels, h x w latent grid.
"""

import hashlib

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.next_frame_schema import NextFrameSettings
from pipeline_steps.training.objectives.base import Needs, Objective, Term


class NextFrame(Objective):
    """Prediction of the next frame's latent, its difference to this one's, or the optical flow."""

    name = "next_frame"
    term_names = ("loss_next_frame", "loss_next_frame_coarse")
    needs = Needs(pairs=True)
    Parameters = NextFrameSettings
    mode = "joint"  # of the batch, see `Modes`
    targets = None

    @classmethod
    def check(cls, stage, settings, network):
        own, key = settings.objective.next_frame, f"training.{stage}.objective.next_frame"
        single = network.architecture == "multi_token" or network.coarse_only
        if own.skip_query and network.architecture == "multi_token":
            raise UserError(
                f"{key}.skip_query is true, but model.architecture multi_token has no queries. Set it false."
            )
        if own.separate_heads and single:
            raise UserError(f"{key}.separate_heads is true, but this network has a single pass. Set it to false.")
        if own.modes.text_conditioned and network.layout == "vision_first":
            raise UserError(
                f"{key}.modes.text_conditioned is {own.modes.text_conditioned:g}, but model.layout vision_first has no "
                "text before the frames: such a batch would be one of video_only. Give that the weight instead."
            )
        others = {name: value for name, value in own.modes.weights.items() if value and name != "joint"}
        if others and settings.loss == "preference":
            raise UserError(f"{key}.modes has {', '.join(others)}, but preference training has joint batches only.")
        if own.modes.captions and not settings.objective.text.weight:
            raise UserError(
                f"{key}.modes.captions is {own.modes.captions:g}, but training.{stage}.objective.text.weight is 0: "
                "such a batch would have no loss. Set one of them."
            )

    @classmethod
    def input_files(cls, stage, settings):
        from pathlib import Path

        from pipeline_steps.common.autoencoder import WEIGHTS, latent_channels

        own = settings.objective.next_frame
        if own.autoencoder is None:
            return []
        latent_channels(own.autoencoder, f"training.{stage}.objective.next_frame.autoencoder")
        return [Path(own.autoencoder) / name for name in ("config.json", WEIGHTS)]

    def make_module(self):
        from pipeline_steps.common.next_frame import NextFrameHeads, TargetMaker

        key = "objective.next_frame"
        self.targets = TargetMaker(self.parameters, self.config.vision_config.patch_size, key)
        return NextFrameHeads(self.parameters, self.config, key)

    def prepare(self, batch, generator):
        weights = {name: value for name, value in self.parameters.modes.weights.items() if value}
        total = sum(weights.values())
        self.mode = str(generator.choice(list(weights), p=[value / total for value in weights.values()]))
        if self.mode not in ("video_only", "text_conditioned"):
            return batch
        return without_text(batch, self.config.visual_token_id, keep_text=self.mode == "text_conditioned")

    def counts(self, batch):
        return {"next_frames": len(self._first_frames(batch))}

    def _first_frames(self, batch):
        from pipeline_steps.common.next_frame import first_frames

        counts = batch.places.counts
        return first_frames(counts * 0 if self.mode == "captions" else counts)

    def terms(self, outputs, batch):
        import torch

        from pipeline_steps.common.next_frame import pair_losses

        firsts = self._first_frames(batch)
        if not outputs.passes or not len(firsts):
            return {}
        firsts = torch.from_numpy(firsts).to(batch.pixel_values.device, non_blocking=True)
        targets = self.targets(batch.inputs()["pixel_values"], firsts)
        previous = self._corrupted(targets.previous, batch)
        single = len(outputs.passes) == 1
        passes = [("loss_next_frame", "coarse" if single else "fine", self.parameters.weight, outputs.passes[-1])]
        if not single:
            weight = self.parameters.weight * self.parameters.coarse_weight
            passes.append(("loss_next_frame_coarse", "coarse", weight, outputs.passes[0]))
        found = {}
        for term, name, weight, frames in passes:
            state = outputs.options.text.at_frames(frames.visual_tokens)[firsts, -1]  # [n, E]
            queries = frames.queries[firsts] if self.parameters.skip_query else None
            predicted = self.module(name, state, queries, previous, targets.grid)
            losses = pair_losses(predicted, targets.expected, self.parameters.l1_weight)
            found[term] = Term(losses.mean(), weight, "next_frames")
        return found

    def _corrupted(self, previous, batch):
        """The previous latents [n, C, h, w] with the configured corruption, in training only. It depends on the step
        and the sample, not on the sample's micro-batch or rank."""
        import torch

        kind = self.parameters.previous_latent
        if previous is None or not self.module.training or kind not in ("drop", "noise"):
            return previous
        drawn = []
        for key, count in zip(batch.keys, batch.places.counts.tolist(), strict=True):
            seed = f"{torch.initial_seed()} {key}".encode()  # the train loop seeds every step
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(seed, digest_size=7).digest()))
            pairs = max(count - 1, 0)
            shape = (pairs, 1, 1, 1) if kind == "drop" else (pairs, *previous.shape[1:])
            drawn.append((torch.rand if kind == "drop" else torch.randn)(shape, generator=generator))
        drawn = torch.cat(drawn).to(previous.device, non_blocking=True)
        if kind == "drop":
            return previous * (drawn >= self.parameters.drop_probability)
        return previous + self.parameters.noise_std * drawn


def without_text(batch, visual_id: int, keep_text: bool):
    """The batch without labels and, unless `keep_text`, without text: every sample keeps its first token, to which
    attention can fall back, and its visual tokens. On the CPU."""
    from dataclasses import replace

    import torch

    from model.constants import IGNORE_INDEX
    from model.packing import BatchPlaces

    real = batch.attention_mask.bool()
    kept = real if keep_text else real & ((batch.input_ids == visual_id) | (real.cumsum(1) == 1))
    lengths = kept.sum(1, keepdim=True)
    order = (~kept).int().argsort(dim=1, stable=True)[:, : int(lengths.max())]
    mask = (torch.arange(order.shape[1]) < lengths).to(batch.attention_mask.dtype)
    ids = batch.input_ids.gather(1, order)
    labels = torch.full_like(ids, IGNORE_INDEX)
    changed = replace(
        batch,
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        score_mask=torch.zeros_like(ids, dtype=torch.bool),
        places=BatchPlaces.of(ids, mask, batch.num_frames, labels, visual_id=visual_id),
    )
    return changed.pin_memory() if batch.input_ids.is_pinned() else changed
