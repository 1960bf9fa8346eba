"""The files of runs: run folders, checkpoints and adapters, each written completely or not at all."""
