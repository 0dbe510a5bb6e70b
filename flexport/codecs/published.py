"""Which packed forms a published checkpoint has, by what its config says.

The config says what may be there; of each matrix its tensors' names say whether it is. Hence what
lists there are of modules that were left as they are (modules_to_not_convert, ignore, …) need not be
read. Torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flexport.codecs.compressed_tensors import formats_of_groups
from flexport.codecs.forms import Awq, Gptq, Mxfp4, Scaled
from flexport.codecs.layout import Format
from flexport.errors import UnsupportedModel

__all__ = ["formats_of"]

_Fields = Mapping[str, Any]


def formats_of(config: _Fields) -> tuple[Format, ...]:
    """The forms in which a checkpoint with this config.json may have matrices, beside plain numbers.

    Raises UnsupportedModel, naming what flexport can't decode.
    """
    text = config.get("text_config") or {}
    asked = config.get("quantization_config") or text.get("quantization_config")
    if not asked:
        return ()
    method = str(asked.get("quant_method")).lower().replace("_", "-")
    if method in _READERS:
        return _READERS[method](asked)
    hint = _INSTEAD.get(method, "")
    raise UnsupportedModel(
        f"quantization_config: quant_method is {asked.get('quant_method')!r}{hint and f' ({hint})'}; "
        "flexport can run plain weights, and those packed as awq, compressed-tensors, fbgemm_fp8, "
        "fp8, gptq or mxfp4, in which most models are published, too"
    )


def _mxfp4(_: _Fields) -> tuple[Format, ...]:
    return (Mxfp4(),)


def _fp8(asked: _Fields) -> tuple[Format, ...]:
    size = asked.get("weight_block_size")
    block = None if size is None else (int(size[0]), int(size[1]))
    return tuple(
        Scaled(dtype="float8_e4m3fn", suffix=suffix, block=block)
        for suffix in ("_scale_inv", "_scale")
    )


def _gptq(asked: _Fields) -> tuple[Format, ...]:
    bits = asked.get("bits")
    if bits not in (2, 4, 8):
        raise _unsupported("bits", bits, "2, 4 and 8; those of 3 cross words")
    stored = str(asked.get("checkpoint_format") or asked.get("format") or "gptq").lower()
    if stored not in ("gptq", "gptq_v2") or asked.get("is_marlin_format"):
        name = stored if stored not in ("gptq", "gptq_v2") else "marlin"
        raise _unsupported("checkpoint_format", name, "gptq and gptq_v2")
    if asked.get("pack_dtype", "int32") != "int32":
        raise _unsupported("pack_dtype", asked["pack_dtype"], "int32")
    group = _group(asked)
    ordered = bool(asked.get("desc_act"))
    usual = {"bits": bits, "group_size": group or -1, "desc_act": ordered}
    for pattern, own in (asked.get("dynamic") or {}).items():
        for name, value in (own or {}).items():
            if not pattern.startswith("-:") and usual.get(name, value) != value:
                raise _unsupported(f"dynamic: {pattern}: {name}", value, "the same for all modules")
    return (Gptq(bits=bits, group=group, ordered=ordered, zeros_less_one=stored == "gptq"),)


def _awq(asked: _Fields) -> tuple[Format, ...]:
    bits = asked.get("bits", asked.get("w_bit", 4))
    if bits != 4:
        raise _unsupported("bits", bits, "4")
    version = asked.get("version") or asked.get("checkpoint_format") or asked.get("format")
    if str(version or "gemm").lower() != "gemm":
        raise _unsupported("version", version, "gemm")
    if asked.get("backend") == "llm-awq":
        raise _unsupported("backend", "llm-awq", "autoawq's files")
    if not asked.get("zero_point", True):
        raise _unsupported("zero_point", False, "True")
    return (Awq(group=_group(asked)),)


def _group(asked: _Fields) -> int | None:
    size = asked.get("group_size", asked.get("q_group_size", 128))
    if not isinstance(size, int) or size == 0 or size < -1:
        raise _unsupported("group_size", size, "a positive number, and -1 for all features")
    return None if size == -1 else size


def _fbgemm_fp8(_: _Fields) -> tuple[Format, ...]:
    return (Scaled(dtype="float8_e4m3fn", suffix="_scale"),)


_READERS: Mapping[str, Callable[[_Fields], tuple[Format, ...]]] = {
    "awq": _awq,
    "compressed-tensors": formats_of_groups,
    "fbgemm-fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}

_DEQUANTISE = (
    "transformers can load it on a machine with its package, `dequantize()` it and save that"
)

_INSTEAD: Mapping[str, str] = {
    "aqlm": "codebooks",
    "auto-round": "exported as auto_gptq or auto_awq it would have their quant_method",
    "bitnet": "ternary numbers",
    "bitsandbytes": _DEQUANTISE,
    "eetq": _DEQUANTISE,
    "gguf": "a file for llama.cpp",
    "hqq": _DEQUANTISE,
    "modelopt": "NVIDIA's own layout; llm-compressor writes the same numbers as compressed-tensors",
    "quanto": _DEQUANTISE,
    "torchao": _DEQUANTISE,
}
"""What to say of others."""


def _unsupported(field: str, value: object, able: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"quantization_config: {field} is {value!r}; what flexport can decode is {able}"
    )
