"""Broken checkpoints, one function each: it damages a good folder and says what must be named."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compress_tool.errors import InputError, ToolError, UnsupportedError

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """`damage` edits a checkpoint in three shards; the error must be `kind` and hold `named`."""

    name: str
    damage: Callable[[Path], None]
    named: tuple[str, ...]
    kind: type[ToolError] = InputError


def edit_json(file: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        value = json.loads((root / file).read_text())
        change(value)
        (root / file).write_text(json.dumps(value))

    return damage


def config(**values: Any) -> Callable[[Path], None]:
    return edit_json("config.json", lambda value: value.update(values))


def without(*keys: str) -> Callable[[Path], None]:
    return edit_json("config.json", lambda value: [value.pop(key) for key in keys])


def weight_map(**values: Any) -> Callable[[Path], None]:
    def change(value: dict[str, Any]) -> None:
        value["weight_map"][ROUTER] = values["to"]

    return edit_json(INDEX, change)


def content(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda root: (root / file).write_bytes(data)  # type: ignore[return-value]


def single_file(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Rewrite the weights as one file without an index, after `change`."""

    def damage(root: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(root.glob("*.safetensors")):
            tensors |= load_file(shard)
            shard.unlink()
        (root / INDEX).unlink()
        change(tensors)
        save_file(tensors, root / "model.safetensors")

    return damage


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return single_file(lambda tensors: tensors.update({name: tensor}))


def removed(*names: str) -> Callable[[Path], None]:
    return single_file(lambda tensors: [tensors.pop(name) for name in names])


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrite the header of the second shard; the payload stays."""

    def damage(root: Path) -> None:
        data = (root / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        value = json.loads(data[8 : 8 + length])
        result = change(value)
        text = result if isinstance(result, bytes) else json.dumps(value).encode()
        (root / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def field(name: str, value: Any) -> Callable[[Path], None]:
    """Set one field of the first tensor of the second shard's header."""

    def change(entries: dict[str, Any]) -> None:
        entries[first(entries)][name] = value

    return header(change)


def first(entries: dict[str, Any]) -> str:
    return min(
        (k for k in entries if k != "__metadata__"), key=lambda k: entries[k]["data_offsets"]
    )


def rename(new: str) -> Callable[[Path], None]:
    def change(entries: dict[str, Any]) -> None:
        entries[new] = entries.pop(first(entries))

    return header(change)


def shard_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda root: (root / SHARD).write_bytes(  # type: ignore[return-value]
        change((root / SHARD).read_bytes())
    )


def duplicate_key(entries: dict[str, Any]) -> bytes:
    name = first(entries)
    return json.dumps(entries).encode()[:-1] + f',"{name}":{json.dumps(entries[name])}}}'.encode()


def overlapping(entries: dict[str, Any]) -> None:
    by_shape: dict[tuple[int, ...], str] = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            other = by_shape.setdefault(tuple(entry["shape"]), name)
            entry["data_offsets"] = entries[other]["data_offsets"]


def link(name: str, target: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)

    return damage


def move_out(name: str) -> Callable[[Path], None]:
    """Move a file out of the folder and link to it."""

    def damage(root: Path) -> None:
        target = root.parent / f"outside-{name}"
        (root / name).rename(target)
        (root / name).symlink_to(target)

    return damage


def fifo(name: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / name).unlink()
        os.mkfifo(root / name)

    return damage


def folder_instead(name: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / name).unlink()
        (root / name).mkdir()

    return damage


def delete(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def duplicate_across_shards(root: Path) -> None:
    other = root / "model-00001-of-00003.safetensors"
    tensors = load_file(other)
    extra = load_file(root / SHARD)
    name = min(extra)
    save_file(tensors | {name: extra[name]}, other)


def index_and_shard_missing(root: Path) -> None:
    (root / INDEX).unlink()
    (root / SHARD).unlink()


def drop_from_index(root: Path) -> None:
    edit_json(INDEX, lambda value: value["weight_map"].pop(ROUTER))(root)


def index_only(root: Path) -> None:
    edit_json(INDEX, lambda value: value["weight_map"].update({"model.extra.weight": SHARD}))(root)


def half_fused(root: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(4, 192, 64)

    single_file(change)(root)


CASES: tuple[Case, ...] = (
    # config.json
    Case(name="no config", damage=delete("config.json"), named=("config.json", "missing")),
    Case(name="config empty", damage=content("config.json", b""), named=("config.json", "JSON")),
    Case(name="config cut", damage=content("config.json", b'{"a": 1'), named=("config.json",)),
    Case(name="config list", damage=content("config.json", b"[]"), named=("config.json", "object")),
    Case(name="config utf-8", damage=content("config.json", b'{"\xff": 1}'), named=("UTF-8",)),
    Case(
        name="config nested", damage=content("config.json", b"[" * 100_000), named=("config.json",)
    ),
    Case(
        name="config long number",
        damage=content("config.json", b'{"vocab_size": ' + b"9" * 10_000 + b"}"),
        named=("config.json",),
    ),
    Case(
        name="config huge",
        damage=content("config.json", b'{"a": "' + b"x" * 5_000_000 + b'"}'),
        named=("config.json", "larger"),
    ),
    Case(
        name="config key twice",
        damage=content("config.json", b'{"vocab_size": 1, "vocab_size": 2}'),
        named=("config.json", "vocab_size", "twice"),
    ),
    Case(
        name="config NaN",
        damage=content("config.json", b'{"a": NaN}'),
        named=("config.json", "NaN"),
    ),
    Case(name="config folder", damage=folder_instead("config.json"), named=("config.json",)),
    Case(name="config fifo", damage=fifo("config.json"), named=("config.json", "regular")),
    Case(name="config link out", damage=move_out("config.json"), named=("config.json", "leaves")),
    Case(name="config auto_map", damage=config(auto_map={"A": "b.c"}), named=("auto_map",)),
    Case(
        name="config nested auto_map",
        damage=config(rope_parameters={"x": [{"auto_map": 1}]}),
        named=("auto_map",),
    ),
    Case(
        name="tokenizer auto_map",
        damage=edit_json(
            "tokenizer_config.json", lambda v: v.update(auto_map={"AutoTokenizer": 1})
        ),
        named=("tokenizer_config.json", "auto_map"),
    ),
    Case(
        name="tokenizer config not JSON",
        damage=content("tokenizer_config.json", b"{"),
        named=("tokenizer_config.json",),
    ),
    Case(
        name="private key",
        damage=config(_attn_implementation_internal="evil/repo"),
        named=("_attn_implementation_internal",),
    ),
    Case(name="no vocab_size", damage=without("vocab_size"), named=("vocab_size", "missing")),
    Case(name="no experts", damage=without("num_local_experts"), named=("num_local_experts",)),
    Case(name="no layers", damage=without("num_hidden_layers"), named=("num_hidden_layers",)),
    Case(name="no top-k", damage=without("num_experts_per_tok"), named=("num_experts_per_tok",)),
    Case(name="size is text", damage=config(hidden_size="64"), named=("hidden_size", "'64'")),
    Case(name="size is true", damage=config(num_hidden_layers=True), named=("num_hidden_layers",)),
    Case(name="size is a float", damage=config(vocab_size=260.0), named=("vocab_size",)),
    Case(name="size negative", damage=config(intermediate_size=-96), named=("intermediate_size",)),
    Case(name="size huge", damage=config(num_hidden_layers=10**30), named=("num_hidden_layers",)),
    Case(name="many layers", damage=config(num_hidden_layers=10**9), named=("layer 2 of",)),
    Case(name="many experts", damage=config(num_local_experts=10**9), named=("num_local_experts",)),
    Case(name="top-k too large", damage=config(num_experts_per_tok=5), named=("4 experts",)),
    Case(name="heads", damage=config(num_key_value_heads=3), named=("num_key_value_heads",)),
    Case(name="head_dim", damage=config(head_dim=-1), named=("head_dim",)),
    Case(
        name="no head_dim, odd heads",
        damage=config(head_dim=None, num_attention_heads=6),
        named=("num_attention_heads",),
    ),
    Case(name="tied is text", damage=config(tie_word_embeddings="no"), named=("tie_word",)),
    Case(name="eps is text", damage=config(rms_norm_eps="small"), named=("rms_norm_eps",)),
    Case(name="rope is a list", damage=config(rope_parameters=[1]), named=("rope_parameters",)),
    Case(
        name="rope_theta is text",
        damage=config(rope_parameters={"rope_theta": "1e4", "rope_type": "default"}),
        named=("rope_theta", "1e4"),
    ),
    Case(
        name="rope_type is a number",
        damage=config(rope_parameters={"rope_theta": 1e4, "rope_type": 1}),
        named=("rope_parameters.rope_type",),
    ),
    Case(name="dropout is text", damage=config(attention_dropout="0"), named=("dropout",)),
    Case(name="eos is text", damage=config(eos_token_id="</s>"), named=("eos_token_id",)),
    Case(name="no architectures", damage=without("architectures"), named=("architectures",)),
    Case(name="two architectures", damage=config(architectures=["A", "B"]), named=("one name",)),
    Case(name="model_type", damage=config(model_type="llama"), named=("model_type", "mixtral")),
    Case(
        name="unsupported",
        damage=config(architectures=["LlamaForCausalLM"], model_type="llama"),
        named=("LlamaForCausalLM", "MixtralForCausalLM"),
        kind=UnsupportedError,
    ),
    Case(
        name="activation",
        damage=config(hidden_act="gelu"),
        named=("hidden_act", "gelu"),
        kind=UnsupportedError,
    ),
    *(
        Case(
            name=f"quantised {method}",
            damage=config(quantization_config={"quant_method": method}),
            named=("quantization_config", method),
            kind=UnsupportedError,
        )
        for method in ("fp8", "gptq", "awq", "bitsandbytes")
    ),
    Case(
        name="dtype in config",
        damage=config(dtype="float8_e4m3fn"),
        named=("dtype", "float8_e4m3fn"),
        kind=UnsupportedError,
    ),
    Case(
        name="renamed without moesvd",
        damage=config(architectures=["MixtralMoESVDForCausalLM"]),
        named=("moesvd", "absent"),
    ),
    Case(name="moesvd without rename", damage=config(moesvd={}), named=("moesvd", "present")),
    Case(
        name="moesvd version",
        damage=config(
            architectures=["MixtralMoESVDForCausalLM"], moesvd={"format_version": 2, "layers": {}}
        ),
        named=("format_version",),
    ),
    Case(
        name="moesvd layer key",
        damage=config(
            architectures=["MixtralMoESVDForCausalLM"],
            moesvd={"format_version": 1, "layers": {"9" * 5000: {}}},
        ),
        named=("config.json",),
    ),
    Case(
        name="moesvd giant group",
        damage=config(
            architectures=["MixtralMoESVDForCausalLM"],
            moesvd={
                "format_version": 1,
                "layers": {
                    "0": {
                        "form": "shared-v",
                        "rank_gate_up": 4,
                        "rank_down": 4,
                        "expert_slot": [0, 0, 0, 0],
                        "slot_group": [10**12],
                    }
                },
            },
        ),
        named=("slot_group",),
    ),
    Case(
        name="moesvd tensors absent",
        damage=config(
            architectures=["MixtralMoESVDForCausalLM"],
            moesvd={"format_version": 1, "layers": {"1": {"form": "narrow", "width": 8}}},
        ),
        named=("block_sparse_moe.experts.0.w1.weight", "[96, 64]", "[8, 64]"),
    ),
    # Files that are never opened
    *(
        Case(name=f"{file}", damage=content(file, b"\x80\x04."), named=(file,))
        for file in ("pytorch_model.bin", "x.pt", "x.pth", "x.pkl", "modeling_x.py", "X.BIN")
    ),
    # The index
    Case(name="index cut", damage=content(INDEX, b'{"weight_map"'), named=(INDEX,)),
    Case(name="index is a list", damage=content(INDEX, b"[1]"), named=(INDEX, "object")),
    Case(name="index without map", damage=content(INDEX, b"{}"), named=(INDEX, "weight_map")),
    Case(
        name="index map is a list",
        damage=content(INDEX, b'{"weight_map": [1]}'),
        named=(INDEX, "weight_map"),
    ),
    Case(name="index to a number", damage=weight_map(to=7), named=(INDEX, ROUTER)),
    Case(name="index to ../", damage=weight_map(to="../a.safetensors"), named=(ROUTER, "../a")),
    Case(name="index absolute", damage=weight_map(to="/etc/hostname"), named=("/etc/hostname",)),
    Case(
        name="index absolute safetensors",
        damage=weight_map(to="/tmp/a.safetensors"),
        named=(ROUTER, "/tmp/a.safetensors"),
    ),
    Case(
        name="index into a subfolder", damage=weight_map(to="sub/a.safetensors"), named=("sub/a",)
    ),
    Case(name="index backslash", damage=weight_map(to="..\\a.safetensors"), named=(ROUTER,)),
    Case(name="index zero byte", damage=weight_map(to="a\0.safetensors"), named=(ROUTER,)),
    Case(name="index to nothing", damage=weight_map(to=".safetensors"), named=(".safetensors",)),
    Case(
        name="index to a long name",
        damage=weight_map(to="a" * 5000 + ".safetensors"),
        named=("aaaa",),
    ),
    Case(name="index to a pickle", damage=weight_map(to="weights.bin"), named=("weights.bin",)),
    Case(name="index to a missing file", damage=weight_map(to="b.safetensors"), named=("b.safe",)),
    Case(name="index to the wrong shard", damage=weight_map(to=SHARD), named=(ROUTER,)),
    Case(name="tensor not in the index", damage=drop_from_index, named=(ROUTER,)),
    Case(name="tensor only in the index", damage=index_only, named=("model.extra.weight",)),
    Case(name="shard missing", damage=delete(SHARD), named=(SHARD, "missing")),
    Case(name="index and shard missing", damage=index_and_shard_missing, named=("2 of 3",)),
    Case(
        name="tensor in two shards",
        damage=duplicate_across_shards,
        named=("model-00001-of-00003.safetensors",),
    ),
    Case(
        name="stray single file",
        damage=lambda root: (root / "model.safetensors").write_bytes(b"x"),
        named=("model.safetensors",),
    ),
    Case(
        name="stray shard",
        damage=lambda root: (root / "model-00004-of-00004.safetensors").write_bytes(b"x"),
        named=("model-00004-of-00004.safetensors",),
    ),
    # Links and special files
    Case(name="shard links out", damage=move_out(SHARD), named=(SHARD, "leaves")),
    Case(name="shard links nowhere", damage=link(SHARD, "gone"), named=(SHARD, "missing")),
    Case(name="shard links to itself", damage=link(SHARD, SHARD), named=(SHARD,)),
    Case(name="shard links to a device", damage=link(SHARD, "/dev/zero"), named=(SHARD,)),
    Case(name="shard is a folder", damage=folder_instead(SHARD), named=(SHARD, "regular")),
    Case(name="shard is a fifo", damage=fifo(SHARD), named=(SHARD, "regular")),
    # Safetensors headers
    Case(name="shard empty", damage=content(SHARD, b""), named=(SHARD, "0 bytes")),
    Case(name="shard of 7 bytes", damage=content(SHARD, b"1234567"), named=(SHARD, "7 bytes")),
    Case(
        name="header length 2^63",
        damage=shard_bytes(lambda d: b"\xff" * 8 + d[8:]),
        named=(SHARD, "header length"),
    ),
    Case(
        name="header length 0",
        damage=shard_bytes(lambda d: b"\0" * 8 + d[8:]),
        named=(SHARD, "header length"),
    ),
    Case(name="header cut", damage=shard_bytes(lambda d: d[:100]), named=(SHARD, "truncated")),
    Case(name="payload cut", damage=shard_bytes(lambda d: d[:-1]), named=(SHARD, "truncated")),
    Case(
        name="bytes after the payload",
        damage=shard_bytes(lambda d: d + b"x"),
        named=(SHARD, "longer"),
    ),
    Case(name="header is a list", damage=header(lambda _: b"[]"), named=(SHARD, "object")),
    Case(name="header not JSON", damage=header(lambda _: b"{:}"), named=(SHARD, "JSON")),
    Case(name="header nested", damage=header(lambda _: b'{"a":' * 50_000), named=(SHARD,)),
    Case(name="tensor twice in a header", damage=header(duplicate_key), named=(SHARD, "twice")),
    Case(
        name="metadata not text",
        damage=header(lambda h: h.update(__metadata__={"a": 1})),
        named=(SHARD, "__metadata__"),
    ),
    Case(name="dtype unknown", damage=field("dtype", "F7"), named=(SHARD, "F7")),
    Case(name="dtype is a list", damage=field("dtype", ["F32"]), named=(SHARD, "dtype")),
    Case(name="shape negative", damage=field("shape", [-4, 64]), named=(SHARD, "shape")),
    Case(name="shape zero", damage=field("shape", [0, 64]), named=(SHARD, "shape")),
    Case(name="shape true", damage=field("shape", [True, 64]), named=(SHARD, "shape")),
    Case(name="shape overflow", damage=field("shape", [2**40, 2**40]), named=(SHARD, "shape")),
    Case(name="offsets reversed", damage=field("data_offsets", [8, 0]), named=(SHARD, "offsets")),
    Case(name="offsets float", damage=field("data_offsets", [0.0, 8]), named=(SHARD, "offsets")),
    Case(name="offsets short", damage=field("data_offsets", [0]), named=(SHARD, "offsets")),
    Case(name="entry with a stray key", damage=field("extra", 1), named=(SHARD, "extra")),
    Case(name="overlap", damage=header(overlapping), named=(SHARD, "starts at")),
    Case(name="name with ..", damage=rename("../../etc/x"), named=(SHARD, "../../etc/x")),
    Case(name="name with control", damage=rename("a\x1b[2Jb"), named=(SHARD, "a\\x1b")),
    Case(name="name empty", damage=rename(""), named=(SHARD, "''")),
    Case(name="name long", damage=rename("a" * 600), named=(SHARD, "aaa")),
    # Tensors against the config
    Case(name="expert missing", damage=removed(EXPERT), named=(EXPERT, "layer 1")),
    Case(name="router missing", damage=removed(ROUTER), named=(ROUTER,)),
    Case(name="norm missing", damage=removed("model.norm.weight"), named=("model.norm.weight",)),
    Case(name="lm_head missing", damage=removed("lm_head.weight"), named=("lm_head.weight",)),
    Case(
        name="expert shape",
        damage=replaced(EXPERT, torch.zeros(95, 64)),
        named=("model.safetensors", EXPERT, "[95, 64]", "[96, 64]"),
    ),
    Case(name="expert transposed", damage=replaced(EXPERT, torch.zeros(64, 96)), named=(EXPERT,)),
    Case(name="router shape", damage=replaced(ROUTER, torch.zeros(5, 64)), named=(ROUTER,)),
    Case(
        name="attention shape",
        damage=replaced("model.layers.0.self_attn.k_proj.weight", torch.zeros(64, 64)),
        named=("model.layers.0.self_attn.k_proj.weight",),
    ),
    Case(
        name="norm shape",
        damage=replaced("model.norm.weight", torch.zeros(64, 1)),
        named=("model.norm.weight",),
    ),
    Case(
        name="embedding shape",
        damage=replaced("model.embed_tokens.weight", torch.zeros(259, 64)),
        named=("model.embed_tokens.weight",),
    ),
    Case(name="vocabulary disagrees", damage=config(vocab_size=261), named=("embed_tokens",)),
    Case(name="width disagrees", damage=config(intermediate_size=97), named=("w1", "[97, 64]")),
    Case(name="fewer layers", damage=config(num_hidden_layers=1), named=("model.layers.1.",)),
    Case(name="more layers", damage=config(num_hidden_layers=3), named=("model.layers.2.",)),
    Case(name="fewer experts", damage=config(num_local_experts=3), named=("block_sparse_moe",)),
    Case(name="more experts", damage=config(num_local_experts=5), named=("experts.4",)),
    Case(
        name="unknown tensor",
        damage=replaced("model.layers.0.extra.weight", torch.zeros(3)),
        named=("model.layers.0.extra.weight",),
    ),
    Case(
        name="stray factor",
        damage=replaced(
            "model.layers.0.block_sparse_moe.experts.moesvd.v_gate_up", torch.zeros(8, 64)
        ),
        named=("moesvd.v_gate_up",),
    ),
    Case(name="half fused", damage=half_fused, named=("model.layers.0.mlp",)),
    Case(
        name="int8 weights",
        damage=replaced(EXPERT, torch.zeros(96, 64, dtype=torch.int8)),
        named=(EXPERT, "I8"),
        kind=UnsupportedError,
    ),
    Case(
        name="fp8 weights",
        damage=replaced(EXPERT, torch.zeros(96, 64).to(torch.float8_e4m3fn)),
        named=(EXPERT, "F8_E4M3"),
        kind=UnsupportedError,
    ),
    Case(
        name="fp64 weights",
        damage=replaced(EXPERT, torch.zeros(96, 64, dtype=torch.float64)),
        named=(EXPERT, "F64"),
        kind=UnsupportedError,
    ),
)
