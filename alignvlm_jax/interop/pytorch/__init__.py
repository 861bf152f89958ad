"""The PyTorch AlignVLM: the "remote code" files that an exported folder carries and transformers loads.

Each file imports torch, transformers, numpy, PIL and its neighbours only, never this package: `trust_remote_code` loads
it from a folder in which the package is not installed. The tiling rules, what joins tiles and the conversion to RGB are
the very files that training uses, copied under another name; the shims here give them that name inside the package.
"""

REMOTE_CODE_FILES: dict[str, str] = {
    "configuration_alignvlm.py": "interop/pytorch/configuration_alignvlm.py",
    "modeling_alignvlm.py": "interop/pytorch/modeling_alignvlm.py",
    "image_processing_alignvlm.py": "interop/pytorch/image_processing_alignvlm.py",
    "processing_alignvlm.py": "interop/pytorch/processing_alignvlm.py",
    "tiling_alignvlm.py": "data/tiling.py",
    "resampling_alignvlm.py": "data/resampling.py",
    "rgb_alignvlm.py": "data/rgb.py",
}
"""File in an exported folder -> the file it is a copy of, relative to the package `alignvlm_jax`."""
