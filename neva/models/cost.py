"""Parameters and floating-point operations of a config, counted part by part.

A multiply and an add are two operations. Counted are the matrix products and attention over the pairs that the mask
allows; norms, activations and the softmax are not. A test compares the counts with torch's own FLOP counter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neva.models.decoder import HEAD_KEPT
from neva.models.layers import GATED
from neva.models.vlm import VLM, VLMConfig, projector


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A quantity of each part of the model."""

    vision: int
    projector: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.vision + self.projector + self.decoder + self.head


def parameters(config: VLMConfig) -> Parts:
    """Parameters of each part. The learned image vectors count as projector, a tied head's matrix as decoder."""
    with torch.device("meta"):
        model = VLM(config)
    counts: dict[str, int] = dict.fromkeys(("vision", "projector", "decoder", "head"), 0)
    for name, parameter in model.named_parameters():
        part = name.split(".", 1)[0]
        counts["projector" if part in ("image_vectors", "image_newline") else part] += parameter.numel()
    return Parts(**counts)


def forward_flops(config: VLMConfig, *, documents: Sequence[int], tiles: int, labelled: int) -> Parts:
    """Operations of one forward pass over documents of these lengths (image features included), `tiles` tiles and `labelled` tokens."""
    pairs, tokens = _pairs(config, documents), sum(documents)
    return Parts(
        vision=tiles * _vision_tile(config),
        projector=2 * tiles * config.tokens_per_tile * sum(_projector_weights(config)) if tiles else 0,
        decoder=config.decoder.layers * (2 * tokens * _decoder_layer_weights(config) + 4 * pairs * config.decoder.heads * config.decoder.head),
        head=2 * labelled * config.decoder.vocab * config.decoder.width,
    )


def step_flops(config: VLMConfig, *, documents: Sequence[int], tiles: int, labelled: int, trained: frozenset[str], recompute: bool = False) -> Parts:
    """Operations of forward and backward of one micro-batch.

    `trained` names the parts that are trained, each as a whole. A part costs a forward; one more of the same where a gradient
    must flow through it to a trained part before it; one more where its own weights are trained; the head one more for
    logits that are too many to keep for backward, and the decoder one more with `recompute`. Attention's backward computes its
    scores again: 5 products for the forward's 2. What the trained parts do not need is not counted.
    """
    f = forward_flops(config, documents=documents, tiles=tiles, labelled=labelled)
    before_decoder = bool(trained & {"vision", "projector", "decoder"})
    decoder = f.decoder * (1 + recompute)
    if before_decoder:
        scores = 4 * _pairs(config, documents) * config.decoder.heads * config.decoder.head * config.decoder.layers
        decoder += (f.decoder - scores) * (1 + ("decoder" in trained)) + scores * 5 // 2
    vision = f.vision
    if "vision" in trained and config.vision is not None:  # the pixels need no gradient
        scores = tiles * 4 * _vision_tokens(config) ** 2 * config.vision.heads * config.vision.head * config.vision.depth
        patch = tiles * 2 * config.vision.patches * 3 * config.vision.patch**2 * config.vision.width
        vision += 2 * (f.vision - scores - patch) + patch + scores * 5 // 2
    bridge = f.projector * (1 + ("projector" in trained) + ("vision" in trained))
    if "projector" in trained and "vision" not in trained:  # its first layer's input, and that alone, needs no gradient
        weights = _projector_weights(config)
        behind = weights if config.projector.startswith("norm_") else weights[1:]  # but for a norm before it
        bridge += f.projector * sum(behind) // max(1, sum(weights))
    again = bool(trained) and labelled * config.decoder.vocab > HEAD_KEPT
    matrix = "decoder" if config.decoder.tied else "head"
    return Parts(vision=vision, projector=bridge, decoder=decoder, head=f.head * (1 + again + bool(trained) + (matrix in trained)))


def _vision_tokens(config: VLMConfig) -> int:
    return config.vision.patches + config.vision.class_token if config.vision is not None else 0


def _vision_tile(config: VLMConfig) -> int:
    v, t = config.vision, _vision_tokens(config)
    if v is None:
        return 0
    inside = v.heads * v.head
    block = 2 * t * (4 * v.width * inside + 2 * v.width * v.ffn) + 4 * t**2 * inside
    return 2 * v.patches * 3 * v.patch**2 * v.width + v.depth * block


def _projector_weights(config: VLMConfig) -> list[int]:
    """Size of each of the projector's matrices, first to last."""
    if config.vision is None:
        return []
    with torch.device("meta"):
        module = projector(config.projector, config.feature_width, config.decoder.width, config.decoder.ffn)
    return [p.numel() for p in module.parameters() if p.ndim == 2]


def _pairs(config: VLMConfig, documents: Sequence[int]) -> int:
    """(query, key) pairs that attention looks at: of n tokens n * (n + 1) / 2, less what lies beyond a window."""
    beyond = [max(0, n - config.decoder.window) if config.decoder.window else 0 for n in documents]
    return sum(n * (n + 1) // 2 - b * (b + 1) // 2 for n, b in zip(documents, beyond, strict=True))


def _decoder_layer_weights(config: VLMConfig) -> int:
    """Weights that each token meets in a block: of experts, the router's and those of the chosen ones."""
    d = config.decoder
    mlp = (3 if d.mlp in GATED else 2) * d.width * d.ffn
    return d.width * d.head * (2 * d.heads + 2 * d.kv_heads) + (d.active_experts * mlp + d.width * d.experts if d.experts else mlp)
