"""gpt4v_jax as a package: what it needs, and the extras. The exact versions that are tested stand in requirements/."""

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.1",
    "array_record>=0.8",
    "einops>=0.8",
    "flax>=0.12",
    "grain>=0.2.15",
    "importlib_resources>=6.0",  # TFDS 4.9.10 asks for it without saying so
    "jax>=0.10",
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "pillow>=11.0",
    "rich>=13.0",
    "safetensors>=0.5",
    "scikit-learn>=1.5",
    "scipy>=1.14",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",  # works without TensorFlow, which is not needed
    "tokenizers>=0.21",
]
MEDIA = ["av>=14.0", "soundfile>=0.13"]  # clips and sound
SCORES = ["jiwer>=4.0", "sacrebleu>=2.5"]  # of speech and of translation
# Output by a regular expression, choices or a JSON schema. 1.7 and 1.8 take all memory for {"minItems": 1000000000}.
CONSTRAIN = ["llguidance>=1.9.1"]
SERVE = [
    *MEDIA, *CONSTRAIN, "fastapi>=0.115", "idna>=3.10", "prometheus-client>=0.21", "python-multipart>=0.0.20",
    "uvicorn>=0.34",
]  # fmt: skip
TEST = [
    *SCORES,
    *SERVE,
    "httpx>=0.28",  # FastAPI's test client
    "openai>=2.0",  # the client that the server is for
    "trustme>=1.2",  # certificates of a TLS server on this machine
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    # The references of the parity tests and of make bench. torch's CPU build is at hand for Python 3.11 alone.
    'torch==2.13.0; python_version < "3.12"',
    'transformers>=5.0; python_version < "3.12"',
]

setup(
    name="gpt4v_jax",
    version="0.1.0",
    description="One causal transformer over text, images, video and sound, in JAX and Flax",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gpt4v_jax", "gpt4v_jax.*"]),
    package_data={"gpt4v_jax": ["report.html"], "gpt4v_jax.serve": ["page.*", "look.js"]},
    install_requires=CORE,
    extras_require={
        "media": MEDIA,
        "scores": SCORES,
        "serve": SERVE,
        "test": TEST,
        "dev": TEST,
        "gpu": ["jax[cuda12]"],  # driver 525 or later; from 580 on jax[cuda13] works, too
        "tpu": ["jax[tpu]"],
    },
)
