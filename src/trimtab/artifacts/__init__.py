"""What runs leave on disk: run folders, checkpoints and adapters, each written whole or not at all."""
