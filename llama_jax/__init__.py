"""One LLaMA decoder, many objectives, one typed configuration: JAX from a laptop to TPU pods."""
