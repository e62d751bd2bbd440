"""The mesh in training frameworks: `lightning` and `huggingface`, each with the extra of its name."""
