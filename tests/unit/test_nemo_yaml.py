"""`neva convert-config`: a line for every key of a NeMo 1.0 config, and a stage that means the same."""

from pathlib import Path

import pytest
import yaml

from neva import api
from neva import config as tree
from neva.job import NAMED, TrainConfig
from neva.models.presets import DECODERS

CONFIG = Path(__file__).parents[1] / "data" / "neva_config.yaml"


def keys(node: object, key: str = "") -> list[str]:
    """Every leaf of a YAML file."""
    if isinstance(node, dict):
        return [leaf for name, value in node.items() for leaf in keys(value, f"{key}.{name}" if key else name)]
    return [key]


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
    assert stage.data.tokenizer == "/models/tokenizer_neva.model" and stage.init.vision == "openai/clip-vit-large-patch14"
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


@pytest.mark.parametrize(("content", "said"), [("a: [", "cannot be read"), ("a: 1", "has no model.mm_cfg"), ("model: {mm_cfg: {}}", "lacks")])
def test_refused(content, said, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=said):
        api.convert_config(tmp_path / "a.yaml")
