"""What trimtab knows of transformers' models: loading, anatomy, surgery, lean operations, the loss."""
