"""Programs compiled for devices that are not here, and what they would take on each of them."""
