"""What the compiler is told in every process of the tests."""

import importlib.metadata

# Most of the time of these tests is the compiler's; shapes are too tiny to gain from its work.
FAST_COMPILATION = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
if importlib.metadata.version('jaxlib').startswith('0.10.'):
    # Compiles in 0.6 of the time. Later versions have no other emitters, and end at the flag.
    FAST_COMPILATION += ' --xla_cpu_use_fusion_emitters=false'
