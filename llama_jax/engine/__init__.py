"""Many requests at once: an engine, its scheduler, and the slots of the KV cache."""
