"""A run in the browser: what `python -m fastdcgan.gallery` shows, and how it is served."""
