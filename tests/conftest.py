"""Eight virtual CPU devices for every test. This has to stand before the first import of jax."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
# A flag and not JAX_NUM_CPU_DEVICES: a process that a test starts can override it either way.
os.environ['XLA_FLAGS'] = ' '.join(
    (
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
        # Most of the time of these tests is LLVM's; shapes are too tiny to gain from its work.
        '--xla_backend_optimization_level=0',
    )
)
