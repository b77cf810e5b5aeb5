"""Every published size of the LLaMA family with its training recipe."""
