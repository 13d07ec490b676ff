"""Matrix products of rows grouped by expert, each group with weights of its own."""
