"""Matrix products and attention for accelerators; Pallas lives here and nowhere else."""
