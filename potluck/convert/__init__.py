"""Models as people have them, as sources of what a GGUF holds."""
