"""Parameters and floating-point operations of a config, counted part by part.

A multiply and an add are two operations. Counted are the matrix products and attention over the pairs that the mask
allows; norms, activations and the softmax are not. A test compares the counts with torch's own FLOP counter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neva.models.decoder import HEAD_KEPT
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
        counts["projector" if part == "image_vectors" else part] += parameter.numel()
    return Parts(**counts)


def forward_flops(config: VLMConfig, *, documents: Sequence[int], tiles: int, labelled: int) -> Parts:
    """Operations of one forward pass over documents of these lengths (image features included), `tiles` tiles and `labelled` tokens."""
    pairs, tokens = sum(n * (n + 1) // 2 for n in documents), sum(documents)
    return Parts(
        vision=tiles * _vision_tile(config),
        projector=2 * tiles * config.vision.tokens * sum(_projector_weights(config)),
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
        pairs = sum(n * (n + 1) // 2 for n in documents)
        scores = 4 * pairs * config.decoder.heads * config.decoder.head * config.decoder.layers
        decoder += (f.decoder - scores) * (1 + ("decoder" in trained)) + scores * 5 // 2
    vision = f.vision
    if "vision" in trained:  # the pixels need no gradient
        scores = tiles * 4 * _vision_tokens(config) ** 2 * config.vision.width * config.vision.depth
        patch = tiles * 2 * config.vision.patches * 3 * config.vision.patch**2 * config.vision.width
        vision += 2 * (f.vision - scores - patch) + patch + scores * 5 // 2
    bridge = f.projector * (1 + ("projector" in trained) + ("vision" in trained))
    if "projector" in trained and "vision" not in trained:  # its first layer's input, and that alone, needs no gradient
        weights = _projector_weights(config)
        bridge += f.projector * sum(weights[1:]) // max(1, sum(weights))
    again = bool(trained) and labelled * config.decoder.vocab > HEAD_KEPT
    matrix = "decoder" if config.decoder.tied else "head"
    return Parts(vision=vision, projector=bridge, decoder=decoder, head=f.head * (1 + again + bool(trained) + (matrix in trained)))


def _vision_tokens(config: VLMConfig) -> int:
    return config.vision.patches + config.vision.class_token


def _vision_tile(config: VLMConfig) -> int:
    v, t = config.vision, _vision_tokens(config)
    block = 2 * t * (4 * v.width**2 + 2 * v.width * v.ffn) + 4 * t**2 * v.width
    return 2 * v.patches * 3 * v.patch**2 * v.width + v.depth * block


def _projector_weights(config: VLMConfig) -> list[int]:
    """Size of each of the projector's matrices, first to last."""
    with torch.device("meta"):
        module = projector(config.projector, config.vision.width, config.decoder.width)
    return [p.numel() for p in module.parameters() if p.ndim == 2]


def _decoder_layer_weights(config: VLMConfig) -> int:
    d = config.decoder
    return d.width * d.head * (2 * d.heads + 2 * d.kv_heads) + 3 * d.width * d.ffn
