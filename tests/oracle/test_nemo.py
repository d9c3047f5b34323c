"""NeMo's checkpoints, written in the published layouts from transformers' models, give those models' logits; and what is refused."""

import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml

import neva
from neva import api
from neva.models import cost
from neva.models.vlm import build as build_ours
from tests.families import DECODERS, SEEN, TEXT, clip, llama, llava, pair
from tests.nemo import fuse, rank_state, save_dcp, stacked, write, write_distributed
from tests.packed import pack, real

torch.set_num_threads(1)
KINDS = {
    "llama": lambda: llama(num_hidden_layers=4, vocab_size=72),
    "mixtral": lambda: tf.MixtralConfig(**{**TEXT, "vocab_size": 72, "num_hidden_layers": 2, "num_local_experts": 4, "sliding_window": None}),
    "nemotron": lambda: tf.NemotronConfig(**{**TEXT, "vocab_size": 72, "num_hidden_layers": 2, "head_dim": 12, "partial_rotary_factor": 0.5}),
    "mistral": lambda: tf.MistralConfig(**{**TEXT, "vocab_size": 72, "num_hidden_layers": 2, "sliding_window": None}),
}


@torch.no_grad()
def difference(checkpoint: Path, both) -> float:
    """How far the imported checkpoint's logits are from those of transformers' model."""
    ours, largest = load_text(checkpoint), 0.0
    for part in both.samples():
        batch = pack(ours.config.layout, [[part]], len(part.tokens))
        largest = max(largest, (ours(batch, logits_at=real(batch)).logits - both.run_theirs(part).logits[0]).abs().max().item())
    return largest


def load_text(checkpoint: Path):
    """The model of a checkpoint without a tokenizer."""
    from neva import config as tree
    from neva.checkpoint import index, store
    from neva.models.vlm import VLM, VLMConfig

    model = VLM(tree.from_dict(VLMConfig, store.load_config(checkpoint)["model"]))
    model.load_state_dict({name: index.read(checkpoint / "weights", name).float() for name, _ in model.named_parameters()}, strict=True)
    return model.eval()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("core", [True, False], ids=["core", "classic"])
@pytest.mark.parametrize("kind", KINDS)
def test_language_models(kind, core, tp, pp, tmp_path):
    """Both key styles, tensor and pipeline ranks."""
    both = pair(KINDS[kind](), tmp_path / "hf")
    ours = dict(both.ours.named_parameters())
    archive = write(tmp_path / "model.nemo", ours, both.ours.config.decoder, core=core or kind == "mixtral", tp=tp, pp=pp)
    api.import_checkpoint([archive], tmp_path / "neva", say=lambda text: None)
    assert difference(tmp_path / "neva", both) < 1e-4
    assert not (tmp_path / "neva.unpacked").exists()


@pytest.mark.parametrize("fields", [
    {"positions": "learned", "norm": "layernorm", "mlp": "gelu_tanh", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied": True},
    {"rotary_fraction": 0.5, "norm": "layernorm1p", "mlp": "geglu", "kv_heads": 4},
    {"norm": "layernorm", "mlp": "gelu", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "kv_heads": 2},
])  # fmt: skip
@pytest.mark.parametrize("core", [True, False])
def test_nvgpt(fields, core, tmp_path):
    """NVGPT's mechanisms, which transformers has no class for, come back tensor by tensor with their config."""
    from neva.models.decoder import DecoderConfig
    from neva.models.vlm import VLMConfig

    config = DecoderConfig(**{"vocab": 72, "width": 48, "layers": 2, "heads": 4, "kv_heads": 4, "ffn": 60, "max_positions": 64, **fields})
    model = build_ours(VLMConfig(decoder=config, vision=None, projector="none"))
    archive = write(tmp_path / "model.nemo", dict(model.named_parameters()), config, core=core, tp=2, pp=2)
    api.import_checkpoint([archive], tmp_path / "neva", say=lambda text: None)
    back = load_text(tmp_path / "neva")
    assert back.config.decoder == config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["torch_dist", "zarr", "zarr bf16"])
def test_distributed_formats(kind, tmp_path):
    """torch_dist and zarr, layers stacked, are read without Megatron."""
    both = pair(llama(num_hidden_layers=4), tmp_path / "hf")
    folder = write_distributed(tmp_path / "nemo", dict(both.ours.named_parameters()), both.ours.config.decoder, kind)
    api.import_checkpoint([folder], tmp_path / "neva", say=lambda text: None)
    if kind != "zarr bf16":
        assert difference(tmp_path / "neva", both) < 1e-4
        return
    for name, parameter in load_text(tmp_path / "neva").named_parameters():
        assert torch.equal(parameter, both.ours.get_parameter(name).to(torch.bfloat16).float())


def test_nemo_2(tmp_path):
    """A NeMo 2 folder: context/model.yaml and weights/ in torch_dist."""
    both = pair(llama(num_hidden_layers=4), tmp_path / "hf")
    c = both.ours.config.decoder
    state = stacked(rank_state(dict(both.ours.named_parameters()), c, core=True, tp=(0, 1), pp=(0, 1), prefix="module."))
    (tmp_path / "nemo" / "context").mkdir(parents=True)
    config = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaConfig", "num_layers": c.layers, "hidden_size": c.width,
              "ffn_hidden_size": c.ffn, "num_attention_heads": c.heads, "num_query_groups": c.kv_heads, "normalization": "RMSNorm",
              "layernorm_epsilon": c.eps, "gated_linear_unit": True, "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
              "add_bias_linear": False, "position_embedding_type": "rope", "rotary_base": c.rope_theta, "seq_length": 128,
              "share_embeddings_and_output_weights": False}  # fmt: skip
    (tmp_path / "nemo" / "context" / "model.yaml").write_text(yaml.safe_dump({"_target_": "LlamaModel", "config": config}))
    save_dcp(state, tmp_path / "nemo" / "weights")
    api.import_checkpoint([tmp_path / "nemo"], tmp_path / "neva", say=lambda text: None)
    assert difference(tmp_path / "neva", both) < 1e-4


def test_nulls(tmp_path):
    """A null in a config is what NeMo takes where nothing stands."""
    both = pair(llama(), tmp_path / "hf")
    c = both.ours.config.decoder
    nulls = dict.fromkeys(("rotary_base", "rotary_percentage", "hidden_dropout", "ffn_dropout", "layernorm_epsilon", "kv_channels", "mm_cfg"))
    archive = write(tmp_path / "model.nemo", dict(both.ours.named_parameters()), c, core=True, more=nulls)
    api.import_checkpoint([archive], tmp_path / "neva", parity=False, say=lambda text: None)
    expected = replace(c, head_width=None, rope_theta=1e4, eps=1e-5, hidden_dropout=0.1, embedding_dropout=0.1)
    assert load_text(tmp_path / "neva").config.decoder == expected


NEVA = {
    "mm_cfg": {"llm": {"model_type": "v1"}, "mm_mlp_adapter_type": "mlp2x_gelu", "use_im_start_end": False,
               "vision_encoder": {"patch_dim": 14, "crop_size": [28, 28], "hidden_size": 32, "vision_select_layer": -2, "class_token_length": 1}},
    "data": {"image_aspect_ratio": "pad"},
}  # fmt: skip


@pytest.mark.parametrize("core", [True, False])
def test_neva(core, tmp_path):
    """A NeVA with its projector in the embedding's adapter, its encoder from a CLIP's folder, computes what the LLaVA it was made of does."""
    both = pair(llava(llama(num_hidden_layers=4, vocab_size=72)), tmp_path / "hf")
    both.theirs.model.vision_tower.save_pretrained(tmp_path / "clip")
    archive = write(tmp_path / "neva.nemo", dict(both.ours.named_parameters()), both.ours.config.decoder, core=core, tp=2, more=NEVA)
    with pytest.raises(ValueError, match="give the encoder's folder with --vision"):
        api.import_checkpoint([archive], tmp_path / "neva")
    api.import_checkpoint([archive, tmp_path / "clip"], tmp_path / "neva", say=lambda text: None)
    assert difference(tmp_path / "neva", both) < 1e-4


@pytest.mark.parametrize(("changes", "said"), [
    ({"data": {"image_aspect_ratio": "keep"}}, "image_aspect_ratio='keep' is not built"),
    ({"mm_cfg": {**NEVA["mm_cfg"], "vision_encoder": {"crop_size": [28, 14]}}}, "crop_size: .* is no square"),
    ({"mm_cfg": {**NEVA["mm_cfg"], "vision_encoder": {"vision_select_feature": "both"}}}, "neither patch nor cls_patch"),
    ({"mm_cfg": {**NEVA["mm_cfg"], "vision_encoder": "clip"}}, "vision_encoder: 'clip' is no mapping"),
])  # fmt: skip
def test_refused_neva(changes, said, tmp_path):
    """What a NeVA's config says of images and neva does not do."""
    both = pair(llava(llama(vocab_size=72)), tmp_path / "hf")
    archive = write(tmp_path / "neva.nemo", dict(both.ours.named_parameters()), both.ours.config.decoder, core=True, more={**NEVA, **changes})
    with pytest.raises(ValueError, match=said):
        api.import_checkpoint([archive], tmp_path / "neva")


def test_downsampling_projector(tmp_path):
    """mlp_downsample: NeMo counts the step that joins patches as layer 0."""
    from neva.models.vlm import VLMConfig

    base = pair(llava(llama(vocab_size=72)), tmp_path / "hf")
    config: VLMConfig = replace(base.ours.config, pixel_shuffle="v1", projector="norm_mlp2x_gelu")
    model = build_ours(config)
    ours = {name: p for name, p in model.named_parameters() if not name.startswith("projector.")}
    for n in (0, 1, 3):
        for p, parameter in model.projector[n].named_parameters():
            ours[f"projector.{n + 1}.{p}"] = parameter
    base.theirs.model.vision_tower.save_pretrained(tmp_path / "clip")
    more = {**NEVA, "mm_cfg": {**NEVA["mm_cfg"], "mm_mlp_adapter_type": "mlp_downsample"}}
    archive = write(tmp_path / "neva.nemo", ours, config.decoder, core=True, more=more)
    api.import_checkpoint([archive, tmp_path / "clip"], tmp_path / "neva", say=lambda text: None)
    back = load_text(tmp_path / "neva")
    assert back.config.pixel_shuffle == "v1"
    assert all(torch.equal(p, back.get_parameter(n)) for n, p in model.named_parameters() if n.startswith("projector."))


CLIP_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "layer_norm1.", "mlp.linear_fc1.layer_norm_": "layer_norm2.",
    "self_attention.linear_proj.": "self_attn.out_proj.", "mlp.linear_fc1.": "mlp.fc1.", "mlp.linear_fc2.": "mlp.fc2.",
}  # fmt: skip


def test_clip(tmp_path):
    """NeMo's CLIP, whose text tower is left behind, as an encoder."""
    text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    theirs = tf.CLIPModel(tf.CLIPConfig(vision_config=SEEN, text_config=text))
    theirs.eval().save_pretrained(tmp_path / "hf")
    source = {n: p for n, p in theirs.vision_model.state_dict().items() if "position_ids" not in n}
    c = clip()
    state = {"model.vision_encoder.class_token": source["embeddings.class_embedding"].view(1, 1, -1),
             "model.vision_encoder.conv1.weight": source["embeddings.patch_embedding.weight"],
             "model.vision_encoder.position_embeddings.weight": source["embeddings.position_embedding.weight"],
             "model.text_encoder.head.weight": torch.zeros(3), "model.vision_encoder.head.weight": torch.zeros(3)}  # fmt: skip

    class Heads:
        heads = kv_heads = c.num_attention_heads
        head = c.hidden_size // c.num_attention_heads

    for p in ("weight", "bias"):
        state[f"model.vision_encoder.ln_pre.{p}"] = source[f"pre_layrnorm.{p}"]
        state[f"model.vision_encoder.final_layernorm.{p}"] = source[f"post_layernorm.{p}"]
        for i in range(c.num_hidden_layers):
            at, of = f"model.vision_encoder.decoder.layers.{i}.", f"encoder.layers.{i}."
            state[f"{at}self_attention.linear_qkv.{p}"] = fuse(*(source[f"{of}self_attn.{n}_proj.{p}"] for n in "qkv"), Heads)
            for to, name in CLIP_NAMES.items():
                state[f"{at}{to}{p}"] = source[f"{of}{name}{p}"]
    (tmp_path / "nemo").mkdir()
    torch.save(state, tmp_path / "nemo" / "model_weights.ckpt")
    vision = {"patch_dim": 14, "img_h": 28, "img_w": 28, "num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 44, "num_attention_heads": 2,
              "activation": "quick-gelu", "layernorm_epsilon": 1e-5}  # fmt: skip
    (tmp_path / "nemo" / "model_config.yaml").write_text(yaml.safe_dump({"vision": vision, "text": {}}))
    api.import_checkpoint([tmp_path / "nemo"], tmp_path / "a", say=lambda text: None)
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "b", say=lambda text: None)
    from neva.checkpoint import index

    assert {*index.stored(tmp_path / "a" / "weights")} == {*index.stored(tmp_path / "b" / "weights")}
    for name in index.stored(tmp_path / "a" / "weights"):
        assert torch.equal(index.read(tmp_path / "a" / "weights", name), index.read(tmp_path / "b" / "weights", name)), name


# Refusals.


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def good(folder: Path) -> Path:
    both = pair(DECODERS["llama grouped"](), folder / "hf")
    return write(folder / "model.nemo", dict(both.ours.named_parameters()), both.ours.config.decoder, core=True, tp=2)


def cut_off(path: Path) -> str:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "model.nemo cannot be unpacked"


def rewrite(path: Path, change) -> None:
    with tarfile.open(path) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}
    change(members)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def cut_off_between_files(path: Path) -> str:
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset])
    return "model.nemo cannot be unpacked .*it has no end"


def runs_code(path: Path) -> str:
    buffer = io.BytesIO()
    torch.save({"x": Evil()}, buffer, pickle_module=pickle)
    rewrite(path, lambda members: members.update({"./mp_rank_00/model_weights.ckpt": buffer.getvalue()}))
    return "is refused: .*print"


def climbs_out(path: Path) -> str:
    rewrite(path, lambda members: members.update({"../../evil.txt": b"x"}))
    return "cannot be unpacked .*evil.txt"


def lost_rank(path: Path) -> str:
    rewrite(path, lambda members: members.pop("./mp_rank_00/model_weights.ckpt"))
    return "some are missing"


def odd_mechanism(path: Path) -> str:
    def change(members: dict) -> None:
        config = yaml.safe_load(members["./model_config.yaml"])
        members["./model_config.yaml"] = yaml.safe_dump({**config, "position_embedding_type": "alibi", "activation": "reglu"}).encode()

    rewrite(path, change)
    return "activation='reglu', position_embedding_type='alibi'"


def configured(**values) -> Callable[[Path], str]:
    """The config with other values; what is said names the first."""

    def damage(path: Path) -> str:
        def change(members: dict) -> None:
            members["./model_config.yaml"] = yaml.safe_dump({**yaml.safe_load(members["./model_config.yaml"]), **values}).encode()

        rewrite(path, change)
        return f"{next(iter(values))}: "

    return damage


def more_layers(path: Path) -> str:
    def change(members: dict) -> None:
        config = yaml.safe_load(members["./model_config.yaml"])
        members["./model_config.yaml"] = yaml.safe_dump({**config, "num_layers": 4}).encode()

    rewrite(path, change)
    return "'decoder.blocks.3.attention_norm.weight' is missing"


@pytest.mark.parametrize("damage", [
    cut_off, cut_off_between_files, runs_code, climbs_out, lost_rank, odd_mechanism, more_layers, configured(hidden_size=[48]),
    configured(hidden_dropout="some"), configured(window_size=4096), configured(mm_cfg="clip"),
])  # fmt: skip
def test_refused(damage, tmp_path, capsys):
    """Each is refused with the file and the reason; nothing half-written remains, nothing runs, nothing lands outside."""
    path = good(tmp_path)
    said = damage(path)
    with pytest.raises(ValueError, match=said):
        api.import_checkpoint([path], tmp_path / "deep" / "neva")
    assert not list(tmp_path.glob("deep/*")) and not (tmp_path / "evil.txt").exists()
    assert "ran" not in capsys.readouterr().out.splitlines()


def test_index_that_runs_code(tmp_path):
    """DCP's index is a pickle: one that names anything but DCP's records is refused by name, in imports and in our own checkpoints."""
    both = pair(llama(), tmp_path / "hf")
    folder = write_distributed(tmp_path / "nemo", dict(both.ours.named_parameters()), both.ours.config.decoder, "torch_dist")
    (folder / "model_weights" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"\.metadata is refused: .*builtins.print"):
        api.import_checkpoint([folder], tmp_path / "neva")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_inspect(kind, tp, tmp_path):
    """Sizes as they are, the parameters of transformers' model, and no weight unpacked: the
    weights' members of the archive are broken."""
    both = pair(KINDS[kind](), tmp_path / "hf")
    decoder = both.ours.config.decoder
    more = {"override_vocab_size": 72}
    archive = write(tmp_path / "model.nemo", dict(both.ours.named_parameters()), decoder, core=True, tp=tp, more=more)
    broken = tmp_path / "broken.nemo"
    with tarfile.open(archive) as whole, tarfile.open(broken, "w") as out:
        for member in whole:
            held = whole.extractfile(member)
            content = held.read() if held is not None else b""
            if member.name.endswith(".ckpt"):
                content = b"no weights"
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    found = neva.inspect(broken)
    assert found["holds"] == "decoder" and found["format"] == "nemo" and found["bytes"] == broken.stat().st_size
    assert f"{decoder.layers} layers of width {decoder.width}" in found["decoder"]
    count = sum(p.numel() for p in both.theirs.parameters())
    assert found["parameters"] == f"{count:,} by its config"
    assert "not read" in found["weights"] and found["tokenizer"] == "none"


def test_inspect_of_a_neva_counts_no_encoder(tmp_path):
    both = pair(llava(llama(num_hidden_layers=4, vocab_size=72)), tmp_path / "hf")
    more = NEVA | {"override_vocab_size": 72}
    ours = dict(both.ours.named_parameters())
    archive = write(tmp_path / "neva.nemo", ours, both.ours.config.decoder, core=True, tp=1, more=more)
    found = neva.inspect(archive)
    assert found["holds"] == "vlm" and "mlp2x_gelu" in found["projector"]
    told = int(found["parameters"].split()[0].replace(",", ""))
    counts = cost.parameters(both.ours.config)
    assert told == counts.projector + counts.decoder + counts.head
    (tmp_path / "x.bin").touch()
    with pytest.raises(ValueError, match="x.bin is a file, and no .nemo"):
        neva.inspect(tmp_path / "x.bin")
