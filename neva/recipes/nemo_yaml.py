"""A NeMo 1.0 `neva_config.yaml` -> a stage of ours, with one line for every key: where it went, or why it did not.

`nemo_keys.KEYS` says what a key means by itself. What depends on other keys, on files or on the environment is found out here, and
takes the place of the table's word: a key is called mapped only where its value is in the stage.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from neva import config as tree
from neva.checkpoint.nemo_config import DEFAULTS, PROJECTORS, aspect, decoder_config, tanh_gelu
from neva.job import TrainConfig
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import ImageConfig, VLMConfig
from neva.recipes.interpolation import Unresolved, load, resolve
from neva.recipes.nemo_keys import KEYS, Rule, Unsupported
from neva.recipes.nemo_vision import by_size, encoder


@dataclass(frozen=True, kw_only=True)
class Line:
    """What became of a key."""

    key: str
    value: Any
    kind: str
    """`to` (mapped), `none` (has no meaning here), `no` (not supported), `unresolved` (neither file nor environment gives it), `unknown`."""
    text: str
    """Where it went, or why it did not."""


SEEN, SCHED = "model.mm_cfg.vision_encoder.", "model.optim.sched."
NULLS: dict[str, tuple[str, str]] = {
    "trainer.gradient_clip_val": ("to", "optim.clip=0: NeMo does not clip then"),
    "model.num_query_groups": ("to", "model.decoder.kv_heads: as many as heads"),
    "model.kv_channels": ("to", "model.decoder.head_width: hidden_size / num_attention_heads"),
    "model.ffn_hidden_size": ("to", "model.decoder.ffn: 4 x hidden_size"),
    "model.seq_len_interpolation_factor": ("to", "model.decoder.rope_scaling=null"),
    "model.num_moe_experts": ("to", "model.decoder.experts=0"),
    "model.window_size": ("to", "model.decoder.window=0"),
    "model.activations_checkpoint_granularity": ("to", "recompute=none"),
    "model.max_position_embeddings": ("none", "null: encoder_seq_length counts"),
    "model.optim.sched": ("to", "optim.schedule=constant, optim.warmup=0: NeMo keeps the rate then"),
    "model.optim.sched.name": ("to", "optim.schedule=constant: NeMo keeps the rate then"),
}
"""Keys whose null says something."""
SILENT = {"optim.clip": 0.0, "optim.warmup": 0.0}
"""What NeMo does where its config says nothing, and we would do otherwise."""
ONE_COUNTS = (
    ("model.restore_from_path", "restore_from_path"),
    ("model.precision", "trainer.precision"),
    ("model.data.conv_template", "model.mm_cfg.llm.model_type"),
    (f"{SCHED}warmup_steps", f"{SCHED}warmup_ratio"),  # NeMo refuses both together, but asks for the steps first
    (f"{SEEN}crop_size", "model.data.crop_size"),
    ("exp_manager.name", "name"),
)
"""Keys that mean one of ours: the first that is given counts."""
SECTIONS = {".".join(key.split(".")[:depth]) for key, rule in KEYS.items() if rule[0] == "to" for depth in range(1, key.count(".") + 1)}
_PLAIN = re.compile(r"[a-z_]+(\.[a-z_]+)*")
"""A place that is one key of ours, to which the value goes as it is."""


class _Given:
    """A config's leaves by key, those values of them that count, as we read them, and what was found out about a key."""

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.values: dict[str, Any] = {}
        self.notes: dict[str, tuple[str, str]] = {}
        for key, value in data.items():
            if _empty(value) or isinstance(value, Unresolved):
                continue
            if key in SECTIONS:
                raise ValueError(f"{key}: {value!r} is no mapping of keys")
            rule = _rule(key)
            if rule is None or len(rule) < 3:
                continue
            try:
                self.values[key] = rule[2](value)
            except Unsupported as why:
                self.note(key, "no", str(why) or rule[1])
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None

    def note(self, key: str, kind: str, text: str) -> None:
        if key in self.data:
            self.notes[key] = kind, text

    def beaten(self, key: str, winner: str) -> None:
        """Only `winner` counts; say so where the two differ."""
        if self.values.pop(key, None) not in (None, self.values.get(winner)):
            self.note(key, "none", f"{winner} counts")

    def line(self, key: str) -> Line:
        value, rule = self.data[key], _rule(key)
        kind, text = self.notes.get(key) or (rule[:2] if rule else ("unknown", "not known to neva, and not carried over"))
        if key in self.notes:
            pass
        elif isinstance(value, Unresolved) and (kind == "to" or key in SECTIONS):
            kind, text = "unresolved", f"{value.why}; not carried over{f' to {text}' if kind == 'to' else ''}"
        elif _empty(value) and key in NULLS:
            kind, text = NULLS[key]
        elif _empty(value) and (kind == "to" or key in SECTIONS):
            default = f"NeMo's default, {DEFAULTS[key[6:]]}" if key[6:] in DEFAULTS else "nothing is given"
            kind, text = "none", f"{'null' if value is None else 'empty'}: {default}"
        return Line(key=key, value=value, kind=kind, text=text)


def convert(path: Path, environment: Mapping[str, str]) -> tuple[TrainConfig, list[Line]]:
    """The stage that a NeMo config means, and a line for each of its keys. ValueError, with the path, for a file that is none."""
    root = load(path)
    try:
        return of_tree(root, environment)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def of_tree(root: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[TrainConfig, list[Line]]:
    """The same of what the file holds."""
    resolved, referred = resolve(root, environment)
    model = resolved.get("model")
    seen = model.get("mm_cfg") if isinstance(model, dict) else model
    if seen is None or isinstance(seen, Unresolved):
        raise ValueError(f"it has no model.mm_cfg, so it is no neva_config.yaml of NeMo 1.0{f' ({seen.why})' if seen else ''}")
    given = _Given(dict(_leaves(resolved)))
    tokenizers = ("model.tokenizer.type", "model.tokenizer.model")
    by_name = given.values.get("model.tokenizer.library") == "huggingface"
    for keys in (*ONE_COUNTS, tokenizers if by_name else tokenizers[::-1]):
        first, *others = [key for key in keys if not _empty(given.data.get(key))] or [""]
        for other in others:
            given.beaten(other, first)
    for key in given.data:
        if _rule(key) is None and any(f"{key}.".startswith(f"{name}.") for name in referred):
            given.note(key, "none", "other keys refer to it; see theirs")
    stage = _stage(given)
    return stage, [given.line(key) for key in given.data]


def _stage(given: _Given) -> TrainConfig:
    v, vision = given.values, _vision(given)
    kind = v.get("model.mm_cfg.mm_mlp_adapter_type", "linear")
    model = VLMConfig(
        decoder=_decoder(given), vision=vision, projector=PROJECTORS[kind], pixel_shuffle="v1" if kind == "mlp_downsample" else "none",
        image=_image(given, vision), use_im_start_end=v.get("model.mm_cfg.use_im_start_end", False),
    )  # fmt: skip
    frozen, frozen_vision = v.get("model.mm_cfg.llm.freeze", False), v.get(f"{SEEN}freeze", True)
    if not frozen_vision:
        given.note(f"{SEEN}freeze", "to", "trainable; NeMo's own code runs the encoder without gradients whatever stands here")
    if (kept := "exp_manager.checkpoint_callback_params.save_top_k") in v:
        given.note(kept, "to", "checkpoint.keep_last: the newest, where NeMo keeps the best by its monitor")
    settings = {
        "trainable": ["projector.*", *(() if frozen else ("decoder.*", "head.*")), *(() if frozen_vision else ("vision.*",))],
        **_batch(given), **_optim(given), **_sources(given), **_init(given), **_out(given),
    }  # fmt: skip
    rules = {key: KEYS[key] for key in v if key in KEYS}
    plain = {rule[1]: v[key] for key, rule in rules.items() if rule[0] == "to" and _PLAIN.fullmatch(rule[1]) and not rule[1].startswith("model.")}
    return tree.from_dict(TrainConfig, {"name": "pretrain" if frozen else "finetune", "model": model, **_nested({**SILENT, **plain, **settings})})


def _decoder(given: _Given) -> DecoderConfig:
    """The language model; of its keys that say something only beside others, a note where they do not."""
    data = {key[6:]: value for key, value in given.data.items() if re.fullmatch(r"model\.[^.]+", key) and not _empty(value)}
    for name in ("num_layers", "hidden_size", "num_attention_heads", "encoder_seq_length"):
        if isinstance(value := data.get(name), Unresolved):
            raise ValueError(f"model.{name}={value} is needed, and {value.why}: write the number")
        if name not in data:
            raise ValueError(f"the config lacks model.{name}, without which there is no model")
    c = {**DEFAULTS, **{name: value for name, value in data.items() if not isinstance(value, Unresolved)}}
    try:
        config = decoder_config(c)
    except ValueError as error:
        raise ValueError(f"model.{error}" if str(error).partition(":")[0] in c else str(error)) from None
    kind = c["activation"]
    if kind != "gelu":
        given.note("model.openai_gelu", "none", f"activation={kind} has one form")
        given.note("model.bias_activation_fusion", "none", f"names a kernel; activation={kind} has one form")
    elif tanh_gelu({**c, "openai_gelu": False}):
        given.note("model.openai_gelu", "none", "bias_activation_fusion is the same tanh approximation")
    elif not tanh_gelu({**c, "openai_gelu": False, "bias_activation_fusion": True}):
        given.note("model.bias_activation_fusion", "none", "names a kernel that fuses a bias, and there is none")
    if config.out_bias:
        given.note("model.qkv_bias", "none", "bias gives every matrix one")
    if config.positions == "learned":
        given.note("model.rotary_percentage", "none", "positions are learned")
    if "override_vocab_size" in c:
        given.note("model.padded_vocab_size", "none", "model.override_vocab_size counts")
    return config


def _vision(given: _Given) -> VisionConfig:
    """The encoder that `from_pretrained` names, else the published one of these sizes, else CLIP-L's depth in these sizes, and a note."""
    v, at = given.values, SEEN
    named = given.data.get(f"{at}from_pretrained")
    known = encoder(str(named)) if not _empty(named) else None
    crop = v.get(f"{at}crop_size", v.get("model.data.crop_size"))
    asked = {"patch_dim": v.get(f"{at}patch_dim"), "hidden_size": v.get(f"{at}hidden_size"), "crop_size": crop}
    token = v.get(f"{at}class_token_length")
    if known is None:
        patch, width, image = asked["patch_dim"] or 14, asked["hidden_size"] or 1024, crop or 224
        known = by_size(width=width, patch=patch, image=image, class_token=token is not False)
        if known is not None and f"{at}from_pretrained" in v:
            given.note(f"{at}from_pretrained", "to", "init.vision; it is not here to be read: model.vision is the published encoder of these sizes")
        if known is None:
            for name in ("patch_dim", "hidden_size"):
                given.note(f"{at}{name}", "no", "no encoder that neva knows has these sizes; name its folder in from_pretrained, or set model.vision")
            known = VisionConfig(image=image, patch=patch, width=width, layers=24, heads=16, ffn=4 * width, class_token=token is not False)
    has = {"patch_dim": known.patch, "hidden_size": known.width, "crop_size": known.image}
    for name, value in asked.items():
        if value not in (None, has[name]):
            for key in (f"{at}{name}", f"model.data.{name}"):
                if key in v:
                    given.note(key, "no", f"{named} has {has[name]}, which counts")
    if token not in (None, known.class_token):
        why = "has a class token: feature=cls_patch keeps it, patch drops it" if known.class_token else "has no class token: every patch is a feature"
        given.note(f"{at}class_token_length", "no", f"the encoder {why}")
    feature = v.get(f"{at}vision_select_feature", "patch")
    if feature == "cls_patch" and not known.class_token:
        given.note(f"{at}vision_select_feature", "none", "the encoder has no class token: every patch is a feature")
        feature = "patch"
    return replace(known, select_layer=v.get(f"{at}vision_select_layer", -2), feature=feature)


def _image(given: _Given, vision: VisionConfig) -> ImageConfig:
    key = "model.data.image_aspect_ratio"
    try:
        return ImageConfig(aspect=aspect(given.values.get(key, "square"), vision))
    except ValueError:
        instead = aspect("square", vision)
        given.note(key, "no", f"there are square and pad; model.image.aspect is {instead}, as NeMo's square is, and as it reads words unknown to it")
        return ImageConfig(aspect=instead)


def _batch(given: _Given) -> dict[str, Any]:
    length = given.values["model.encoder_seq_length"]
    samples = given.values.get("model.global_batch_size")
    return {"batch.seq_length": length, **({"batch.rows": max(1, round(samples * 800 / length))} if samples else {})}


def _optim(given: _Given) -> dict[str, Any]:
    """The schedule, where it does not follow from its name."""
    v = given.values
    if given.data.get("model.optim.name") == "adam" and v.get("model.optim.weight_decay"):
        given.note("model.optim.name", "no", "its weight decay is part of the gradient; AdamW's, which is the optimiser of every stage, is not")
    if v.get(f"{SCHED}max_steps") not in (None, -1, v.get("trainer.max_steps")):
        given.note(f"{SCHED}max_steps", "no", "the schedule runs over the stage's steps")
    bent = [key for key in (f"{SCHED}power", f"{SCHED}cycle") if given.notes.get(key)]
    if given.data.get(f"{SCHED}name") == "PolynomialDecayAnnealing" and bent:
        given.note(f"{SCHED}name", "no", f"its {bent[0]} makes it no straight line; optim.schedule is linear")
    return {"optim.schedule": "constant"} if _empty(given.data.get(f"{SCHED}name")) else {}


def _sources(given: _Given) -> dict[str, Any]:
    """One data file, or a blend of several with one image folder."""
    paths, weights = given.values.get("model.data.data_path", []), given.values.get("model.data.concat_sampling_probabilities")
    if len(paths) < 2:
        given.note("model.data.concat_sampling_probabilities", "none", "one data file needs no weight")
        return {"data.source": paths[0]} if paths else {}
    if weights is not None and len(weights) != len(paths):
        raise ValueError(f"model.data has {len(paths)} data_path and {len(weights)} concat_sampling_probabilities: give each file its own")
    folder = given.values.pop("model.data.image_folder", "")
    share = weights or [1 / len(paths)] * len(paths)  # NeMo draws from each as often where nothing is said
    return {"data.sources": [{"path": path, "image_folder": folder, "weight": weight} for path, weight in zip(paths, share, strict=True)]}


def _init(given: _Given) -> dict[str, Any]:
    v, found = given.values, {}
    decoder, vision = "model.mm_cfg.llm.from_pretrained", v.get(f"{SEEN}from_pretrained", "")
    if decoder in v and ("model.restore_from_path" in v or "restore_from_path" in v):
        del v[decoder]
        given.note(decoder, "none", "restore_from_path is read after it; set init.decoder where that file holds a projector alone")
    if v.get(f"{SEEN}from_hf") and re.fullmatch(r"[\w.-]+/[\w.-]+", vision) and not Path(vision).exists():
        found["init.vision"] = f"hf:{vision}"
        given.notes.setdefault(f"{SEEN}from_pretrained", ("to", f"init.vision=hf:{vision}"))
    name = "model.tokenizer.type"
    if v.get("model.tokenizer.library") == "huggingface" and name in v and not Path(v[name]).exists() and not v[name].startswith(("/", ".")):
        del v[name]
        given.note(name, "no", "a tokenizer is read from a file or folder; download it and set data.tokenizer")
    return found


def _out(given: _Given) -> dict[str, Any]:
    v, first = given.values, "exp_manager.explicit_log_dir"
    others = [key for key in ("exp_manager.exp_dir", "exp_manager.name", "name") if key in v]
    if first in v:
        for key in others:
            given.note(key, "none", f"{first} counts")
        return {"out": v[first]}
    name = v.get("exp_manager.name", v.get("name", "default"))
    return {"out": f"{v.get('exp_manager.exp_dir', 'runs')}/{name}"} if others else {}


@cache
def _rule(key: str) -> Rule | None:
    return KEYS.get(key) or next((rule for pattern, rule in KEYS.items() if "*" in pattern and fnmatch.fnmatchcase(key, pattern)), None)


def _empty(value: Any) -> bool:
    return value is None or value == "" or value == {}


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree by dotted key; a name that holds a dot itself is quoted, since no key of NeMo's does."""
    if isinstance(node, dict) and node:
        for name, value in node.items():
            one = repr(name) if "." in str(name) else str(name)
            yield from _leaves(value, f"{key}.{one}" if key else one)
    else:
        yield key, node


def _nested(data: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for key, value in data.items():
        *path, last = key.split(".")
        node = root
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return root
