"""Model folders that somebody made to do harm, or that are broken. No torch: a safetensors file is a few bytes of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "dtype": "float32",
}
TEMPLATES = "additional_chat_templates"
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
}


def header(tensors: Any, data: bytes) -> bytes:
    """A safetensors file with this header, true or not."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin: int = 0, end: int = 32, shape: Any = (8,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


WEIGHTS = header({"a": tensor(), "b": tensor(32, 64)}, bytes(64))


def good(folder: Path) -> Path:
    """The folder that every case spoils."""
    folder.mkdir(parents=True)
    write(folder, "config.json", CONFIG)
    write(folder, "tokenizer.json", TOKENIZER)
    write(folder, "tokenizer_config.json", {"model_max_length": 10**30, "chat_template": "{{ messages }}"})
    write(folder, "generation_config.json", {"eos_token_id": [1, 2]})
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder, name, json.loads((folder / name).read_bytes()) | changes)


def put(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder, name, value)


def huge(name: str, size: int) -> Callable[[Path], None]:
    """A file of that size that takes no room on the disk."""
    return lambda folder: os.truncate(folder / name, size) if (folder / name).exists() else _sparse(folder / name, size)


def _sparse(file: Path, size: int) -> None:
    with file.open("wb") as stream:
        stream.truncate(size)


def link(name: str, target: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something that is no regular file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def weights(data: bytes) -> Callable[[Path], None]:
    return put("model.safetensors", data)


def sharded(index: Any, **shards: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write(folder, "model.safetensors.index.json", index)
        for name, data in shards.items():
            (folder / f"{name}.safetensors").write_bytes(data)

    return spoil


def outside(folder: Path) -> None:
    """An index that names a file beside the folder."""
    (folder.parent / "secret.safetensors").write_bytes(WEIGHTS)
    sharded({"weight_map": {"a": "../secret.safetensors", "b": "../secret.safetensors"}})(folder)


def link_outside(folder: Path, name: str = "generation_config.json") -> None:
    (folder.parent / "secret").write_text("{}")
    link(name, str(folder.parent / "secret"))(folder)


def templates(**texts: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / TEMPLATES).mkdir()
        for name, text in texts.items():
            (folder / TEMPLATES / f"{name}.jinja").write_bytes(text)

    return spoil


def templates_outside(folder: Path) -> None:
    """The sub-folder is a link, and the files in it are none."""
    other = folder.parent / "other"
    other.mkdir()
    (other / "x.jinja").write_text("secret")
    link(TEMPLATES, str(other))(folder)


def link_to_foreign_blobs(folder: Path) -> None:
    """The hub's way to its blobs, from a folder that is no snapshot."""
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    (blobs / "x").write_bytes(WEIGHTS)
    link("model.safetensors", "../../blobs/x")(folder)


def only(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name) and None


def nested(depth: int, key: str, value: Any) -> dict[str, Any]:
    result: dict[str, Any] = {key: value}
    for _ in range(depth):
        result = {"inner": [result]}
    return result


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    # -- code and redirections
    "auto_map": (edit("config.json", auto_map={"AutoModel": "x.Y"}), "sets 'auto_map', which names Python code"),
    "auto_map of another repository": (edit("config.json", auto_map={"AutoConfig": "evil/x--x.Y"}), "sets 'auto_map'"),
    "auto_map of a tokenizer": (edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), "sets 'auto_map'"),
    "nested auto_map": (edit("config.json", **nested(5, "auto_map", {})), "sets 'auto_map'"),
    "nested trust_remote_code": (edit("config.json", **nested(7, "trust_remote_code", True)), "sets 'trust_remote_code'"),
    "trust_remote_code in a sub-configuration": (
        edit("config.json", text_config={"trust_remote_code": True}),
        "trust_remote_code",
    ),
    "kernels of the hub": (edit("config.json", _attn_implementation_internal="evil/kernel"), "_attn_implementation_internal"),
    "kernels, by the public key": (edit("config.json", attn_implementation="evil/kernel"), "sets 'attn_implementation'"),
    "kernels of a sub-configuration": (edit("config.json", text_config={"_attn_implementation": "a/b"}), "_attn_implementation"),
    "kernels for experts": (edit("config.json", _experts_implementation_internal="a/b"), "_experts_implementation_internal"),
    "kernels, all": (edit("config.json", use_kernels=True), "sets 'use_kernels'"),
    "pipelines": (edit("config.json", custom_pipelines={"x": {"impl": "x.Y"}}), "sets 'custom_pipelines'"),
    "generation by code": (edit("generation_config.json", custom_generate="evil/x"), "sets 'custom_generate'"),
    "another configuration": (edit("config.json", configuration_files=["config.4.0.0.json"]), "sets 'configuration_files'"),
    "other weights": (edit("config.json", transformers_weights="../x.bin"), "sets 'transformers_weights'"),
    "code in some other JSON file": (put("preprocessor_config.json", {"auto_map": {}}), "sets 'auto_map'"),
    "Python beside the weights": (put("modeling_llama.py", b"raise SystemExit"), "holds Python files"),
    "a library beside the weights": (put("kernel.so", b"\x7fELF"), "holds Python files"),
    "an adapter": (put("adapter_config.json", {"base_model_name_or_path": "evil/x"}), "is an adapter; merge it"),
    "quantised": (edit("config.json", quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "quantised, without a method": (edit("config.json", quantization_config=[1]), r"quantised \(unnamed\)"),
    # -- weights that are no safetensors
    "a pickle": (only("pytorch_model.bin"), "only pytorch_model.bin; convert it"),
    "a pickle, sharded": (only("pytorch_model-00001-of-00002.bin"), "convert it with transformers' save_pretrained"),
    "a checkpoint": (only("model.ckpt"), "only model.ckpt"),
    "numpy": (only("weights.npz"), "only weights.npz"),
    "GGUF": (only("model.gguf"), "only model.gguf"),
    "safetensors of another name": (only("adapter_model.safetensors"), "only adapter_model.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no model.safetensors\.index\.json$"),
    # -- what lies where a file should
    "a directory": (instead("config.json", Path.mkdir), "is no regular file"),
    "a pipe": (instead("config.json", os.mkfifo), "is no regular file"),
    "a device": (link("tokenizer.json", "/dev/zero"), "is no regular file"),
    "a link to a secret": (link_outside, "is a link that leaves the folder"),
    "a link to the system": (link("generation_config.json", "/etc/passwd"), "is a link that leaves the folder"),
    "a link that looks like the hub's": (link_to_foreign_blobs, "is a link that leaves the folder"),
    "a link to nothing": (link("config.json", "nothing"), "cannot be read: No such file"),
    "a link to itself": (link("config.json", "config.json"), "cannot be read: Too many levels"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    # -- sizes
    "a configuration of 2 GB": (huge("config.json", 2**31), "is larger than 1048576 bytes"),
    "a tokenizer of 2 GB": (huge("tokenizer.json", 2**31), "is larger than 67108864 bytes"),
    "a template of 1 MB": (put("chat_template.jinja", b"x" * 2**20), "is larger than 262144 bytes"),
    "a template in the configuration": (
        edit("tokenizer_config.json", chat_template="x" * 300_000),
        "chat template of more than 262144 characters",
    ),
    "a named template": (edit("tokenizer_config.json", chat_template=[{"template": "x" * 300_000}]), "chat template of more"),
    "a hundred templates": (edit("tokenizer_config.json", chat_template=["x"] * 100), "or more than 32$"),
    "a template in a file of its own": (put("chat_template.json", {"chat_template": "x" * 300_000}), "chat template of more"),
    "a large template among others": (templates(tools=b"x" * 300_000), "tools.jinja is larger than 262144 bytes"),
    "many templates": (templates(**{f"t{index}": b"x" for index in range(40)}), "holds more than 32 chat templates"),
    "a template that is a link": (
        lambda folder: templates()(folder) or link_outside(folder, TEMPLATES + "/x.jinja"),
        "leaves the folder",
    ),
    "templates of somebody else": (templates_outside, "is a link that leaves the folder"),
    "a million lists": (put("special_tokens_map.json", b"[" + b"[]," * 1_000_000 + b"[]]"), "more than 500000 values"),
    "a tokenizer of lists": (put("tokenizer.json", b'{"model":[' + b"[]," * 5_000_000 + b"[]]}"), "more than 4000000 values"),
    # -- JSON
    "no JSON": (put("config.json", b"{"), "cannot be read as JSON"),
    "no UTF-8": (put("config.json", b'{"a": "\xff"}'), "cannot be read as JSON"),
    "a list": (put("config.json", b"[]"), "must hold a JSON object"),
    "nested too deep for a parser": (put("config.json", b'{"a":' * 100_000), "cannot be read as JSON"),
    "nested deep": (edit("config.json", **nested(40, "a", 1)), "nested more than 32 levels"),
    "a tokenizer nested deep": (edit("tokenizer.json", pre_tokenizer=nested(40, "a", 1)), "nested more than 32 levels"),
    "a key twice": (put("config.json", b'{"model_type": "llama", "model_type": "evil"}'), "'model_type' stands there twice"),
    "not a number": (put("config.json", b'{"rope_theta": NaN}'), "NaN is no finite number"),
    "infinity, spelled as a number": (put("config.json", b'{"rope_theta": 1e999}'), "1e999 is no finite number"),
    "an integer of 5,000 digits": (put("config.json", b'{"a": ' + b"9" * 5000 + b"}"), "an integer has 5000 digits"),
    # -- numbers
    "hidden_size of 2**40": (
        edit("config.json", hidden_size=2**40),
        "sets hidden_size to '1099511627776'; it must be an integer",
    ),
    "a thousand million layers": (edit("config.json", num_hidden_layers=10**9), "sets num_hidden_layers"),
    "more layers than tensors": (edit("config.json", num_hidden_layers=1000), "promises 1000 layers and the weights hold 2"),
    "a negative vocabulary": (edit("config.json", vocab_size=-1), "sets vocab_size to '-1'"),
    "heads without width": (edit("config.json", head_dim=0), "sets head_dim to '0'"),
    "a context of 10**12": (edit("config.json", max_position_embeddings=10**12), "sets max_position_embeddings"),
    "a size that is text": (edit("config.json", hidden_size="8"), "sets hidden_size to '8'"),
    "a size that is true": (edit("config.json", num_attention_heads=True), "sets num_attention_heads"),
    "a size in a sub-configuration": (edit("config.json", text_config={"hidden_size": 2**40}), "sets hidden_size"),
    "a size of one layer": (edit("config.json", intermediate_size=[16, 2**40]), "sets intermediate_size"),
    "a rope base of nought": (edit("config.json", rope_parameters={"rope_theta": 0.0}), "sets rope_theta"),
    "an ending token that is text": (edit("generation_config.json", eos_token_id="</s>"), "sets eos_token_id"),
    "an ending token of 2**63": (edit("generation_config.json", eos_token_id=[2**63]), "sets eos_token_id"),
    # -- tokenizer
    "a pattern of 10 kB": (
        edit("tokenizer.json", pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+" * 2000}}),
        "the pre_tokenizer of .* has a pattern of 10000 characters",
    ),
    "an endless sequence": (edit("tokenizer.json", normalizer={"normalizers": [{"type": "NFC"}] * 5000}), "has 5001 parts"),
    "a token id of 2**40": (edit("tokenizer.json", model={"vocab": {"a": 2**40}}), "a token id that is no integer"),
    "no tokenizer model": (edit("tokenizer.json", model=None), "has no model"),
    # -- safetensors
    "empty": (weights(b""), "is cut or is no safetensors file"),
    "a header of 2**63": (weights((2**63).to_bytes(8, "little") + b"{}"), "is cut or is no safetensors file"),
    "a header longer than the file": (weights((100).to_bytes(8, "little") + b"{}"), "is cut or is no safetensors file"),
    "a header that is no JSON": (weights(header(b"\x80\x04.", b"")), "header of .* cannot be read as JSON"),
    "a tensor twice": (weights(header(b'{"a": {}, "a": {}}', b"")), "'a' stands there twice"),
    "overlapping": (weights(header({"a": tensor(), "b": tensor(16, 48)}, bytes(48))), "overlaps another or leaves a gap"),
    "a gap": (weights(header({"a": tensor(), "b": tensor(40, 72)}, bytes(72))), "overlaps another or leaves a gap"),
    "offsets beyond the file": (weights(header({"a": tensor(0, 64, (16,))}, bytes(32))), "is cut or has bytes"),
    "hidden bytes": (weights(header({"a": tensor()}, bytes(320))), "is cut or has bytes that belong to no tensor"),
    "negative offsets": (weights(header({"a": tensor(-32, 0)}, bytes(32))), "offsets that are no sizes"),
    "a shape that overflows": (weights(header({"a": tensor(0, 0, (2**32, 2**32))}, b"")), "other offsets than its shape needs"),
    "a shape of 10**20": (weights(header({"a": tensor(0, 0, (10**20, 0))}, b"")), "offsets that are no sizes"),
    "a shape of a thousand dimensions": (
        weights(header({"a": tensor(0, 4, (1,) * 1000)}, bytes(4))),
        "offsets that are no sizes",
    ),
    "a shape that is text": (weights(header({"a": tensor(shape="8")}, bytes(32))), "offsets that are no sizes"),
    "an unknown dtype": (weights(header({"a": tensor(dtype="F8_E4M3", shape=(32,))}, bytes(32))), "is stored as 'F8_E4M3'"),
    "a dtype that is a list": (weights(header({"a": tensor(dtype=[])}, bytes(32))), "is stored as"),
    "a description too many": (weights(header({"a": tensor() | {"code": "x"}}, bytes(32))), "is not described by dtype"),
    "a name of 10 kB": (weights(header({"a" * 10_000: tensor()}, bytes(32))), "a name that no parameter can have"),
    "a name with control characters": (weights(header({"a\x1b[2J": tensor()}, bytes(32))), "a name that no parameter can have"),
    # -- shards
    "a shard beside the folder": (outside, r"names '\.\./secret.safetensors', which is no \*.safetensors in the folder"),
    "an absolute shard": (sharded({"weight_map": {"a": "/etc/x.safetensors"}}), "no .*safetensors in the folder"),
    "a shard that is a pickle": (sharded({"weight_map": {"a": "model.bin"}}), "no .*safetensors in the folder"),
    "a missing shard": (sharded({"weight_map": {"a": "x.safetensors"}}), "names 'x.safetensors', which is missing"),
    "an index without a map": (sharded({"metadata": {}}), "has no weight_map"),
    "an index of numbers": (sharded({"weight_map": {"a": 1}}), "has no weight_map"),
    "an index of another model": (
        sharded({"weight_map": {"a": "x.safetensors", "c": "x.safetensors"}}, x=WEIGHTS),
        "disagree about tensor 'b'",
    ),
    "a tensor in two shards": (
        sharded({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}, x=WEIGHTS, y=WEIGHTS),
        "hold a tensor twice",
    ),
}
"""Name -> (what spoils a good folder, how the sentence reads)."""
