"""Model folders for programs that read other files than Transformers does."""
