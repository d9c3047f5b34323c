"""A transformers vision model as the encoder, run as it is: for encoders that `vit.py` does not compute.

Shapes: n tiles, c channels, h and w pixels, p patches, t tokens, d width.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from neva.models.vit import VisionConfig, normalise


class HFVision(nn.Module):
    """Pixels of tiles -> the selected hidden state of a transformers model."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.model = make(config.hf_config)
        with torch.device("cpu"):
            self._buffers_at_start = {name: buffer.clone() for name, buffer in make(config.hf_config).named_buffers()}

    def forward(self, tiles: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n p d"]:
        """Features of each tile; tokens before the patches are dropped, all but the class token with `feature=cls_patch`. n may be 0."""
        if not tiles.shape[0]:  # transformers' own code stumbles over none
            return self(tiles.new_zeros(1, *tiles.shape[1:]))[:0]
        c = self.config
        pixels = normalise(tiles, c.mean, c.std).to(next(self.model.parameters()).dtype)
        given = {"pixel_values": pixels}
        if c.hf_config["model_type"] == "siglip2_vision_model":
            given = _cut(pixels, c.patch)
        hidden = self.model(**given, output_hidden_states=True).hidden_states[c.select_layer]
        patches = hidden[:, hidden.shape[1] - c.patches :]
        return patches if c.feature == "patch" else torch.cat((hidden[:, :1], patches), dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HFVision":
        """As nn.Module's, which `to_empty` calls: that leaves the buffers (position numbers, frequencies) without values, so they are put back."""
        super()._apply(fn, recurse)
        for name, buffer in self.model.named_buffers():
            if not buffer.is_meta:
                buffer.copy_(self._buffers_at_start[name])
        return self


def make(config: dict[str, Any]) -> nn.Module:
    """The model of a config.json, on the default device, its weights not set. ValueError for a model type that transformers lacks."""
    from transformers import AutoConfig, AutoModel
    from transformers.initialization import no_init_weights

    fields = {name: value for name, value in config.items() if name != "model_type"}
    try:
        described = AutoConfig.for_model(config["model_type"], **fields)
        with no_init_weights(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModel.from_config(
                described,
                attn_implementation="sdpa",
                trust_remote_code=False,
            )
    except Exception as error:
        # transformers checks little: a field of a wrong kind raises whatever it meets
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"vision.hf_config: transformers builds no vision model of it ({reason}).",
        ) from None


def _cut(pixels: Float[Tensor, "n c h w"], patch: int) -> dict[str, Tensor]:
    """Patches as SigLIP-2 takes them: [n, patches, pixels of a patch, channels last], with the grid's shape."""
    n, _, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    x = pixels[:, :, : rows * patch, : columns * patch].unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
    x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    mask = torch.ones(n, rows * columns, dtype=torch.int64, device=pixels.device)
    shapes = torch.tensor([[rows, columns]], dtype=torch.int64).expand(n, -1).to(pixels.device)
    return {"pixel_values": x, "pixel_attention_mask": mask, "spatial_shapes": shapes}
