"""Parameters and floating-point operations of a config, counted part by part.

A multiply and an add are two operations. Counted are the matrix products and attention over the pairs that the mask
allows; norms, activations and the softmax are not. A test compares the counts with torch's own FLOP counter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neva.models.decoder import HEAD_KEPT
from neva.models.layers import GATED
from neva.models.vlm import PARTS, VLM, VLMConfig, part_of, projector


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A quantity of each part of the model."""

    vision: int
    projector: int
    cross: int
    """Cross-attention layers."""
    decoder: int
    """Embedding and blocks without those."""
    head: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.vision + self.projector + self.cross + self.decoder + self.head


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a micro-batch makes the model compute."""

    documents: Sequence[int]
    """Lengths of the samples, image features included."""
    tiles: int
    labelled: int
    memory: int = 0
    """Keys that cross-attention reads."""
    pairs: int = 0
    """(token, key) pairs of cross-attention: of each run its tokens times its keys."""
    crossing: int = 0
    """Tokens that go through cross-attention: all, or none where no rank's micro-batch holds a tile."""


def parameters(config: VLMConfig) -> Parts:
    """Parameters of each part. The learned image vectors count as projector, a tied head's matrix as decoder."""
    with torch.device("meta"):
        model = VLM(config)
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return Parts(**counts)


def forward_flops(config: VLMConfig, work: Work) -> Parts:
    """Operations of one forward pass."""
    d, tokens = config.decoder, sum(work.documents)
    attention, mlp = _decoder_layer_weights(config)
    scores = 4 * _pairs(config, work.documents) * d.heads * d.head
    cross = _cross_layer(config, work)
    return Parts(
        vision=work.tiles * _vision_tile(config),
        projector=2 * work.tiles * config.tokens_per_tile * sum(_projector_weights(config)) if work.tiles else 0,
        cross=len(d.cross_layers) * (cross.queries + cross.keys + cross.scores + cross.mlp),
        decoder=d.layers * (2 * tokens * (attention + mlp) + scores),
        head=2 * work.labelled * d.vocab * d.width,
    )


def step_flops(config: VLMConfig, work: Work, *, trained: frozenset[str], recompute: bool = False) -> Parts:
    """Operations of forward and backward of one micro-batch.

    `trained` names the parts that are trained, each as a whole. A part costs a forward; one more of the same where a gradient
    must flow through it to a trained part before it; one more where its own weights are trained; the head one more for
    logits that are too many to keep for backward, and the blocks one more with `recompute`. Attention's backward computes its
    scores again: 5 products for the forward's 2. What the trained parts do not need is not counted.
    """
    f = forward_flops(config, work)
    vision = f.vision
    if "vision" in trained and config.vision is not None:  # the pixels need no gradient
        scores = work.tiles * 4 * _vision_tokens(config) ** 2 * config.vision.heads * config.vision.head * config.vision.depth
        patch = work.tiles * 2 * config.vision.patches * 3 * config.vision.patch**2 * config.vision.width
        vision += 2 * (f.vision - scores - patch) + patch + scores * 5 // 2
    bridge = f.projector * (1 + ("projector" in trained) + ("vision" in trained))
    if "projector" in trained and "vision" not in trained:  # its first layer's input, and that alone, needs no gradient
        weights = _projector_weights(config)
        behind = weights if config.projector.startswith("norm_") else weights[1:]  # but for a norm before it
        bridge += f.projector * sum(behind) // max(1, sum(weights))
    again = bool(trained) and work.labelled * config.decoder.vocab > HEAD_KEPT
    matrix = "decoder" if config.decoder.tied else "head"
    cross, decoder = _blocks_backward(config, work, trained)
    return Parts(
        vision=vision, projector=bridge, cross=f.cross * (1 + recompute) + cross, decoder=f.decoder * (1 + recompute) + decoder,
        head=f.head * (1 + again + bool(trained) + (matrix in trained)),
    )  # fmt: skip


def _blocks_backward(config: VLMConfig, work: Work, trained: frozenset[str]) -> tuple[int, int]:
    """Operations of backward of the cross-attention layers and of the rest of the blocks."""
    d, tokens = config.decoder, sum(work.documents)
    attention, mlp = _decoder_layer_weights(config)
    scores = 4 * _pairs(config, work.documents) * d.heads * d.head
    one = _cross_layer(config, work)
    tagged = config.inline == "thumbnail" and config.image.tags != "none"  # whose embeddings are keys
    to_memory = bool(trained & {"vision", "projector"}) or (tagged and "decoder" in trained)
    # Features in the sequence carry the gradient to the encoder and the projector from the first layer on; in the memory from the first cross layer.
    flowing = "decoder" in trained or (bool(trained & {"vision", "projector"}) and config.inline != "none")
    cross = decoder = 0
    for number in range(d.layers):
        if flowing:
            decoder += 2 * tokens * attention + scores * 5 // 2
        if number in d.cross_layers and work.crossing and (flowing or to_memory or "cross" in trained):
            cross += one.queries - one.asked + one.scores * 5 // 2 + one.mlp
            own = "cross" in trained  # then the norms before its projections want a gradient too
            cross += (one.asked if flowing or own else 0) + (one.keys if to_memory or (own and d.cross.key_norm) else 0)
            cross += one.queries + one.keys + one.mlp if own else 0
            flowing = True
        if flowing:
            decoder += 2 * tokens * mlp
        if "decoder" in trained:
            decoder += 2 * tokens * (attention + mlp)
    return cross, decoder


@dataclass(frozen=True)
class _Cross:
    """Operations of one cross-attention layer's forward."""

    asked: int
    """The projection to queries."""
    queries: int
    """That and the one back."""
    keys: int
    scores: int
    mlp: int


def _cross_layer(config: VLMConfig, work: Work) -> _Cross:
    d, c = config.decoder, config.decoder.cross
    heads, width = c.heads or d.heads, c.head_width or d.head
    kept = c.kv_heads or heads
    asked = 2 * work.crossing * d.width * heads * width
    matrices = 3 if d.mlp in GATED else 2
    return _Cross(
        asked=asked, queries=2 * asked, keys=2 * 2 * work.memory * d.width * kept * width, scores=4 * work.pairs * heads * width,
        mlp=2 * work.crossing * matrices * d.width * c.ffn,
    )  # fmt: skip


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


def _decoder_layer_weights(config: VLMConfig) -> tuple[int, int]:
    """Weights that each token meets in a block, of attention and of the MLP: of experts, the router's and those of the chosen ones."""
    d = config.decoder
    mlp = (3 if d.mlp in GATED else 2) * d.width * d.ffn
    return d.width * d.head * (2 * d.heads + 2 * d.kv_heads), d.active_experts * mlp + d.width * d.experts if d.experts else mlp
