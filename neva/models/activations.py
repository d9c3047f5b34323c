"""Bytes that a training step keeps from forward for backward, counted part by part from a config.

Counted is what autograd saves of each operation, each tensor once: the inputs of norms, activations
and attention, and where weights are trained the inputs of their products. A test compares the
counts with torch's saved tensors. Masks, positions and other numbers of a few bytes a token are
left out.

Letters: t tokens of a micro-batch with padding, n tiles, y keys of cross-attention, l labelled
tokens, d width, f width inside the MLP, e bytes of a number in the precision of the computation.
"""

from dataclasses import dataclass

from neva.models.cost import Parts, Work
from neva.models.decoder import HEAD_KEPT, HEAD_TILE, DecoderConfig
from neva.models.layers import GATED
from neva.models.vlm import VLMConfig

FP32 = 4


@dataclass(frozen=True, kw_only=True)
class How:
    """What memory depends on beside the model and the micro-batch."""

    trained: frozenset[str]
    """Parts that are trained, each as a whole."""
    size: int
    """Bytes of a number: 2 in bf16, 4 in fp32."""
    cuda: bool
    """A GPU's kernels keep other tensors than a CPU's."""
    recompute: bool = False
    """Is each decoder block computed again in backward?"""


def saved(config: VLMConfig, work: Work, how: How) -> Parts:
    """Bytes that are kept when a micro-batch's forward ends, those of its largest block included
    that `recompute` makes again."""
    trained = how.trained
    seen = bool(work.tiles)
    from_tiles = seen and bool(trained & {"vision", "projector"})
    flows = "decoder" in trained or (from_tiles and config.inline != "none")
    tagged = "decoder" in trained and config.inline == "thumbnail"
    to_memory = from_tiles or tagged
    blocks, crosses = [], []
    for number in range(config.decoder.layers):
        block = _attention(config.decoder, work, how) if flows else 0
        cross = 0
        if number in config.decoder.cross_layers and work.crossing:
            cross = _cross(config, work, how, flows=flows, to_memory=to_memory)
            flows = flows or to_memory or "cross" in trained
        crosses.append(cross)
        blocks.append(block + (_mlp(config.decoder, work, how) if flows else 0))
    tokens = sum(work.documents)
    decoder, cross = sum(blocks), sum(crosses)
    if how.recompute:
        inputs = config.decoder.layers * tokens * config.decoder.width * how.size
        decoder = inputs + max(block + cross for block, cross in zip(blocks, crosses, strict=True))
        cross = 0
    shared = work.memory * config.decoder.width * how.size if "cross" in trained and work.crossing else 0
    return Parts(
        vision=_vision(config, work, how) if seen and "vision" in trained else 0,
        projector=_projector(config, work, how) if from_tiles else 0,
        cross=cross + shared * bool(config.decoder.cross_layers),
        decoder=decoder + (2 * tokens * config.decoder.rotary_width * how.size if flows else 0),
        head=_head(config.decoder, work, how, flows=flows) if flows or "head" in trained else 0,
    )


def working(config: VLMConfig, work: Work, how: How) -> int:
    """Bytes that backward needs for a while beside what is kept: the gradients within a block, or
    those of the head and a tile of logits."""
    d, tokens = config.decoder, sum(work.documents)
    branches = (3 if d.mlp in GATED else 2) * (d.active_experts if d.experts else 1)
    block = tokens * (branches * d.ffn + 3 * d.width) * how.size
    logits = min(work.labelled * d.vocab, (64 if how.cuda else 1) * HEAD_TILE)
    head = work.labelled * d.width * (FP32 + how.size) + logits * (FP32 + 2 * (how.size if how.size < FP32 else 0))
    if ("decoder" if d.tied else "head") in how.trained:
        head += d.vocab * d.width * (FP32 + (how.size if how.size < FP32 else 0))
    return max(block, head)


def seeing(config: VLMConfig, work: Work, how: How) -> int:
    """Bytes that the encoder needs in forward before anything is kept of it: a layer's hidden
    state, and what is widest within it."""
    v = config.vision
    if v is None:
        return 0
    tokens = work.tiles * (v.patches + v.class_token)
    return tokens * (2 * v.width + max(2 * v.ffn, 4 * v.heads * v.head)) * how.size


def _norm(tokens: int, width: int, kind: str, how: How, *, own: bool, flows: bool = True) -> int:
    """A norm's input; of an RMSNorm on a CPU, which has no kernel of its own for it, what its steps
    keep: the input where a gradient flows to it, and where its weight is trained what that
    scales."""
    if kind != "rmsnorm" or how.cuda:
        return tokens * width * how.size
    return tokens * width * FP32 * (flows + own)


def _attention(d: DecoderConfig, work: Work, how: How) -> int:
    """A decoder block up to its MLP, through which a gradient flows."""
    tokens, own = sum(work.documents), "decoder" in how.trained
    inside, kept = d.heads * d.head, d.kv_heads * d.head
    one = 2 * inside + 2 * kept
    if how.cuda:  # keys and values are repeated for the queries' heads; padding is masked in a copy
        one = 4 * inside + own * inside
    norm = _norm(tokens, d.width, d.norm, how, own=own)
    return norm + tokens * ((one + d.width * own) * how.size + d.heads * FP32)


def _mlp(d: DecoderConfig, work: Work, how: How) -> int:
    """The rest of the block. Experts keep rows of their own, one for each expert of a token."""
    tokens, own = sum(work.documents), "decoder" in how.trained
    inner = (_between(d.mlp) + own) * d.ffn
    norm = _norm(tokens, d.width, d.norm, how, own=own) + tokens * d.width * own * how.size
    if not d.experts:
        return norm + tokens * inner * how.size
    rows = tokens * d.active_experts
    return norm + rows * (inner + (2 + own) * d.width) * how.size + tokens * d.experts * FP32


def _between(activation: str) -> int:
    """Widths of the MLP that its activation keeps: with a gate the gate before and behind its
    activation, and what it is multiplied with."""
    return 3 if activation in GATED else 2 if activation == "quick_gelu" else 1


def _cross(config: VLMConfig, work: Work, how: How, *, flows: bool, to_memory: bool) -> int:
    """A layer's cross-attention; the memory itself is counted once for all layers."""
    d, c, own = config.decoder, config.decoder.cross, "cross" in how.trained
    if not (flows or to_memory or own):
        return 0
    tokens = sum(work.documents)
    heads, width = c.heads or d.heads, c.head_width or d.head
    kept = (c.kv_heads or heads) * width
    norm = _norm(tokens, d.width, d.norm, how, own=own, flows=flows) if flows or own else 0
    queries = tokens * (2 * heads * width + 2 * d.width * own) * how.size + tokens * heads * FP32
    keys = work.memory * (2 * kept + (d.width if c.key_norm else 0) * own) * how.size
    if c.key_norm:
        keys += _norm(work.memory, d.width, d.norm, how, own=own, flows=to_memory)
    if c.ffn:
        norm += _norm(tokens, d.width, d.norm, how, own=own)
        queries += tokens * ((_between(d.mlp) + own) * c.ffn + 2 * d.width * own) * how.size
    return norm + queries + keys


def _vision(config: VLMConfig, work: Work, how: How) -> int:
    """A trained encoder."""
    v = config.vision
    assert v is not None
    tokens = work.tiles * (v.patches + v.class_token)
    inside = v.heads * v.head
    one = 4 * inside + 2 * v.width + (_between(v.activation) + 1) * v.ffn + (2 * v.width if v.layer_scale else 0)
    block = 2 * _norm(tokens, v.width, v.norm, how, own=True) + tokens * (one * how.size + v.heads * FP32)
    if v.qk_norm:
        block += 2 * tokens * inside * (FP32 + how.size)
    pixels = work.tiles * 3 * v.image**2 * how.size
    first = _norm(tokens, v.width, v.norm, how, own=True) if v.pre_norm else 0
    return pixels + first + v.depth * block


def _projector(config: VLMConfig, work: Work, how: How) -> int:
    """Inputs of the projector's products, norm and activations."""
    own, vision = "projector" in how.trained, config.vision
    assert vision is not None
    features = work.tiles * config.tokens_per_tile
    name, width = config.projector, config.feature_width
    normed = name.startswith("norm_")
    widths = width * (own + normed)
    hidden = config.decoder.ffn if name == "norm_ffn_gelu" else config.decoder.width
    between = 1 if name == "norm_ffn_gelu" else max(0, _depth(name) - 1)
    return features * (widths + between * (1 + own) * hidden) * how.size


def _depth(name: str) -> int:
    """Layers of `mlpNx_gelu`; 1 of others."""
    digits = name.removeprefix("norm_").removeprefix("mlp")[:1]
    return int(digits) if digits.isdigit() else 1


def _head(d: DecoderConfig, work: Work, how: How, *, flows: bool) -> int:
    """The labelled tokens before and behind the last norm, and while they are few their
    exponentials."""
    kept = work.labelled * d.vocab
    own = "head" in how.trained
    norm = _norm(work.labelled, d.width, d.norm, how, own=own, flows=flows)
    return norm + work.labelled * d.width * how.size + (kept * how.size if kept <= HEAD_KEPT else 0)
