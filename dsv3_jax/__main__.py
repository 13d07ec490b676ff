"""`python -m dsv3_jax`."""

from dsv3_jax.cli import main, run_command

if __name__ == "__main__":
    run_command(main)
