"""Text out of a decoder: sampling, the decode loop, and batches of prompts."""
