"""Model families, one small file each; their registry; and how checkpoints are found and read."""
