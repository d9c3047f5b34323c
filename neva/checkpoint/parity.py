"""The gate before a conversion is published: our model and transformers' run on one batch, and must agree.

Both run in fp32 on the CPU. Where two copies fit in memory the models run whole. Where they do not,
they run in slices: for each layer a model of that one layer on either side, from the tensors that
neva read. Then, so that neva's choice of files and names does not prove itself, the model of the
first layers alone, which transformers reads from the folder by itself.
"""

import json
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from neva.batch import IGNORE, IMAGE, NEWLINE, Batch
from neva.checkpoint.manifest import CheckpointError
from neva.data.image import to_tiles
from neva.data.tiling import anyres_slots, tiling
from neva.models import hf, hf_config, hf_vlm
from neva.models.attention import Documents
from neva.models.decoder import Decoder, DecoderConfig, Head
from neva.models.vit import VisionConfig, normalise
from neva.models.vlm import VISION_BACKENDS, VLM, VLMConfig, projector

TOLERANCE = 1e-4
"""Largest difference that passes, relative to the largest magnitude where that is over 1."""
TOKENS = 32
ROWS = 4096
"""Rows of two matrices that are compared at once."""
Read = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two models are apart in one of their parts."""

    part: str
    largest: float
    """Largest absolute difference."""
    magnitude: float
    """Largest absolute value of transformers'."""

    @property
    def passes(self) -> bool:
        """Is it within the tolerance? A NaN is not."""
        return self.largest <= TOLERANCE * max(1.0, self.magnitude)

    @property
    def fault(self) -> str:
        """What is wrong with it, for a message."""
        if not math.isfinite(self.largest):
            return f"{self.part} is not finite"
        return f"{self.part} differs by {self.largest:.2e}"


def show(differences: list[Difference]) -> str:
    """A table to print."""
    rows = [f"  {d.part:<28}{d.largest:>12.2e}{d.magnitude:>12.3g}{'' if d.passes else '   TOO LARGE'}" for d in differences]
    return "\n".join([f"Parity with transformers in fp32, tolerance {TOLERANCE:g}\n  {'part':<28}{'difference':>12}{'magnitude':>12}", *rows])


def check(differences: list[Difference], what: str) -> None:
    """CheckpointError naming the parts that differ too much."""
    wrong = [d.fault for d in differences if not d.passes]
    if wrong:
        raise CheckpointError(f"{what} is not published: against transformers {', '.join(wrong)}, over the tolerance of {TOLERANCE:g}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Peer:
    """A model in transformers' layout to compare with."""

    config: Mapping[str, Any]
    names: tuple[str, ...]
    """Its tensors, as the table of its family spells them."""
    read: Read
    folder: Path | None = None
    """Where `from_pretrained` finds it whole; None where it is a part of something else."""
    cast: torch.dtype | None = None
    """Round its tensors to this dtype first; None leaves them as they are."""


def decoder(config: DecoderConfig, read: Read, peer: Peer, *, whole: bool) -> list[Difference]:
    """Our decoder, its tensors from `read`, against transformers'."""
    if not whole:
        return [*_decoder_slices(config, read, peer)]
    return _whole_decoder("decoder logits", config, read, _whole("AutoModelForCausalLM", peer))


def _whole_decoder(part: str, config: DecoderConfig, read: Read, theirs: Any) -> list[Difference]:
    ends, ids = _ends(config, read, theirs), _ids(config)
    with torch.no_grad():
        logits = _logits(config, read, ids)
        return [*ends, _difference(part, logits, theirs(input_ids=ids).logits[0])]


def _ends(config: DecoderConfig, read: Read, theirs: Any) -> list[Difference]:
    """Embedding and head by themselves, so that a refusal names the one that is another."""
    embed = read("decoder.embed.weight")
    head = embed if config.tied else read("head.weight")
    return [
        _difference("embedding", embed, theirs.get_input_embeddings().weight.detach()),
        _difference(_head(config), head, theirs.get_output_embeddings().weight.detach()),
    ]


def _head(config: DecoderConfig) -> str:
    return "head, tied to the embedding," if config.tied else "head"


def vision(config: VisionConfig, read: Read, peer: Peer, *, whole: bool) -> list[Difference]:
    """Our encoder against transformers'; in slices each layer stands alone between the embeddings and the output."""
    tiles, found = _tiles(config), []
    whole = whole or config.backend == "hf"  # the same code on both sides: no slice of it is ours
    family = hf_config.VISION.get(peer.config["model_type"])
    for number in (None,) if whole else range(config.depth):
        one = config if number is None else replace(config, layers=1, select_layer=-1)
        ours = _fill(VISION_BACKENDS[one.backend](one), "vision.", read if number is None else _renumbered(read, "vision.blocks.", number))
        if peer.config["model_type"] == "intern_vit_6b":
            theirs = _build("InternVLVisionModel", *_ported(config, peer, number), peer.cast)
        elif number is None:
            theirs = _whole(family.architecture if family else "AutoModel", peer)
        elif number == 0 and family and peer.folder is not None:
            theirs = _theirs(family.architecture, peer.folder, peer.cast, first=("",))
        else:
            described = {**peer.config, "num_hidden_layers": 1}
            theirs = _build(family.architecture if family else "AutoModel", described, _sliced(peer, number), peer.cast)
        with torch.no_grad():
            part = "encoder features" if number is None else f"encoder layer {number}"
            found.append(_difference(part, ours(tiles), _hidden(theirs, one, tiles)))
    return found


def llava(
    config: VLMConfig,
    read: Read,
    folder: Path,
    *,
    whole: bool,
    asked: bool = False,
    cast: torch.dtype | None = None,
) -> list[Difference]:
    """A LLaVA or LLaVA-NeXT against transformers': its parts, logits of text, with an image.

    It is whole, or its first layers alone. With `asked`, theirs reads the features that `config`
    names, not those of its config.json.
    """
    assert config.vision is not None
    first: tuple[str, ...] = ()
    if not whole:
        asked = True
        first = ("text_config",)
        config = replace(config, decoder=replace(config.decoder, layers=1, cross_layers=()))
        assert config.vision is not None
        if config.vision.backend != "hf":
            first = (*first, "vision_config")
            config = replace(config, vision=replace(config.vision, layers=1, select_layer=-1))
            assert config.vision is not None
    kind = hf_vlm.NEXT if config.image.aspect == "anyres" else hf_vlm.LLAVA
    theirs: Any = _theirs(kind, folder, cast, first=first)
    if asked:
        theirs.config.vision_feature_layer = config.vision.select_layer
        theirs.config.vision_feature_select_strategy = strategy(config.vision)
    ours = _fill(VLM(config), "", read)
    shown, ids = Image.fromarray(_tiles(config.vision)[0].permute(1, 2, 0).numpy()).resize((61, 33)), _ids(config.decoder)
    tiles, found = to_tiles(shown, config.layout), tiling(shown.size, config.layout)
    image_id = theirs.config.image_token_id
    if not 0 <= image_id < config.decoder.vocab:
        rows = f"which none of the embedding's {config.decoder.vocab} rows is for"
        raise CheckpointError(f"{folder}/config.json: the image token is {image_id}, {rows}.")
    ids = torch.where(ids == image_id, ids - 1, ids)
    pixels = normalise(tiles, config.vision.mean, config.vision.std)
    given: dict[str, Any] = {"pixel_values": pixels}
    slots, features = torch.arange(config.tokens_per_tile)[None], [True] * config.tokens_per_tile
    if config.image.aspect == "anyres":
        slots, features = anyres_slots(shown.size, found, config.layout)
        given = {"pixel_values": pixels[None], "image_sizes": torch.tensor([[shown.height, shown.width]])}
    placed = torch.cat((ids[:, :4], torch.full((1, len(features)), image_id), ids[:, 4:]), dim=1)
    ours_placed = torch.cat((ids[:, :4], torch.where(torch.tensor([features]), IMAGE, NEWLINE), ids[:, 4:]), dim=1)
    slots = torch.where(slots < 0, -1, slots + 4)
    with torch.no_grad():
        hidden = _hidden(theirs.model.vision_tower, config.vision, tiles)
        features = theirs.model.multi_modal_projector(hidden)
        with loading(folder):
            of_text = theirs(input_ids=ids).logits[0]
            of_both = theirs(input_ids=placed, **given).logits[0]
        return [
            *_ends(config.decoder, read, theirs),
            _difference("encoder features", ours.vision(tiles), hidden),  # type: ignore[misc]
            _difference("projected features", ours.features(tiles), features),
            _difference("logits of text", _run(ours, ids), of_text),
            _difference("logits with an image", _run(ours, ours_placed, tiles, slots), of_both),
        ]


def strategy(vision: VisionConfig) -> str:
    """transformers' word for the features of an encoder that are read."""
    return "default" if vision.class_token and vision.feature == "patch" else "full"


def llava_projector(
    config: VLMConfig,
    read: Read,
    layers: Sequence[tuple[Tensor, Tensor]],
    *,
    cast: torch.dtype | None = None,
) -> Difference:
    """A LLaVA's projector against the same written out: linear `layers`, with GELU between.

    A layer is its weight and its bias.
    """
    hidden = _noise(4, config.feature_width)
    text = config.decoder
    made = projector(config.projector, config.feature_width, text.width, text.ffn)
    ours = _fill(made, "projector.", read)
    with torch.no_grad():
        mine = ours(hidden)
        for number, (weight, bias) in enumerate(layers):
            if number:
                hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            hidden = hidden @ _rounded(weight, cast).T + _rounded(bias, cast)
        return _difference("projected features", mine, hidden)


def one_tensor(
    part: str,
    ours: Tensor,
    theirs: Tensor,
    *,
    cast: torch.dtype | None = None,
) -> Difference:
    """A tensor that stands by itself against the folder's."""
    return _difference(part, ours, theirs.to(cast or theirs.dtype))


def _rounded(tensor: Tensor, cast: torch.dtype | None) -> Tensor:
    return tensor.to(cast or tensor.dtype).float()


def _noise(*shape: int) -> Tensor:
    return torch.empty(*shape).normal_(generator=torch.Generator().manual_seed(0))


def nvlm_projector(config: VLMConfig, read: Read, theirs: Read, *, cast: torch.dtype | None = None) -> Difference:
    """NVLM-D's projector against the same written out, from the folder's tensors: transformers has none."""
    x = _noise(4, config.feature_width)
    ours = _fill(projector(config.projector, config.feature_width, config.decoder.width, config.decoder.ffn), "projector.", read)
    names = ("mlp1.0.weight", "mlp1.0.bias", "mlp1.1.weight", "mlp1.3.weight")
    scale, shift, first, second = (_rounded(theirs(name), cast) for name in names)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * scale + shift
    hidden = normed @ first.T
    with torch.no_grad():
        return _difference("projected features", ours(x), (hidden * (1 + torch.erf(hidden / 2**0.5)) / 2) @ second.T)


def fits(parameters: int) -> bool:
    """Do two fp32 copies fit in the memory that is free now?"""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines()) if Path("/proc/meminfo").exists() else iter(())
    free = next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), 2**33)
    return parameters * 4 * 2.2 < free


# transformers' side.


def _theirs(
    kind: str,
    folder: Path,
    cast: torch.dtype | None,
    *,
    first: Sequence[str] = (),
) -> nn.Module:
    """What transformers makes of a folder; of the parts in `first` (`""`: all) one layer alone."""
    import transformers

    made = getattr(transformers, kind)
    with silence(), loading(folder):
        more = {"config": _first_layers(made, folder, first)} if first else {}
        model = made.from_pretrained(
            folder,
            **more,
            dtype=cast or torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
        return model.float().eval()


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """CheckpointError for whatever transformers raises within on files that it does not take."""
    try:
        yield
    except Exception as error:  # it checks little, and raises whatever it meets
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        told = f"transformers cannot load and run {folder}, so nothing can be compared ({reason})."
        raise CheckpointError(told) from None


@contextmanager
def silence() -> Iterator[None]:
    """transformers says nothing within."""
    import transformers

    noisy = transformers.utils.logging
    level, bar = noisy.get_verbosity(), noisy.is_progress_bar_enabled()
    noisy.set_verbosity_error()
    noisy.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.set_verbosity(level)
        if bar:
            noisy.enable_progress_bar()


def _first_layers(kind: Any, folder: Path, parts: Sequence[str]) -> Any:
    """The config that transformers reads in a folder, but with one layer in each of the parts."""
    import transformers

    read = (getattr(kind, "config_class", None) or transformers.AutoConfig).from_pretrained
    described: Any = read(folder, trust_remote_code=False)
    for part in parts:
        one = getattr(described, part) if part else described
        one.num_hidden_layers = 1
        if getattr(one, "layer_types", None):
            one.layer_types = one.layer_types[:1]
    return described


def _hidden(tower: nn.Module, config: VisionConfig, tiles: Tensor) -> Tensor:
    """The features that the config selects, of a transformers vision model."""
    if config.backend == "hf":  # the same code on both sides: what is compared is that the weights arrived
        shell = VISION_BACKENDS["hf"](config)
        shell.model = tower
        return shell(tiles)
    hidden = tower(normalise(tiles, config.mean, config.std), output_hidden_states=True).hidden_states[config.select_layer]
    return hidden[:, 1:] if config.class_token and config.feature == "patch" else hidden


LAYER = re.compile(r"(layers?|blocks?)\.(\d+)\.")
PORT = (
    (r"embeddings\.class_embedding", "embeddings.cls_token"),
    (r"embeddings\.position_embedding", "embeddings.position_embeddings"),
    (r"embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"encoder\.layers\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.ls1", ".lambda_1"),
    (r"\.ls2", ".lambda_2"),
)
"""Names of InternViT, whose published class is code beside the weights -> those of transformers' own port, without a detour over ours."""


def _sliced(peer: Peer, number: int) -> dict[str, Tensor]:
    """What stands outside the layers, and layer `number` as if it were layer 0."""
    state = {}
    for name in peer.names:
        layer = LAYER.search(name)
        if layer is None or int(layer[2]) == number:
            state[LAYER.sub(r"\1.0.", name)] = peer.read(name).float()
    return state


def _ported(config: VisionConfig, peer: Peer, number: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of an InternViT for transformers' port of it; NVLM's heads of zeros, which it has no field for, are cut off."""
    real = replace(config, heads=config.width // config.head, head_width=None, layers=config.layers if number is None else 1, select_layer=-1)
    described = {**hf_config.vision_json(real, {"model_type": "internvl_vision"}), "use_mean_pooling": True}
    state = {}
    for name, tensor in (_sliced(peer, number) if number is not None else {name: peer.read(name).float() for name in peer.names}).items():
        for pattern, instead in PORT:
            name = re.sub(pattern, instead, name)
        if ".qkv." in name:
            parts = tensor.chunk(3)
            state |= {name.replace("qkv", f"{part}_proj"): x[: config.width] for part, x in zip("qkv", parts, strict=True)}
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            state[name] = tensor[: config.width]
        else:
            state[name] = tensor[:, : config.width] if "projection_layer.weight" in name else tensor
    state |= {f"layernorm.{p}": torch.ones(config.width) for p in ("weight", "bias")}
    return described, state


def _whole(kind: str, peer: Peer) -> Any:
    if peer.folder is not None:
        return _theirs(kind, peer.folder, peer.cast)
    return _build(kind, peer.config, {name: peer.read(name) for name in peer.names}, peer.cast)


def _build(kind: str, described: Mapping[str, Any], state: Mapping[str, Tensor], cast: torch.dtype | None) -> Any:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "config.json").write_text(json.dumps(dict(described)))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        return _theirs(kind, folder, cast)
    finally:
        shutil.rmtree(folder)


def _decoder_slices(config: DecoderConfig, read: Read, peer: Peer) -> Iterator[Difference]:
    """Each layer alone between equal inputs and a norm of ones; then embedding, norm and head, tensor by tensor: there are no others."""
    table = hf_config.DECODERS[peer.config["model_type"]].table
    one = replace(config, layers=1, vocab=8, tied=True, cross_layers=())
    x = _noise(1, TOKENS, config.width)
    ends = {f"head.{name}": torch.ones(parameter.shape) for name, parameter in Head(one).named_parameters()}
    ends |= {"decoder.embed.weight": torch.zeros(8, config.width)}
    changed: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 8, "tie_word_embeddings": True}
    changed |= {name: None for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    changed |= {"layer_types": peer.config["layer_types"][:1]} if peer.config.get("layer_types") else {}
    inside = {name for name in peer.names if LAYER.search(name)}
    layers = Peer(config=peer.config, names=tuple(sorted(inside)), read=peer.read)
    for number in range(config.layers):
        theirs = _build("AutoModelForCausalLM", {**peer.config, **changed}, _sliced(layers, number) | hf.to_theirs(ends, table), peer.cast)
        block = _renumbered(read, "decoder.blocks.", number)
        ours = _fill(Decoder(one), "decoder.", lambda name, block=block: ends[name] if name in ends else block(name))
        norm = _fill(Head(one), "head.", lambda name: ends[name]).norm
        with torch.no_grad():
            hidden = norm(ours(x, torch.arange(TOKENS)[None], _alone(TOKENS))[0])
            yield _difference(f"decoder layer {number}", hidden, theirs.model(inputs_embeds=x).last_hidden_state)
    if peer.folder is None:
        yield from _outer(config, read, peer, table)
        return
    theirs = _theirs("AutoModelForCausalLM", peer.folder, peer.cast, first=("",))
    one = replace(config, layers=1, cross_layers=())
    yield from _whole_decoder("logits of the first layer", one, read, theirs)


def _outer(
    config: DecoderConfig,
    read: Read,
    peer: Peer,
    table: Mapping[str, str],
) -> Iterator[Difference]:
    """What stands outside the layers, tensor by tensor.

    Of a tied model also the head that lies in the folder all the same, if one does.
    """
    norms = (f"head.{name}" for name, _ in Head(config).named_parameters() if name != "weight")
    named = {"embedding": "decoder.embed.weight", _head(config): "head.weight"}
    for part, name in (*named.items(), *((f"final {name[5:]}", name) for name in norms)):
        made = hf.origin(name, table)
        assert made is not None
        tied = config.tied and name == "head.weight"
        if tied and made.theirs[0] not in peer.names:
            continue
        mine = read("decoder.embed.weight" if tied else name)
        yield one_tensor(part, mine, peer.read(made.theirs[0]), cast=peer.cast)


# Our side.


def _fill(module: Any, prefix: str, read: Read) -> Any:
    """A module in fp32 with the tensors that `read` gives."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(read(prefix + name))
    return module.eval()


def _renumbered(read: Read, prefix: str, number: int) -> Read:
    return lambda name: read(name.replace(f"{prefix}0.", f"{prefix}{number}.", 1) if name.startswith(prefix) else name)


def _logits(config: DecoderConfig, read: Read, ids: Tensor) -> Tensor:
    model = VLM(VLMConfig(decoder=replace(config, cross_layers=()), vision=None, projector="none"))
    return _run(_fill(model, "", read), ids)


def _run(model: VLM, ids: Tensor, tiles: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
    """Logits of one document, with the features of its tiles in these slots."""
    n, none = ids.shape[1], torch.zeros(0, dtype=torch.int64)
    one = torch.ones_like(ids)
    batch = Batch(
        tokens=ids, labels=torch.full_like(ids, IGNORE), positions=torch.arange(n)[None], segments=one,
        cu_seqlens=torch.tensor([0, n], dtype=torch.int32), max_len=n, labelled=none, groups=one, group_names=("",),
        tiles=tiles if tiles is not None else torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
        inline=torch.arange(0 if tiles is None else len(tiles)), slots=slots if slots is not None else none.view(0, 1), memory=none,
        memory_tags=none.view(0, 0), memory_tokens=none, memory_positions=none, sees=torch.zeros(1, n, 2, dtype=torch.int64), runs=none.view(0, 4),
        run_sizes=(0, 0, 0, 0), any_tiles=tiles is not None,
    )  # fmt: skip
    logits = model(batch, logits_at=torch.arange(n)).logits
    assert logits is not None
    return logits


def _alone(tokens: int) -> Documents:
    return Documents(cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32), max_len=tokens, segments=torch.ones(1, tokens, dtype=torch.int64))


def _ids(config: DecoderConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, config.vocab, (1, min(TOKENS, config.max_positions)), generator=generator)


def _tiles(config: VisionConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, config.image, config.image), generator=generator, dtype=torch.uint8)


def _difference(part: str, ours: Tensor, theirs: Tensor) -> Difference:
    assert ours.shape == theirs.shape, f"{part}: {list(ours.shape)} against {list(theirs.shape)}"
    pairs = zip(ours.split(ROWS), theirs.split(ROWS), strict=True)  # some rows: a copy may be large
    largest = torch.stack([(a.float() - b.float()).abs().max() for a, b in pairs]).max()
    return Difference(part=part, largest=float(largest), magnitude=float(theirs.abs().max()))
