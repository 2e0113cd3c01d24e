"""Training recipes: the model, the data and the trainer, one short file each."""
