"""One small file a model family, the registry, and where checkpoints come from."""
