"""Cost models of the model and of the machines it runs on: NumPy only, and never JAX.

`hardware` and `model_cost` are the data; `latency`, `topology` and `network` are the physics;
`estimate`, `planner`, `what_if` and `reproduce` answer questions with them; `commands` is what the
command line calls. docs/codesign.md is the tour.
"""
