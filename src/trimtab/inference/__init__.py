"""Using a trained model: generate, evaluate and export."""
