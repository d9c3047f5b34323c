"""NVLM's configs: the article's sizes and tables, what is refused before training, named data sets, and `neva data tiles`."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from neva import api, cli, recipes
from neva.data.pack import Budget, Item, Packer
from neva.models import cost
from neva.models.presets import DECODERS, VLMS
from neva.models.vlm import VLM, ImageConfig, VLMConfig
from neva.parallel import wrap
from neva.recipes.nvlm_tiny import MODELS
from neva.recipes.resolve import resolve
from tests import runs


@pytest.mark.parametrize(("size", "cross", "projector"), [("34b", 2.06e9, 0.41e9), ("72b", 2.68e9, 0.62e9)])
def test_parameters_that_the_article_adds(size: str, cross: float, projector: float) -> None:
    """4.5: ten cross-attention layers and a two-layer projector of these sizes, an encoder of 5.54 billion parameters."""
    d, x, h = (cost.parameters(VLMS[f"nvlm-{kind}-{size}"]) for kind in "dxh")
    assert x.cross == h.cross == pytest.approx(cross, rel=0.005) and d.cross == 0
    assert d.projector == h.projector == pytest.approx(projector, rel=0.01)
    assert len(VLMS[f"nvlm-x-{size}"].decoder.cross_layers) == 10
    assert d.vision == pytest.approx(5.54e9, rel=0.002)
    assert VLMS[f"nvlm-d-{size}"].layout.tokens_per_image == 7 * 256 and VLMS[f"nvlm-h-{size}"].layout.tokens_per_image == 256


# (stage, lr, least lr, warm-up, betas, decay, clip, steps) of tables 10 and 11.
TABLES = {
    "d": [(1e-4, 2.5e-5, 500, (0.9, 0.95), 0.1, 10, 20_000), (2e-6, 2.5e-7, 1000, (0.9, 0.98), 0.1, 10, 40_000)],
    "x": [(1e-4, 1e-5, 1000, (0.9, 0.95), 0.05, 1, 20_000), (1e-5, 1e-6, 500, (0.9, 0.98), 0.05, 1, 20_000)],
    "h": [(1e-4, 1e-5, 1000, (0.9, 0.98), 0.05, 1, 20_000), (1e-5, 1e-7, 1000, (0.9, 0.98), 0.05, 1, 40_000)],
}


@pytest.mark.parametrize("size", ["34b", "72b"])
@pytest.mark.parametrize("kind", TABLES)
def test_recipes_hold_the_articles_tables(kind: str, size: str) -> None:
    stages = recipes.get(f"nvlm-{kind}-{size}")
    for stage, expected in zip(stages, TABLES[kind], strict=True):
        lr, least, warmup, betas, decay, clip, steps = expected
        if (kind, size, stage.name) == ("x", "72b", "finetune"):
            least = 1e-7
        o = stage.optim
        assert (o.lr, o.min_lr, o.warmup, o.betas, o.weight_decay, o.clip, stage.steps) == (lr, least, warmup, betas, decay, clip, steps)
        assert stage.batch.seq_length % 8 == 0 and not stage.model.decoder.hidden_dropout
        names = [source.name for source in stage.data.blend]
        assert {"clevr-math", "docmatix"} <= set(names) and (stage.name == "pretrain") != ({"metamath", "magicoder", "slimorca"} <= set(names))
    first, second = (stage.model.image for stage in stages)
    assert (first.max_tiles, first.tags) == ((6, "1d") if kind == "h" else (1, "none")) and (second.max_tiles, second.tags) == (6, "1d")
    resolve(stages)


def test_tiny_recipes() -> None:
    """No dropout, at least four micro-batches a step, rows of a multiple of 8, and a share of text."""
    for kind in "dxh":
        for stage in recipes.get(f"nvlm-{kind}-tiny"):
            assert stage.batch.seq_length % 8 == 0 and stage.batch.rows // stage.batch.micro_rows >= 4
            assert not stage.model.decoder.hidden_dropout and not stage.model.decoder.attention_dropout
        assert {source.name for source in stage.data.blend} == {"pages", "text"}


X = MODELS["x"]
REFUSED = {
    "layers beyond the decoder": (lambda: replace(X.decoder, cross_layers=(1, 4)), "numbers from 0 to 3"),
    "layers out of order": (lambda: replace(X.decoder, cross_layers=(3, 1)), "each once, in order"),
    "heads that do not divide": (lambda: replace(X.decoder, cross=replace(X.decoder.cross, kv_heads=3)), "cross.kv_heads=3 does not divide"),
    "memory without cross-attention": (lambda: replace(X, decoder=replace(X.decoder, cross_layers=())), "decoder.cross_layers is empty"),
    "cross-attention without memory": (lambda: replace(X, inline="all"), "would see no tile"),
    "H of one tile": (lambda: replace(MODELS["h"], image=replace(X.image, max_tiles=1)), "nothing would be left"),
    "H without a thumbnail": (lambda: replace(MODELS["h"], image=replace(X.image, thumbnail="none")), "nothing would be left"),
    "a binding without tags": (lambda: replace(MODELS["h"], image=replace(X.image, tags="none")), "tag_binding=rotary .* tag_binding=adjacent"),
    "a binding in X": (lambda: replace(X, tag_binding="rotary"), "tag_binding=rotary"),
    "rotary binding without positions": (lambda: replace(MODELS["h"], decoder=X.decoder), "go together"),
    "positions without rotary binding": (
        lambda: replace(MODELS["h"], tag_binding="adjacent"), "go together"
    ),
    "boxes of one point": (lambda: ImageConfig(aspect="tiles", max_tiles=6, tags="bbox", box_scale=1), "at least max_tiles=6"),
    "tags in the text of X": (lambda: replace(X, image=replace(X.image, tag_tokens="joined")), "need inline=all"),
    "tiles of another aspect": (lambda: ImageConfig(aspect="pad", max_tiles=6), "max_tiles=6 needs aspect=tiles"),
    "fewer than the fewest": (lambda: ImageConfig(aspect="tiles", min_tiles=4, max_tiles=2), "need 1 <= min_tiles <= max_tiles"),
    "anyres without pinpoints": (lambda: ImageConfig(aspect="anyres"), "anyres needs some"),
    "pinpoints that are no tiles": (
        lambda: replace(VLMS["llava-v1.6-vicuna-7b"], image=ImageConfig(aspect="anyres", pinpoints=((100, 336),))), "multiples of vision.image=336"
    ),
    "a fast resize of another filter": (lambda: ImageConfig(resize="fast", resample="lanczos"), "resize=fast knows"),
    "a function for a grid": (lambda: ImageConfig(aspect="tiles", process="a:b"), "gives one tile"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_training(case: str) -> None:
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        make()


def test_other_decoders_keep_the_recipes_cross_attention(tmp_path: Path) -> None:
    """init.decoder brings a text model's sizes; which layers cross-attend is the recipe's."""
    assert isinstance(VLMS["nvlm-x-34b"], VLMConfig) and VLMS["nvlm-x-34b"].decoder.cross_layers != DECODERS["yi-34b"].cross_layers
    given = ("nvlm-x-tiny/pretrain", "steps=1", f"out={tmp_path / 'x'}", "log.tensorboard=false")
    text = ("llava-tiny/pretrain", "steps=1", f"out={tmp_path / 'text'}", "log.tensorboard=false", "model.vision=null", "model.projector=none",
            "trainable=[*]", "data.sources.0.mock.images=0", "data.template=v1", "model.decoder.layers=4")  # fmt: skip
    runs.run("train", *text)
    stages = api.recipe(given[0], [*given[1:], f"init.decoder={tmp_path / 'text'}"])
    assert stages[0].model.decoder.cross_layers == (1, 3) and stages[0].model.decoder.width == 64
    said = runs.run("train", *given, f"init.decoder={tmp_path / 'text'}", "trainable=[*]", "data.template=v1")
    assert "New, drawn from seed 0: vision, projector, cross" in said
    said = runs.run("train", *given, f"init.cross={tmp_path / 'text'}", "--resume", "auto", f"out={tmp_path / 'no'}", code=1)
    assert "is of a model without cross-attention" in said
    with pytest.raises(ValueError, match=r"data.fewer_tiles has no effect on model.image.aspect=pad"):
        resolve(api.recipe("llava-tiny", ["data.fewer_tiles=true"]))
    short = ["batch.seq_length=1536", f"data.tokenizer={runs.TOKENIZER}", "model.decoder.vocab=512"]
    with pytest.raises(ValueError, match="an image takes 1853 tokens, 61 of them its tags"):
        resolve(api.recipe("nvlm-d-34b/finetune", short))
    resolve(api.recipe("nvlm-d-34b/finetune", [*short, "data.fewer_tiles=true"]))


def test_what_init_brings_and_whether_it_fits(tmp_path: Path) -> None:
    """A decoder of X without its cross-attention in D; a whole X in every stage of D's recipe, and said; weights that do not fit, from configs."""
    small = ["log.tensorboard=false", "data.workers=0", "steps=1", "model.vision.layers=1", "evaluate.source=", "evaluate.image_folder="]
    mock = "data.sources=[{name: a, weight: 1, mock: {samples: 50, words: [4, 9], image_size: [56, 28]}}]"
    x = tmp_path / "x"
    api.train("nvlm-x-tiny/finetune", [*small, mock, f"out={x}"], say=lambda text: None)
    plain = api.recipe("nvlm-d-tiny/finetune", [f"init.decoder={x}"])
    assert plain[0].model.inline == "all" and plain[0].model.decoder.cross_layers == ()
    said: list[str] = []
    stages = api.recipe("nvlm-d-tiny", [f"pretrain:init.model={x}"], say=said.append)
    assert [stage.model.inline for stage in stages] == ["none", "none"] and stages[0].model == stages[1].model
    assert "init.model brings inline=none, projector=norm_linear" in said[0]
    refused = {
        "cross_layers=[1, 3]": ["nvlm-x-tiny/finetune", f"init.model={x}", "model.decoder.cross_layers=[0,2]"],
        "leave it out": ["nvlm-d-tiny/finetune", f"init.cross={x}"],
        "decoder.blocks.0.mlp": ["nvlm-x-tiny/finetune", f"init.model={x}", "model.decoder.ffn=64"],
    }
    for why, (name, *overrides) in refused.items():
        with pytest.raises(ValueError, match=re.escape(why)):
            api.dry_run(name, [*overrides, *small, mock, f"out={tmp_path / 'no'}"], say=said.append)
    api.train("nvlm-d-tiny/finetune", [*small, mock, f"init.decoder={x}", f"out={tmp_path / 'd'}"], say=lambda text: None)
    fresh = ["init.cross=fresh", "model.decoder.cross_layers=[0,2]", f"init.model={x}"]
    api.train("nvlm-x-tiny/finetune", [*small, mock, *fresh, f"out={tmp_path / 'again'}"], say=lambda text: None)
    with pytest.raises(ValueError, match=r"an image makes 7 tiles, more than batch.max_tiles=3: .*data.fewer_tiles=true"):
        resolve(api.recipe("nvlm-x-tiny/finetune", ["batch.max_tiles=3"]))


@pytest.mark.parametrize("kind", TABLES)
def test_a_step_packs_the_articles_batch(kind: str) -> None:
    """Samples of lengths around the means that recipes/nvlm.py assumes, of six tiles and a thumbnail where the stage has them."""
    means, samples = {"d": (330, 1500), "x": (80, 250), "h": (330, 500)}[kind], {"d": (2048, 128), "x": (2048, 512), "h": (2048, 256)}[kind]
    for stage, tokens, expected in zip(recipes.get(f"nvlm-{kind}-34b"), means, samples, strict=True):
        b, tiles = stage.batch, stage.model.layout.most_tiles
        budget = Budget(
            seq_length=b.seq_length,
            rows=b.rows,
            micro_rows=b.micro_rows,
            max_tiles=b.max_tiles,
        )
        items = [Item(number, tokens // 2 + number * 37 % tokens, tiles) for number in range(4 * expected)]
        rows = sum(1 for _ in Packer(budget, items, pool=stage.data.pool).rows())
        assert 4 * expected / rows * b.rows == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("trained", "groups"), [(("projector.*", "decoder.blocks.*.cross.*"), 2), (("*", "!vision.*"), 0), (("decoder.*", "!*.cross.*"), 2)]
)
def test_cross_attention_is_sharded_apart_only_where_it_must(trained: tuple[str, ...], groups: int) -> None:
    with torch.device("meta"):
        model = VLM(X)
    wrap.freeze(model, trained)
    assert len(wrap._apart(model.decoder.blocks)) == groups


def test_data_sets_by_name(tmp_path: Path) -> None:
    """data.folder gives a recipe's named sources their files; what it lacks is named, or left out if asked."""
    for name in ("coco-captions", "vqav2"):
        (tmp_path / f"{name}.json").write_text(json.dumps([runs.row("a", "What?", "x")]))
    (tmp_path / "vqav2").mkdir()
    with pytest.raises(ValueError, match="holds 2 of 18 data sets and not cc3m, sbu"):
        resolve(api.recipe("nvlm-d-34b/pretrain", [f"data.folder={tmp_path}", "data.tokenizer=" + runs.TOKENIZER]))
    (stage,) = resolve(api.recipe("nvlm-d-34b/pretrain", [f"data.folder={tmp_path}", "data.absent=skip", "data.tokenizer=" + runs.TOKENIZER]))
    found = {source.name: (source.path, source.image_folder) for source in stage.data.blend}
    assert found == {
        "coco-captions": (str(tmp_path / "coco-captions.json"), ""), "vqav2": (str(tmp_path / "vqav2.json"), str(tmp_path / "vqav2")),
    }  # fmt: skip
    with pytest.raises(ValueError, match="holds 0 of 18"):
        resolve(api.recipe("nvlm-d-34b/pretrain", [f"data.folder={tmp_path / 'vqav2'}", "data.absent=skip", "data.tokenizer=" + runs.TOKENIZER]))


def test_data_tiles(tmp_path: Path) -> None:
    run = CliRunner().invoke
    result = run(cli.main, ["data", "tiles", "336x224", "--max-tiles", "6", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout) == {"columns": 3, "rows": 2, "tiles": 7}
    assert json.loads(run(cli.main, ["data", "tiles", "20x20", "--json"]).stdout) == {"columns": 1, "rows": 1, "tiles": 1}
    Image.new("RGB", (90, 60), (200, 10, 10)).save(tmp_path / "a.png")
    out = tmp_path / "grid.png"
    result = run(cli.main, ["data", "tiles", str(tmp_path / "a.png"), "--tile", "32", "--out", str(out)])
    assert result.exit_code == 0 and "3 x 2 tiles of 32 x 32 pixels and one of the whole: 7 in all" in result.stdout
    with Image.open(out) as drawn:
        assert drawn.width > 3 * 32 and drawn.height > 3 * 32 and (200, 10, 10) in {colour for _, colour in drawn.getcolors(10**6)}
    for bad, said in (("0x5", "nothing to show"), ("nothing.png", "missing"), ("5x", "missing")):
        result = run(cli.main, ["data", "tiles", bad])
        assert result.exit_code == 1 and said in result.stderr
