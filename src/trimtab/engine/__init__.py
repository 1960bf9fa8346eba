"""The engine: trainers on TRL and transformers (trainers), their arguments, and the model as they step it (prepare)."""
