"""What models are built of, over the seam alone."""
