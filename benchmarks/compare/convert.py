"""The model in the forms that peers read: `python -m benchmarks.compare.convert KIND FOLDER TARGET`. Runs where the peer lives.

`openvino` is optimum-intel's own export, which OpenVINO GenAI documents. `gguf` is written with llama.cpp's package `gguf`: its
names, its order of rotary dimensions. `gguf-q8_0` and `gguf-q4_k_m` are what llama.cpp itself makes of that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_FTYPES: Final = {"gguf-q8_0": 7, "gguf-q4_k_m": 15}  # LLAMA_FTYPE_MOSTLY_Q8_0, LLAMA_FTYPE_MOSTLY_Q4_K_M


def converted(kind: str, folder: Path, python: str) -> Path:
    """The form, beside the folder; made if it is not there yet, by an interpreter that has the packages for it.

    Raises:
        RuntimeError: it cannot be made.
    """
    target = folder.with_name(f"{folder.name}.{kind}")
    if target.exists():
        return target
    source = converted("gguf", folder, python) if kind in _FTYPES else folder
    part = target.with_name(f"{target.name}.part")
    print(f"converting {folder.name} to {kind} (once)", file=sys.stderr, flush=True)
    command = [python, "-m", "benchmarks.compare.convert", kind, str(source), str(part)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"{folder.name} cannot be converted to {kind}: {last}")
    part.rename(target)
    return target


def main() -> None:
    kind, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if kind == "openvino":
        _openvino(source, target)
    elif kind == "gguf":
        _gguf(source, target)
    else:
        _quantised(source, target, _FTYPES[kind])


def _openvino(folder: Path, target: Path) -> None:
    from optimum.intel import OVModelForCausalLM

    OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, load_in_8bit=False).save_pretrained(target)


def _quantised(source: Path, target: Path, ftype: int) -> None:
    import ctypes

    import llama_cpp as llama

    params = llama.llama_model_quantize_default_params()
    params.ftype = ftype
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot quantise {source}")


def _gguf(folder: Path, target: Path) -> None:
    import gguf
    import numpy as np

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    _describe(writer, config)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, stored, raw in _tensors(folder):
        count = next((count for part, count in heads.items() if part in name), 0)
        tensor = neighbours(raw, count) if count else raw
        target_name = names.get_name(name, try_suffixes=(".weight",))
        if tensor.ndim == 1:
            exact = (tensor.astype(np.uint32) << 16).view(np.float32) if stored == "BF16" else tensor
            writer.add_tensor(target_name, exact)
        elif stored == "BF16":
            writer.add_tensor(target_name, tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(target_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours(weight: Any, heads: int) -> Any:
    """Reorder the rows of a query or key projection, [heads * head_dim, inputs].

    transformers rotates dimension i of a head with i + head_dim / 2, llama.cpp rotates 2 i with 2 i + 1.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def _describe(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # Plain words, whatever the tokens are: llama-server holds back tokens that end within a character, and forgets their ids.
    writer.add_token_list([f"w{index}" for index in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["a b"])  # llama.cpp wants one; texts are never tokenized here
    writer.add_add_bos_token(value=False)


def _tensors(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """(name, dtype, values); bfloat16 as the upper halves of float32."""
    import numpy as np

    file = folder / "model.safetensors"
    data = np.memmap(file, np.uint8, mode="r")
    size = int(data[:8].view(np.uint64)[0])
    for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            values = data[begin:end].view(np.uint16 if entry["dtype"] == "BF16" else np.float32)
            yield name, entry["dtype"], values.reshape(entry["shape"])


if __name__ == "__main__":
    main()
