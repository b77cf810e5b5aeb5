"""Package metadata. Tool settings stand in pyproject.toml, exact versions in constraints/."""

from setuptools import find_packages, setup

# A training step and generation import jax, flax and optax only; data, checkpoints and reports need
# the rest. The lower bounds are the oldest versions that the tests run on.
CORE = [
    'jax>=0.10.2',
    'flax>=0.12.8',
    'optax>=0.2.8',
    'numpy>=2.0',
    'jaxtyping>=0.3.11',
    'orbax-checkpoint>=0.12.8',
    'grain>=0.2.18',
    'tensorflow-datasets>=4.9.10',
    'array_record>=0.8.6',
    'sentencepiece>=0.2.3',
    'tyro>=1.0.17',
    'tensorboardX>=2.6.5',
    'rich>=15.0',
    'tqdm>=4.67',
    'etils>=1.14',
    'ml_dtypes>=0.6',
    'absl-py>=2.5',
    'matplotlib>=3.11',
    'scipy>=1.17',
]

SERVE = ['starlette>=1.10', 'uvicorn>=0.54', 'llguidance>=1.9']
# Models of others: GGUF files, tokenizer.json, chat templates.
WEIGHTS = ['gguf>=0.19', 'tokenizers>=0.23', 'jinja2>=3.1.6']

# Files of text: Parquet, and Zstandard, which Python 3.14 has itself.
FORMATS = ['pyarrow>=20', 'zstandard>=0.23; python_version < "3.14"']

# Of what a model writes.
SCORES = ['rouge_score>=0.1.2', 'sacrebleu>=2.6']

EXTRAS = {
    'tpu': ['jax[tpu]>=0.10.2'],
    # Of the driver's age: tools/accelerator.py.
    'cuda12': ['jax[cuda12]>=0.10.2'],
    'cuda13': ['jax[cuda13]>=0.10.2'],
    'serve': SERVE,
    # Tasks, and lm-eval itself.
    'eval': ['lm-eval>=0.4.13', *SCORES],
    # Comparing objectives: probes and baselines.
    'compare': ['scikit-learn>=1.9'],
    'formats': FORMATS,
    'weights': WEIGHTS,
    # The exact release: goldens name it, and it decides which build of torch pip takes.
    # cyllama is llama.cpp, which reads the GGUF files that are written here.
    # trl is what losses of preferences and of policies are compared with.
    'parity': [
        *('torch==2.13.0', 'transformers>=5.23', 'cyllama>=0.2.18', 'trl>=1.16', 'peft>=0.21'),
        *('datasets>=5.2', 'pyyaml>=6.0'),
        # Clients of the server; click runs the command line of llm.
        *('lm-eval[api]>=0.4.13', 'langchain-openai>=1.7', 'llm>=0.36', 'click>=8.5'),
    ],
    'test': [
        # Newer than that of venv: the tests build a wheel.
        'setuptools>=77',
        *('pytest>=9.2', 'pytest-xdist>=3.8', 'hypothesis>=6.170', 'ruff>=0.17', 'mypy>=2.4'),
        *SERVE,
        *WEIGHTS,
        *FORMATS,
        *SCORES,
        *('openai>=3.57', 'jsonschema>=4.26', 'tiktoken>=0.14', 'safetensors>=0.8'),
    ],
    # --wandb of experiments.pretrain.
    'wandb': ['wandb>=0.22'],
    # Pages of the API, for which every module is imported.
    'docs': ['pdoc>=16.0', *SERVE, *WEIGHTS],
}

# A wheel has these within the package, where they hide nobody's `configs`; `llama-jax` finds them
# there (llama_jax/installed.py).
SCRIPTS = {f'llama_jax.scripts.{top}': top for top in ('configs', 'experiments', 'tpu')}

setup(
    name='llama_jax',
    version='0.1.0',
    description='One LLaMA decoder, many objectives, one typed configuration, in JAX',
    author='The llama_jax authors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11',
    packages=[*find_packages(include=['llama_jax', 'llama_jax.*']), *SCRIPTS],
    package_dir=SCRIPTS,
    entry_points={'console_scripts': ['llama-jax = llama_jax.__main__:main']},
    package_data={'llama_jax': ['py.typed'], 'llama_jax.serve': ['page/*']},
    install_requires=CORE,
    extras_require=EXTRAS,
)
