"""Package metadata. Tools (ruff, pytest, the build backend) are configured in pyproject.toml."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_INIT = (_ROOT / "latentlab/__init__.py").read_text()
_VERSION = re.search(r'^__version__ = "(.+)"$', _INIT, re.MULTILINE)[1]

# Pallas changes with every minor release. In 0.10.0 an abstract device does not know its platform.
_JAX = ">=0.10.1,<0.13"

_EXTRAS = {
  "arrow": ["pyarrow>=20,<27"],
  "audio": ["jiwer>=4,<5", "pystoi>=0.4,<0.5"],
  "cuda13": [f"jax[cuda13]{_JAX}"],
  "tpu": [f"jax[tpu]{_JAX}"],
  "images": ["scikit-learn>=1.6,<2"],
  "interop": ["safetensors>=0.5,<1"],
  "logging": ["tensorboardX>=2.6.2,<3"],
  "notebooks": ["ipykernel>=6.29,<8", "jupyterlab>=4.3,<5"],
}
# What tests/parity compares with; and torchscale 0.3.0, which pins old fairscale and timm, needed
# for nothing here: `pip install --no-deps torchscale==0.3.0`.
_EXTRAS["parity"] = ["torch==2.13.*", "transformers>=5.20,<6"]
_EXTRAS["test"] = [
  "beartype>=0.20,<1",
  "hypothesis>=6.100,<7",
  "ipykernel>=6.29,<8",
  # Compiles kernels for a TPU that is not there.
  "libtpu>=0.0.42,<0.1; sys_platform == 'linux' and platform_machine == 'x86_64'",
  "nbclient>=0.10,<1",
  "nbformat>=5.10,<6",
  "pytest>=8.3,<10",
  "pytest-xdist>=3.6,<4",
  "ruff>=0.12,<1",
  *_EXTRAS["arrow"],
  *_EXTRAS["audio"],
  *_EXTRAS["images"],
  *_EXTRAS["interop"],
  *_EXTRAS["logging"],
]

setuptools.setup(
  name="latentlab",
  version=_VERSION,
  description="Ten papers on sequence models, on one spine of JAX, Flax and Pallas.",
  long_description=(_ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  author="The latentlab authors",
  license="Apache-2.0",
  packages=setuptools.find_packages(include=["latentlab*", "pallas_kernels*"]),
  package_data={"pallas_kernels": ["README.md", "*/README.md"]},
  python_requires=">=3.11",
  install_requires=[
    f"jax{_JAX}",
    "absl-py>=2.1,<3",
    "flax>=0.12.6,<0.13",
    "grain>=0.2.15,<0.3",
    "jaxtyping>=0.3.2,<0.4",
    "matplotlib>=3.9,<4",
    "ml_collections>=1.1,<2",
    "numpy>=2.0,<3",
    "scipy>=1.17,<2",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=11,<14",
    "tokenizers>=0.21,<0.24",
    "tqdm>=4.66,<5",
  ],
  extras_require=_EXTRAS,
)
