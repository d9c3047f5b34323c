"""`neva convert-config`: a line for every key of a NeMo 1.0 config, and a stage that means the same."""

import copy
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from neva import api
from neva import config as tree
from neva.checkpoint.nemo_config import DEFAULTS
from neva.cli import main
from neva.job import NAMED, TrainConfig
from neva.models.presets import DECODERS, VISION
from neva.recipes import nemo_yaml
from neva.recipes.interpolation import load
from neva.recipes.nemo_keys import KEYS
from neva.recipes.nemo_yaml import Line

CONFIG = Path(__file__).parents[1] / "data" / "neva_config.yaml"


ROOT = load(CONFIG)
SEEN, SCHED = "model.mm_cfg.vision_encoder", "model.optim.sched"
ABSENT = object()


def keys(node: object, key: str = "") -> list[str]:
    """Every leaf of a YAML file."""
    if isinstance(node, dict):
        return [leaf for name, value in node.items() for leaf in keys(value, f"{key}.{name}" if key else name)]
    return [key]


def converted(changes: dict[str, Any], environment: dict[str, str] | None = None) -> tuple[TrainConfig, dict[str, Line]]:
    """The config of the tests with some keys changed, or taken away."""
    root = copy.deepcopy(ROOT)
    for key, value in changes.items():
        *path, last = key.split(".")
        node = root
        for name in path:
            node = node.setdefault(name, {})
        node.pop(last, None) if value is ABSENT else node.update({last: value})
    stage, lines = nemo_yaml.of_tree(root, environment or {})
    return stage, {line.key: line for line in lines}


BASE, LINES = converted({})


def test_every_key_has_its_line():
    """None is dropped, and none of the documented ones is unknown."""
    _, lines = api.convert_config(CONFIG)
    assert [line.key for line in lines] == keys(yaml.safe_load(CONFIG.read_text()))
    assert not [line.key for line in lines if line.kind == "unknown"]
    kinds = {line.key: line.kind for line in lines}
    assert kinds["model.tensor_model_parallel_size"] == kinds["model.fp8"] == kinds["model.peft.lora_tuning.adapter_dim"] == "no"
    assert kinds["model.megatron_amp_O2"] == kinds["model.use_flash_attention"] == kinds["model.mm_cfg.vision_encoder.from_hf"] == "none"
    assert all(line.text for line in lines)


def test_the_stage(tmp_path):
    """What is mapped lands where its line says, and the file that is written is one that `neva train` takes."""
    text, _ = api.convert_config(CONFIG, tmp_path / "ours.yaml")
    (stage,) = tree.load(tmp_path / "ours.yaml", TrainConfig, named=NAMED)
    assert tree.dumps([stage]) == text
    assert stage.name == "finetune" and stage.trainable == ("projector.*", "decoder.*", "head.*")
    assert stage.model.decoder == DECODERS["llama2-13b"]
    v = stage.model.vision
    assert v is not None and (v.image, v.patch, v.width, v.select_layer, stage.model.projector) == (224, 14, 1024, -2, "linear")
    o = stage.optim
    assert (o.lr, o.min_lr, o.warmup, o.betas, o.weight_decay, o.clip, o.schedule) == (2e-3, 2e-5, 140, (0.9, 0.95), 0, 1, "cosine")
    assert (stage.steps, stage.precision, stage.recompute, stage.seed) == (4650, "bf16", "block", 1234)
    assert (stage.batch.seq_length, stage.batch.rows) == (4096, 25)
    assert (stage.data.source, stage.data.image_folder, stage.data.template, stage.data.workers) == ("/data/chat.json", "/data/images", "llama_2", 8)
    assert stage.data.tokenizer == "/models/tokenizer_neva.model" and stage.init.vision == "hf:openai/clip-vit-large-patch14"
    assert stage.checkpoint.every == 1000 and stage.checkpoint.keep_last == 10


def test_other_values(tmp_path):
    """A frozen language model is the pretraining stage; NVGPT's mechanisms are read; an unknown key is said to be unknown."""
    loaded = yaml.safe_load(CONFIG.read_text())
    loaded["model"] |= {"activation": "squared-relu", "normalization": "layernorm1p", "rotary_percentage": 0.5, "wonder": 3}
    loaded["model"]["mm_cfg"]["llm"]["freeze"] = True
    loaded["model"]["mm_cfg"]["mm_mlp_adapter_type"] = "mlp_downsample"
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(loaded))
    _, lines = api.convert_config(tmp_path / "a.yaml", tmp_path / "b.yaml")
    (stage,) = tree.load(tmp_path / "b.yaml", TrainConfig, named=NAMED)
    assert stage.name == "pretrain" and stage.trainable == ("projector.*",)
    assert (stage.model.pixel_shuffle, stage.model.projector) == ("v1", "norm_mlp2x_gelu")
    assert (stage.model.decoder.mlp, stage.model.decoder.norm, stage.model.decoder.rotary_fraction) == ("squared_relu", "layernorm1p", 0.5)
    assert [line.key for line in lines if line.kind == "unknown"] == ["model.wonder"]


# A key is called mapped only where its value is in the stage.

OTHER: dict[str, Any] = {
    "trainer.precision": "32", "model.precision": "32", "model.mm_cfg.llm.model_type": "v1", "model.data.conv_template": "plain",
    f"{SEEN}.from_pretrained": "google/siglip-so400m-patch14-384", f"{SEEN}.crop_size": [448, 448], f"{SEEN}.vision_select_layer": -1,
    f"{SEEN}.vision_select_feature": "cls_patch", f"{SEEN}.class_token_length": 0, "model.mm_cfg.mm_mlp_adapter_type": "mlp2x_gelu",
    "model.position_embedding_type": "learned_absolute", "model.rotary_percentage": 0.5, "model.rotary_base": 5e5, "model.window_size": [4095, 0],
    "model.normalization": "layernorm", "model.activation": "gelu", "model.kv_channels": 64, "model.num_query_groups": 8,
    "model.seq_len_interpolation_factor": 2, "model.num_moe_experts": 8, "model.moe_router_topk": 1, "model.moe_aux_loss_coeff": 0.01,
    "model.qkv_bias": True, "model.override_vocab_size": 64000, "model.padded_vocab_size": 64000, "model.activations_checkpoint_granularity": None,
    "model.data.dataloader_type": "single", "model.data.crop_size": [448, 448], "model.data.image_aspect_ratio": "pad",
    "model.data.concat_sampling_probabilities": [1.0], "model.optim.betas": [0.8, 0.99], "model.optim.eps": 1e-6,
    f"{SCHED}.name": "WarmupAnnealing", f"{SCHED}.warmup_ratio": 0.1, "exp_manager.create_tensorboard_logger": False,
}  # fmt: skip
"""A value of a key that means something else than the test's own, where none can be made of that."""
NOT_MAPPED = {
    "trainer.precision": "model.precision counts", "model.mm_cfg.llm.model_type": "model.data.conv_template counts",
    "name": "exp_manager.name counts", "model.data.crop_size": f"{SEEN}.crop_size counts", f"{SCHED}.warmup_ratio": "warmup_steps counts",
    "model.tokenizer.type": "model.tokenizer.model counts", "model.data.concat_sampling_probabilities": "one data file",
    "model.openai_gelu": "has one form", "model.bias_activation_fusion": "has one form",
    f"{SEEN}.patch_dim": "has 14, which counts", f"{SEEN}.hidden_size": "has 1024, which counts", f"{SEEN}.crop_size": "has 224, which counts",
    f"{SEEN}.class_token_length": "the encoder has a class token",
}  # fmt: skip
"""Mapped keys whose other value is not, beside the other keys of the test's config -> what their line says then."""


def other(key: str, value: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    return (2 * value or 0.25) if isinstance(value, int | float) else "/another/place"


@pytest.mark.parametrize("key", [key for key, rule in KEYS.items() if rule[0] == "to"])
def test_a_mapped_value_is_in_the_stage(key):
    """Another value of any key that the table maps gives another stage; where it does not, the key's line says why."""
    literal = {"model.precision": "bf16", "model.data.conv_template": "llama_2"}  # in the file they follow other keys
    stage, lines = converted({**literal, key: other(key, LINES[key].value if key in LINES else None)})
    if key in NOT_MAPPED:
        assert lines[key].kind in ("none", "no") and NOT_MAPPED[key] in lines[key].text
        assert stage == BASE
    else:
        assert lines[key].kind == "to" and stage != BASE


GELU = {"model.activation": "gelu", "model.bias": True, "model.openai_gelu": False, "model.bias_activation_fusion": False}


@pytest.mark.parametrize(("beside", "key", "values"), [
    ({"model.precision": None}, "trainer.precision", ("32", "bf16")),
    ({"model.data.conv_template": None}, "model.mm_cfg.llm.model_type", ("v1", "plain")),
    ({"exp_manager.name": None}, "name", ("a", "b")),
    ({f"{SEEN}.crop_size": None, f"{SEEN}.from_pretrained": None}, "model.data.crop_size", (224, [336, 336])),
    ({f"{SCHED}.warmup_steps": None}, f"{SCHED}.warmup_ratio", (0.03, 0.1)),
    ({"model.tokenizer.library": "huggingface"}, "model.tokenizer.type", ("/a", "/b")),
    ({"model.data.data_path": ["/a", "/b"]}, "model.data.concat_sampling_probabilities", ([0.5, 0.5], [0.1, 0.9])),
    (GELU, "model.openai_gelu", (True, False)), (GELU, "model.bias_activation_fusion", (True, False)),
    ({f"{SEEN}.from_pretrained": None}, f"{SEEN}.patch_dim", (14, 28)), ({f"{SEEN}.from_pretrained": None}, f"{SEEN}.hidden_size", (1024, 1152)),
    ({f"{SEEN}.from_pretrained": None}, f"{SEEN}.crop_size", (224, 336)),
    ({f"{SEEN}.from_pretrained": None, f"{SEEN}.hidden_size": 768, f"{SEEN}.patch_dim": 16}, f"{SEEN}.class_token_length", (0, 1)),
])  # fmt: skip
def test_keys_that_count_without_another(beside, key, values):
    """Those that the test before says not to be mapped are, where nothing else takes their place."""
    (one, first), (two, second) = (converted({**beside, key: value}) for value in values)
    assert one != two and first[key].kind == "to" and second[key].kind == ("no" if key == f"{SEEN}.patch_dim" else "to")


ODD = (None, "", "nonsense", 0, -1, 7, 0.5, True, [], [448, 448], {"a": 1}, "7", "???", "${no.such}", "${model.seed}", 10**30, 1e400)
"""What may stand anywhere."""
READ = {key for key, rule in KEYS.items() if len(rule) > 2 or rule[0] == "to" or key[6:] in DEFAULTS}
"""Keys of which the conversion reads more than that they are there."""


def nodes(node: dict, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config, those of sections too, with its value."""
    for name, value in node.items():
        one = f"{key}.{name}" if key else name
        yield one, value
        if isinstance(value, dict):
            yield from nodes(value, one)


@pytest.mark.slow
@pytest.mark.parametrize("section", ["trainer", "exp_manager", "model.mm_cfg", "model.data", "model.optim", "model"])
def test_any_value_of_any_key(section):
    """Each is refused in one line, or converted; called mapped, its value is in the stage. Nothing else is raised."""
    inner = ("model.mm_cfg", "model.data", "model.optim")
    for key, value in nodes(ROOT):
        if not key.startswith(section) or (section == "model" and key.startswith(inner)):
            continue
        unread = key in LINES and key not in READ
        for odd in ODD[:1] if unread else ODD:
            try:
                stage, lines = converted({key: odd})
            except ValueError as error:
                assert "\n" not in str(error) and str(error), (key, odd)
                continue
            same = odd == value or (odd in (None, "") and value in (None, ""))
            assert same or key not in lines or lines[key].kind != "to" or stage != BASE, (key, odd, lines[key])


@pytest.mark.parametrize("section", ["model.mm_cfg.llm", SEEN, "model.data", "model.optim", SCHED, "trainer", "exp_manager", "model.tokenizer"])
@pytest.mark.parametrize("empty", [None, {}])
def test_empty_sections(section, empty):
    """An empty section says nothing."""
    stage, lines = converted({section: empty})
    assert stage.model.decoder == BASE.model.decoder and lines[section].kind in ("none", "to")
    assert not [key for key in lines if key.startswith(f"{section}.")]


# What a null, or nothing, means to NeMo.


@pytest.mark.parametrize(("key", "place", "expected", "said"), [
    ("trainer.gradient_clip_val", "optim.clip", 0.0, "optim.clip=0"),
    ("model.hidden_dropout", "model.decoder.hidden_dropout", 0.1, "NeMo's default, 0.1"),
    ("model.rotary_percentage", "model.decoder.rotary_fraction", 1.0, "NeMo's default, 1.0"),
    ("model.rotary_base", "model.decoder.rope_theta", 10000.0, "NeMo's default, 10000"),
    ("model.normalization", "model.decoder.norm", "layernorm", "NeMo's default, layernorm"),
    ("model.ffn_hidden_size", "model.decoder.ffn", 4 * 5120, "4 x hidden_size"),
    ("model.max_position_embeddings", "model.decoder.max_positions", 4096, "encoder_seq_length counts"),
    (SCHED, "optim.schedule", "constant", "optim.schedule=constant"),
    (f"{SCHED}.name", "optim.schedule", "constant", "optim.schedule=constant"),
    (f"{SCHED}.warmup_steps", "optim.warmup", 0.0, "nothing is given"),
    (f"{SEEN}.crop_size", "model.vision.image", 224, "nothing is given"),
    ("trainer.max_steps", "steps", 1000, "nothing is given"),
])  # fmt: skip
def test_null(key, place, expected, said):
    for value in (None, ABSENT):
        stage, lines = converted({key: value})
        found: Any = stage
        for name in place.split("."):
            found = getattr(found, name)
        assert found == expected
        assert value is ABSENT or said in lines[key].text


@pytest.mark.parametrize("key", ["hidden_size", "num_layers", "num_attention_heads", "encoder_seq_length"])
@pytest.mark.parametrize("value", [None, ABSENT, "${no.such}"])
def test_what_no_model_can_lack(key, value):
    with pytest.raises(ValueError, match=f"model.{key}"):
        converted({f"model.{key}": value})


# Values that NeMo knows and neva does not, or reads otherwise.


@pytest.mark.parametrize(("key", "value", "kind", "said", "place", "expected"), [
    ("model.data.image_aspect_ratio", "anyres", "no", "there are square and pad", "model.image.aspect", "crop"),
    ("model.data.conv_template", "vila", "no", "set data.template", "data.template", ""),
    (f"{SCHED}.name", "NoamAnnealing", "no", "optim.schedule stays cosine", "optim.schedule", "cosine"),
    (f"{SCHED}.name", "PolynomialDecayAnnealing", "to", "optim.schedule", "optim.schedule", "linear"),
    (f"{SCHED}.name", "WarmupPolicy", "to", "optim.schedule", "optim.schedule", "constant"),
    (f"{SCHED}.max_steps", 9000, "no", "the stage's steps", "steps", 4650), (f"{SCHED}.max_steps", -1, "none", "the stage's steps", "steps", 4650),
    (f"{SCHED}.power", 2.0, "no", "a straight line", "optim.schedule", "cosine"),
    (f"{SCHED}.constant_steps", 100, "no", "the last step", "optim.schedule", "cosine"),
    (f"{SCHED}.warmup_ratio", 0.03, "none", "warmup_steps counts", "optim.warmup", 140.0),
    ("model.optim.name", "sgd", "no", "AdamW", "optim.lr", 2e-3),
    ("trainer.precision", 16, "no", "stays auto", "precision", "auto"),
    ("trainer.max_steps", -1, "no", "set steps", "steps", 1000),
    ("exp_manager.checkpoint_callback_params.save_top_k", -1, "to", "keep_last", "checkpoint.keep_last", 0),
    ("exp_manager.checkpoint_callback_params.save_top_k", 0, "no", "checkpoint.every=0", "checkpoint.keep_last", 2),
    ("model.activations_checkpoint_granularity", "selective", "no", "recompute stays none", "recompute", "none"),
    ("model.data.image_folder", "/data/images.tar", "no", "unpack", "data.image_folder", ""),
    ("model.data.data_path", ["/a.json"], "to", "data.source", "data.source", "/a.json"),
    ("model.data.media_type", "video", "no", "video is not built", "data.source", "/data/chat.json"),
    ("model.hidden_size", "5120", "to", "width", "model.decoder.width", 5120),
    (f"{SEEN}.crop_size", 224, "to", "image", "model.vision.image", 224),
    (f"{SEEN}.vision_select_feature", "cls_patch", "to", "feature", "model.vision.feature", "cls_patch"),
    (f"{SEEN}.vision_select_feature", "both", "no", "stays patch", "model.vision.feature", "patch"),
    ("model.mm_cfg.use_im_start_end", "true", "to", "use_im_start_end", "model.use_im_start_end", True),
    ("model.mm_cfg.use_lita", True, "no", "LITA", "model.projector", "linear"),
    ("model.qkv_bias", True, "to", "qkv_bias", "model.decoder.qkv_bias", True),
    ("model.padded_vocab_size", 32128, "to", "vocab", "model.decoder.vocab", 32128),
    ("exp_manager.exp_dir", "/results", "to", "out", "out", "/results/nemo_neva"),
    ("exp_manager.explicit_log_dir", "/here", "to", "out", "out", "/here"),
    ("model.mm_cfg.llm.model_type", "nvgpt", "to", "data.template", "data.template", "nv_steerlm"),
])  # fmt: skip
def test_what_becomes_of(key, value, kind, said, place, expected):
    stage, lines = converted({key: value})
    found: Any = stage
    for name in place.split("."):
        found = getattr(found, name)
    assert (lines[key].kind, found) == (kind, expected) and said in lines[key].text


@pytest.mark.parametrize(("key", "value", "said"), [
    ("model.hidden_size", [5120], r"model.hidden_size: \[5120\] is not a number"),
    (f"{SEEN}.crop_size", [224, 448], "no square"),
    (f"{SEEN}.vision_select_layer", "last", "vision_select_layer: 'last' is not a number"),
    ("model.mm_cfg", "clip", "model.mm_cfg: 'clip' is no mapping"),
    ("model.activation", "reglu", "activation='reglu'"),
    ("model.normalize_attention_scores", False, "normalize_attention_scores=False"),
    (f"{SCHED}.warmup_ratio", 1.5, "no share of the steps"),
    ("model.mm_cfg.mm_mlp_adapter_type", "qformer", "'qformer' is not built"),
    ("model.window_size", 4096, "no window"),
])  # fmt: skip
def test_no_value_of_its_key(key, value, said):
    with pytest.raises(ValueError, match=said):
        converted({key: value})


def test_several_data_files():
    """A blend, drawn from evenly unless weights are given."""
    stage, _ = converted({"model.data.data_path": ["/a.json", "/b.json"]})
    assert [(s.path, s.image_folder, s.weight) for s in stage.data.sources] == [("/a.json", "/data/images", 0.5), ("/b.json", "/data/images", 0.5)]
    assert not stage.data.source and not stage.data.image_folder
    stage, lines = converted({"model.data.data_path": ["/a.json", "/b.json"], "model.data.concat_sampling_probabilities": [0.9, 0.1]})
    assert [s.weight for s in stage.data.sources] == [0.9, 0.1] and lines["model.data.concat_sampling_probabilities"].kind == "to"
    with pytest.raises(ValueError, match="give each file its own"):
        converted({"model.data.data_path": ["/a.json", "/b.json"], "model.data.concat_sampling_probabilities": [1.0]})


def test_tokenizers(tmp_path):
    """The library says which of the two keys is read; a name on the hub is no file."""
    both = {"model.tokenizer.type": str(tmp_path), "model.tokenizer.model": "/t.model"}
    stage, lines = converted(both)
    assert stage.data.tokenizer == "/t.model" and "tokenizer.model counts" in lines["model.tokenizer.type"].text
    stage, lines = converted({**both, "model.tokenizer.library": "huggingface"})
    assert stage.data.tokenizer == str(tmp_path) and "tokenizer.type counts" in lines["model.tokenizer.model"].text
    stage, lines = converted(
        {"model.tokenizer.type": "meta-llama/Llama-2-7b", "model.tokenizer.model": None, "model.tokenizer.library": "huggingface"}
    )
    assert stage.data.tokenizer == "" and lines["model.tokenizer.type"].kind == "no"


def test_restored_model():
    """NeMo reads a whole model after its parts, so that the language model's own file does not count."""
    decoder = "model.mm_cfg.llm.from_pretrained"
    stage, lines = converted({"model.restore_from_path": "/neva.nemo", "restore_from_path": "/other.nemo", decoder: "/llama.nemo"})
    assert (stage.init.model, stage.init.decoder) == ("/neva.nemo", "")
    assert lines[decoder].kind == "none" and lines["restore_from_path"].text == "model.restore_from_path counts"


# The encoder.


@pytest.mark.parametrize(("name", "preset"), [
    ("openai/clip-vit-large-patch14-336", "clip-l-14-336"), ("/models/clip-vit-base-patch32/", "clip-b-32"),
    ("google/siglip-so400m-patch14-384", "siglip-so400m-14-384"), ("${models}/google/siglip-base-patch16-224", "siglip-base-16-224"),
])  # fmt: skip
def test_published_encoders(name, preset):
    """A published name says the encoder, also within a path that is not here."""
    expected = VISION[preset]
    sizes = {f"{SEEN}.hidden_size": expected.width, f"{SEEN}.patch_dim": expected.patch, f"{SEEN}.crop_size": [expected.image] * 2}
    stage, lines = converted({f"{SEEN}.from_pretrained": name, f"{SEEN}.class_token_length": int(expected.class_token), **sizes})
    assert stage.model.vision == expected and {lines[key].kind for key in (*sizes, f"{SEEN}.class_token_length")} == {"to"}
    assert stage.model.image.aspect == ("crop" if expected.class_token else "square")
    assert lines[f"{SEEN}.from_pretrained"].kind == ("unresolved" if "${" in name else "to")


def test_encoders_by_size():
    """Without a name that says it, the published encoder of these sizes; sizes of none are said to be a guess."""
    siglip = {
        f"{SEEN}.from_pretrained": "/models/eyes",
        f"{SEEN}.hidden_size": 1152,
        f"{SEEN}.crop_size": [384, 384],
        f"{SEEN}.class_token_length": 0,
    }
    stage, lines = converted(siglip)
    assert stage.model.vision == VISION["siglip-so400m-14-384"] and "of these sizes" in lines[f"{SEEN}.from_pretrained"].text
    stage, lines = converted({f"{SEEN}.from_pretrained": None, f"{SEEN}.class_token_length": 0})
    assert stage.model.vision == VISION["clip-l-14"] and lines[f"{SEEN}.class_token_length"].kind == "no"
    stage, lines = converted({f"{SEEN}.from_pretrained": None, f"{SEEN}.hidden_size": 1280, f"{SEEN}.class_token_length": 0})
    assert stage.model.vision is not None and (stage.model.vision.width, stage.model.vision.class_token) == (1280, False)
    assert lines[f"{SEEN}.hidden_size"].kind == lines[f"{SEEN}.patch_dim"].kind == "no"


def test_encoders_that_are_here(tmp_path):
    """A folder's config.json and NeMo's own CLIP are looked at."""
    sizes = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": sizes}))
    stage, lines = converted({f"{SEEN}.from_pretrained": str(tmp_path)})
    v = stage.model.vision
    assert v is not None and (v.image, v.patch, v.width, v.layers, v.heads, v.ffn) == (28, 14, 32, 3, 2, 44)
    assert stage.init.vision == str(tmp_path) and lines[f"{SEEN}.hidden_size"].kind == "no"
    described = {"patch_dim": 14, "img_h": 28, "img_w": 28, "num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 44, "num_attention_heads": 2}
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump({"vision": described, "text": {}}))
    with tarfile.open(tmp_path / "clip.nemo", "w") as archive:
        archive.add(tmp_path / "model_config.yaml", "./model_config.yaml")
    assert converted({f"{SEEN}.from_pretrained": str(tmp_path / "clip.nemo")})[0].model.vision == v
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model_config.yaml").unlink()
    with pytest.raises(ValueError, match="is not supported yet"):
        converted({f"{SEEN}.from_pretrained": str(tmp_path)})


# Interpolations, and files that are something else.


def test_interpolated_values():
    """Composed, chained, relative and from the environment; what cannot be known is said with its own words."""
    given = {
        "data_dir": "${oc.env:DATA}/neva", "model.data.data_path": "${data_dir}/chat.json", "model.max_position_embeddings": "${.encoder_seq_length}",
        "model.encoder_seq_length": "${training.model.data.length}", "model.data.length": "${trainer.length}", "trainer.length": 2048,
        "model.global_batch_size": "${multiply:${model.micro_batch_size}, 4}",
    }  # fmt: skip
    stage, lines = converted(given, {"DATA": "/d"})
    assert stage.data.source == lines["model.data.data_path"].value == "/d/neva/chat.json"
    assert lines["data_dir"].kind == lines["trainer.length"].kind == "none" and "refer to it" in lines["data_dir"].text
    assert stage.init.decoder == "/d/neva/neva/checkpoints/llama-2-13b-chat-tp8.nemo"
    assert (stage.batch.seq_length, stage.model.decoder.max_positions, stage.batch.rows) == (2048, 2048, 25)
    stage, lines = converted(given)
    line = lines["model.data.data_path"]
    assert stage.data.source == "" and (line.kind, str(line.value)) == ("unresolved", "${data_dir}/chat.json")
    assert "the environment has no DATA" in line.text


def test_the_environment_and_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("NEVA_TEST_DIR", "/from/here")
    (tmp_path / "a.yaml").write_text(CONFIG.read_text().replace("data_path: /data/chat.json", "data_path: ${oc.env:NEVA_TEST_DIR}/x.json"))
    result = CliRunner().invoke(main, ["convert-config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "b.yaml")])
    assert result.exit_code == 0 and "model.data.data_path=/from/here/x.json -> data.source" in result.output
    assert "llama-2-13b-chat-tp8.nemo UNRESOLVED: data_dir is not in the file; not carried over to init.decoder" in result.output


@pytest.mark.parametrize(("content", "said"), [
    ("a: [", ":1 cannot be read as YAML"), ("a: 1", "has no model.mm_cfg"), ("model: {mm_cfg: {}}", "lacks model.num_layers"),
    ("model: {mm_cfg: null}", "has no model.mm_cfg"), ("model: 5", "model: 5 is no mapping"), ("- a", "holds a list"), ("words", "holds text"),
    ("", "holds nothing"), ("# Title\n\n`code`: text", ":3 cannot be read as YAML"), ("a: 1\na: 2", "the key a stands twice"),
    ("a: &a {b: *a}", "stands within itself"), ("model: {mm_cfg: {a: '${model.mm_cfg}'}}", "refers to itself"),
    ("model: {mm_cfg: '${elsewhere}'}", "elsewhere is not in the file"),
])  # fmt: skip
def test_refused(content, said, tmp_path):
    """In one line, which names the file."""
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        api.convert_config(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / "a.yaml"))
