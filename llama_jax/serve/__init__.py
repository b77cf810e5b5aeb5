"""An HTTP server in the shape of OpenAI's API, and a page to try a model."""
