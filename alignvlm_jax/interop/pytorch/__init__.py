"""The PyTorch AlignVLM: the "remote code" files in an exported folder, which transformers loads.

The files import only torch, transformers, numpy, PIL and each other, never this package: users of an exported folder do
not have it installed. For tiling, resampling and conversion to RGB, the files used in training are copied under
another name. The shims in this folder make them available under that name inside the package, too.
"""

import pathlib
import re

REMOTE_CODE_FILES: dict[str, str] = {
    "configuration_alignvlm.py": "interop/pytorch/configuration_alignvlm.py",
    "modeling_alignvlm.py": "interop/pytorch/modeling_alignvlm.py",
    "generation_alignvlm.py": "interop/pytorch/generation_alignvlm.py",
    "outputs_alignvlm.py": "interop/pytorch/outputs_alignvlm.py",
    "image_processing_alignvlm.py": "interop/pytorch/image_processing_alignvlm.py",
    "processing_alignvlm.py": "interop/pytorch/processing_alignvlm.py",
    "tiling_alignvlm.py": "data/tiling.py",
    "resampling_alignvlm.py": "data/resampling.py",
    "rgb_alignvlm.py": "data/rgb.py",
    "png_alignvlm.py": "data/png.py",
    "tiff_alignvlm.py": "data/tiff.py",
    "samples_alignvlm.py": "data/samples.py",
    "file_kinds_alignvlm.py": "data/file_kinds.py",
}
"""Maps a file in an exported folder to its source, relative to the package `alignvlm_jax`."""

_PACKAGE = pathlib.Path(__file__).parents[2]


def remote_code(name: str) -> str:
    """Returns the text of a file in an exported folder, which imports its neighbors under their names there."""
    text = (_PACKAGE / REMOTE_CODE_FILES[name]).read_text(encoding="utf-8")
    for neighbor, file in REMOTE_CODE_FILES.items():
        if file.startswith("data/"):
            module = "alignvlm_jax." + file.removesuffix(".py").replace("/", ".")
            text = re.sub(
                rf"^from {re.escape(module)} import", f"from .{neighbor[:-3]} import", text, flags=re.MULTILINE
            )
    return text
