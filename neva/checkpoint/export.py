"""neva checkpoints -> Hugging Face folders: shard by shard, resumable, all or nothing.

Names are spelled as the folder spelled them that the checkpoint was once imported from, or, with `keys="vllm"` and where there was none, as
the published files and vLLM do. What the model does not compute but the import found (an encoder's last layers and norm) is given back.
While it is written the folder is `DIR.tmp`; an export of the same checkpoint goes on from what is there.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from neva.checkpoint import gate, index, parity, store, stream
from neva.checkpoint import hf as folders
from neva.checkpoint.peers import on_disk
from neva.checkpoint.prompts import compare_prompts
from neva.checkpoint.shards import converted, open_shards
from neva.checkpoint.target import PEER, ExportOptions, Target, configs, kept_dtype, make_target, with_dtype
from neva.models import hf
from neva.models.vlm import grown


def export(checkpoint: Path, out: Path, options: ExportOptions, *, check: bool = True, say: Callable[[str], None] = print) -> Path:
    """Write a checkpoint as a folder that transformers and vLLM load, and give its path.

    ValueError naming each field that the format cannot hold, and where transformers does not compute the same from what was written;
    `check=False` leaves out the latter. Nothing half-written remains under `out`.
    """
    out = Path(out)
    with stream.Staging(out) as staging:
        opened = store.open_checkpoint(checkpoint)
        model, vision = configs(opened.folder, opened.config)
        weights = index.Tensors(opened.folder / "weights")
        target = make_target(opened.folder, opened.config, model, vision, options)
        target = with_dtype(target, weights, options)
        files = {name: file.sha256 for name, file in opened.manifest.files.items()}
        mark = json.dumps({"of": files, "options": str(options)})
        staging.begin(mark, needs=_bytes(target.names, weights, options))
        _write_weights(staging.folder, target, weights, options, say)
        described = json.dumps(target.config, indent=2) + "\n"
        (staging.folder / "config.json").write_text(described)
        for name, content in target.files.items():
            (staging.folder / name).write_bytes(content)
        if check:
            _check(staging, target, weights, options, say)
        else:
            say("NOT COMPARED with transformers (--no-parity): nothing shows that this folder computes what the checkpoint does")
        if target.note:
            say(target.note)
        return staging.finish()


def _check(
    staging: stream.Staging,
    target: Target,
    weights: index.Tensors,
    options: ExportOptions,
    say: Callable[[str], None],
) -> None:
    """Compare with transformers. CheckpointError where it computes something else."""
    if target.kind == "projector":
        say("A projector alone is no model of transformers: there is nothing to compare it with")
        return
    say("Comparing with transformers")
    read = partial(_written, weights, target=target, options=options)
    source = folders.read_source(staging.folder)
    differences = gate.compare([source], target.model, target.vision, read)
    say(parity.show(differences))
    parity.check(differences, str(staging.out))
    if target.encoder is not None:
        say(compare_prompts(staging.folder, target.encoder, target.vision))


# Writing.


def _bytes(names: Iterable[str], weights: index.Tensors, options: ExportOptions) -> int:
    """Bytes of tensors as they are written."""
    found = (weights.described[name] for name in names)
    return sum(t.numel() * kept_dtype(t.dtype, options).itemsize for t in found)


def _write_weights(
    folder: Path,
    target: Target,
    weights: index.Tensors,
    options: ExportOptions,
    say: Callable[[str], None],
) -> None:
    """model.safetensors, or shards with their index. A shard of an earlier, cut-off export that is whole is kept."""
    groups = [*_groups(target, weights.described)]
    plan: list[list[list[str]]] = [[]]
    room = options.shard
    tick = stream.Progress(_bytes(target.names, weights, options), say)
    for group in groups:
        size = _bytes(group, weights, options)
        if size > room and plan[-1]:
            plan.append([])
            room = options.shard
        plan[-1].append(group)
        room -= size
    mapped: dict[str, str] = {}
    total = 0
    for number, chunk in enumerate(plan):
        file = folder / ("model.safetensors" if len(plan) == 1 else f"model-{number + 1:05d}-of-{len(plan):05d}.safetensors")
        if not file.exists():
            state: dict[str, Tensor] = {}
            for group in chunk:
                ours = {name: _written(weights, name, target=target, options=options) for name in group}
                state |= {target.spelled(name): tensor for name, tensor in _theirs(ours, target).items()}
            if number == len(plan) - 1:
                dtype = folders.DTYPES.get(options.dtype)
                for name, tensor in target.extra.items():
                    state[target.spelled(name)] = converted(tensor, dtype, name)
            part = file.with_suffix(".part")
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, part, metadata={"format": "pt"})
            part.replace(file)
            del state
        tick(sum(_bytes(group, weights, options) for group in chunk))
        for name, entry in open_shards(folder, files=(file.name,)).entries.items():
            mapped[name] = file.name
            total += entry.dtype.itemsize * torch.Size(entry.shape).numel()
    if len(plan) > 1:
        listed = {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapped.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listed, indent=2) + "\n")


def _theirs(ours: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """Tensors of ours under the default spelling of theirs; an encoder that runs as transformers' own is spelled by transformers."""
    if not _is_peer(next(iter(ours))):
        return hf.to_theirs(ours, target.table)
    assert target.vision is not None
    prefix = "vision_tower." if target.kind == "vlm" else ""
    named = on_disk({name.removeprefix(PEER): tensor for name, tensor in ours.items()}, target.vision.hf_config)
    return {prefix + name: tensor for name, tensor in named.items()}


def _is_peer(name: str) -> bool:
    return name.startswith(PEER)


def _groups(target: Target, described: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Our tensors that are written together: the parts of one of theirs, all of a transformers encoder, else each alone."""
    if peers := [name for name in target.names if _is_peer(name)]:
        yield peers
    pending: dict[str, list[str]] = {}
    for name in (name for name in target.names if not _is_peer(name)):
        experts = described[name].shape[0] if described[name].ndim == 3 else 0
        made = hf.origin(name, target.table, experts=experts)
        if made is None:
            raise ValueError(f"{name} has no place in the format {target.config.get('model_type', target.kind)!r}")
        if made.part is None:
            yield [name]
            continue
        group = pending.setdefault(made.theirs[0], [])
        group.append(name)
        if len(group) == made.part[1]:
            yield pending.pop(made.theirs[0])


def _written(weights: index.Tensors, name: str, *, target: Target, options: ExportOptions) -> Tensor:
    """One of our tensors as it is written: with the rows and in the dtype that were asked for."""
    tensor = weights.read(name)
    if name in target.grow:
        tensor = grown(tensor, target.grow[name])
    return converted(tensor, kept_dtype(tensor.dtype, options), name)
